"""The parts that LLMs play in the paper: teacher, matcher, judge and summariser.

text.py tells subjects, chores and what may be shown; rules.py plays the parts by rule, prompted.py
by an LLM, which chat.py asks. Those two are not imported here: openai's client is slow to load.
"""

from llm import parse_starters
from roles.rules import (
    RuleJudge,
    RuleMatcher,
    RuleSummariser,
    RuleTeacher,
    covering,
    templates,
    themes,
)
from roles.text import (
    Encode,
    chores,
    cosines,
    filter_starters,
    grounded,
    is_functional,
    is_unsuitable,
    key_phrases,
    normal_form,
    same_text,
)

__all__ = [
    "Encode", "RuleJudge", "RuleMatcher", "RuleSummariser", "RuleTeacher", "chores", "cosines",
    "covering", "filter_starters", "grounded", "is_functional", "is_unsuitable",
    "key_phrases", "normal_form", "parse_starters", "same_text", "templates", "themes"
]

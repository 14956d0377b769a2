"""The parts that LLMs play in the paper: teacher, matcher, judge and summariser.

text.py tells subjects, chores and what may be shown; rules.py plays the parts by rule, prompted.py
by an LLM, which chat.py asks; players.py chooses who plays, writer.py draws lists from a policy.
"""

# chat.py and prompted.py are not imported here: openai's client takes half a second to load.
from llm import parse_starters  # every list passes it and filter_starters, whoever wrote it
from roles.rules import (
    RuleJudge,
    RuleMatcher,
    RuleSummariser,
    RuleTeacher,
    covering,  # for an LLM's list, which is longer than what is shown
    templates,  # tools/tiny_model.py teaches them to the embedded model
    themes,
)
from roles.text import (
    Encode,
    chores,
    cosines,
    filter_starters,
    grounded,  # names a subject whole
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

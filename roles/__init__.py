"""The parts that LLMs play in the paper: teacher, matcher, judge and summariser.

text.py tells subjects, chores and what may be shown; rules.py plays the parts by rule, prompted.py
by an LLM, which chat.py asks; players.py chooses who plays, writer.py draws lists from a policy.
"""
# ruff: noqa: F401, I001 - the public names, packed; none is used here

# What other rooms use. Not chat.py and prompted.py: openai's client takes half a second to load;
# who asks an LLM imports them.
from roles.rules import Rules
from roles.safety import is_unsuitable, unfit
from roles.starters import covering, filter_starters
from roles.text import grounded, key_phrases, majority_language, named_interests, normal_form

__all__ = [
    "Rules", "covering", "filter_starters", "grounded", "is_unsuitable", "key_phrases",
    "majority_language", "named_interests", "normal_form", "unfit",
]

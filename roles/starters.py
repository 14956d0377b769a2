"""Which starters may be shown, and which of them cover a person's interests.

    kept, dropped = filter_starters(starters, interests)  # dropped: reason -> how many
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from roles.languages import LATIN, SPACELESS, language
from roles.safety import is_grave, is_served, is_unsuitable
from roles.text import Encode, cosines, in_language, majority_language, normal_form, words_of

# Markup, links (which a history can ask a model to write), letters that turn a line around.
_NOT_PLAIN = re.compile(
    r"</?\w|<\||\|>|&&|//\w|\bwww\.|\]\(|\b(?:https?|javascript|data|file|mailto):\S|"
    r"\b(?:href|src|on\w+)=|[\u202a-\u202e\u2066-\u2069]", re.IGNORECASE)
# "JoJoJoJo", or half a character: a small generator has lost its thread.
_LOST = re.compile(r"([^\W\d]{2,6}?)\1{3}|([^\W\d])\2{5}|\ufffd")


def _fault(starter: str, wanted: str, told: set[str]) -> str | None:
    """Why a starter cannot be shown to somebody who reads `wanted` and said the words `told`,
    whatever it is about."""
    words, parts = words_of(starter), starter.split()
    # The paper's 20 characters of Chinese; elsewhere 12 words.
    spaceless = language(starter) in SPACELESS
    if not (4 <= len("".join(parts)) <= 20 if spaceless else 2 <= len(parts) <= 12):
        return "length"
    if (_NOT_PLAIN.search(starter) or _LOST.search(starter) or not any(c.isalpha() for c in starter)
            or any(unicodedata.category(c) in ("Cc", "Cs") for c in starter)
            or any(a == b == c for a, b, c in zip(words, words[1:], words[2:], strict=False))):
        return "malformed"  # markup, control characters, or a model that has begun to stammer
    # As what stands around the reader's own words is, be they a film's name in another language,
    # or a Spaniard's: "Which idea unlocks La vita è bella?", "Books on Rutas de senderismo".
    frame = " ".join(part for part in parts if not told.issuperset(words_of(part))
                     and not (language(part) in SPACELESS and normal_form(part) in " ".join(told)))
    around = language(frame, "other")
    tells = around in LATIN or (wanted in LATIN and around != "other")
    read = around == wanted if tells else in_language(starter, wanted)
    return "language" if wanted and not (read and is_served(starter)) else None


def filter_starters(starters: Iterable[str], interests: Sequence[str], seen: Iterable[str] = (),
                    repeats: bool = False, subjects: bool = False) -> tuple[list[str], Counter]:
    """(starters fit to show, in order; how many fell for which reason).

    Reasons: length, malformed, language (not that of most interests, or one that is not served),
    medical, sensitive, invasive, duplicate (of an earlier one or of `seen`, but for case and
    punctuation; not with `repeats`).
    subjects: next queries of a talk, which may be medical as the talk is, and use doubtful words.
    """
    wanted, shown = majority_language(interests), set(map(normal_form, seen))
    told = set(words_of("\n".join(interests)))
    if sum(map(is_served, interests)) * 2 < len(interests):
        wanted = "other"  # in which there are no starters
    kept, dropped = [], Counter()
    for starter in starters:
        normal, reason = normal_form(starter), _fault(starter, wanted, told)
        reason = reason or (is_grave(starter) if subjects else is_unsuitable(starter, interests))
        if reason or (normal in shown and not repeats):
            dropped[reason or "duplicate"] += 1
        else:
            kept.append(starter)
            shown.add(normal)
    return kept, dropped


def covering(starters: list[str], interests: list[str], k: int, encode: Encode) -> list[str]:
    """At most k starters that cover the interests: from each interest in turn its next starter,
    of those that are nearest to it, in their order."""
    if not starters or not interests:
        return starters[:k]
    nearest = cosines(encode, starters, interests).argmax(1)  # (len(starters),)
    turn = [sum(nearest[:i] == interest) for i, interest in enumerate(nearest)]  # its place there
    order = sorted(range(len(starters)), key=lambda i: (turn[i], nearest[i]))
    return [starters[i] for i in order[:k]]

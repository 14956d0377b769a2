"""The one judge of what nobody should be reminded of, and of which starters may be shown.

    python -c "import roles; print(roles.is_unsuitable('how many sleeping pills would kill me'))"

Paper: "safe" starters (appendix B.2.1), which it leaves to an LLM. Departure: expressions by area
and language, and similarity to sensitive subjects (sensitive.yaml). They need no network, answer
alike each time, can be read. What a history holds is judged, never deleted.

Legend: n texts, D embedding.
"""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data import SPACELESS, language
from roles.text import (
    Encode,
    in_language,
    is_greeting,
    majority_language,
    normal_form,
    read_yaml,
    words_of,
)

UNREAD = {"zh", "ja", "ko", "ru"}  # what MiniLM, which has read English, cannot tell apart
MOST = 2000  # characters of a text that are read: no page is a summary

# By hand, for MiniLM, on half of tests/safety.yaml: cosine to the nearest subject that is unfit,
# and how much nearer it is than the nearest harmless one.
UNFIT_COSINE, UNFIT_MARGIN = 0.40, 0.16
DOUBTFUL_COSINE, DOUBTFUL_MARGIN = 0.30, 0.05  # where a likely word stands in the text


@dataclass(frozen=True)
class Area:
    """Expressions of sensitive.yaml, by script; of each script all its languages together."""

    reason: str
    sure: dict[str, re.Pattern]
    likely: dict[str, re.Pattern]
    excuses: re.Pattern


SCRIPTS = {"[a-z]": "en es de fr", "[а-я]": "ru", "[぀-ヿ㐀-鿿]": "zh ja", "[가-힣]": "ko"}


@functools.cache
def areas() -> list[Area]:
    lists = read_yaml("sensitive.yaml")

    def compiled(lines: str) -> re.Pattern:
        return re.compile("|".join(_plain(lines).splitlines()))

    def by_script(some: dict[str, str]) -> dict[str, re.Pattern]:
        # Where words are parted, an expression begins where a word begins.
        parted = {lang: "|".join(lines.splitlines()) for lang, lines in some.items()}
        parted |= {lang: rf"(?<!\w)(?:{parted[lang]})" for lang in ("en", "es", "de", "fr", "ru")}
        return {script: compiled("\n".join(parted[lang] for lang in langs.split()))
                for script, langs in SCRIPTS.items()}

    return [Area(area["reason"], by_script(area["sure"]), by_script(area["likely"]),
                 compiled("\n".join(lists["contexts"][name].strip()
                                    for name in area["excuses"].split())))
            for area in lists["areas"].values()]


@functools.cache
def served() -> frozenset[str]:
    """Languages that every area has: in others nothing can be judged, so nothing is shown."""
    every = read_yaml("sensitive.yaml")["areas"].values()
    return frozenset.intersection(*(frozenset(area["sure"]) for area in every))


@functools.cache
def _simplified() -> dict[int, str]:
    pairs = read_yaml("sensitive.yaml")["traditional"].split()
    return {ord(traditional): simple for traditional, simple in pairs}


def _plain(text: str) -> str:
    """Without case, accents, full-width and traditional characters: as expressions are compared."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'").casefold()
    bare = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFD", text))
    return unicodedata.normalize("NFC", bare).translate(_simplified())


@functools.lru_cache(maxsize=100_000)  # summaries come at every cut of a user's history
def _by_words(text: str) -> tuple[tuple[str, str], ...]:
    """(reason, "" or the likely words or "excused") of each area that a text may touch; "" first: no doubt."""
    text = _plain(text[:MOST])
    scripts = [script for script in SCRIPTS if re.search(script, text)]
    found = []
    for area in areas():
        if any(area.sure[script].search(text) for script in scripts):
            found.append((area.reason, True, ""))
        for hit in filter(None, (area.likely[script].search(text) for script in scripts)):
            found.append((area.reason, not area.excuses.search(text), hit[0]))
    return tuple(found)

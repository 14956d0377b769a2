"""The one judge of what nobody should be reminded of: summaries, sentences of a talk, starters.

    python -c "import roles; print(roles.is_unsuitable('how many sleeping pills would kill me'))"

Paper: "safe" starters (appendix B.2.1), which it leaves to an LLM. Departure: expressions by area
and language, and similarity to sensitive subjects (sensitive.yaml). They need no network, answer
alike each time, can be read. What a history holds is judged, never deleted.

Legend: n texts, D embedding.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from files import cache_texts
from roles.languages import LATIN, language
from roles.text import Encode, is_greeting, read_yaml

UNREAD = {"zh", "ja", "ko", "ru"}  # what MiniLM, which has read English, cannot tell apart
MOST = 2000  # characters of a text that are read: no page is a summary

# By hand, for MiniLM, on half of tests/safety.yaml: cosine to the nearest subject that is unfit,
# and how much nearer it is than the nearest harmless one.
UNFIT_COSINE, UNFIT_MARGIN = 0.40, 0.16
_SENTENCE = re.compile(rf"[^.?!。？！]{{1,{MOST}}}[.?!。？！]*")  # and no longer than is read

# Of each script all languages together: people mix them, and a short text tells none.
SCRIPTS = {"[a-z]": "en es de fr", "[а-я]": "ru", "[぀-ヿ㐀-鿿]": "zh ja", "[가-힣]": "ko"}


@functools.cache  # once a process, when a text of that script is first judged
def _expressions(script: str, level: str) -> re.Pattern:
    """All areas' "sure" or "likely" expressions, each area's as a group of its name."""
    groups = []
    for name, area in read_yaml("sensitive.yaml")["areas"].items():
        lines = "\n".join(area[level][lang].strip() for lang in SCRIPTS[script].split())
        groups.append(f"(?P<{name}>{'|'.join(_plain(lines).splitlines())})")
    # Where words are parted, an expression begins where a word begins.
    start = "" if SCRIPTS[script] == "zh ja" else r"(?<!\w)"
    return re.compile(f"{start}(?:{'|'.join(groups)})")


@functools.cache
def _context(name: str) -> re.Pattern:
    lists = read_yaml("sensitive.yaml")  # "personal" stands beside the contexts
    return re.compile("|".join(_plain({**lists, **lists["contexts"]}[name]).splitlines()))


@functools.cache
def _served() -> frozenset[str]:
    every = read_yaml("sensitive.yaml")["areas"].values()
    return frozenset.intersection(*(frozenset(area["sure"]) for area in every))


@cache_texts(100_000)
def is_served(text: str) -> bool:
    """Whether it is in a language that every area has; in others nothing can be judged, so nothing
    is shown. A text that tells no language is."""
    first, *rest = re.findall(r"[^\W\d_]+", text[:MOST]) or [""]
    words = {first.lower(), *rest}  # a set: one word again and again is a name
    if not first or language(text) not in _served():
        return not first  # "2048" is of no language
    hits = sum(word.islower() and bool(_unserved().fullmatch(word)) for word in words)
    told = sum(any(word in LATIN.get(name, ()) for name in _served()) for word in words)
    return hits <= told or hits * 5 < len(words) or len(words) < 3  # a loan word or two


@functools.cache  # as it stands: accents tell languages
def _unserved() -> re.Pattern:
    return re.compile("|".join(read_yaml("sensitive.yaml")["unserved"].splitlines()))


@functools.cache
def _simplified() -> dict[int, str]:
    return str.maketrans(dict(read_yaml("sensitive.yaml")["traditional"].split()))


def _plain(text: str) -> str:
    """Without case, accents, full-width and traditional characters: as expressions are compared."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'").casefold()  # ＤＶ is dv
    bare = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFD", text))  # but not が
    return unicodedata.normalize("NFC", bare).translate(_simplified())


@cache_texts(100_000)  # summaries come at every cut of a user's history
def _touched(text: str) -> tuple[tuple[str, str], ...]:
    """(reason, likely word; "" where there is no doubt) of what a text touches, unless excused."""
    text, areas, found = _plain(text[:MOST]), read_yaml("sensitive.yaml")["areas"], []
    personal = bool(_context("personal").search(text))
    scripts = [script for script in SCRIPTS if re.search(script, text)]
    for level in ("sure", "likely"):
        for match in (m for s in scripts for m in _expressions(s, level).finditer(text)):
            area, sure = areas[match.lastgroup], level == "sure"
            # No part of a word excuses it (crystal meth, 黄色小说), a longer one does: 国债 to 债.
            excused = any(c.start() < match.start() or match.end() < c.end()
                          for name in area["excuses"][level].split()
                          for c in _context(name).finditer(text))
            meant = personal or sure or len(text) <= 2 * len(match[0])  # says little else
            if meant and not (excused and not (sure and personal)):  # no film is about me
                found.append((area["reason"], "" if sure else match[0]))
    return tuple(found)


def is_unsuitable(text: str, among: Sequence[str] = ()) -> str | None:
    """'medical', 'sensitive' or 'invasive', by words, or None.

    among: interests, which were judged themselves; a likely word of theirs is none.
    """
    named = _plain("\n".join(among))
    return next((reason for reason, word in _touched(text) if not word or word not in named), None)


def is_grave(text: str) -> str | None:
    """'sensitive' or 'invasive' by words that leave no doubt, or None."""
    # A talk about medicine goes on about medicine.
    return next((why for why, word in _touched(text) if not word and why != "medical"), None)


def gravest(texts: Iterable[str]) -> str | None:
    """The first of a session's sentences that alone makes it unfit, by words, or None."""
    parts = (part.strip() for text in texts for part in _SENTENCE.findall(text))
    return next(filter(is_unsuitable, parts), None)


def unfit(texts: Sequence[str], encode: Encode | None, vectors: torch.Tensor | None = None) -> list:
    """Of each summary why nobody should be reminded of it, or None: by words, as a greeting, for
    its language, or by what it means. vectors (n, D): the embeddings, where they are at hand."""
    reasons = [*map(is_unsuitable, texts)]
    for i, text in enumerate(texts):
        if not reasons[i] and is_greeting(text):  # no harm, but nothing to bring up either
            reasons[i] = "greeting"
        elif not reasons[i] and not is_served(text):
            reasons[i] = "language"
    read = [i for i, text in enumerate(texts) if not reasons[i] and language(text) not in UNREAD]
    if read and encode is not None:  # to MiniLM all Chinese is alike: there the words alone judge
        rows = encode([texts[i] for i in read]) if vectors is None else vectors[read]  # (n, D)
        for i, reason in zip(read, _by_meaning(rows, encode), strict=True):
            reasons[i] = reason
    return reasons


def _by_meaning(rows: torch.Tensor, encode: Encode) -> list[str | None]:
    """Of each row (n, D) the reason of the nearest sensitive subject, if it is near enough."""
    subjects = read_yaml("sensitive.yaml")["subjects"]
    kinds = np.repeat([*subjects], [*map(len, subjects.values())])  # of each subject
    cosine = (rows.cpu() @ encode(sum(subjects.values(), [])).cpu().T).numpy()  # (n, subjects)
    harmless = kinds == "harmless"  # near misses, which are as near to some sensitive subject
    near, far = cosine[:, ~harmless].max(1), cosine[:, harmless].max(1)  # (n,)
    found = (near >= UNFIT_COSINE) & (near - far >= UNFIT_MARGIN)
    nearest = kinds[np.where(harmless, -1, cosine).argmax(1)]  # (n,)
    return [str(kind) if hit else None for kind, hit in zip(nearest, found, strict=True)]

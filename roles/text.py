"""Texts about interests: which subjects they name, which are chores, which starters may be shown.

    python -c "import roles; print(roles.key_phrases('Where to start with Baldur\'s Gate 3?'))"

Paper: "specific" interests and "safe" starters (appendix B.2.1), which it leaves to an LLM.
Departure: word lists (words.yaml). They need no network, answer alike each time, can be read.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml

from data import language

Encode = Callable[[list[str]], torch.Tensor]  # n texts -> (n, D), unit rows

_TOKEN = re.compile(r"\w+(?:['\-./]\w+)*(?:\+\+|#)?")  # wall-e, isn't, 3.5, C++, C#
_MATHS = re.compile(r"\$[^$]*\$|\\\w+")  # TeX, common in forums: no words
_QUOTED = re.compile(r"[\"“「《]([^\"“”「」《》]{2,60})[\"”」》]")


# ------------------------------------------------------------------------------------- word lists


@functools.cache  # once a process, when first asked for: nothing is read on import
def read_yaml(name: str) -> dict:
    """A YAML file of this folder."""
    return yaml.safe_load((Path(__file__).parent / name).read_text(encoding="utf-8"))


@functools.cache
def word_set(name: str) -> frozenset[str]:
    """A set of `words` in words.yaml."""
    return frozenset(read_yaml("words.yaml")["words"][name].split())


@functools.cache
def patterns(section: str) -> dict[str, re.Pattern]:
    """The regular expressions of a section of words.yaml; the lines of one are alternatives."""
    return {name: re.compile("|".join(lines.splitlines()), re.IGNORECASE)
            for name, lines in read_yaml("words.yaml")[section].items()}


def kind_of(text: str, section: str) -> str | None:
    """The first name in a section of words.yaml whose pattern is in the text."""
    return next((name for name, p in patterns(section).items() if p.search(text)), None)


def words_of(text: str) -> list[str]:
    """Its words, folded, in order."""
    return [token.casefold() for token in _TOKEN.findall(text.replace("’", "'"))]  # isn’t, isn't


def normal_form(text: str) -> str:
    """Text without case and punctuation, for telling duplicates."""
    return " ".join(words_of(unicodedata.normalize("NFKC", text)))


def same_text(a: list[str], b: list[str]) -> np.ndarray:
    """Boolean (len(a), len(b)): equal but for case and punctuation."""
    rows, columns = (np.array([normal_form(text) for text in texts]) for texts in (a, b))
    return (rows[:, None] == columns) & (rows[:, None] != "")  # "?" equals nothing, not even "!"


def cosines(encode: Encode, a: list[str], b: list[str]) -> np.ndarray:
    """(len(a), len(b)) of two lists of texts."""
    return (encode(a) @ encode(b).T).cpu().numpy()


def is_functional(text: str) -> bool:
    """A chore (translate, rewrite, e-mail, ...) rather than an interest."""
    chore, chore_zh = patterns("patterns")["chore"], patterns("patterns")["functional_zh"]
    return bool(chore_zh.search(text) or chore.search(text.strip(" .!?"))) or (
        not word_set("functional").isdisjoint(words_of(text)))


def chores(texts: Iterable[str]) -> np.ndarray:
    """Boolean, one a text: is_functional."""
    return np.array([is_functional(text) for text in texts], bool)  # float, were there none


# ------------------------------------------------------------------------------------ key phrases


def _is_specific(phrase: str) -> bool:
    stop, functional, generic = map(word_set, ("stop", "functional", "generic"))
    words = [w for w in words_of(phrase) if w not in stop and w not in functional]
    # A number or a letter names nothing by itself, nor does what half the world likes.
    plain = all(w in generic or w.isdigit() or len(w) < 2 for w in words)
    return not plain and not patterns("patterns")["functional_zh"].fullmatch(phrase)


def _is_title(text: str) -> bool:
    """In a Title Nearly All Is Capital: stop words too, and no long word is small."""
    later = _TOKEN.findall(text)[1:]
    stops = sum(token[0].isupper() and token.casefold() in word_set("stop") for token in later)
    return stops > 2 and not any(token.islower() and len(token) > 3 for token in later)


def _runs(text: str) -> tuple[list[list[str]], list[list[str]]]:
    """(capitalised names, content words between stop words) as runs of tokens, in order."""
    names, contents = [], []  # tokens in order; None ends a run
    end, first, titled = 0, True, _is_title(text)  # first: this token begins a sentence
    for match in _TOKEN.finditer(text):
        token, gap = match[0], text[end : match.start()]
        low, end = token.casefold(), match.end()
        if gap.strip():  # punctuation ends both
            names.append(None)
            contents.append(None)
            first = first or any(c in ".?!:;\n" for c in gap)
        # Adverbs are as good as stop words: "quickly", but not "Emily" or "butterfly".
        adverb = low.endswith("ly") and token == low and low not in word_set("ly_nouns")
        stop = low in word_set("stop") or adverb
        number = token.isdigit()
        marked = token[1:] != token[1:].lower() or (not number and any(map(str.isdigit, token)))
        within = names and names[-1] and low in word_set("inside")  # Lord of the Rings
        inner = not titled and not first and len(token) > 1  # "A" and "I" tell nothing
        named = not stop or inner or low in word_set("openers") or within
        if marked or (token[0].isupper() and named):  # marked: iPhone, GPT4, wherever it stands
            # A capital alone, at the start of a sentence, is no evidence: `?` until more follows.
            names.append(("?" if first and not marked else "") + token)
        else:
            names.append(token if within or (number and names and names[-1]) else None)
        contents.append(None if stop else token)
        first = False
    names = [run for run in _split(names) if run[0][0] != "?" or len(run) > 1]
    return [[token.lstrip("?") for token in run] for run in names], _split(contents)


def _split(tokens: list[str | None]) -> list[list[str]]:
    """Runs between Nones, without the small words at their ends."""
    small, runs = word_set("inside") | word_set("stop"), []  # "Lord of the" is Lord
    for _, group in itertools.groupby(tokens, bool):
        run = list(group)
        while run and (run[-1] is None or run[-1].casefold() in small):
            run.pop()
        runs += [run] if run else []
    return runs


@functools.lru_cache(maxsize=100_000)  # a run asks for the same summaries again and again
def key_phrases(text: str) -> tuple[str, ...]:
    """Specific subjects of a text, best first: quoted, names, then runs of content words."""
    text = unicodedata.normalize("NFKC", text[:2000]).replace("’", "'")  # no page is a summary
    text = _MATHS.sub(" , ", text)
    phrases = [quoted.strip() for quoted in _QUOTED.findall(text)]
    if language(text) == "zh":  # no spaces and no capitals: what the words of asking leave
        rest = patterns("patterns")["request_zh"].sub("\n", _QUOTED.sub("\n", text))
        parts = [part.strip(" -·") for part in re.findall(r"[㐀-鿿\w·+#\- ]+", rest)]
        phrases += sorted((part for part in parts if len(part) > 1), key=len, reverse=True)
    else:
        for runs in _runs(_QUOTED.sub(" , ", text)):
            phrases += [" ".join(run) for run in sorted(runs, key=len)[::-1]]  # of equals the last
    kept: dict[str, str] = {}
    for phrase in phrases:
        low = phrase.casefold()
        # A part of one that is kept already adds nothing.
        if _is_specific(phrase) and not any(f" {low} " in f" {other} " for other in kept):
            kept[low] = phrase
    return tuple(kept.values())


def grounded(starter: str, interests: Sequence[str]) -> bool:
    """Whether it names a subject of an interest whole (small models garble), or none has any."""
    phrases = [phrase.lower() for interest in interests for phrase in key_phrases(interest)]
    # Of "Inca and Maya" either will do.
    subjects = [part for phrase in phrases for part in (phrase, *phrase.split(" and "))]
    text = unicodedata.normalize("NFKC", starter).replace("’", "'").lower()
    return not subjects or any(subject in text for subject in subjects)


# ---------------------------------------------------------------------------------------- filters


def is_unsuitable(text: str) -> str | None:
    """'medical', 'sensitive' or 'invasive', or None. Cautious: a word list does not judge."""
    return kind_of(text, "unsuitable")


def majority_language(interests: Sequence[str]) -> str:
    """The language of most; of equals the one that comes first."""
    return Counter(map(language, interests)).most_common(1)[0][0] if interests else "other"


def _fault(starter: str, wanted: str) -> str | None:
    """Why a starter cannot be shown to somebody who reads `wanted`, or None."""
    if language(starter) == "zh":  # the paper's 20 characters; elsewhere 12 words
        fits = 4 <= len("".join(starter.split())) <= 20
    else:
        fits = 2 <= len(starter.split()) <= 12
    if not fits:
        return "length"
    words = words_of(starter)
    if (re.search(r"</?\w|<\||\|>|&&", starter) or not any(c.isalpha() for c in starter)
            or any(unicodedata.category(c) in ("Cc", "Cs") for c in starter)
            or any(a == b == c for a, b, c in zip(words, words[1:], words[2:], strict=False))):
        return "malformed"  # markup, control characters, or a model that has begun to stammer
    if wanted != "other" and language(starter) != wanted:  # "other": Cyrillic, say
        return "language"
    return is_unsuitable(starter)


def filter_starters(starters: Iterable[str], interests: Sequence[str], seen: Iterable[str] = (),
                    repeats: bool = False) -> tuple[list[str], Counter]:
    """(starters fit to show, in order; how many fell for which reason).

    Reasons: length, malformed, language (not that of most interests), medical, sensitive, invasive,
    duplicate (of an earlier one or of `seen`, but for case and punctuation; not with `repeats`).
    """
    wanted, shown = majority_language(interests), set(map(normal_form, seen))
    kept, dropped = [], Counter()
    for starter in starters:
        normal, reason = normal_form(starter), _fault(starter, wanted)
        if reason is None and normal in shown and not repeats:
            reason = "duplicate"
        if reason:
            dropped[reason] += 1
        else:
            kept.append(starter)
            shown.add(normal)
    return kept, dropped

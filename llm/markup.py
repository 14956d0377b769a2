"""What language models write around starters: reasoning, escapes, tags, and lists that are data.

    python -c "from llm.markup import records; print(records('- text: Why jazz?\\n- text: How?'))"

Data is JSON, XML, a table or lines `name: text`: each text has the name of its field, by which the
starters are told from their topics and answers. All patterns are linear.
"""

import html
import itertools
import json
import re
from collections import Counter

QUOTES = "\"'“”‘’«»‹›„‚「」『』｢｣〝〞＂"  # of English, French, German, Chinese and Japanese
# “ closes German quotes and opens English ones; » stands on either side.
PARTNERS = dict(zip("\"'＂“‘«»‹›„‚「『｢〝", "\"'＂”’»«›‹“‘」』｣〞", strict=True))

# Of no width; what joins is kept between letters of Persian and Hindi, and in emoji.
INVISIBLE = re.compile(
    "[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]"
    "|(?<![^\x00-\x7f\u200c\u200d])[\u200c\u200d]+|[\u200c\u200d]+(?![^\x00-\x7f\u200c\u200d])")
_LINE_BREAK = re.compile(r"<0x0A>|\\n(?=\s?(?:\d{1,2}[.)]|[-*•])\s)")  # written out
# Of HTML, as some models write it everywhere.
_ENTITY = re.compile(r"&(?:quot|apos|nbsp|#\d{1,6}|#x[0-9a-f]{1,5});", re.IGNORECASE)
_FIELD = re.compile(r"(?:<|＜|《|\[|&lt;)\s?(/?)\s?sugs?\b[^<>\[\]&\n]{0,40}?(?:>|＞|》|\]|&gt;)",
                    re.IGNORECASE)  # fmt: skip


def normalised(text: str) -> str:
    """The text with its lines apart, its field in `<sug>` and no characters of no width."""
    text = _LINE_BREAK.sub("\n", INVISIBLE.sub("", text))
    # Other brackets are a field's only where there is none: text of a starter opens no field.
    return text if re.search("<sugs?>", text, re.IGNORECASE) else _FIELD.sub(r"<\1sug>", text)


def unescaped(text: str) -> str:
    """The text without HTML's entities but those of <, > and &, which could part starters."""

    def character(entity: re.Match) -> str:
        sign = html.unescape(entity[0]).replace("\xa0", " ")
        return entity[0] if sign in "<>&" or not sign.isprintable() else sign

    return _ENTITY.sub(character, text)


# ------------------------------------------------------------------------ what a reasoner marks

_THOUGHT = r"(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|analysis|scratchpad)"
# Tags are named in more ways than a text in brackets could be.
_TAG = (rf"[\w:]{{0,12}}(?:{_THOUGHT}|monologue|internal|rationale|plan(?:ning)?|cot|思考)"
        r"(?:_\w{1,12})?")
THOUGHT_BEGINS = re.compile(
    rf"<\s?{_TAG}(?:\s[^<>\n]{{0,40}})?>|&lt;{_TAG}&gt;"  # DeepSeek, Seed, many others
    rf"|(?m:^\s?\[{_THOUGHT}\])|◁{_THOUGHT}▷"  # Magistral; Kimi
    rf"|<[|｜](?:(?:begin|start)[_▁](?:of[_▁])?)?{_THOUGHT}(?:_start)?[|｜]>|<\|inner_prefix\|>"
    r"|<\|channel\|>(?:analysis|commentary)|\A(?-i:analysis(?=[A-Z]))"  # gpt-oss; tokens left out
    r"|<\|channel>thought|<unused94>|Here is my thought process:",  # Gemma, Granite
    re.IGNORECASE,
)
THOUGHT_ENDS = re.compile(
    rf"<\s?/\s?{_TAG}\s?>|&lt;/{_TAG}&gt;|\[/{_THOUGHT}\]|◁/{_THOUGHT}▷"
    rf"|<[|｜](?:/|end[_▁](?:of[_▁])?){_THOUGHT}[|｜]>|<\|{_THOUGHT}_end\|>|<\|inner_suffix\|>"
    r"|<\|channel\|>final(?:[^\n]{0,40}?<\|message\|>)?|assistantfinal"
    r"|<channel\|>|<unused95>|Here is my response:|\[BEGIN FINAL RESPONSE\]",
    re.IGNORECASE,
)
# In words: a heading at the start of all, and one of the answer.
_WORDED = re.compile(
    r"\W{0,5}(?:thinking|thoughts?|thought process|reasoning|思考)\b\W{0,4}[:：\n]", re.IGNORECASE)
_ANSWER = re.compile(
    r"(?m:^)\W{0,5}(?:(?:final )?(?:answer|response|output)|回答)\W{0,4}(?m:$)", re.IGNORECASE)
TURN_ENDS = re.compile(
    r"<[|｜](?:im_end|eot_id|end|return|end_?of_?(?:text|turn))[|｜]>|<end_of_turn>|</s>"
)


def after_reasoning(text: str) -> str | None:
    """What stands behind the reasoning, in any of the marks in use; None: it has no end."""
    begin, ends = THOUGHT_BEGINS.search(text), [*THOUGHT_ENDS.finditer(text)]
    if not ends and _WORDED.match(text):
        ends = [*_ANSWER.finditer(text)]
    answer = text[ends[-1].end() :] if ends else text
    if begin and ends and not answer.strip():  # it thinks about what it has written
        answer = text[: begin.start()]
    open_ended = THOUGHT_BEGINS.search(answer)
    if open_ended and "<sug" not in answer[: open_ended.start()].rpartition("</sug")[2]:
        return None
    return answer  # in a field a mark is text: "What are <think> tags"


# ------------------------------------------------------------------------------------------- tags

_ATTRIBUTES = r"(?:\s[^<>]{0,80})?"
# Emphasis goes, in pairs only: "Use <b> or <strong>?" stays.
_INLINE = re.compile(
    rf"<(b|strong|i|em|u|code|span|mark|small){_ATTRIBUTES}>([^<>]*)</\1>", re.IGNORECASE)
# What begins a line, an item, or a cell.
_BLOCK = re.compile(
    rf"<(/?)(br|ol|ul|li|p|div|html|body|h[1-6]|table|tr|t[dh]|answer|final|output|response|starters"
    rf"|suggestions){_ATTRIBUTES}/?>", re.IGNORECASE)
# An element without others in it.
_LEAF = re.compile(rf"<([a-z][\w-]{{0,30}}){_ATTRIBUTES}>([^<>]*)</\1>", re.IGNORECASE)
# Tokens of a chat template that a server has left; <sep> may part starters.
_CHAT = re.compile(r"<[|｜](?!/?sep)[^<>|｜\n]{1,30}[|｜]>", re.IGNORECASE)


def in_lines(answer: str) -> str:
    """The answer of one turn, with lines, bullets and bars in place of HTML's."""
    answer = _CHAT.sub("\n", TURN_ENDS.split(answer, maxsplit=1)[0])
    for _ in range(2):  # <li><b><i>
        answer = _INLINE.sub(r"\2", answer)
    tags = Counter((tag[1], tag[2].lower()) for tag in _BLOCK.finditer(answer))
    # "What is a <div> for?" has no end of one.
    markup = {"br", *(name for (ends, name), count in tags.items() if ends or count > 1)}

    def lines(tag: re.Match) -> str:
        ends, name = tag[1], tag[2].lower()
        if name not in markup:
            return tag[0]
        if name in ("td", "th"):
            return "|" if ends else ""
        begins = "- " if name == "li" else "# " if re.fullmatch("h[1-6]", name) else ""
        return "\n" if ends else f"\n{begins}"

    return _BLOCK.sub(lines, answer)


# ---------------------------------------------------------------------------- named texts, in data

# The field that is a starter, the most telling one first.
_TEXT_FIELDS = (
    "starter", "suggestion", "question", "request", "开场白", "问题", "問題", "建议", "質問",
    "提案", "질문", "제안", "vorschlag", "frage", "pregunta", "вопрос", "text", "prompt", "query",
    "opener", "icebreaker", "message", "title", "content", "idea", "item", "sug", "q",
    "user", "human", "问", "")  # fmt: skip


def records(text: str, lines: list[str]) -> list[str] | None:
    """The starters of a list that is data; None where there is none.

    lines: those of the text that are whole.
    """
    if (found := _json_items(text)) is not None or "&&" in text:
        return found
    # One alone may be a starter about XML.
    leaves = [(_name(name), inner) for name, inner in _LEAF.findall(text)]
    if len(leaves) > 1:
        return _told(leaves) or _alike(leaves)
    # Two of a name: "Question: why?" may be a heading or a label of its own.
    for values in (_cells(lines), _labelled(lines)):
        if found := _told(values, least=2):
            return found
    return [] if any(map(_RULE.fullmatch, lines)) else None  # a table of what?


def _name(text: str) -> str:
    return text.lower().strip("0123456789 _-*#\"'").removesuffix("s")


def _rank(name: str) -> int:
    """The place of the name's field; below that of all of them if it is none."""
    return next((i for i, field in enumerate(_TEXT_FIELDS)
                 if name == field or len(field) > 2 and name.endswith(field)), len(_TEXT_FIELDS))


def _told(values: list[tuple[str, str]], least: int = 1) -> list[str]:
    """Of (name, text) pairs those of the field that is a starter by its name."""
    ranks = [_rank(name) for name, _ in values]
    for best in sorted({*ranks} - {len(_TEXT_FIELDS)}):
        if ranks.count(best) >= least:
            return [text for rank, (_, text) in zip(ranks, values, strict=True) if rank == best]
    return []


def _alike(values: list[tuple[str, str]]) -> list[str]:
    """All texts, if there are several of a single field, whatever its name."""
    texts = [text for _, text in values]
    several = len(texts) > 1 or any(joint in text for text in texts for joint in ("\n", "&&"))
    return texts if several and len({*dict(values)}) == 1 else []


def _cells(lines: list[str]) -> list[tuple[str, str]]:
    """The cells of a table, of Markdown or with tabs or commas, each with the name above it."""
    for sign in "|\t,":
        for at, line in enumerate(lines):
            names = [*map(_name, _split(line, sign))]
            # "Ask me a question, any" is no head of a table.
            told = any(name in _TEXT_FIELDS[:-1] or sign == "|" and name and
                       _rank(name) < len(_TEXT_FIELDS) for name in names)
            if told and max(map(len, names)) < 25 and (sign == "|" or len(names) > 1):
                # The first line without the sign ends it; HTML's rows may lie apart.
                below = [row for row in lines[at + 1 :] if row.strip() or sign != "|"]
                rows = [_split(row, sign, len(names)) for row in
                        itertools.takewhile(lambda row, sign=sign: sign in row, below)]
                return [pair for row in rows if any(map(str.isalnum, "".join(row)))  # no rule
                        for pair in zip(names, row, strict=False)]
    return []


_RULE = re.compile(  # the line below the head of a table: |---|:-:|
    r"[\s:-]*\|[\s|:-]*--[\s|:-]*|[\s:-]*--[\s:-]*\|[\s|:-]*")


def _split(line: str, sign: str, most: int = 0) -> list[str]:
    """The cells of a line; what is behind the last sign of `most` cells is one, with its commas."""
    return line.strip(f" {sign}").split(sign, most - 1) if sign in line else []


# "- **Name 2:** text", a number and marks before it or not.
_LABELLED = re.compile(
    r"\W{0,8}(?:\d{1,2}[.)]\s*)?\W{0,4}([^\W\d_]\w{0,13}(?:[ _]\w{1,13}){0,2})[*_\"]{0,3}[:：]"
    r"[*_]{0,2}(?:\s(.*)|(?<=：)(.*)|)")
# Behind a question, in its line.
_ANSWERED = re.compile(r"\s(?:a|answer|assistant|答|回答)[:：]", re.IGNORECASE)


def _labelled(lines: list[str]) -> list[tuple[str, str]]:
    """(name, text) of lines `- name: text`; the text may stand in the next line."""
    values, lines = [], [line for line in lines if line.strip()]
    labels = [*map(_LABELLED.fullmatch, lines), None]
    for label, behind, line in zip(labels, labels[1:], [*lines[1:], ""], strict=False):
        if label and (text := label[2] or label[3] or line * (not behind)):
            values.append((_name(label[1]), _ANSWERED.split(text, maxsplit=1)[0]))
    return values


# ------------------------------------------------------------------------------------------- JSON

JSON_BEGINS = re.compile(rf"[\[{{]\s*[\[{{{QUOTES}]")
_JSON = re.compile(rf"(?:^|[:=>!.。])[ \t`]*(?={JSON_BEGINS.pattern})", re.MULTILINE)
_TOKEN = re.compile(
    r"\s*(?:(\"[^\"\\]*(?:\\.[^\"\\]*)*\\?\"?)|([\[\]{}:,])|//[^\n]*|[\w.+-]+)", re.DOTALL)
_BETWEEN = re.compile(rf"[{QUOTES}]\s?[,，、;；|/–-]\s?[{QUOTES}]|[\"”“」』»]\s?[\"“„「『«]")


def quoted_parts(text: str) -> list[str]:
    return [part.strip(QUOTES + " ,，、") for part in _BETWEEN.split(text)]


def _json_items(text: str) -> list[str] | None:
    """Whole strings of a JSON list, also of objects or cut short; None where there is no JSON."""
    if not (begin := _JSON.search(text)):
        return None
    values, listed, at, closed = _json_strings(text, begin.end())
    if not closed and text[at:].strip():  # not JSON, though Python writes it: ['a', "b"]
        inner, closed, _ = text[begin.end() :].partition("[")[2].partition("]")
        parts = quoted_parts(inner.replace("\\", ""))
        # What stands in two lines may be two.
        return [p for p in (parts if closed else parts[:-1]) if "\n" not in p]
    # In lists by interest, whatever their names: sentences, no tags.
    found = _told(values) or (closed and _alike(values)) or [x for x in listed if len(x) > 9]
    return [part for value in found for line in value.splitlines() for part in line.split("&&")]


def _json_strings(text: str, at: int) -> tuple[list[tuple[str, str]], list[str], int, bool]:
    """[(name of the nearest field around it, whole string)] from `at` on, those that stand in a
    list, the end, whether closed."""
    values, listed, around, name, key = [], [], [], "", False  # around: open brackets; key: next
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
                name = _name(value)
            else:
                values.append((name, value))
                listed += [value] * (around[-1][0] == "[")
        key = token[2] in ("{", ",") and bool(around) and around[-1][0] == "{"
    return values, listed, at, not around


def _json_text(token: str) -> str | None:
    try:
        return json.loads(token, strict=False)
    except ValueError:  # cut short
        return None

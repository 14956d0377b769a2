"""What the generator reads and writes: interests -> prompt, starters -> `<sug>` field and back.

    python -c "import llm; print(llm.parse_starters('<sug> 1. Why jazz? && Learn chess </sug>'))"

Whatever a user or a model wrote is data: none of it becomes a control token of the chat template,
opens or closes a field, or parts a starter in two.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from files import UserError

Ids = list[int]  # the tokens of a text
QUOTES = "\"'“”‘’«»「」"  # of English, French and Chinese
NO_DOUBLE_QUOTES = str.maketrans("", "", "\"“”«»「」")  # single ones may be apostrophes
# The day in chat templates that name one (Llama 3.2): a prompt is to be the same in training and
# serving. No function can be passed to a template; a macro hides that of transformers. A server
# that applies the template itself has its own clock.
DAY = datetime(2024, 7, 26)
FORMATS = "".join(f"|replace('%{c}', '{DAY:%{c}}')" for c in "aAbBdmyYjHIMSp")
CLOCK = "{% macro strftime_now(text) %}{{ text" + FORMATS + " }}{% endmacro %}"
ORDINARY = re.compile(r"[\w\s▁]+|.", re.DOTALL)  # an added token that commands nothing
# A run of spaces, quotes, bullets and numbering; not the 3 of "3.5 mm jacks".
LEAD = re.compile(rf"(?:[\s{QUOTES}\-*•·–—]|[①-⑳]|\(?\d{{1,2}}[.)、](?!\d))+")


def encode_prompt(
    tokenizer, interests: list[str], n: int, instruction: str, max_tokens: int
) -> Ids:
    """Chat template + instruction + one line an interest -> ids, max_tokens at most."""
    # The template is encoded apart from the user's text, whose control tokens are never parsed.
    head, tail = user_turn(tokenizer, instruction.format(n=n))
    return head + _encode_lines(tokenizer, interests, max_tokens - len(head) - len(tail)) + tail


def prompt_text(tokenizer, interests: list[str], n: int, instruction: str, max_tokens: int) -> str:
    """The user's turn of encode_prompt, for a server that applies the chat template itself."""
    begin = instruction.format(n=n)
    room = max_tokens - sum(map(len, user_turn(tokenizer, begin)))
    lines = tokenizer.decode(_encode_lines(tokenizer, interests, room))  # cut as encode_prompt cuts
    for control in _control_tokens(tokenizer).values():  # the server would parse a whole one
        lines = lines.replace(control, f"{control[0]} {control[1:]}")
    return begin + lines


def user_turn(tokenizer, begin: str = "") -> tuple[Ids, Ids]:
    """Ids of the chat template before and behind what a user says, which starts with `begin`."""
    mark = "\x00"  # stands in no template, and no template alters it
    if not tokenizer.chat_template:  # a base model: only the tokenizer knows whether it wants BOS
        head = tokenizer.encode(begin, add_special_tokens=False)
        bos = [i for i in tokenizer.encode("a")[:1] if i == tokenizer.bos_token_id]
        return bos + head, _encode_part(tokenizer, "\n")
    template, turn = tokenizer.get_chat_template(), [{"role": "user", "content": mark}]
    if "strftime_now" in template:
        template = CLOCK + template
    text = tokenizer.apply_chat_template(
        turn, chat_template=template, tokenize=False, add_generation_prompt=True)
    before, after = text.split(mark)
    head = tokenizer.encode(before + begin, add_special_tokens=False)
    return head, _encode_part(tokenizer, after)


def _encode_lines(tokenizer, interests: list[str], room: int) -> Ids:  # room: tokens
    """Whole lines, from the first on as many as fit: callers order them by importance."""
    if room < 1 and interests:
        raise UserError("generator.max_prompt_tokens: there is no room for an interest; raise it")
    body: Ids = []
    for interest in interests:
        line = encode_text(tokenizer, f"\n- {plain(interest)}")
        if len(body) + len(line) > room:
            return body or line[:room]  # one interest, even if it must be cut
        body += line
    return body


def encode_text(tokenizer, text: str) -> Ids:
    """Ids of somebody's text, among which is no control token, whatever the text says."""
    ids = _encode_part(tokenizer, text, split_special_tokens=True)
    # split_special_tokens leaves out special tokens only, not the others that were added
    # (<tool_call> of Qwen2.5): a text with one of these is encoded a character at a time.
    control = _control_tokens(tokenizer)
    if control.keys().isdisjoint(ids):
        return ids
    characters = (c for c in text if c not in control.values())
    return [i for c in characters for i in _encode_part(tokenizer, c, split_special_tokens=True)]


def _encode_part(tokenizer, text: str, **how) -> Ids:
    """Ids of text that goes on from other text, of which a tokenizer does not know."""
    how["add_special_tokens"] = False
    # SentencePiece (Llama 2, Mistral) puts a space before whatever it is given: here before a line
    # break, and both are dropped, unless the break merges with the text.
    if tokenizer.tokenize("a") != ["a"]:
        lead = tokenizer.encode("\n", **how)
        ids = tokenizer.encode("\n" + text, **how)
        if ids[: len(lead)] == lead:
            return ids[len(lead) :]
    return tokenizer.encode(text, **how)


@functools.lru_cache(maxsize=4)  # of a few hundred in some tokenizers
def _control_tokens(tokenizer) -> dict[int, str]:
    """Added tokens that a text must not contain: not words, line breaks (Gemma) or spaces (Phi)."""
    added = tokenizer.added_tokens_decoder.items()
    return {i: t.content for i, t in added if t.special or not ORDINARY.fullmatch(t.content)}


def plain(text: str) -> str:
    """Text that can neither open or close a <sug> field nor part two starters."""
    return re.sub("&{2,}", "&", text.replace("<", "(").replace(">", ")"))


def format_starters(starters: Iterable[str]) -> str:
    """`<sug> a && b </sug>`, which parse_starters reads as the same number of starters."""
    return f"<sug> {' && '.join(map(plain, starters))} </sug>"


def encode_completion(tokenizer, starters: list[str]) -> Ids:
    """Ids of `<sug> a && b </sug>` and the end token."""
    return encode_text(tokenizer, format_starters(starters)) + [tokenizer.eos_token_id]


@dataclass(frozen=True)
class Parsed:
    """Starters of one completion; `reason` says why there are none, and is None if there are."""

    starters: tuple[str, ...]
    reason: str | None


def parse_starters(text: str) -> Parsed:
    """Starters of `<think>..</think><sug> a && b </sug>`, from any string, in linear time.

    The last complete field after the reasoning counts. A field that was never closed is read to the
    end without its last item, which is taken for cut short unless it ends like a sentence.
    """
    body = text[text.rfind("</think>") + 1 :]  # the whole text if there is no such tag
    # Searches for a tag, no pattern with a star: hostile text must not take long.
    _, closed, field = body.rpartition("</sug>")[0].rpartition("<sug>")
    if not closed:
        _, opened, field = body.rpartition("<sug>")
        if not opened:
            return Parsed((), "no <sug> field")
    items = field.partition("</sug>")[0].split("&&")
    if not closed and not items[-1].rstrip().endswith(tuple("?!.？！。")):
        items.pop()  # max_new_tokens ran out in it
    # Where a quote between two & goes, a separator is left: none may stand inside a starter.
    cleaned = (re.sub("&{2,}", "&", clean_starter(item)) for item in items)
    starters = tuple(filter(None, cleaned))
    reason = "empty <sug> field" if items else "unclosed <sug> field"
    return Parsed(starters, None if starters else reason)


def clean_starter(item: str) -> str:
    """One line without control characters, bullets, numbering or surrounding quotes."""
    item = "".join(" " if unicodedata.category(c)[0] == "C" else c for c in item)
    item = " ".join(item.split())
    if not (lead := LEAD.match(item)):
        return item
    item = item[lead.end() :]
    if not any(c in QUOTES for c in lead[0]):
        return item
    # The partner of a stripped quote goes as well.
    item = " ".join(item.translate(NO_DOUBLE_QUOTES).split()).rstrip(QUOTES + " ")
    # Without a limit, hostile text would recurse a thousand times.
    return clean_starter(item) if LEAD.match(item) and len(item) < 1000 else item

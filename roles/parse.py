"""The `<sug>` parser and writer; on their way to llm/prompts.py."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

_QUOTES = "\"'“”‘’«»「」"
_LEAD = re.compile(rf"(?:[\s{_QUOTES}\-*•·–—]|[①-⑳]|\(?\d{{1,2}}[.)、](?!\d))+")
_NO_DOUBLE_QUOTES = str.maketrans("", "", "\"“”«»「」")


@dataclass(frozen=True)
class Parsed:
    """Starters of one completion; `reason` says why there are none, and is None if there are."""

    starters: tuple[str, ...]
    reason: str | None


def clean(item: str) -> str:
    """One line without control characters, bullets, numbering or surrounding quotes."""
    item = "".join(" " if unicodedata.category(c)[0] == "C" else c for c in item)
    item = " ".join(item.split())
    lead = _LEAD.match(item)
    if lead:
        item = item[lead.end():]
        if any(c in _QUOTES for c in lead[0]):  # the partner of a stripped quote goes as well
            item = " ".join(item.translate(_NO_DOUBLE_QUOTES).split()).rstrip(_QUOTES + " ")
            return clean(item) if _LEAD.match(item) and len(item) < 1000 else item
    return item


def parse_starters(text: str) -> Parsed:
    """Starters of `<think>..</think><sug> a && b </sug>`, from any string, in linear time.

    The last complete field after the reasoning counts. A field that was never closed is read to the
    end without its last item, which is taken for cut short unless it ends like a sentence.
    """
    body = text[text.rfind("</think>") + 1:]  # the whole text if there is no such tag
    last_close = body.rfind("</sug>")
    start = body.rfind("<sug>", 0, last_close) if last_close >= 0 else -1
    closed = start >= 0
    if not closed:
        start = body.rfind("<sug>")
    if start < 0:
        return Parsed((), "no <sug> field")
    start += len("<sug>")
    items = body[start:body.find("</sug>", start) if closed else None].split("&&")
    if not closed and not items[-1].rstrip().endswith(tuple("?!.？！。")):
        items.pop()
        if not items:
            return Parsed((), "unclosed <sug> field")
    starters = tuple(filter(None, map(clean, items)))
    return Parsed(starters, None if starters else "empty <sug> field")


def format_starters(starters: Iterable[str]) -> str:
    """`<sug> a && b </sug>`; what would read as markup inside a starter is taken out."""
    plain = (clean(re.sub("[<>]", " ", s)) for s in starters)
    return f"<sug> {' && '.join(re.sub('&{2,}', 'and', s) for s in plain if s)} </sug>"



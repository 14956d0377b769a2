"""Conversations from elsewhere as users: exports of ChatGPT, ShareGPT, WildChat and LoCoMo.

    python -m tools.logs import chatgpt conversations.json --out users.jsonl
    python -m tools.logs import mimics mimics_duo.jsonl --out dialogues.jsonl   # see Mimics

One record per kind of file. Its sessions() yields (user_id, session_id, timestamp, messages) with
messages as (role, text or None); a user_id of None is the one person whose export the file is.
Records are strict: a row that does not fit is a fault, listed by its place and not its content.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

import data
from data import DataError, Faults, Name, Record, Stamp, Text, User
from files import progress

Sessions = Iterator[tuple[str | None, str, datetime | None, list[tuple[str, str | None]]]]


def _unix(seconds: float) -> datetime:
    """Seconds since 1970 to naive UTC."""
    try:
        return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)
    except (ValueError, OverflowError, OSError):  # which of them depends on the machine
        raise ValueError("not in the years 1 to 9999 as seconds since 1970") from None


class ChatGPTMessage(Record):
    class Author(Record):
        role: str  # user, assistant, system, tool

    class Content(Record):
        content_type: str  # text, multimodal_text, code, ...
        parts: list[Any] | None = None  # texts, and objects of images and speech

    author: Author
    content: Content | None = None
    recipient: str | None = None
    create_time: float | None = None  # seconds since 1970

    def text(self) -> str | None:
        """Its text and the transcripts of speech; None for images, code and calls of tools."""
        kind = self.content and self.content.content_type
        # Another recipient is a tool.
        if kind not in ("text", "multimodal_text") or self.recipient not in (None, "all"):
            return None
        parts = [p.get("text") if isinstance(p, dict) else p for p in self.content.parts or ()]
        return "\n".join(part for part in parts if isinstance(part, str))


class ChatGPT(Record):
    """A conversation in conversations.json of ChatGPT's export: a tree of messages."""

    class Node(Record):
        message: ChatGPTMessage | None = None  # the root has none
        parent: str | None = None

    conversation_id: Name | None = None  # or `id`: exports differ
    id: Name | None = None
    create_time: Annotated[float, AfterValidator(_unix)] | None = None  # of the conversation
    mapping: dict[str, Node]
    current_node: str | None = None  # the leaf that its person saw last

    def sessions(self) -> Sessions:
        session_id = self.conversation_id or self.id
        if not session_id:
            raise ValueError("conversation_id: missing, and so is id")
        shown = [node.message for node in self._branch() if node.message]
        said = [(m.author.role, m.text()) for m in shown if m.author.role in ("user", "assistant")]
        yield None, session_id, self.create_time, said  # None: whoever exported it

    def _branch(self) -> list[Node]:
        """Root to the node shown last; edits and regenerations hang on other branches."""
        node, branch = self.current_node, {}
        if node not in self.mapping:  # then the latest leaf
            parents = {each.parent for each in self.mapping.values()}
            leaves = [key for key in self.mapping if key not in parents]
            # Of equally late ones the last in the file: max keeps the first that it meets.
            node = max(reversed(leaves), key=self._time, default=None)
        while node in self.mapping and node not in branch:  # a lost parent or a cycle ends it
            branch[node] = self.mapping[node]
            node = branch[node].parent
        return list(branch.values())[::-1]

    def _time(self, key: str) -> float:
        message = self.mapping[key].message
        return (message and message.create_time) or -math.inf


# The models whose conversations people shared.
_SHAREGPT_ROLES = dict.fromkeys(("gpt", "chatgpt", "assistant", "bing", "bard"), "assistant")
_SHAREGPT_ROLES |= {"human": "user", "user": "user", "system": "system"}


class ShareGPT(Record):
    """A ShareGPT conversation; it names no person, so the parts of one id count as one user's."""

    class Message(Record):
        speaker: Literal[*_SHAREGPT_ROLES] = Field(alias="from")  # a word of Python
        value: str | None

    id: Name
    conversations: list[Message]

    def sessions(self) -> Sessions:
        said = [(_SHAREGPT_ROLES[m.speaker], m.value) for m in self.conversations]
        yield _part(self.id)[0], self.id, None, said


def _part(name: str) -> tuple[str, int]:
    """Split "abc_3" into ("abc", 3); a name without a number is part 0."""
    match = re.fullmatch(r"(.+)_([0-9]{1,9})", name)
    return (match[1], int(match[2])) if match else (name, 0)


class WildChat(Record):
    """A WildChat conversation; a hashed address counts as a user."""

    class Message(data.Message):
        content: str | None
        hashed_ip: Text | None = None

    conversation_hash: Name
    timestamp: Stamp = None
    hashed_ip: Text | None = None  # here or in the messages
    conversation: list[Message]

    def sessions(self) -> Sessions:
        addresses = [self.hashed_ip, *(m.hashed_ip for m in self.conversation)]
        user_id = next(filter(None, addresses), self.conversation_hash)  # without: a user each
        said = [(m.role, m.content) for m in self.conversation]
        yield user_id, self.conversation_hash, self.timestamp, said


class LocomoTalk(Record):
    class Message(Record):
        speaker: Name
        text: str | None

    speaker_a: Name
    speaker_b: Name
    sessions: dict[str, list[Message]]
    times: dict[str, Any]  # the same keys; a time that cannot be read is no fault

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value):
        """Gather the keys session_1, session_1_date_time, session_2, ... in numeric order."""
        if not isinstance(value, dict):
            return value
        keys = [key for key in value if re.fullmatch(r"session_[0-9]{1,9}", key)]
        keys.sort(key=lambda key: _part(key)[1])  # session_10 comes after session_9
        times = {key: value.get(f"{key}_date_time") for key in keys}
        return value | {"sessions": {key: value[key] for key in keys}, "times": times}


class Locomo(Record):
    """A LoCoMo sample: two people over many sessions, each a user with the other as assistant."""

    sample_id: Name
    conversation: LocomoTalk

    def sessions(self) -> Sessions:
        talk = self.conversation
        pairs = itertools.product((talk.speaker_a, talk.speaker_b), talk.sessions.items())
        for name, (key, lines) in pairs:
            stamp = None
            with contextlib.suppress(TypeError, ValueError):  # what cannot be read is unknown
                stamp = datetime.strptime(talk.times[key], "%I:%M %p on %d %B, %Y")
            said = [("user" if m.speaker == name else "assistant", m.text) for m in lines]
            yield f"{self.sample_id}/{name}", key, stamp, said  # a name alone is in many samples


KINDS = {  # kind -> record of a conversation, what the file usually is
    "chatgpt": (ChatGPT, "a JSON array"),
    "sharegpt": (ShareGPT, "a JSON array or JSONL"),
    "wildchat": (WildChat, "parquet or JSONL"),
    "locomo": (Locomo, "a JSON array"),
}
# Keys that each conversation of a kind has; no other kind has them all.
MARKS = {
    kind: {name for name, field in record.model_fields.items() if field.is_required()}
    for kind, (record, _) in KINDS.items()
}


def _parquet(path: str | Path) -> Iterator[dict]:
    """Yield the rows of a parquet file batch by batch, only with what a WildChat record takes."""
    import pyarrow  # a second to import, and most files are JSON
    from pyarrow.parquet import ParquetFile

    message = r"conversation\.(\w+\.){1,2}(role|content|hashed_ip)"  # of conversation.list.element
    wanted = rf"conversation_hash|timestamp|hashed_ip|{message}"
    try:
        with ParquetFile(path) as file:
            leaves = [file.schema.column(i).path for i in range(len(file.schema))]
            columns = [leaf for leaf in leaves if re.fullmatch(wanted, leaf)]
            # WildChat's other columns, of moderation, are most of its bytes.
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:  # its text may quote the file
        raise DataError(f"{path}: cannot be read as parquet ({type(error).__name__})") from None


def _rows(path: str | Path, faults: Faults) -> Iterator[tuple[str, dict]]:
    """Yield (place, JSON object) of a JSON array, parquet or JSONL; other rows are faults."""
    try:
        with open(path, "rb") as file:
            head = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")  # a byte order mark
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if head.startswith(b"PAR1"):
        rows = _parquet(path)
    elif head.startswith(b"["):
        rows = data.parse_json(Path(path).read_bytes())  # whole: JSON has no other way
    else:
        yield from data.json_objects(path, faults)
        return
    for number, row in enumerate(rows, 1):
        place = f"{path}: conversation {number}"
        if isinstance(row, dict):
            yield place, row
        else:
            faults.add(place, ValueError("row: not a JSON object"))


def _conversations(path: str | Path, kind: str, faults: Faults) -> Iterator[tuple[str, dict]]:
    """Yield (place, row); raises DataError if no row of the file looks like one of this kind."""
    expected = f"{KINDS[kind][1]} of conversations with {' and '.join(sorted(MARKS[kind]))}"
    right_kind, first_keys = False, set()
    try:
        for place, row in _rows(path, faults):
            first_keys = first_keys or row.keys()
            right_kind = right_kind or MARKS[kind] <= row.keys()
            yield place, row
    except ValueError as error:  # of an array that is no JSON
        raise DataError(f"{path}: {error}; {kind} is {expected}") from None
    if not right_kind:  # rather than a fault for each of a million rows
        looks = next((f"; this looks like {k}" for k in KINDS if MARKS[k] <= first_keys), "")
        raise DataError(f"{path}: no such conversation in it; {kind} is {expected}{looks}")


def _user(user_id: str, session_id: str, timestamp: datetime | None, said: list) -> User:
    """A user with this session alone, or with none if they say nothing in it."""
    messages = [data.Message(role=role, content=text or "") for role, text in said]
    messages = [message for message in messages if message.content]
    session = {"session_id": session_id, "timestamp": timestamp, "messages": messages}
    asked = any(message.role == "user" for message in messages)  # the rest tells nothing of them
    return User.model_validate({"user_id": user_id, "sessions": [session] if asked else []})


def import_users(kind: str, paths: list[str | Path], out: str | Path, me: str = "me") -> str:
    """Write conversations of a kind, in one file or several, as users; return what was written.

    Until all are read, sessions are held as JSON text, which is smaller than records. Raises
    DataError that lists every faulty conversation.
    """
    faults, left_out, messages = Faults(), Counter(), 0
    texts = defaultdict(dict)  # user_id -> session_id -> bytes of JSON
    for path in paths:
        for place, row in progress(_conversations(path, kind, faults), f"import {path}"):
            try:
                parts = KINDS[kind][0].model_validate(row).sessions()
                users = [_user(name or me, *part) for name, *part in parts]
            except ValueError as error:  # a ValidationError is one too
                faults.add(place, error)
                continue
            for user in users:
                if not user.sessions:
                    left_out["without a user's words"] += 1
                elif user.sessions[0].session_id in texts[user.user_id]:  # parts may overlap
                    left_out["seen before"] += 1
                else:
                    [session] = user.sessions
                    text = session.model_dump_json(exclude_unset=True).encode()
                    texts[user.user_id][session.session_id] = text
                    messages += len(session.messages)
    faults.refuse()
    if not texts:  # an empty users file would only be refused by the next command
        raise DataError(f"{paths[0]}: no conversation with a user's words in it")
    data.write_users(out, (_whole(kind, *item) for item in texts.items()))
    counts = f"{len(texts)} users, {sum(map(len, texts.values()))} sessions ({messages} messages)"
    rest = "".join(f"; {n} conversations {why} left out" for why, n in left_out.items())
    return f"{counts} written to {out}{rest}"


def _whole(kind: str, user_id: str, texts: dict[str, bytes]) -> User:
    sessions = [data.Session.model_validate_json(text) for text in texts.values()]
    if kind == "sharegpt":  # its parts have no time, but a number
        sessions.sort(key=lambda session: _part(session.session_id)[1])
    return data.in_time_order(User(user_id=user_id, sessions=sessions))


class Mimics(Record):
    """A query of MIMICS-Duo with the clarification panes that a search engine showed for it.

    Each pane becomes a context of its own: the query is the user's one turn, the pane's options
    are the suggestions, `click_shares` their conditional click shares, aggregated over people, and
    `clicked` the option with the largest share (several if they tie; none without engagement). The
    pane's question, its impression level and the human labels are left out. Contexts of one query
    share the first part of their id, "q12-", and the text of their turn: split by it.
    """

    class Pane(Record):
        options: Annotated[list[data.Sentence], Field(min_length=1)]
        option_cctr: list[Annotated[float, Field(ge=0, le=1)]]

        @model_validator(mode="after")
        def _fits(self):
            if len(self.option_cctr) != len(self.options):
                raise ValueError("option_cctr: not one for each option")
            return self

    query: data.Sentence
    panes: Annotated[list[Pane], Field(min_length=1)]

    def dialogues(self, number: int) -> Iterator[data.Dialogue]:
        """A context for each pane; `number` of the query in its file, from 1."""
        for place, pane in enumerate(self.panes, 1):
            most = max(pane.option_cctr)  # 0: nobody engaged with it
            best = [i for i, share in enumerate(pane.option_cctr) if share == most > 0]
            yield data.Dialogue(
                dialogue_id=f"q{number}-{place}", intent="web search", suggestions=pane.options,
                turns=[data.Turn(role="user", content=self.query)],
                clicked=best, click_shares=pane.option_cctr)


def import_mimics(paths: list[str | Path], out: str | Path) -> str:
    """Write the panes of MIMICS-Duo files as dialogues; return what was written.

    Raises DataError that lists every faulty query.
    """
    faults, rows, queries = Faults(), [], 0
    for path in paths:
        for place, row in _rows(path, faults):
            try:
                queries += 1  # over all files, so that no id stands twice
                rows += Mimics.model_validate(row).dialogues(queries)
            except ValueError as error:  # a ValidationError is one too
                faults.add(place, error)
    faults.refuse()
    if not rows:
        raise DataError(f"{paths[0]}: no query with panes in it")
    data.write_dialogues(out, rows)
    clicked = sum(bool(row.clicked) for row in rows)
    return f"{len(rows)} panes of {queries} queries, {clicked} with clicks, written to {out}"

"""Conversations from elsewhere as users: exports of chat assistants, and shared data sets.

    python -m tools.logs import chatgpt conversations.json --out users.jsonl
    python -m tools.logs import mimics mimics_duo.jsonl --out dialogues.jsonl   # see Mimics

One record per kind of file. Its sessions() yields a Talk for each session. What is not needed (a
turn of a tool, an unknown role, a time that nobody can read) is passed over and counted; a row
without what is needed is a fault, listed by its place and not its content.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

import data
from data import DataError, Faults, Name, Record, Text, User
from files import digest, progress

# Names of who speaks, in all kinds of files; tools and what else there is are passed over.
ROLES = dict.fromkeys(("gpt", "chatgpt", "assistant", "bing", "bard", "model"), "assistant")
ROLES |= {"human": "user", "user": "user", "prompter": "user", "system": "system"}
UNREAD_TIME = "times that cannot be read"
ENTRIES = 1000  # files of a zip archive that are looked at
UNPACKED = 4 * 2**30  # bytes of one of them at most: an archive may promise terabytes


def _moment(value, info) -> datetime | None:
    """ISO 8601 text, or seconds, milli-, micro- or nanoseconds since 1970, to naive UTC."""
    if value is None or value == "":
        return None
    try:
        if isinstance(value, str) and not re.fullmatch(r"-?\d{9,20}(\.\d{1,9})?", value):
            return data.to_utc(value)
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            seconds = float(value)
            if abs(seconds) > 1e19:  # no nanoseconds either; JSON's 1e999 is infinite
                raise ValueError
            while abs(seconds) > 1e11:  # the year 5138
                seconds /= 1000
            return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)
        return data.to_utc(value)  # of parquet
    except (ValueError, TypeError, OverflowError, OSError):  # which of them depends on the machine
        if info.context is not None:
            info.context[UNREAD_TIME] += 1  # a history can do without
        return None


Time = Annotated[datetime | None, BeforeValidator(_moment)]
# Some databases number their conversations.
Id = Annotated[Name, BeforeValidator(lambda value: str(value) if type(value) is int else value)]


@dataclass(frozen=True)
class Talk:
    user_id: str | None  # None: the one person whose export the file is
    session_id: str
    begun: datetime | None
    said: list[tuple[str, str | None]]  # (role as the file has it, text)
    updated: datetime | None = None  # which of two exports has the later state

    def turns(self) -> list[dict]:
        said = [(ROLES.get(role.lower()), text) for role, text in self.said]
        return [{"role": role, "content": text} for role, text in said if role and text]


Sessions = Iterator[Talk]


def _earliest(*times: datetime | None) -> datetime | None:
    return min(filter(None, times), default=None)


def _text(content) -> str | None:
    """Text of a message that is a text, or a list of parts of which some are texts."""
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) else p for p in content]
        return "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else None


def _branch(parents: dict[str, str | None], leaf: Any) -> list[str]:
    """Root to leaf of a tree; edits and regenerations hang on other branches."""
    branch: dict[str, None] = {}
    while isinstance(leaf, str) and leaf in parents and leaf not in branch:
        branch[leaf] = None  # a lost parent or a cycle ends it
        leaf = parents[leaf]
    return list(branch)[::-1]


def _latest_leaf(parents: dict[str, str | None], times: dict[str, datetime | None]) -> str | None:
    inner = set(parents.values())
    leaves = [key for key in parents if key not in inner]
    # Of equally late ones the last in the file: max keeps the first that it meets.
    return max(reversed(leaves), key=lambda key: times[key] or datetime.min, default=None)


class ChatGPTMessage(Record):
    class Author(Record):
        role: str  # user, assistant, system, tool

    class Content(Record):
        content_type: str  # text, multimodal_text, code, ...
        parts: list[Any] | None = None  # texts, and objects of images and speech

    author: Author | None = None
    content: Content | None = None
    recipient: str | None = None
    create_time: Time = None
    metadata: Any = None

    def text(self) -> str | None:
        """Its text and the transcripts of speech; None for images, code and calls of tools."""
        kind = self.content and self.content.content_type
        # Another recipient is a tool.
        if kind not in ("text", "multimodal_text") or self.recipient not in (None, "all"):
            return None
        hidden = "is_visually_hidden_from_conversation"  # put there by the chat, not its person
        if isinstance(self.metadata, dict) and self.metadata.get(hidden):
            return None
        return _text(self.content.parts or [])


class ChatGPT(Record):
    """A conversation in conversations.json of ChatGPT's export: a tree of messages."""

    class Node(Record):
        message: ChatGPTMessage | None = None  # the root has none
        parent: str | None = None

    conversation_id: Id | None = None  # or `id`: exports differ
    id: Id | None = None
    create_time: Time = None  # of the conversation
    update_time: Time = None
    mapping: dict[str, Node]
    current_node: Any = None  # the leaf that its person saw last

    def sessions(self) -> Sessions:
        session_id = self.conversation_id or self.id
        if not session_id:
            raise ValueError("conversation_id: missing, and so is id")
        parents = {key: node.parent for key, node in self.mapping.items()}
        times = {k: n.message and n.message.create_time for k, n in self.mapping.items()}
        branch = _branch(parents, self.current_node) or _branch(
            parents, _latest_leaf(parents, times))  # fmt: skip
        shown = [self.mapping[key].message for key in branch]
        # What the system said is ChatGPT's, the same for everybody.
        shown = [m for m in shown if m and m.author and m.author.role != "system"]
        said = [(m.author.role, m.text()) for m in shown]
        begun = self.create_time or _earliest(*map(times.get, branch)) or self.update_time
        yield Talk(None, session_id, begun, said, self.update_time)  # of whoever exported it


class Claude(Record):
    """A conversation in conversations.json of Claude's export."""

    class Message(Record):
        sender: str = ""
        text: str | None = None
        content: Any = None  # parts, of later exports
        created_at: Time = None

    uuid: Id
    created_at: Time = None
    updated_at: Time = None
    chat_messages: list[Message]

    def sessions(self) -> Sessions:
        said = [(m.sender, m.text or _text(m.content)) for m in self.chat_messages]
        begun = self.created_at or _earliest(*(m.created_at for m in self.chat_messages))
        yield Talk(None, self.uuid, begun or self.updated_at, said, self.updated_at)


class OpenWebUI(Record):
    """A chat of Open WebUI, of one person's export or of an administrator's of everybody."""

    class Message(Record):
        role: str = ""
        content: Any = None
        parentId: str | None = None  # noqa: N815 (its name there)
        timestamp: Time = None

    class Chat(Record):
        history: Any = None  # {"messages": {id: message}, "currentId": id}
        messages: Any = None  # older exports: the branch shown

    id: Id
    user_id: Id | None = None
    created_at: Time = None
    updated_at: Time = None
    chat: Chat

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value):
        """The branch shown as chat.messages, whichever way the chat holds it."""
        chat = value.get("chat") if isinstance(value, dict) else None
        history = chat.get("history") if isinstance(chat, dict) else None
        tree = history.get("messages") if isinstance(history, dict) else None
        if isinstance(tree, dict) and tree:
            tree = {key: node for key, node in tree.items() if isinstance(node, dict)}
            parents = {key: node.get("parentId") for key, node in tree.items()}
            shown = _branch(parents, history.get("currentId")) or list(tree)
            value = value | {"chat": {"messages": [tree[key] for key in shown]}}
        return value

    def sessions(self) -> Sessions:
        rows = self.chat.messages if isinstance(self.chat.messages, list) else []
        messages = [self.Message.model_validate(row) for row in rows]
        said = [(m.role, _text(m.content)) for m in messages]
        begun = self.created_at or _earliest(*(m.timestamp for m in messages)) or self.updated_at
        yield Talk(self.user_id, self.id, begun, said, self.updated_at)


class HuggingChat(Record):
    """A conversation of HuggingChat (chat-ui)."""

    class Message(Record):
        speaker: str = Field("", alias="from")
        content: Any = None
        id: str | None = None
        ancestors: list[Any] | None = None  # of a tree; absent: a plain list
        created: Time = Field(None, alias="createdAt")

    id: Any = Field(None, alias="_id")  # a text, or {"$oid": text}
    title: Any = None
    created: Time = Field(None, alias="createdAt")
    updated: Time = Field(None, alias="updatedAt")
    messages: list[Message]

    def sessions(self) -> Sessions:
        name = self.id.get("$oid") if isinstance(self.id, dict) else self.id
        last = self.messages[-1] if self.messages else None  # the one that was written last
        shown = self.messages
        if last and last.ancestors:
            shown = [m for m in shown if m.id in last.ancestors or m is last]
        said = [(m.speaker, _text(m.content)) for m in shown]
        begun = self.created or _earliest(*(m.created for m in shown)) or self.updated
        if not isinstance(name, str) or not name:  # some exports have none
            name = digest(str(begun), said[:1])
        yield Talk(None, name, begun, said, self.updated)


class ShareGPT(Record):
    """A ShareGPT conversation; it names no person, so the parts of one id count as one user's."""

    class Message(Record):
        speaker: str = Field(alias="from")  # a word of Python
        value: str | None = None

    id: Id
    conversations: list[Message]

    def sessions(self) -> Sessions:
        said = [(m.speaker, m.value) for m in self.conversations]
        yield Talk(_part(self.id)[0], self.id, None, said)


def _part(name: str) -> tuple[str, int]:
    """Split "abc_3" into ("abc", 3); a name without a number is part 0."""
    match = re.fullmatch(r"(.+)_([0-9]{1,9})", name)
    return (match[1], int(match[2])) if match else (name, 0)


class RoleMessage(Record):
    role: str
    content: Any
    hashed_ip: Text | None = None


class WildChat(Record):
    """A WildChat conversation; a hashed address counts as a user."""

    conversation_hash: Id
    timestamp: Time = None
    hashed_ip: Text | None = None  # here or in the messages
    conversation: list[RoleMessage]

    def sessions(self) -> Sessions:
        addresses = [self.hashed_ip, *(m.hashed_ip for m in self.conversation)]
        user_id = next(filter(None, addresses), self.conversation_hash)  # without: a user each
        said = [(m.role, _text(m.content)) for m in self.conversation]
        yield Talk(user_id, self.conversation_hash, self.timestamp, said)


class LMSYS(Record):
    """A conversation of LMSYS-Chat-1M; it names no person, so each is a user's."""

    conversation_id: Id
    tstamp: Time = None
    conversation: list[RoleMessage]

    def sessions(self) -> Sessions:
        said = [(m.role, _text(m.content)) for m in self.conversation]
        yield Talk(self.conversation_id, self.conversation_id, self.tstamp, said)


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
            # A name alone is in many samples.
            yield Talk(f"{self.sample_id}/{name}", key, stamp, said)


KINDS = {  # kind -> record of a conversation, what the file usually is
    "chatgpt": (ChatGPT, "a JSON array"),
    "claude": (Claude, "a JSON array"),
    "openwebui": (OpenWebUI, "a JSON array"),
    "huggingchat": (HuggingChat, "a JSON array or JSONL"),
    "sharegpt": (ShareGPT, "a JSON array or JSONL"),
    "wildchat": (WildChat, "parquet or JSONL"),
    "lmsys": (LMSYS, "parquet or JSONL"),
    "locomo": (Locomo, "a JSON array"),
}
# Keys that each conversation of a kind has; no other kind has them all.
MARKS = {
    kind: {name for name, field in record.model_fields.items() if field.is_required()}
    for kind, (record, _) in KINDS.items()
}


def _parquet(path: str | Path) -> Iterator[dict]:
    """Yield the rows of a parquet file batch by batch, only with what a record takes."""
    import pyarrow  # a second to import, and most files are JSON
    from pyarrow.parquet import ParquetFile

    message = r"conversation\.(\w+\.){1,2}(role|content|hashed_ip)"  # of conversation.list.element
    wanted = rf"conversation_(?:hash|id)|timestamp|tstamp|hashed_ip|{message}"
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
    """Yield (place, JSON object) of a JSON array, one object, JSONL or parquet, also within a zip
    archive; other rows are faults."""
    try:
        with open(path, "rb") as file:
            head = file.read(2**16)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if head.startswith(b"PK\x03\x04"):
        yield from _unzipped(path, faults)
    elif head.startswith(b"PAR1"):
        yield from _objects(str(path), _parquet(path), faults)
    elif _is_whole(head):
        yield from _objects(str(path), _whole_json(Path(path).read_bytes()), faults)
    else:
        yield from data.json_objects(path, faults)


def _is_whole(head: bytes) -> bool:
    """Whether a file that begins so is to be read whole: an array, UTF-16, or an object of several
    lines. JSON has no other way."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")  # a byte order mark
    if start.startswith((b"[", b"\xff\xfe", b"\xfe\xff")) or b"\x00" in head[:4]:
        return True
    first, newline, _ = start.partition(b"\n")
    return bool(newline) and first.startswith(b"{") and first.rstrip()[-1:] in (b"{", b",", b"[")


def _whole_json(content: bytes) -> list:
    """The rows of a file's content: its array, or its one object."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\x00" in content[:4]:
        # What Windows calls Unicode; without a byte order mark zeros tell.
        kind = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else (
            "utf-16-be" if content[:1] == b"\x00" else "utf-16-le")  # fmt: skip
        try:
            content = content.decode(kind).encode()
        except UnicodeError:
            raise ValueError("neither UTF-8 nor UTF-16") from None
    value = data.parse_json(content)
    return value if isinstance(value, list) else [value]


def _unzipped(path: str | Path, faults: Faults) -> Iterator[tuple[str, dict]]:
    """Yield (place, row) of every JSON file of an archive, such as a whole export."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [f for f in archive.infolist()[:ENTRIES] if "__MACOSX" not in f.filename]
            files = [f for f in names if f.filename.endswith((".json", ".jsonl"))]
            # An export has files of other things beside its conversations.
            told = [f for f in files if "conversation" in f.filename.lower()] or files
            for entry in told:
                if entry.file_size > UNPACKED:
                    raise DataError(f"{path}: an entry of {entry.file_size} bytes; unpack it first")
                content, place = archive.read(entry), f"{path}: {data.label(entry.filename)}"
                if entry.filename.endswith(".jsonl"):
                    rows = [data.parse_json(line) for line in io.BytesIO(content) if line.strip()]
                else:
                    rows = _whole_json(content)
                yield from _objects(place, rows, faults)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError):
        raise DataError(f"{path}: a zip archive that cannot be read; unpack it first") from None


def _objects(place: str, rows, faults: Faults) -> Iterator[tuple[str, dict]]:
    for number, row in enumerate(rows, 1):
        where = f"{place}: conversation {number}"
        if isinstance(row, dict):
            yield where, row
        else:
            faults.add(where, ValueError("row: not a JSON object"))


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


def _user(talk: Talk, me: str) -> User:
    """A user with this session alone, or with none if they say nothing in it."""
    messages = talk.turns()
    session = {"session_id": talk.session_id, "timestamp": talk.begun, "messages": messages}
    # The rest tells nothing of them.
    asked = any(m["role"] == "user" and m["content"].strip() for m in messages)
    name = me if talk.user_id is None else talk.user_id
    user = User.model_validate({"user_id": name, "sessions": [session] if asked else []})
    kept = [s.model_copy(update={"messages": [m for m in s.messages if m.content]})
            for s in user.sessions]  # fmt: skip
    return user.model_copy(update={"sessions": kept})


def import_users(kind: str, paths: list[str | Path], out: str | Path, me: str = "me") -> str:
    """Write conversations of a kind, in one file or several, as users; return what was written.

    Of a conversation that stands several times the latest state stays. Until all are read, sessions
    are held as JSON text, which is smaller than records. Raises DataError that lists every faulty
    conversation.
    """
    faults, left_out, passed = Faults(), Counter(), Counter()
    # user_id -> session_id -> ((last update, messages), bytes of JSON)
    texts: dict[str, dict[str, tuple]] = defaultdict(dict)
    for path in paths:
        for place, row in progress(_conversations(path, kind, faults), f"import {path}"):
            try:
                talks = [*KINDS[kind][0].model_validate(row, context=passed).sessions()]
                users = [_user(talk, me) for talk in talks]
            except ValueError as error:  # a ValidationError is one too
                faults.add(place, error)
                continue
            for talk, user in zip(talks, users, strict=True):
                roles = [role for role, _ in talk.said if role.lower() not in ROLES]
                passed["messages of tools and other roles"] += len(roles)
                if not user.sessions:
                    left_out["without a user's words"] += 1
                    continue
                [session] = user.sessions
                state = talk.updated or datetime.min, len(session.messages)
                earlier = texts[user.user_id].get(session.session_id)
                left_out["seen before"] += earlier is not None  # parts may overlap
                if not earlier or state > earlier[0]:
                    text = session.model_dump_json(exclude_unset=True).encode()
                    texts[user.user_id][session.session_id] = state, text
    faults.refuse()
    if not texts:  # an empty users file would only be refused by the next command
        raise DataError(f"{paths[0]}: no conversation with a user's words in it")
    data.write_users(out, (_whole(kind, *item) for item in texts.items()))
    messages = sum(state[1] for sessions in texts.values() for state, _ in sessions.values())
    counts = f"{len(texts)} users, {sum(map(len, texts.values()))} sessions ({messages} messages)"
    rest = "".join(f"; {n} conversations {why} left out" for why, n in left_out.items() if n)
    # Names with a dot are keys that no field takes: exports are full of them.
    passed_over = {what: n for what, n in passed.items() if n and "." not in what}
    rest += "".join(f"; {n} {what} passed over" for what, n in passed_over.items())
    return f"{counts} written to {out}{rest}"


def _whole(kind: str, user_id: str, texts: dict[str, tuple]) -> User:
    sessions = [data.Session.model_validate_json(text) for _, text in texts.values()]
    if kind == "sharegpt":  # its parts have no time, but a number
        sessions.sort(key=lambda session: _part(session.session_id)[1])
    stamps = [s.timestamp for s in sessions if s.timestamp]
    if sum((a < b) - (a > b) for a, b in itertools.pairwise(stamps)) < 0:  # newest first
        sessions = sessions[::-1]
    # One without a time stays behind its neighbour, and turns no history around.
    known = itertools.accumulate((s.timestamp for s in sessions), lambda last, now: now or last)
    order = sorted(zip(known, range(len(sessions)), strict=True),
                   key=lambda item: item[0] or datetime.min)  # fmt: skip
    return User(user_id=user_id, sessions=[sessions[i] for _, i in order])


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

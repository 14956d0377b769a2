"""What exports of chat assistants and shared data sets look like: one record per kind of file.

    ChatGPT.model_validate(row).sessions()    # a Talk for each session

What is not needed (a turn of a tool, an unknown role, a time that nobody can read) is passed over
and counted in the context of the validation; a message that cannot be read is named there too.
importers.py reads the files.
"""

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, WrapValidator, model_validator
from pydantic_core import ValidationError

import data
from data import Faults, Name, Record, Text
from files import digest

# Names of who speaks, in all kinds of files; tools and what else there is are passed over.
ROLES = dict.fromkeys(("gpt", "chatgpt", "assistant", "bing", "bard", "model"), "assistant")
ROLES |= {"human": "user", "user": "user", "prompter": "user", "system": "system"}
UNREAD_TIME = "times that cannot be read"


class Passed(Counter):
    """What was passed over, by kind; messages that cannot be read are faults of `unread`."""

    def __init__(self):
        super().__init__()
        self.place, self.unread = "", Faults()  # place: of the row that is being read


def _moment(value, info) -> datetime | None:
    """ISO 8601 text, or seconds, milli-, micro- or nanoseconds since 1970, to naive UTC."""
    value = _at(value, "$date", "$numberLong") or _at(value, "$date") or value  # of MongoDB
    if value in (None, "", 0):  # 0: nobody has set it
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
        if info and info.context is not None:
            info.context[UNREAD_TIME] += 1  # a history can do without
        return None


Time = Annotated[datetime | None, BeforeValidator(_moment)]


def _name(value):
    return str(value) if type(value) is int else value  # some databases number what they hold


Id = Annotated[Name, BeforeValidator(_name)]
Address = Annotated[Text | None, BeforeValidator(_name)]
Account = Annotated[Id | None, BeforeValidator(  # other objects are nobody's
    lambda v: _at(v, "uuid") or _at(v, "$oid") or (None if isinstance(v, dict) else v or None))]


def _or_error(value, validate):
    try:
        return validate(value)
    except ValidationError as error:
        return error  # a value like others: only the list around it knows its place


def _readable(messages: list, info) -> list:
    """The messages but for those that are errors, which the context is told with their places."""
    for number, message in enumerate(messages):
        if isinstance(message, ValidationError) and info.context is not None:
            place = info.context.place
            info.context.unread.add(place, message, (info.field_name, number))
    return [message for message in messages if not isinstance(message, ValidationError)]


T = TypeVar("T")
# A list less the messages that cannot be read: one of them does not cost the rest.
Messages = Annotated[list[Annotated[T, WrapValidator(_or_error)]], AfterValidator(_readable)]


@dataclass(frozen=True)
class Talk:
    user_id: str | None  # None: the one person whose export the file is
    session_id: str
    begun: datetime | None
    said: list[tuple[str, str | None]]  # (role as the file has it, text)
    updated: datetime | None = None  # which of two exports has the later state
    account: str | None = None  # whose it is, where an export may be of several people

    def turns(self) -> list[dict]:
        said = [(ROLES.get(role.lower()), text) for role, text in self.said]
        return [{"role": role, "content": text} for role, text in said if role and text]


Sessions = Iterator[Talk]


def _span(begun: datetime | None, updated: datetime | None, times: Iterable) -> tuple:
    """When a talk began and when it last changed; for want of these its messages' times."""
    told = [time for time in times if time]
    return begun or min(told, default=updated), updated or max(told, default=None)


def _at(value, *keys: str):
    """What stands under these keys, one within the other; None where something else stands."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _text(content) -> str | None:
    """Text of a message that is a text, or a list of parts of which some are texts."""
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) else p for p in content]
        return "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else None


def _shown(tree: dict, parent: str, leaf: Any, message: Callable, time: str) -> list:
    """Messages of the branch to a leaf, or for want of it to the latest one; edits hang on others.
    Before them what is no node. parent, time: keys of a node and of a message; message(node): None
    of the root."""
    nodes = {key: node for key, node in tree.items() if isinstance(node, dict)}
    parents = {key: str(node.get(parent) or None) for key, node in nodes.items()}
    # Claude names a root that is no message. Where no parent is one, there is no tree but a list.
    roots = {"None", *[*parents.values()][:1]}
    tied = not nodes.keys().isdisjoint(parents.values())
    for before, key in itertools.pairwise(parents):
        if parents[key] not in tree and not (tied and parents[key] in roots):
            parents[key] = before  # for want of the lost one
    said = {key: message(node) for key, node in nodes.items()}
    times = {key: _moment(m.get(time), None) for key, m in said.items() if isinstance(m, dict)}
    inner = {*parents.values()}
    leaves = [key for key in parents if key not in inner]
    # Of equally late ones the last in the file: max keeps the first that it meets.
    latest = max(reversed(leaves), key=lambda key: times.get(key) or datetime.min, default=None)
    key, branch = str(leaf) if str(leaf) in parents else latest, {}
    while key in parents and key not in branch:  # a cycle ends it
        branch[key] = said[key]
        key = parents[key]
    # Wherever they hung: to be named, not to be read.
    odd = [node for node in tree.values() if not isinstance(node, dict)]
    return odd + [message for message in reversed(branch.values()) if message is not None]


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
        if _at(self.metadata, "is_visually_hidden_from_conversation"):  # the chat's, no person's
            return None
        return _text(self.content.parts or [])


class ChatGPT(Record):
    """A conversation in conversations.json of ChatGPT's export: a tree of messages."""

    conversation_id: Id | None = None  # or `id`: exports differ
    id: Id | None = None
    create_time: Time = None  # of the conversation
    update_time: Time = None
    mapping: Messages[ChatGPTMessage]  # of the branch shown

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value):
        """The messages of the branch that its person saw last, in place of the tree."""
        if not isinstance(value, dict) or "mapping" not in value:
            return value
        if not isinstance(tree := value["mapping"], dict):
            raise ValueError("mapping: no tree of messages")
        leaf = value.get("current_node")
        shown = _shown(tree, "parent", leaf, lambda node: node.get("message"), "create_time")
        return value | {"mapping": shown}

    def sessions(self) -> Sessions:
        session_id = self.conversation_id or self.id
        if not session_id:
            raise ValueError("conversation_id: missing, and so is id")
        # What the system said is ChatGPT's, the same for everybody.
        shown = [m for m in self.mapping if m.author and m.author.role != "system"]
        said = [(m.author.role, m.text()) for m in shown]
        times = (m.create_time for m in self.mapping)
        begun, updated = _span(self.create_time, self.update_time, times)
        yield Talk(None, session_id, begun, said, updated)  # of whoever exported it


class Claude(Record):
    """A conversation in conversations.json of Claude's export."""

    class Message(Record):
        sender: str = ""
        text: str | None = None
        content: Any = None  # parts, of later exports
        created_at: Time = None

    uuid: Id
    account: Account = None
    created_at: Time = None
    updated_at: Time = None
    chat_messages: Messages[Message]  # of the branch shown

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value):
        """Of a tree, as of later exports, the branch shown: what was edited stands on another."""
        rows, tree = _at(value, "chat_messages"), {}
        if isinstance(rows, list):
            tree = {str(_at(row, "uuid") or i): row for i, row in enumerate(rows)}
        if tree and all("parent_message_uuid" in row for row in rows if isinstance(row, dict)):
            leaf = value.get("current_leaf_message_uuid")
            shown = _shown(tree, "parent_message_uuid", leaf, lambda node: node, "created_at")
            value = value | {"chat_messages": shown}
        return value

    def sessions(self) -> Sessions:
        said = [(m.sender, m.text or _text(m.content)) for m in self.chat_messages]
        times = (m.created_at for m in self.chat_messages)
        begun, updated = _span(self.created_at, self.updated_at, times)
        yield Talk(None, self.uuid, begun, said, updated, self.account)


class OpenWebUI(Record):
    """A chat of Open WebUI, of one person's export or of an administrator's of everybody."""

    class Chat(Record):
        class Message(Record):
            role: str = ""
            content: Any = None
            timestamp: Time = None

        messages: Messages[Message] = []  # of the branch shown

    id: Id
    user_id: Id | None = None
    created_at: Time = None
    updated_at: Time = None
    chat: Chat

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value):
        """The branch shown as chat.messages: older exports have it there, others a tree as
        chat.history, {"messages": {id: message}, "currentId": id}."""
        tree = _at(value, "chat", "history", "messages")
        if isinstance(tree, dict) and tree:
            leaf = _at(value, "chat", "history", "currentId")
            shown = _shown(tree, "parentId", leaf, lambda node: node, "timestamp")
            value = value | {"chat": {"messages": shown}}
        return value

    def sessions(self) -> Sessions:
        said = [(m.role, _text(m.content)) for m in self.chat.messages]
        times = (m.timestamp for m in self.chat.messages)
        begun, updated = _span(self.created_at, self.updated_at, times)
        yield Talk(self.user_id, self.id, begun, said, updated)


class HuggingChat(Record):
    """A conversation of HuggingChat (chat-ui)."""

    class Message(Record):
        speaker: str = Field("", alias="from")
        content: Any = None
        id: Any = None
        ancestors: list[Any] | None = None  # of a tree; absent: a plain list
        created: Time = Field(None, alias="createdAt")

    id: Any = Field(None, alias="_id")  # a text, or {"$oid": text}
    account: Account = Field(None, alias="userId")
    title: Any = None
    created: Time = Field(None, alias="createdAt")
    updated: Time = Field(None, alias="updatedAt")
    messages: Messages[Message]

    def sessions(self) -> Sessions:
        name = _name(_at(self.id, "$oid") or self.id)
        last = self.messages[-1] if self.messages else None  # the one that was written last
        shown = self.messages
        if last and last.ancestors:
            branch = {*map(str, last.ancestors)}
            shown = [m for m in shown if str(m.id) in branch or m is last]
        said = [(m.speaker, _text(m.content)) for m in shown]
        begun, updated = _span(self.created, self.updated, (m.created for m in shown))
        if not isinstance(name, str) or not name:  # some exports have none
            name = digest(str(begun), said[:1] if begun else said)  # many begin alike
        yield Talk(None, name, begun, said, updated, self.account)


class ShareGPT(Record):
    """A ShareGPT conversation; it names no person, so the parts of one are one user's."""

    class Message(Record):
        speaker: str = Field(alias="from")  # a word of Python
        value: Any = None

    id: Id
    conversations: Messages[Message]

    def sessions(self) -> Sessions:
        said = [(m.speaker, _text(m.value)) for m in self.conversations]
        yield Talk(part_number(self.id)[0], self.id, None, said)


def part_number(name: str) -> tuple[str, int]:
    """Split "abc_3" into ("abc", 3); a name without a number is part 0."""
    match = re.fullmatch(r"(.+)_([0-9]{1,9})", name)
    return (match[1], int(match[2])) if match else (name, 0)


class RoleMessage(Record):
    role: str
    content: Any
    hashed_ip: Address = None
    timestamp: Time = None


class WildChat(Record):
    """A WildChat conversation; a hashed address counts as a user."""

    conversation_hash: Id
    timestamp: Time = None
    hashed_ip: Address = None  # here or in the messages
    conversation: Messages[RoleMessage]

    def sessions(self) -> Sessions:
        addresses = [self.hashed_ip, *(m.hashed_ip for m in self.conversation)]
        user_id = next(filter(None, addresses), self.conversation_hash)  # without: a user each
        said = [(m.role, _text(m.content)) for m in self.conversation]
        begun, updated = _span(self.timestamp, None, (m.timestamp for m in self.conversation))
        yield Talk(user_id, self.conversation_hash, begun, said, updated)


class LMSYS(Record):
    """A conversation of LMSYS-Chat-1M; it names no person, so each is a user's."""

    conversation_id: Id
    tstamp: Time = None
    conversation: Messages[RoleMessage]

    def sessions(self) -> Sessions:
        said = [(m.role, _text(m.content)) for m in self.conversation]
        begun, updated = _span(self.tstamp, None, (m.timestamp for m in self.conversation))
        yield Talk(self.conversation_id, self.conversation_id, begun, said, updated)


class LocomoTalk(Record):
    class Message(Record):
        speaker: Name
        text: str | None

    speaker_a: Name
    speaker_b: Name
    sessions: dict[str, Messages[Message]]
    times: dict[str, Any]  # the same keys; a time that cannot be read is no fault

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value):
        """Gather the keys session_1, session_1_date_time, session_2, ... in numeric order."""
        if not isinstance(value, dict):
            return value
        keys = [key for key in value if re.fullmatch(r"session_[0-9]{1,9}", key)]
        keys.sort(key=lambda key: part_number(key)[1])  # session_10 comes after session_9
        times = {key: value.get(f"{key}_date_time") for key in keys}
        return value | {"sessions": {key: value[key] for key in keys}, "times": times}


class Locomo(Record):
    """A LoCoMo sample: two people over many sessions, each a user with the other as assistant."""

    sample_id: Id
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
# Keys that each conversation of a kind has; no other kind has them all (`marks_of` a row).
MARKS = {
    kind: {name for name, field in record.model_fields.items() if field.is_required()}
    for kind, (record, _) in KINDS.items()
}
MARKS["huggingchat"].add("messages.from")  # of messages alone are rows of many kinds


def marks_of(row: dict) -> set[str]:
    """The keys of a row and, behind a dot, those of the objects in its lists."""
    items = [(key, item) for key, value in row.items() if isinstance(value, list) for item in value]
    return row.keys() | {f"{key}.{k}" for key, item in items if type(item) is dict for k in item}

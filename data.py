"""Records of users and shown lists: JSONL in and out, checks, splits by user, cuts by time.

    python data.py check users.jsonl
    python data.py import chatgpt conversations.json --out users.jsonl  # sharegpt, wildchat, locomo
    python data.py export trl runs/tiny --out pairs.jsonl     # for TRL's DPOTrainer

Every bad line is reported as `file:line: field: reason`, all of them up to a limit, and never with
the content of the row: these are people's histories.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import hashlib
import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from tqdm import tqdm

from config import UserError, atomic_path, read_json, script


class DataError(UserError):
    """Bad lines of one file, one `file:line: field: reason` each."""


def _one_line(value):
    """Collapse space and control characters; drop lone surrogates, which nothing can encode."""
    if not isinstance(value, str):
        return value
    value = re.sub(r"[\ud800-\udfff]", "", value)
    return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", value).split())


def _label(key) -> str:
    """A key of a row, safe and short enough for a message."""
    return _one_line(str(key))[:40]


def _stamp(value):
    """ISO 8601 text, with or without a zone, to naive UTC."""
    if value is None:
        return None
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment
    except (TypeError, ValueError, OverflowError):  # overflow: in UTC before year 1
        raise ValueError("neither an ISO 8601 time nor null") from None


Text = Annotated[str, BeforeValidator(_one_line)]  # one line, encodable, perhaps empty
Name = Annotated[Text, StringConstraints(min_length=1, max_length=200)]
Stamp = Annotated[datetime | None, BeforeValidator(_stamp)]
Sentence = Annotated[Text, StringConstraints(min_length=1)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _count_extra(cls, value, info: ValidationInfo):
        """Count the keys that no field takes in the reader's Counter, as `record.key`."""
        if info.context is not None and isinstance(value, dict):
            extra = value.keys() - cls.model_fields.keys()
            info.context.update(f"{cls.__name__.lower()}.{_label(key)}" for key in extra)
        return value


class Message(_Record):
    role: Literal["user", "assistant", "system"]
    content: Text


class Session(_Record):
    session_id: Name
    timestamp: Stamp = None
    summary: Annotated[Text | None, AfterValidator(lambda text: text or None)] = None
    messages: list[Message] | None = None

    @model_validator(mode="after")
    def _has_content(self):
        if not self.summary and not any(m.content for m in self.messages or ()):
            raise ValueError("summary: neither a summary nor messages")
        return self


class User(_Record):
    user_id: Name
    profile: dict[Text, Text] | None = None
    sessions: list[Session]


class Impression(_Record):
    user_id: Name
    timestamp: Stamp = None
    starters: Annotated[list[Sentence], Field(min_length=1)]
    clicked: list[Annotated[int, Field(ge=0)]]
    sessions_after: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _clicked_exists(self):
        if any(i >= len(self.starters) for i in self.clicked):
            raise ValueError("clicked: names a starter that was not shown")
        return self


# ---------------------------------------------------------------------------------- read and write


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    try:
        with open(path, "rb") as file:
            yield from enumerate(file, 1)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no number in JSON")


def _json(text: bytes):
    """Return the one JSON value of a line or a file, or raise ValueError with the reason."""
    try:
        return json.loads(text.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:  # NaN, Infinity, an integer of thousands of digits
        raise ValueError(f"not JSON ({error})") from None


def _parse(line: bytes) -> dict:
    """Return the one JSON object of a line, or raise ValueError with `field: reason`."""
    try:
        value = _json(line)
    except ValueError as error:
        raise ValueError(f"line: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("line: not a JSON object")
    return value


def _reasons(error: ValidationError) -> Iterator[str]:
    """Yield `field: reason` for each fault that pydantic found in one row."""
    for item in error.errors(include_input=False, include_url=False):
        where = ".".join(map(_label, item["loc"]))
        reason = item["msg"].removeprefix("Value error, ")
        if item["type"] == "value_error" and re.match(r"[a-z]+: ", reason):  # names its own field
            yield f"{where}.{reason}" if where else reason
        else:
            yield f"{where or 'line'}: {reason}"


class _Faults:
    """Faults of rows: the first `limit` as lines for a DataError, the rest as a count."""

    def __init__(self, limit: int):
        self.lines, self.found, self.limit = [], 0, limit

    def add(self, place: str, error: ValueError) -> None:
        """Note a row's ValidationError, or its ValueError with `field: reason`."""
        reasons = list(_reasons(error)) if isinstance(error, ValidationError) else [str(error)]
        self.lines += [f"{place}: {text}" for text in reasons[: self.limit - len(self.lines)]]
        self.found += len(reasons)

    def refuse(self) -> None:
        if self.found:
            rest = self.found - len(self.lines)
            raise DataError("\n".join(self.lines + [f"... and {rest} more"] * bool(rest)))


def _read(path: str | Path, record: type[BaseModel], max_errors: int, check=None) -> list:
    """Read each row as a `record`; `check(row)` refuses one by ValueError with `field: reason`."""
    rows, faults, extra = [], _Faults(max_errors), Counter()
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = record.model_validate(_parse(line), context=extra)
            if check:
                check(row)
            rows.append(row)
        except ValueError as error:  # a ValidationError is one too
            faults.add(f"{path}:{number}", error)
    faults.refuse()
    if not rows:
        raise DataError(f"{path}:1: line: the file holds no rows")
    if extra:
        keys = [f"{name} ({count} times)" for name, count in extra.most_common(20)]
        more = f" and {len(extra) - 20} more" if len(extra) > 20 else ""
        print(f"{path}: ignored keys: {', '.join(keys)}{more}", file=sys.stderr)
    return rows


def read_users(path: str | Path, max_errors: int = 20) -> list[User]:
    """Read users.jsonl; sessions come back in time order where all have a time.

    Raises DataError that lists every bad line.
    """
    seen = set()

    def once(user: User):
        if user.user_id in seen:
            raise ValueError("user_id: stands on an earlier line too")
        seen.add(user.user_id)

    return [_sorted(user) for user in _read(path, User, max_errors, once)]


def _sorted(user: User) -> User:
    if all(s.timestamp for s in user.sessions):
        return user.model_copy(
            update={"sessions": sorted(user.sessions, key=lambda s: s.timestamp)}
        )
    return user


def read_impressions(path: str | Path, max_errors: int = 20) -> list[Impression]:
    """Read impressions.jsonl. Raises DataError that lists every bad line."""
    return _read(path, Impression, max_errors)


def _write(path: str | Path, rows: Iterable[BaseModel]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(row.model_dump_json(exclude_unset=True) + "\n")


def write_users(path: str | Path, users: Iterable[User]) -> None:
    _write(path, users)


def write_impressions(path: str | Path, impressions: Iterable[Impression]) -> None:
    _write(path, impressions)


# ----------------------------------------------------------------------------------- splits, cuts


def split_users(user_ids: Iterable[str], shares: dict[str, float], seed: int) -> dict[str, str]:
    """Assign each user to a split by a hash of its id: adding users moves nobody."""
    names, ends = list(shares), list(itertools.accumulate(shares.values()))
    result = {}
    for user_id in user_ids:
        bits = hashlib.sha256(f"{seed}/{user_id}".encode()).digest()[:8]
        point = int.from_bytes(bits, "big") / 2**64 * ends[-1]  # in [0, sum of shares]
        result[user_id] = names[min(bisect.bisect_right(ends, point), len(names) - 1)]
    return result


def cut_sessions(user: User, share: float) -> tuple[list[Session], list[Session]]:
    """Return (history, future): the first `share` of the sessions, rounded up, and the rest.

    From two sessions on neither side is empty; a single session is history.
    """
    n = len(user.sessions)
    k = math.ceil(round(share * n, 6))  # 0.55 * 100 is 55.000000000000007
    k = min(max(1, k), n - 1) if n > 1 else n
    return user.sessions[:k], user.sessions[k:]


def cut_time(user: User, share: float) -> datetime | None:
    """Return when the future of `cut_sessions` begins; None if there is none or it has no time."""
    future = cut_sessions(user, share)[1]
    return future[0].timestamp if future else None


_SCRIPTS = {
    "zh": re.compile(r"[\u3400-\u9fff]"),  # a character of Chinese says what a word does
    "en": re.compile(r"[A-Za-z\u00c0-\u024f]+"),
    "other": re.compile(r"[^\W\d_A-Za-z\u00c0-\u024f\u3400-\u9fff]+"),
}


def language(text: str) -> str:
    """Return the script that dominates: "zh" (Chinese characters), "en" (Latin words), "other"."""
    counts = {name: len(script.findall(text)) for name, script in _SCRIPTS.items()}
    return max(counts, key=counts.get) if any(counts.values()) else "other"


# -------------------------------------------------------------------- conversations from elsewhere
#
# One record per kind of file. Its sessions() yields (user_id, session_id, timestamp, messages) with
# messages as (role, text or None); a user_id of None is the one person whose export the file is.

_Sessions = Iterator[tuple[str | None, str, datetime | None, list[tuple[str, str | None]]]]


def _unix(seconds: float) -> datetime:
    """Seconds since 1970 to naive UTC."""
    try:
        return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)
    except (ValueError, OverflowError, OSError):
        raise ValueError("not in the years 1 to 9999 as seconds since 1970") from None


class ChatGPTAuthor(_Record):
    role: str


class ChatGPTContent(_Record):
    content_type: str
    parts: list[Any] | None = None


class ChatGPTMessage(_Record):
    author: ChatGPTAuthor
    content: ChatGPTContent | None = None
    recipient: str | None = None
    create_time: float | None = None

    def text(self) -> str | None:
        """Its text and the transcripts of speech; None for images, code and calls of tools."""
        if not self.content or self.content.content_type not in ("text", "multimodal_text"):
            return None
        if self.recipient not in (None, "all"):  # the name of a tool
            return None
        parts = [p.get("text") if isinstance(p, dict) else p for p in self.content.parts or ()]
        return "\n".join(part for part in parts if isinstance(part, str))


class ChatGPTNode(_Record):
    message: ChatGPTMessage | None = None
    parent: str | None = None


class ChatGPT(_Record):
    """A conversation in conversations.json of ChatGPT's export: a tree of messages."""

    conversation_id: Name | None = None
    id: Name | None = None
    create_time: Annotated[float, AfterValidator(_unix)] | None = None
    mapping: dict[str, ChatGPTNode]
    current_node: str | None = None

    def sessions(self) -> _Sessions:
        session_id = self.conversation_id or self.id
        if not session_id:
            raise ValueError("conversation_id: missing, and so is id")
        shown = [node.message for node in self._branch() if node.message]
        said = [(m.author.role, m.text()) for m in shown if m.author.role in ("user", "assistant")]
        yield None, session_id, self.create_time, said

    def _branch(self) -> list[ChatGPTNode]:
        """Root to the node shown last; edits and regenerations hang on other branches."""
        node, branch = self.current_node, {}
        if node not in self.mapping:  # then the latest leaf
            parents = {each.parent for each in self.mapping.values()}
            leaves = [key for key in self.mapping if key not in parents]
            node = max(reversed(leaves), key=self._time, default=None)
        while node in self.mapping and node not in branch:  # a lost parent or a cycle ends it
            branch[node] = self.mapping[node]
            node = branch[node].parent
        return list(branch.values())[::-1]

    def _time(self, key: str) -> float:
        message = self.mapping[key].message
        return (message and message.create_time) or -math.inf


_SHAREGPT_ROLES = {"human": "user", "user": "user", "system": "system"} | dict.fromkeys(
    ("gpt", "chatgpt", "assistant", "bing", "bard"), "assistant"
)


class ShareGPTMessage(_Record):
    speaker: Literal[*_SHAREGPT_ROLES] = Field(alias="from")
    value: str | None


class ShareGPT(_Record):
    """A ShareGPT conversation; it names no person, so the parts of one id count as one user's."""

    id: Name
    conversations: list[ShareGPTMessage]

    def sessions(self) -> _Sessions:
        said = [(_SHAREGPT_ROLES[m.speaker], m.value) for m in self.conversations]
        yield _part(self.id)[0], self.id, None, said


def _part(name: str) -> tuple[str, int]:
    """Split "abc_3" into ("abc", 3); a name without a number is part 0."""
    match = re.fullmatch(r"(.+)_([0-9]{1,9})", name)
    return (match[1], int(match[2])) if match else (name, 0)


class WildChatMessage(_Record):
    role: Literal["user", "assistant", "system"]
    content: str | None
    hashed_ip: Text | None = None


class WildChat(_Record):
    """A WildChat conversation; a hashed address counts as a user."""

    conversation_hash: Name
    timestamp: Stamp = None
    hashed_ip: Text | None = None
    conversation: list[WildChatMessage]

    def sessions(self) -> _Sessions:
        addresses = [self.hashed_ip, *(m.hashed_ip for m in self.conversation)]
        user_id = next(filter(None, addresses), self.conversation_hash)
        said = [(m.role, m.content) for m in self.conversation]
        yield user_id, self.conversation_hash, self.timestamp, said


class LocomoMessage(_Record):
    speaker: Name
    text: str | None


class LocomoTalk(_Record):
    speaker_a: Name
    speaker_b: Name
    sessions: dict[str, list[LocomoMessage]]
    times: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value):
        """Gather the keys session_1, session_1_date_time, session_2, ... in numeric order."""
        if not isinstance(value, dict):
            return value
        keys = [key for key in value if re.fullmatch(r"session_[0-9]{1,9}", key)]
        keys.sort(key=lambda key: _part(key)[1])
        times = {key: value.get(f"{key}_date_time") for key in keys}
        return value | {"sessions": {key: value[key] for key in keys}, "times": times}


class Locomo(_Record):
    """A LoCoMo sample: two people over many sessions, each a user with the other as assistant."""

    sample_id: Name
    conversation: LocomoTalk

    def sessions(self) -> _Sessions:
        talk = self.conversation
        for name, (key, lines) in itertools.product(
            (talk.speaker_a, talk.speaker_b), talk.sessions.items()
        ):
            stamp = None
            with contextlib.suppress(TypeError, ValueError):  # what cannot be read is unknown
                stamp = datetime.strptime(talk.times[key], "%I:%M %p on %d %B, %Y")
            said = [("user" if m.speaker == name else "assistant", m.text) for m in lines]
            yield f"{self.sample_id}/{name}", key, stamp, said


KINDS = {  # kind -> record of a conversation, what the file usually is
    "chatgpt": (ChatGPT, "a JSON array"),
    "sharegpt": (ShareGPT, "a JSON array or JSONL"),
    "wildchat": (WildChat, "parquet or JSONL"),
    "locomo": (Locomo, "a JSON array"),
}


def _marks(kind: str) -> set[str]:
    """Keys that each conversation of a kind has; no other kind has them all."""
    return {name for name, field in KINDS[kind][0].model_fields.items() if field.is_required()}


def _wrong_kind(path: str | Path, kind: str, reason: str, keys=frozenset()) -> DataError:
    """Say what was expected, and which other kind has rows with these keys."""
    expected = f"{KINDS[kind][1]} of conversations with {' and '.join(sorted(_marks(kind)))}"
    other = next((f"; this looks like {k}" for k in KINDS if _marks(k) <= keys), "")
    return DataError(f"{path}: {reason}; {kind} is {expected}{other}")


def _parquet(path: str | Path) -> Iterator[dict]:
    """Yield the rows of a parquet file batch by batch, only with what a WildChat record takes."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    message = r"conversation\.(\w+\.){1,2}(role|content|hashed_ip)"  # of conversation.list.element
    wanted = rf"conversation_hash|timestamp|hashed_ip|{message}"
    try:
        with ParquetFile(path) as file:
            leaves = [file.schema.column(i).path for i in range(len(file.schema))]
            columns = [leaf for leaf in leaves if re.fullmatch(wanted, leaf)]
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({type(error).__name__})") from None


def _places(path: str | Path, kind: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a JSON array, parquet or JSONL, where a row is the bytes of a line."""
    try:
        with open(path, "rb") as file:
            head = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        if head.startswith(b"PAR1"):
            rows = _parquet(path)
        elif head.startswith(b"["):
            rows = _json(Path(path).read_bytes())
        else:
            yield from ((f"{path}:{n}", line) for n, line in _lines(path) if line.strip())
            return
        for number, row in enumerate(rows, 1):
            yield f"{path}: conversation {number}", row
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # of _json, before the first row
        raise _wrong_kind(path, kind, str(error)) from None


def _conversations(path: str | Path, kind: str, faults: _Faults) -> Iterator[tuple[str, dict]]:
    """Yield (place, JSON object); rows that are none go to `faults`.

    Raises DataError if no row looks like one of this kind, or the file cannot be read at all.
    """
    known, keys = False, set()
    for place, row in _places(path, kind):
        try:
            row = _parse(row) if isinstance(row, bytes) else row
            if not isinstance(row, dict):
                raise ValueError("row: not a JSON object")
        except ValueError as error:
            faults.add(place, error)
            continue
        keys = keys or row.keys()
        known = known or _marks(kind) <= row.keys()
        yield place, row
    if not known:
        raise _wrong_kind(path, kind, "no such conversation in it", keys)


def _alone(user_id: str, session_id: str, timestamp: datetime | None, said: list) -> User:
    """A user with this session alone, or with none if they say nothing in it."""
    messages = [Message(role=role, content=text or "") for role, text in said]
    fields = {"session_id": session_id, "timestamp": timestamp}
    fields["messages"] = [message for message in messages if message.content]
    asked = any(message.role == "user" for message in fields["messages"])
    return User.model_validate({"user_id": user_id, "sessions": [fields] if asked else []})


def import_users(
    kind: str, paths: list[str | Path], out: str | Path, me: str = "me", max_errors: int = 20
) -> str:
    """Write conversations of a kind, in one file or several, as users; return what was written.

    Until all are read, sessions are held as JSON text, which is smaller than records. Raises
    DataError that lists every faulty conversation.
    """
    faults, left_out, messages = _Faults(max_errors), Counter(), 0
    held: dict[str, dict[str, bytes]] = {}  # user_id -> session_id -> session
    for path in paths:
        rows = _conversations(path, kind, faults)
        for place, row in tqdm(rows, "import", disable=None, leave=False):
            try:
                parts = KINDS[kind][0].model_validate(row).sessions()
                users = [_alone(me if owner is None else owner, *part) for owner, *part in parts]
            except ValueError as error:  # a ValidationError is one too
                faults.add(place, error)
                continue
            for user in users:
                if not user.sessions:
                    left_out["without a user's words"] += 1
                    continue
                session, sessions = user.sessions[0], held.setdefault(user.user_id, {})
                if session.session_id in sessions:
                    left_out["seen before"] += 1
                    continue
                sessions[session.session_id] = session.model_dump_json(exclude_unset=True).encode()
                messages += len(session.messages)
    faults.refuse()
    if not held:
        raise DataError(f"{paths[0]}: no conversation with a user's words in it")

    def users_in_order() -> Iterator[User]:
        for user_id, texts in held.items():
            sessions = [Session.model_validate_json(text) for text in texts.values()]
            if kind == "sharegpt":
                sessions.sort(key=lambda session: _part(session.session_id)[1])
            yield _sorted(User(user_id=user_id, sessions=sessions))

    write_users(out, users_in_order())
    n_sessions = sum(map(len, held.values()))
    made = f"{len(held)} users, {n_sessions} sessions ({messages} messages) written to {out}"
    return made + "".join(f"; {n} conversations {why} left out" for why, n in left_out.items())


# ------------------------------------------------------------------------------------------ check


def _is_robot(user: User) -> bool:
    """At least 20 sessions and nine in ten of them word for word the same."""
    texts = Counter(s.summary for s in user.sessions if s.summary)
    n = len(user.sessions)
    return n >= 20 and max(texts.values(), default=0) >= 0.9 * n


def _spread(values: list[int]) -> str:
    return f"min {min(values)}, median {median(values):g}, max {max(values)}" if values else "none"


def describe_users(users: list[User]) -> dict[str, object]:
    """Return what a users file holds, as label -> figure."""
    sessions = [s for u in users for s in u.sessions]
    texts = [s.summary for s in sessions if s.summary]
    distinct = sum(len({s.summary for s in u.sessions if s.summary}) for u in users)
    languages = Counter(map(language, texts)).most_common()
    return {
        "users": len(users),
        "sessions": len(sessions),
        "sessions per user": _spread([len(u.sessions) for u in users]),
        "exact repeats within a user": f"{1 - distinct / len(texts):.1%}" if texts else "none",
        "languages": ", ".join(f"{name} {n / len(texts):.1%}" for name, n in languages) or "none",
        "characters per summary": _spread([len(text) for text in texts]),
        "sessions without a summary": len(sessions) - len(texts),
        "sessions without a timestamp": sum(s.timestamp is None for s in sessions),
        "users without a profile": sum(not u.profile for u in users),
        "users without a session": sum(not u.sessions for u in users),
        "likely robots": sum(map(_is_robot, users)),
    }


def describe_impressions(impressions: list[Impression]) -> dict[str, object]:
    """Return what an impressions file holds, as label -> figure."""
    shown = Counter(slot for i in impressions for slot in range(len(i.starters)))
    clicked = Counter(slot for i in impressions for slot in set(i.clicked))
    by_slot = [f"{clicked[slot]} ({clicked[slot] / n:.1%})" for slot, n in sorted(shown.items())]
    unclicked = sum(not i.clicked for i in impressions)
    return {
        "lists": len(impressions),
        "users": len({i.user_id for i in impressions}),
        "starters per list": _spread([len(i.starters) for i in impressions]),
        "distinct starters": len({text for i in impressions for text in i.starters}),
        "starters clicked": f"{clicked.total() / shown.total():.1%}",
        "lists without a click": f"{unclicked / len(impressions):.1%}",
        "clicks by slot": ", ".join(by_slot),
        "lists without a timestamp": sum(i.timestamp is None for i in impressions),
        "lists without sessions_after": sum(i.sessions_after is None for i in impressions),
    }


# ----------------------------------------------------------------------- what the generator reads


def plain(text: str) -> str:
    """Text that can neither open or close a <sug> field nor part two starters."""
    return text.replace("<", "(").replace(">", ")").replace("&&", "&")


def list_text(starters: list[str]) -> str:
    return f"<sug> {' && '.join(map(plain, starters))} </sug>"


def export_trl(run: str | Path) -> Iterator[dict]:
    """Preference pairs of a finished run's DPO rounds, as TRL's DPOTrainer takes them.

    Conversations: the prompt's chat template is the tokenizer's, as in training here. Raises
    UserError if the folder is no run with DPO rounds.
    """
    rounds = sorted(Path(run).glob("dpo/round*/pairs.json"))
    if not rounds:
        raise UserError(f"{run}: no dpo/round*/pairs.json; run train.py --stage dpo first")
    settings = OmegaConf.load(Path(run) / "config.yaml").generator
    for path in rounds:
        for pair in read_json(path):
            lines = "".join(f"\n- {plain(interest)}" for interest in pair["interests"])
            text = settings.instruction.format(n=settings.list_size) + lines
            for rejected in pair["rejected"].values():
                sides = {"chosen": pair["chosen"], "rejected": rejected}
                yield {"prompt": [{"role": "user", "content": text}]} | {
                    side: [{"role": "assistant", "content": list_text(starters)}]
                    for side, starters in sides.items()
                }


def _holds_impressions(path: str | Path) -> bool:
    """Decide by the keys of the first line that is a JSON object."""
    for _, line in _lines(path):
        with contextlib.suppress(ValueError):
            return "starters" in _parse(line)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="say what a users or impressions file holds")
    check.add_argument("file")
    importer = commands.add_parser("import", help="conversations from elsewhere as users.jsonl")
    importer.add_argument("kind", choices=KINDS)
    importer.add_argument("file", nargs="+", help="one file or the parts of one data set")
    importer.add_argument("--out", required=True)
    importer.add_argument("--user", default="me", help="user_id for a chatgpt export")
    export = commands.add_parser("export", help="preference pairs of a run for another trainer")
    export.add_argument("kind", choices=["trl"])
    export.add_argument("run", help="folder of a finished run")
    export.add_argument("--out", required=True)
    arguments = parser.parse_args()
    if arguments.command == "import":
        print(import_users(arguments.kind, arguments.file, arguments.out, arguments.user))
        return
    if arguments.command == "export":
        lines = [json.dumps(pair, ensure_ascii=False) for pair in export_trl(arguments.run)]
        with atomic_path(arguments.out) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{len(lines)} pairs written to {arguments.out}")
        return
    path = arguments.file
    figures = (
        describe_impressions(read_impressions(path))
        if _holds_impressions(path)
        else describe_users(read_users(path))
    )
    print("\n".join(f"{label + ':':30} {figure}" for label, figure in figures.items()))


if __name__ == "__main__":
    script(main)

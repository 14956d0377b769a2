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
from typing import Annotated, Literal

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
    field_validator,
    model_validator,
)

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


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _count_extra(cls, value, info: ValidationInfo):
        """Count the keys that no field takes in the reader's Counter, as `record.key`."""
        if info.context is not None and isinstance(value, dict):
            extra = value.keys() - cls.model_fields.keys()
            info.context.update(f"{cls.__name__.lower()}.{_label(key)}" for key in extra)
        return value


class Message(Record):
    role: Literal["user", "assistant", "system"]
    content: Text


class Session(Record):
    session_id: Name
    timestamp: Stamp = None
    summary: Annotated[Text | None, AfterValidator(lambda text: text or None)] = None
    messages: list[Message] | None = None

    @model_validator(mode="after")
    def _has_content(self):
        if not self.summary and not any(m.content for m in self.messages or ()):
            raise ValueError("summary: neither a summary nor messages")
        return self


def each_once(sessions: list[Session]) -> list[Session]:
    """The sessions; raises ValueError if two have one id."""
    if len({s.session_id for s in sessions}) < len(sessions):
        raise ValueError("a session_id stands twice")
    return sessions


class User(Record):
    user_id: Name
    profile: dict[Text, Text] | None = None
    sessions: list[Session]

    @field_validator("sessions")
    @classmethod
    def _ids_stand_once(cls, sessions):
        return each_once(sessions)


class Impression(Record):
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


def lines_of(path: str | Path) -> Iterator[tuple[int, bytes]]:
    try:
        with open(path, "rb") as file:
            yield from enumerate(file, 1)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no number in JSON")


def parse_json(text: bytes):
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


def parse_line(line: bytes) -> dict:
    """Return the one JSON object of a line, or raise ValueError with `field: reason`."""
    try:
        value = parse_json(line)
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


class Faults:
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
    rows, faults, extra = [], Faults(max_errors), Counter()
    for number, line in lines_of(path):
        if not line.strip():
            continue
        try:
            row = record.model_validate(parse_line(line), context=extra)
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

    return [in_time_order(user) for user in _read(path, User, max_errors, once)]


def in_time_order(user: User) -> User:
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


def export_trl(run: str | Path) -> Iterator[dict]:
    """Preference pairs of a finished run's DPO rounds, as TRL's DPOTrainer takes them.

    Conversations: the prompt's chat template is the tokenizer's, as in training here, but interests
    that went beyond generator.max_prompt_tokens there are not left out. Raises UserError if the
    folder is no run with DPO rounds.
    """
    file, paths = Path(run) / "config.yaml", []
    if file.is_file():
        config = OmegaConf.load(file)
        paths = [Path(run) / f"dpo/round{n + 1}/pairs.json" for n in range(config.dpo.rounds)]
    if not (paths := [path for path in paths if path.is_file()]):
        raise UserError(f"{run}: no dpo/round*/pairs.json; run train.py --stage dpo first")
    settings = config.generator
    for path in paths:
        for pair in read_json(path):
            lines = "".join(f"\n- {llm.plain(interest)}" for interest in pair["interests"])
            text = settings.instruction.format(n=settings.list_size) + lines
            for rejected in pair["rejected"].values():
                sides = {"chosen": pair["chosen"], "rejected": rejected}
                yield {"prompt": [{"role": "user", "content": text}]} | {
                    side: [{"role": "assistant", "content": llm.format_starters(starters)}]
                    for side, starters in sides.items()
                }


def _holds_impressions(path: str | Path) -> bool:
    """Decide by the keys of the first line that is a JSON object."""
    for _, line in lines_of(path):
        with contextlib.suppress(ValueError):
            return "starters" in parse_line(line)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="say what a users or impressions file holds")
    check.add_argument("file")
    importer = commands.add_parser("import", help="conversations from elsewhere as users.jsonl")
    importer.add_argument("kind", choices=["chatgpt", "sharegpt", "wildchat", "locomo"])
    importer.add_argument("file", nargs="+", help="one file or the parts of one data set")
    importer.add_argument("--out", required=True)
    importer.add_argument("--user", default="me", help="user_id for a chatgpt export")
    export = commands.add_parser("export", help="preference pairs of a run for another trainer")
    export.add_argument("kind", choices=["trl"])
    export.add_argument("run", help="folder of a finished run")
    export.add_argument("--out", required=True)
    arguments = parser.parse_args()
    if arguments.command == "import":
        from tools import importers

        if any(Path(arguments.out).resolve() == Path(f).resolve() for f in arguments.file):
            raise UserError(f"--out {arguments.out}: is the file to be imported")
        print(importers.import_users(arguments.kind, arguments.file, arguments.out, arguments.user))
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

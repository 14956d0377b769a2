"""Records of users and shown lists: JSONL in and out, checks, splits by user, cuts by time.

    python data.py check users.jsonl

Every bad line is reported as `file:line: field: reason`, all of them up to a limit, and never with
the content of the row: these are people's histories.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

from pydantic import (
    AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints,
    ValidationError, model_validator,
)

from config import UserError, atomic_path, script


class DataError(UserError):
    """Bad lines of one file, one `file:line: field: reason` each."""


def _one_line(value):
    """Collapse white space and control characters; lone surrogates cannot be encoded, so drop them."""
    if not isinstance(value, str):
        return value
    value = re.sub(r"[\ud800-\udfff]", "", value)
    return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", value).split())


def _stamp(value):
    """ISO 8601 text, with or without a zone, to naive UTC."""
    if value is None or isinstance(value, datetime):
        return value
    if not isinstance(value, str):
        raise ValueError("an ISO 8601 time or null is expected")
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("not an ISO 8601 time") from None
    return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment


Text = Annotated[str, BeforeValidator(_one_line)]
Name = Annotated[Text, StringConstraints(min_length=1, max_length=200)]
Stamp = Annotated[datetime | None, BeforeValidator(_stamp)]
Sentence = Annotated[Text, StringConstraints(min_length=1)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


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
    profile: dict[str, Text] | None = None
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


def _lines(path: str | Path):
    try:
        with open(path, "rb") as file:
            yield from enumerate(file, 1)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _parse(line: bytes):
    """One JSON object, or ValueError with `field: reason`."""
    def refuse(name):
        raise ValueError(f"line: {name} is not JSON")

    try:
        value = json.loads(line.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError:
        raise ValueError("line: not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line: not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("line: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("line: not a JSON object")
    return value


def _reasons(error: ValidationError) -> list[str]:
    found = []
    for item in error.errors(include_input=False, include_url=False):
        where = ".".join(map(str, item["loc"]))
        reason = item["msg"].removeprefix("Value error, ")
        if item["type"] == "value_error" and re.match(r"[a-z]+: ", reason):  # names its own field
            field, reason = reason.split(": ", 1)
            where = f"{where}.{field}" if where else field
        found.append(f"{where or 'line'}: {reason}")
    return found


def _read(path: str | Path, record: type[BaseModel], max_errors: int, check=None) -> list:
    rows, errors, extra = [], [], Counter()
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = _parse(line)
            extra.update(value.keys() - record.model_fields.keys())
            sessions = value.get("sessions") if record is User else None
            for session in sessions if isinstance(sessions, list) else ():
                if isinstance(session, dict):
                    extra.update(f"sessions.{k}" for k in session.keys() - Session.model_fields.keys())
            row = record.model_validate(value)
            if check:
                check(row)
            rows.append(row)
        except ValidationError as error:
            errors += [f"{path}:{number}: {reason}" for reason in _reasons(error)]
        except ValueError as error:
            errors.append(f"{path}:{number}: {error}")
    if errors:
        more = f"\n... and {len(errors) - max_errors} more" if len(errors) > max_errors else ""
        raise DataError("\n".join(errors[:max_errors]) + more)
    if not rows:
        raise DataError(f"{path}:1: line: the file holds no rows")
    if extra:
        keys = ", ".join(f"{name} ({n}x)" for name, n in sorted(extra.items()))
        print(f"{path}: ignored keys: {keys}", file=sys.stderr)
    return rows


def read_users(path: str | Path, max_errors: int = 20) -> list[User]:
    """Read users.jsonl; sessions come back in time order where all have a time.

    Raises DataError that lists every bad line.
    """
    seen = set()

    def once(user: User):
        if user.user_id in seen:
            raise ValueError("user_id: stands on an earlier line already")
        seen.add(user.user_id)

    return [_sorted(user) for user in _read(path, User, max_errors, once)]


def _sorted(user: User) -> User:
    if all(s.timestamp for s in user.sessions):
        return user.model_copy(
            update={"sessions": sorted(user.sessions, key=lambda s: s.timestamp)})
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
    result = {}
    for user_id in user_ids:
        bits = hashlib.sha256(f"{seed}/{user_id}".encode()).digest()[:8]
        point, name = int.from_bytes(bits, "big") / 2**64, None
        for name, share in shares.items():
            point -= share
            if point < 0:
                break
        result[user_id] = name
    return result


def cut_sessions(user: User, share: float) -> tuple[list[Session], list[Session]]:
    """(history, future): the first `share` of the sessions; both sides non-empty from two on."""
    n = len(user.sessions)
    k = min(max(1, math.ceil(share * n)), n - 1) if n > 1 else n
    return user.sessions[:k], user.sessions[k:]


def cut_time(user: User, share: float) -> datetime | None:
    """When the future of `cut_sessions` begins; None if there is none or it has no time."""
    future = cut_sessions(user, share)[1]
    return future[0].timestamp if future else None


_CJK = re.compile(r"[㐀-鿿]")
_LATIN = re.compile(r"[A-Za-z]+")


def language(text: str) -> str:
    """'zh' if Chinese characters outnumber Latin words, 'en' for Latin script, else 'other'."""
    chinese, latin = len(_CJK.findall(text)), len(_LATIN.findall(text))
    if chinese > latin:
        return "zh"
    return "en" if latin else "other"


# ------------------------------------------------------------------------------------------ check


def describe_users(users: list[User]) -> dict[str, object]:
    """What a users file holds, as label -> figure."""
    counts = [len(u.sessions) for u in users]
    sessions = [s for u in users for s in u.sessions]
    texts = [s.summary for s in sessions if s.summary]
    repeats = sum(len(t) - len(set(t)) for u in users
                  for t in [[s.summary for s in u.sessions if s.summary]])
    robots = [u for u in users if len(u.sessions) >= 20 and
              Counter(s.summary for s in u.sessions).most_common(1)[0][1] >= 0.9 * len(u.sessions)]
    lengths = sorted(map(len, texts)) or [0]
    return {
        "users": len(users), "sessions": len(sessions),
        "sessions per user (min, median, max)":
            f"{min(counts)}, {median(counts):g}, {max(counts)}",
        "summaries that repeat the user's own, word for word":
            f"{repeats / max(1, len(texts)):.1%}",
        "languages": dict(Counter(map(language, texts)).most_common()),
        "summary length in characters (min, median, max)":
            f"{lengths[0]}, {median(lengths):g}, {lengths[-1]}",
        "sessions without a summary": len(sessions) - len(texts),
        "sessions without a time": sum(s.timestamp is None for s in sessions),
        "users without a profile": sum(not u.profile for u in users),
        "users without a session": counts.count(0), "likely robots": len(robots),
    }


def describe_impressions(impressions: list[Impression]) -> dict[str, object]:
    """What an impressions file holds, as label -> figure."""
    shown = Counter(slot for i in impressions for slot in range(len(i.starters)))
    clicked = Counter(slot for i in impressions for slot in set(i.clicked))
    return {
        "lists": len(impressions), "users": len({i.user_id for i in impressions}),
        "distinct starters": len({s for i in impressions for s in i.starters}),
        "lists without a click": f"{sum(not i.clicked for i in impressions) / len(impressions):.1%}",
        "click rate by slot": " ".join(f"{clicked[s] / shown[s]:.3f}" for s in sorted(shown)),
        "lists without a time": sum(i.timestamp is None for i in impressions),
        "lists without sessions_after": sum(i.sessions_after is None for i in impressions),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Say what a users or impressions file holds.")
    parser.add_argument("command", choices=["check"])
    parser.add_argument("file")
    path = parser.parse_args().file
    first = next((line for _, line in _lines(path) if line.strip()), b"{}")
    try:
        shown = "starters" in _parse(first)
    except ValueError:
        shown = False
    figures = describe_impressions(read_impressions(path)) if shown else describe_users(read_users(path))
    for label, figure in figures.items():
        print(f"{label}: {figure}")


if __name__ == "__main__":
    script(main)

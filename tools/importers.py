"""Conversations from elsewhere as users: exports of chat assistants, and shared data sets.

    python -m tools.logs import chatgpt conversations.json --out users.jsonl
    python -m tools.logs import mimics mimics_duo.jsonl --out dialogues.jsonl   # panes

A row without what its record needs (formats.py) is a fault, listed by its place and not its
content.
"""

from __future__ import annotations

import io
import itertools
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import data
from data import DataError, Faults, User
from files import progress
from tools.formats import KINDS, MARKS, ROLES, Mimics, Talk, part_number

ENTRIES = 1000  # files of a zip archive that are looked at
UNPACKED = 4 * 2**30  # bytes of one of them at most: an archive may promise terabytes


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
        sessions.sort(key=lambda session: part_number(session.session_id)[1])
    stamps = [s.timestamp for s in sessions if s.timestamp]
    if sum((a < b) - (a > b) for a, b in itertools.pairwise(stamps)) < 0:  # newest first
        sessions = sessions[::-1]
    # One without a time stays behind its neighbour, and turns no history around.
    known = itertools.accumulate((s.timestamp for s in sessions), lambda last, now: now or last)
    order = sorted(zip(known, range(len(sessions)), strict=True),
                   key=lambda item: item[0] or datetime.min)  # fmt: skip
    return User(user_id=user_id, sessions=[sessions[i] for _, i in order])


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

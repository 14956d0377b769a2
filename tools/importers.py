"""Conversations from elsewhere as users: exports of chat assistants, and shared data sets.

    python -m tools.logs import chatgpt conversations.json --out users.jsonl
    python -m tools.logs import mimics mimics_duo.jsonl --out dialogues.jsonl   # panes

A conversation or a message without what its record needs (formats.py) is passed over, counted, and
named on stderr by its place and not its content. An import of which nothing is left is refused.
"""

import io
import itertools
import json
import lzma
import os
import re
import struct
import sys
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import Field, model_validator

import data
from data import DataError, Faults, Record, User
from files import progress
from tools.formats import KINDS, MARKS, ROLES, Passed, Talk, marks_of, part_number

_GAP = re.compile("[\ufeff \t\r\n]*")  # between JSON values: joined files keep their marks
_NO_UTF8 = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of such bytes
_LENIENT = json.JSONDecoder(parse_constant=lambda name: None)  # NaN, where a null would do
WHOLE = 2**30  # bytes of JSON that are read at once: its values take several times as many


def _parquet(path: str | Path) -> Iterator[dict]:
    """Yield the rows of a parquet file batch by batch, only with what a record takes."""
    import pyarrow  # a second to import, and most files are JSON
    from pyarrow.parquet import ParquetFile

    message = r"conversation\.(\w+\.){1,2}(role|content|hashed_ip|timestamp)"  # .list.element.
    wanted = rf"conversation_(?:hash|id)|timestamp|tstamp|hashed_ip|{message}"
    try:
        with ParquetFile(path) as file:
            leaves = [file.schema.column(i).path for i in range(len(file.schema))]
            columns = [leaf for leaf in leaves if re.fullmatch(wanted, leaf)]
            # WildChat's other columns, of moderation, are most of its bytes.
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError, OSError) as error:  # its text may quote the file
        raise DataError(f"{path}: cannot be read as parquet ({type(error).__name__})") from None


def _rows(path: str | Path, faults: Faults, marks=frozenset()) -> Iterator[tuple[str, dict]]:
    """Yield (place, JSON object) of JSON arrays, objects, JSONL or parquet, also within a zip
    archive, there of the files with these marks; other rows are faults. Raises ValueError if a file
    is no JSON."""
    try:
        with open(path, "rb") as file:
            head = file.peek(4)[:4]
            if head[:2] == b"PK":  # by content: an ending may be anything
                yield from _unzipped(path, faults, marks)
            elif head == b"PAR1":
                yield from _objects(str(path), _parquet(path), faults)
            else:
                yield from _json(file, os.fstat(file.fileno()).st_size, str(path), faults)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _json(file: BinaryIO, size: int, name: str, faults: Faults) -> Iterator[tuple[str, dict]]:
    """Yield (place, JSON object) of an open file; arrays, UTF-16 and objects of several lines are
    read whole: JSON has no other way."""
    head = file.read(2**16)
    file.seek(0)
    if head.startswith(b"\x1f\x8b"):
        # Its size is not known before it is unpacked: no limit could be kept.
        raise ValueError("compressed by gzip; unpack it first")
    encoding = json.detect_encoding(head)  # by its mark, or by the zeros of ASCII in it
    wide = not encoding.startswith("utf-8") and any(head)
    if wide or _is_whole(head):
        if size > WHOLE:
            raise ValueError(f"{size:,} bytes; only {WHOLE:,} are read at once: write JSONL, UTF-8")
        try:
            text = file.read().decode(encoding, "strict" if wide else "surrogateescape")
        except UnicodeError:
            raise ValueError(f"neither UTF-8 nor {encoding.upper()}") from None
        if _is_whole(text[: 2**16].encode(errors="surrogateescape")):
            rows = _values(text, name, faults)
            if not wide and _NO_UTF8.search(text):  # a fault of its row, as in JSONL of its line
                rows = (ValueError("row: not UTF-8") if _NO_UTF8.search(json.dumps(
                    row, ensure_ascii=False)) else row for row in rows)  # fmt: skip
            yield from _objects(name, rows, faults)
            return
        # In UTF-8 a line ends at one byte, which UTF-16 has within others.
        file = io.BytesIO(text.encode(errors="surrogateescape"))
    yield from data.json_lines(file, name, faults, _LENIENT)


def _values(text: str, name: str, faults: Faults) -> Iterator:
    """Yield the rows of a file's JSON values, one behind the other as `cat` joins exports. One that
    is no JSON is a fault; raises ValueError if it is the first, or many are: no such file."""
    start = first = _GAP.match(text).end()
    broken = 0
    while start < len(text):
        try:
            value, end = _LENIENT.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            broken += 1
            if start == first or broken > 100:  # each costs a pass over the file, to tell its line
                raise ValueError(data.json_fault(error)) from None
            line = text.count("\n", 0, start) + 1
            faults.add(f"{name}:{line}", ValueError(f"line: {data.json_fault(error)}"))
            # Lines within a value are indented, mostly: the next that begins so is a value's.
            value, end = [], text.find(f"\n{text[first]}", start) + 1 or len(text)
        yield from value if isinstance(value, list) else [value]
        start = _GAP.match(text, end).end()


def _is_whole(head: bytes) -> bool:
    """Whether a file that begins so is of arrays, or of objects of several lines."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")  # a byte order mark
    first, newline, rest = start.partition(b"\n")
    # A row of JSONL that was cut does not end either, but another row follows it.
    goes_on = first.rstrip()[-1:] != b"}" and rest.lstrip()[:1] != b"{"
    return start.startswith(b"[") or (start.startswith(b"{") and bool(newline) and goes_on)


def _unzipped(path: str | Path, faults: Faults, marks: frozenset) -> Iterator[tuple[str, dict]]:
    """Yield (place, row) of an archive's JSON files, such as a whole export, in which a row has
    these marks; for want of one, of the first file."""
    of_kind, others, broken = False, [], None
    try:
        with zipfile.ZipFile(path) as archive:
            # A Mac adds files about files: __MACOSX/._name, or ._name beside the name.
            files = [f for f in archive.infolist() if "/._" not in f"/{f.filename}"
                     and f.filename.lower().endswith((".json", ".jsonl"))]  # fmt: skip
            if not files:
                raise ValueError("an archive without a .json or .jsonl file")
            for entry in files:  # some are of other things, whatever they are called
                name = f"{path}: {data.label(entry.filename)}"
                try:
                    with archive.open(entry) as file:
                        rows = _json(io.BufferedReader(file), entry.file_size, name, faults)
                        first = [*itertools.islice(rows, 100)]  # in a file all are of one kind
                        if any(marks <= marks_of(row) for _, row in first):
                            of_kind = True
                            yield from itertools.chain(first, rows)
                        others = others or first
                except ValueError as error:  # its neighbours may be whole
                    broken = broken or error
                    faults.add(name, ValueError(f"file: {error}"))
    # Which of them, depends on the byte that is damaged.
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, RuntimeError,
            NotImplementedError, EOFError, OSError):  # fmt: skip
        raise DataError(f"{path}: a zip archive that cannot be read; unpack it first") from None
    if not of_kind and broken:
        raise broken
    yield from [] if of_kind else others


def _objects(place: str, rows, faults: Faults) -> Iterator[tuple[str, dict]]:
    for number, row in enumerate(rows, 1):
        where = f"{place}: conversation {number}"
        if isinstance(row, dict):
            yield where, row
        else:
            fault = row if isinstance(row, ValueError) else ValueError("row: not a JSON object")
            faults.add(where, fault)


def _conversations(path: str | Path, kind: str, faults: Faults) -> Iterator[tuple[str, dict]]:
    """Yield (place, row); raises DataError if no row of the file looks like one of this kind."""
    expected = f"{KINDS[kind][1]} of conversations with {' and '.join(sorted(MARKS[kind]))}"
    right_kind, first_keys, told = False, set(), len(faults)
    try:
        for place, row in _rows(path, faults, MARKS[kind]):
            first_keys = first_keys or marks_of(row)
            right_kind = right_kind or MARKS[kind] <= marks_of(row)
            yield place, row
    except ValueError as error:  # of an array that is no JSON
        raise DataError(f"{path}: {error}; {kind} is {expected}") from None
    if not right_kind:  # rather than a fault for each of a million rows
        looks = next((f"; this looks like {k}" for k in KINDS if MARKS[k] <= first_keys), "")
        if not first_keys and faults[told:]:  # no row is JSON, or none an object
            looks = f"; {faults[told]}"
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

    Of a conversation that stands several times the latest state stays, and nothing if its user has
    no words in it any more. Until all are read, sessions are held as JSON text, which is smaller
    than records. What cannot be read is named on stderr. Raises DataError if nothing is left.
    """
    faults, left_out, passed = Faults(), Counter(), Passed()
    # user_id -> session_id -> (last update, messages, bytes of JSON: none without a user's words)
    texts: dict[str, dict[str, tuple]] = defaultdict(dict)
    accounts: dict[str, str] = {}  # session_id -> whose
    for path in paths:
        for place, row in progress(_conversations(path, kind, faults), f"import {path}"):
            passed.place = place
            try:
                talks = [*KINDS[kind][0].model_validate(row, context=passed).sessions()]
                users = [_user(talk, me) for talk in talks]
            except ValueError as error:  # a ValidationError is one too
                faults.add(place, error)
                continue
            for talk, user in zip(talks, users, strict=True):
                roles = [role for role, _ in talk.said if role.lower() not in ROLES]
                passed["messages of tools and other roles"] += len(roles)
                kept = user.sessions  # one or, without the user's words, none: this is a state too
                # Texts too: in whatever order the files come, the same state stays.
                state = (talk.updated or datetime.min, sum(len(s.messages) for s in kept),
                         "".join(s.model_dump_json(exclude_unset=True) for s in kept).encode())
                session_id = data.one_line(talk.session_id)  # as the record of a session has it
                earlier = texts[user.user_id].get(session_id)
                left_out["seen before"] += earlier is not None  # parts may overlap
                texts[user.user_id][session_id] = max(state, earlier or state)
                accounts |= {session_id: talk.account} if talk.account else {}
    if len({*accounts.values()}) > 1:  # of one alone it is that person's export
        for session_id, account in accounts.items():
            texts[account][session_id] = texts[data.one_line(me)].pop(session_id)
    for user_id, sessions in [*texts.items()] if kind == "sharegpt" else ():
        parts = sorted((part_number(name)[1], n) for name, (_, n, _) in sessions.items())
        # FastChat numbers a part by the messages before it; identity_0 and identity_1 are people.
        if parts[0][0] or any(i + n > after for (i, n), (after, _) in itertools.pairwise(parts)):
            for name in texts.pop(user_id):
                texts[name][name] = sessions[name]
    for user_id, sessions in [*texts.items()]:
        texts[user_id] = {name: state for name, state in sessions.items() if state[-1]}
        left_out["without a user's words"] += len(sessions) - len(texts[user_id])
    texts = {user_id: sessions for user_id, sessions in texts.items() if sessions}
    # An empty users file would only be refused by the next command.
    _pass_over(Faults(faults + passed.unread), texts, f"{paths[0]}: no conversation with a user's"
               " words in it")
    left_out["that cannot be read"] = faults.rows
    passed["messages that cannot be read"] = passed.unread.rows
    data.write_users(out, (_whole(kind, *item) for item in texts.items()))
    messages = sum(n for sessions in texts.values() for _, n, _ in sessions.values())
    counts = f"{len(texts)} users, {sum(map(len, texts.values()))} sessions ({messages} messages)"
    rest = "".join(f"; {n} conversations {why} left out" for why, n in left_out.items() if n)
    # Names with a dot are keys that no field takes: exports are full of them.
    passed_over = {what: n for what, n in passed.items() if n and "." not in what}
    rest += "".join(f"; {n} {what} passed over" for what, n in passed_over.items())
    return f"{counts} written to {out}{rest}"


def _pass_over(faults: Faults, rest, nothing: str) -> None:
    """Name what could not be read; raises DataError if there is no rest."""
    if not rest:
        faults.refuse()
        raise DataError(nothing)
    if faults:
        print(faults, file=sys.stderr)


def _whole(kind: str, user_id: str, texts: dict[str, tuple]) -> User:
    sessions = [data.Session.model_validate_json(text) for *_, text in texts.values()]
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

    A query that cannot be read is named on stderr. Raises DataError if nothing is left.
    """
    faults, rows, queries = Faults(), [], 0
    for path in paths:
        try:
            for place, row in _rows(path, faults):
                queries += 1  # over all files, so that no id stands twice
                try:
                    rows += Mimics.model_validate(row).dialogues(queries)
                except ValueError as error:  # a ValidationError is one too
                    faults.add(place, error)
        except ValueError as error:  # of an array that is no JSON
            raise DataError(f"{path}: {error}") from None
    _pass_over(faults, rows, f"{paths[0]}: no query with panes in it")
    data.write_dialogues(out, rows)
    clicked = sum(bool(row.clicked) for row in rows)
    rest = f"; {faults.rows} queries that cannot be read left out" if faults else ""
    return f"{len(rows)} panes of {queries} queries, {clicked} with clicks, written to {out}{rest}"

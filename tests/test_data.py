"""Readers refuse what cannot be used, line by line; splits and cuts keep their promises."""

import json
import random
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import llm

ROOT = Path(__file__).resolve().parent.parent
SECRET = "zebra-crossing"  # stands in every text of a valid row and must never reach a message


def user_row(i: int) -> dict:
    sessions = [
        {"session_id": f"s{k}", "timestamp": f"2026-05-0{k + 1}T09:00", "summary": f"{SECRET} {k}"}
        for k in range(3)
    ]
    sessions.append(
        {
            "session_id": "s3",
            "timestamp": None,
            "summary": None,
            "messages": [{"role": "user", "content": SECRET}],
        }
    )
    return {"user_id": f"u{i}", "profile": {"age": SECRET}, "sessions": sessions}


def impression_row(i: int) -> dict:
    return {
        "user_id": f"u{i}",
        "timestamp": "2026-05-01T09:00:00Z",
        "sessions_after": 3,
        "starters": [f"{SECRET} {k}" for k in range(5)],
        "clicked": [2],
    }


def write_rows(path: Path, rows: list) -> Path:
    """Write rows as JSONL; bytes are a line as it is."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def refusals(read, path: Path, **options) -> list[str]:
    with pytest.raises(data.DataError) as caught:
        read(path, **options)
    return str(caught.value).splitlines()


def user(n: int, stamps=True) -> data.User:
    row = {
        "user_id": "u",
        "sessions": [
            {
                "session_id": f"s{i}",
                "summary": f"text {i}",
                "timestamp": f"2026-01-{i % 28 + 1:02}" if stamps else None,
            }
            for i in range(n)
        ],
    }
    return data.User.model_validate(row)


# -------------------------------------------------------------------------------- malformed files

NOT_TEXT = (7, 1.5, True, [SECRET], {SECRET: 1})
NOT_A_LIST = (None, 7, SECRET, {"0": SECRET})
NOT_AN_OBJECT = (7, SECRET, [SECRET])
BAD_STAMPS = (
    7,
    True,
    "",
    "yesterday",
    "2026-13-01",
    "2026-05-01T25:00",
    "0001-01-01T00:00+10:00",
    [2026],
    f"2026-05-01 {SECRET}",
)
BAD_COUNTS = (-1, 1.0, True, "1", [1])
EMPTY = ("", "  \n\t ", "\u0000", "\ud800")
BAD_LINES = (  # (what stands in the file, field that is named)
    b"{",
    b"[1, 2]",
    b"null",
    b"17",
    b'"text"',
    b"{'user_id': 1}",
    b"{} {}",
    b"\xff\xfe{\x00}\x00",
    b'{"user_id": "\xe9"}',
    b'{"user_id": NaN}',
    b'{"x": [Infinity]}',
    b"[" * 200_000,
    b'{"a":' * 100_000,
    b'{"user_id": "u\x01"}',
    b'{"n": ' + b"9" * 5000 + b"}",
)

# Path to the value, values to refuse there, field that the message names if it is not the path.
USER_MUTATIONS = [
    (("user_id",), (None, *NOT_TEXT, *EMPTY, "x" * 201), None),
    (("profile",), NOT_AN_OBJECT, None),
    (("profile", "age"), (None, *NOT_TEXT), None),
    (("sessions",), NOT_A_LIST, None),
    (("sessions", 1), (None, *NOT_AN_OBJECT), None),
    (("sessions", 1, "session_id"), (None, *NOT_TEXT, *EMPTY), None),
    (("sessions", 1, "session_id"), ("s0",), "sessions"),  # stands twice
    (("sessions", 1, "timestamp"), BAD_STAMPS, None),
    (("sessions", 1, "summary"), NOT_TEXT, None),
    (("sessions", 1, "summary"), (None, *EMPTY), None),  # neither summary nor messages
    (("sessions", 3, "messages"), (None, []), "sessions.3.summary"),
    (("sessions", 3, "messages"), (7, SECRET, {"role": "user"}), None),
    (("sessions", 3, "messages", 0), (None, *NOT_AN_OBJECT), None),
    (("sessions", 3, "messages", 0, "role"), (None, SECRET, 7), None),
    (("sessions", 3, "messages", 0, "content"), (None, *NOT_TEXT), None),
    (("sessions", 3, "messages", 0, "content"), EMPTY, "sessions.3.summary"),
]
IMPRESSION_MUTATIONS = [
    (("user_id",), (None, *NOT_TEXT, *EMPTY), None),
    (("timestamp",), BAD_STAMPS, None),
    (("starters",), (*NOT_A_LIST, []), None),
    (("starters", 4), (None, *NOT_TEXT, *EMPTY), None),
    (("clicked",), NOT_A_LIST, None),
    (("clicked", 0), (None, *BAD_COUNTS), None),
    (("clicked", 0), (5, 10**9), "clicked"),
    (("sessions_after",), BAD_COUNTS, None),
]
REMOVALS = {
    "users": [
        ("user_id",),
        ("sessions",),
        ("sessions", 0, "session_id"),
        ("sessions", 0, "summary"),
        ("sessions", 3, "messages", 0, "role"),
        ("sessions", 3, "messages", 0, "content"),
    ],
    "impressions": [("user_id",), ("starters",), ("clicked",)],
}


def changed(row: dict, path: tuple, value=None, remove=False) -> dict:
    *parents, last = path
    target = row
    for key in parents:
        target = target[key]
    if remove:
        del target[last]
    else:
        target[last] = value
    return row


def malformed(rng: random.Random) -> list[tuple[str, dict | bytes, str]]:
    """(kind of file, a row that must be refused, field that the refusal must name)."""
    kinds = {
        "users": (user_row, USER_MUTATIONS),
        "impressions": (impression_row, IMPRESSION_MUTATIONS),
    }
    cases = []
    for kind, (row, mutations) in kinds.items():
        cases += [(kind, line, "line") for line in BAD_LINES]
        whole = json.dumps(row(0)).encode()
        for place in rng.sample(range(1, len(whole)), 20):
            cases += [
                (kind, whole[:place], "line"),
                (kind, whole[:place] + b"\xff" + whole[place:], "line"),
            ]
        cases += [
            (kind, changed(row(0), path, remove=True), ".".join(map(str, path)))
            for path in REMOVALS[kind]
        ]
        cases += [
            (kind, changed(row(0), path, value), field or ".".join(map(str, path)))
            for path, values, field in mutations
            for value in values
        ]
    return cases


def test_each_malformed_file_is_refused_with_its_line_and_field(tmp_path):
    rng = random.Random(0)
    cases = malformed(rng)
    assert len(cases) >= 200
    readers = {
        "users": (data.read_users, user_row),
        "impressions": (data.read_impressions, impression_row),
    }
    for kind, bad, field in cases:
        read, row = readers[kind]
        rows = [row(i) for i in range(1, 5)]
        number = rng.randint(1, 5)
        rows.insert(number - 1, bad)
        path = write_rows(tmp_path / "rows.jsonl", rows)
        lines = refusals(read, path)
        assert lines[0].startswith(f"{path}:{number}: {field}: "), (kind, bad, lines)
        assert len(lines) == 1, (kind, bad, lines)
        assert SECRET not in lines[0].removeprefix(str(path)), (kind, bad, lines)


def test_all_bad_lines_are_listed_up_to_the_limit(tmp_path, monkeypatch):
    rows = [b"", b"{", user_row(1), {"user_id": 3, "sessions": 3}, b"   ", user_row(1)]
    path = write_rows(tmp_path / "users.jsonl", rows)
    places = [(2, "line"), (4, "user_id"), (4, "sessions"), (6, "user_id")]
    lines = refusals(data.read_users, path)
    assert [
        line.startswith(f"{path}:{n}: {field}: ")
        for (n, field), line in zip(places, lines, strict=True)
    ] == [True] * 4
    monkeypatch.setattr(data, "MOST_FAULTS", 1)
    assert refusals(data.read_users, path) == [lines[0], "... and 3 more"]


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "users.jsonl"
    path.write_bytes(content)
    assert refusals(data.read_users, path) == [f"{path}:1: line: the file holds no rows"]


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "absent.jsonl", tmp_path):
        assert refusals(data.read_impressions, path)[0].startswith(f"{path}: ")


# ------------------------------------------------------------------------------------ valid files


def test_unknown_keys_are_counted_once_and_dropped(tmp_path, capsys):
    row = user_row(1) | {"secret": SECRET}
    for session in row["sessions"]:
        session["gold\nkeys"] = [SECRET]
    users = data.read_users(write_rows(tmp_path / "users.jsonl", [row, user_row(2)]))
    log = capsys.readouterr().err
    assert len(log.splitlines()) == 1 and SECRET not in log
    assert "user.secret (1 times)" in log and "session.gold keys (4 times)" in log
    assert SECRET + " 0" in users[0].model_dump_json() and "gold" not in users[0].model_dump_json()


def test_text_becomes_one_line_that_can_be_encoded(tmp_path):
    row = {
        "user_id": " u\ud8001 ",
        "sessions": [
            {"session_id": "s", "summary": "  a\n\tb\u0000c \ud83d\ude00 \udc00\u2028d "},
            {
                "session_id": "t",
                "summary": " \n ",
                "messages": [{"role": "user", "content": "x\ny"}],
            },
        ],
    }
    (read,) = data.read_users(write_rows(tmp_path / "users.jsonl", [row]))
    assert read.user_id == "u1"
    assert read.sessions[0].summary == "a b c \U0001f600 d"
    assert read.sessions[1].summary is None and read.sessions[1].messages[0].content == "x y"


def test_timestamps_become_naive_utc_and_order_the_sessions(tmp_path):
    stamps = ["2026-05-02T01:00:00+02:00", "2026-05-01T22:59:59.5", "2026-05-01T08:00:00Z"]
    row = {
        "user_id": "u",
        "sessions": [
            {"session_id": str(i), "summary": "x", "timestamp": t} for i, t in enumerate(stamps)
        ],
    }
    (read,) = data.read_users(write_rows(tmp_path / "users.jsonl", [row]))
    assert [s.session_id for s in read.sessions] == ["2", "1", "0"]
    assert read.sessions[2].timestamp == datetime(2026, 5, 1, 23)
    row["sessions"][1]["timestamp"] = None  # then the order of the file is all there is
    (read,) = data.read_users(write_rows(tmp_path / "users.jsonl", [row]))
    assert [s.session_id for s in read.sessions] == ["0", "1", "2"]


names = st.text(min_size=1, max_size=9).filter(lambda text: data.one_line(text))
stamp = st.none() | st.datetimes(timezones=st.none() | st.timezones()).map(datetime.isoformat)
message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": names})
session = st.fixed_dictionaries(
    {"session_id": names, "timestamp": stamp, "summary": names},
    optional={"messages": st.none() | st.lists(message, max_size=2)},
)
user_rows = st.lists(
    st.fixed_dictionaries(
        {
            "user_id": names,
            "profile": st.none() | st.dictionaries(names, st.text(max_size=5), max_size=2),
            "sessions": st.lists(
                session, max_size=4, unique_by=lambda s: data.one_line(s["session_id"])
            ),
        }
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda row: data.one_line(row["user_id"]),
)
impression_rows = st.lists(
    st.lists(names, min_size=1, max_size=5).flatmap(
        lambda starters: st.fixed_dictionaries(
            {
                "user_id": names,
                "timestamp": stamp,
                "starters": st.just(starters),
                "clicked": st.lists(st.integers(0, len(starters) - 1)),
                "sessions_after": st.none() | st.integers(0, 10**6),
            }
        )
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(user_rows, impression_rows)
def test_what_is_written_reads_back_equal(tmp_path_factory, users, impressions):
    folder = tmp_path_factory.mktemp("round")
    for rows, read, write in [
        (users, data.read_users, data.write_users),
        (impressions, data.read_impressions, data.write_impressions),
    ]:
        records = read(write_rows(folder / "first.jsonl", rows))
        write(folder / "second.jsonl", records)
        assert len(records) == len(rows) and read(folder / "second.jsonl") == records


# --------------------------------------------------------------------------------- splits, cuts

SHARES = {"train": 0.5, "valid": 0.1, "judge": 0.25, "test": 0.15}


def test_splits_follow_the_shares_and_do_not_move_when_users_join():
    ids = [f"u{i}" for i in range(4000)]
    splits = data.split_users(ids, SHARES, seed=1)
    for name, share in SHARES.items():
        assert abs(list(splits.values()).count(name) / len(ids) - share) < 0.03
    part = data.split_users(reversed(ids[1000:2000]), SHARES, seed=1)
    assert part == {i: splits[i] for i in ids[1000:2000]}
    assert data.split_users(ids, SHARES, seed=2) != splits
    assert splits["u0"] == "train" and splits["u7"] == "train"  # the same on every machine


@given(st.integers(0, 60), st.floats(0.01, 0.99))
def test_cuts_partition_the_sessions(n, share):
    one = user(n)
    history, future = data.cut_sessions(one, share)
    assert history + future == one.sessions
    assert bool(future) == (n >= 2) and bool(history) == (n >= 1)
    if n >= 2:
        assert len(history) == n - 1 or len(history) - 1 < share * n <= len(history) + 1e-6
    assert data.cut_time(one, share) == (future[0].timestamp if future else None)


def test_cut_rounds_up_but_not_past_a_whole_number():
    assert len(data.cut_sessions(user(5), 0.5)[0]) == 3
    assert len(data.cut_sessions(user(100), 0.55)[0]) == 55
    assert data.cut_time(user(4, stamps=False), 0.5) is None


# ----------------------------------------------------------------------- what the generator reads

MARKUP = ["&", "&&", "&&&&", "<", ">", "<sug>", "</sug>", "<think>", "</think>", " ", "tea", "三体"]


@given(st.lists(st.lists(st.sampled_from(MARKUP), max_size=9).map("".join), min_size=1, max_size=5))
def test_no_text_of_a_starter_parts_or_ends_a_list(texts):
    """A list reads back as many starters as were written."""
    starters = [f"x{text}y" for text in texts]
    read = llm.parse_starters(llm.format_starters(starters)).starters
    assert len(read) == len(starters)
    assert all(r[0] == "x" and r[-1] == "y" for r in read)


def test_a_starter_keeps_its_text_but_for_markup():
    written = llm.format_starters(["a &&&& b", "<sug> c && d </sug>", "R&D", "e &"])
    assert llm.parse_starters(written).starters == ("a & b", "(sug) c & d (/sug)", "R&D", "e &")

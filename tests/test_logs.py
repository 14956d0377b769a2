"""The check of a log says what it holds, or what is wrong with it."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_data import ROOT, impression_row, user_row, write_rows

import data
from files import UserError
from tools import logs


def check(path: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tools.logs", "check", path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_check_describes_a_users_file(tmp_path):
    robot = user_row(9)
    robot["sessions"] = [{"session_id": f"s{i}", "summary": "一样的"} for i in range(20)]
    bare = {"user_id": "u10", "profile": None, "sessions": []}
    done = check(write_rows(tmp_path / "users.jsonl", [b"", user_row(1), robot, bare]))
    assert done.returncode == 0, done.stderr
    figures = dict(line.split(":", 1) for line in done.stdout.splitlines())
    expected = {
        "users": "3",
        "sessions": "24",
        "sessions per user": "min 0, median 4, max 20",
        "exact repeats within a user": "82.6%",
        "languages": "zh 87.0%, en 13.0%",
        "characters per summary": "min 3, median 3, max 16",
        "sessions without a summary": "1",
        "sessions without a timestamp": "21",
        "users without a profile": "1",
        "users without a session": "1",
        "likely robots": "1",
    }
    assert {label: figure.strip() for label, figure in figures.items()} == expected


def test_check_describes_an_impressions_file_though_its_first_line_is_bad(tmp_path):
    rows = [
        impression_row(1),
        impression_row(1) | {"clicked": []},
        impression_row(2) | {"clicked": [0, 2], "sessions_after": None},
    ]
    figures = logs.describe_impressions(
        data.read_impressions(write_rows(tmp_path / "shown.jsonl", rows))
    )
    assert figures["lists"] == 3 and figures["users"] == 2 and figures["distinct starters"] == 5
    assert figures["starters clicked"] == "20.0%" and figures["lists without a click"] == "33.3%"
    assert figures["clicks by slot"] == "1 (33.3%), 0 (0.0%), 2 (66.7%), 0 (0.0%), 0 (0.0%)"
    path = write_rows(tmp_path / "bad.jsonl", [b"{", *rows])
    done = check(path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {path}:1: line: not JSON")
    assert len(done.stderr.splitlines()) == 1


USER = json.dumps(user_row(1))


@pytest.mark.parametrize("content, form", [
    (json.dumps([user_row(1)], indent=1), "a JSON array"), (f"[\n{USER}\n]", "a JSON array"),
    (json.dumps(user_row(1), indent=1), "a JSON object of several lines"),
    (f"{USER}\n{USER}".encode("utf-16"), "UTF-16"), (USER.encode("utf-16-le"), "UTF-16"),
    (gzip.compress(USER.encode()), "gzip"), ("- user_id: u1\n  x: 1\n", "not JSON"),
])  # fmt: skip
def test_a_file_of_another_form_is_refused_in_one_line(tmp_path, content, form):
    path = tmp_path / "users.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(data.DataError) as caught:
        logs.describe(path)
    assert str(caught.value) == f"{path}: {form}; wants one JSON object a line, in UTF-8"


def test_a_typo_of_the_first_row_changes_no_kind(tmp_path):
    product = {"product_id": "p", "name": "n", "categories": "c"}
    for row, key, kind in ((impression_row(1), "starters", "impressions"),
                           (user_row(1), "sessions", "users"),
                           (product, "name", "products")):  # fmt: skip
        typo = {name.replace(key, "typo"): value for name, value in row.items()}
        with pytest.raises(data.DataError) as caught:
            logs.describe(write_rows(tmp_path / "rows.jsonl", [typo, row]))
        reason = f"{tmp_path}/rows.jsonl:1: {key}: Field required; checked as {kind}"
        assert str(caught.value) == reason
    assert logs.describe(write_rows(tmp_path / "rows.jsonl", [product]))["products"] == 1


def test_out_writes_what_a_link_names(tmp_path, monkeypatch):
    (link := tmp_path / "link").symlink_to(tmp_path / "users.jsonl")
    chat = {"conversations": [{"from": "human", "value": "How to bake rye bread?"}], "id": "a_0"}
    write_rows(tmp_path / "chats.json", [chat])
    words = ["logs", "import", "sharegpt", f"{tmp_path}/chats.json", "--out", f"{link}"]
    monkeypatch.setattr(sys, "argv", words)
    logs.main()
    assert link.is_symlink() and len(data.read_users(tmp_path / "users.jsonl")) == 1


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_replaced(tmp_path, monkeypatch, make):
    make(tmp_path / "out")
    words = ["logs", "import", "claude", "none.json", "--out", f"{tmp_path}/out"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError, match="^--out .*: is no file; name a new one"):
        logs.main()

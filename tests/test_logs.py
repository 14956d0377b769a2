"""The check of a log says what it holds, or what is wrong with it."""

import subprocess
import sys
from pathlib import Path

from test_data import ROOT, impression_row, user_row, write_rows

import data
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

"""The runs of a reproduction, and tasks side by side."""

import multiprocessing
import os
import time
from functools import partial
from pathlib import Path

import pytest

from files import UserError, read_json
from tables import reproduce


def test_an_unknown_table_is_refused_before_anything_is_trained():
    with pytest.raises(UserError, match="--reproduce 4: no such table; there are 1 2 3 6"):
        reproduce.reproduce(["1", "4"], 1, "", [], quick=False)


def _fail_or_sleep(seconds):
    if not seconds:
        raise KeyError("a variant that fails")
    time.sleep(seconds)


def test_where_one_task_fails_the_others_do_not_go_on_unseen(capsys):
    started = time.monotonic()
    with pytest.raises(KeyError, match="a variant that fails"):
        reproduce.in_parallel({
            f"task {i}": (partial(_fail_or_sleep, seconds), [])
            for i, seconds in enumerate((600, 0, 600, 600))
        }, {})
    assert time.monotonic() - started < 300
    assert "failed: task 1" in capsys.readouterr().out


def _note_and_sleep(path):
    path.write_text(str(os.getpid()))
    time.sleep(600)


def _work_alone(path):
    reproduce.in_parallel({"a": (partial(_note_and_sleep, path), [])}, {})


def test_a_killed_start_leaves_no_work_behind(tmp_path):
    path = tmp_path / "pid"
    parent = multiprocessing.get_context("spawn").Process(target=_work_alone, args=(path,))
    parent.start()
    _until(lambda: path.exists() and path.read_text())
    parent.kill()
    state = Path(f"/proc/{path.read_text()}/stat")
    _until(lambda: not state.exists() or ") Z " in state.read_text())  # ended


def _until(met, seconds=120):
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_clock_keeps_the_starts_that_were_interrupted(tmp_path):
    file, env = tmp_path / "starts.json", {"commit": "0123456789abc", "uncommitted_changes": True}
    with pytest.raises(KeyboardInterrupt), reproduce.clock(file, env):
        raise KeyboardInterrupt
    with reproduce.clock(file, env | {"uncommitted_changes": False}) as starts:
        reproduce.in_parallel({"a": (partial(time.sleep, 1), [])}, starts[-1])
    assert starts == read_json(file) and starts[1]["core_hours"] > 0 < starts[0]["minutes"]
    assert [x["commit"] for x in starts] == ["0123456789 with changes", "0123456789"]


def _note(path, name):
    with open(path, "a") as file:
        file.write(name)


def test_a_task_waits_for_those_it_needs(tmp_path):
    order = tmp_path / "order"
    needs = {"c": "b", "b": "a", "a": "", "d": "ac"}
    tasks = {x: (partial(_note, order, x), [*needs[x]]) for x in needs}
    reproduce.in_parallel(tasks, {})
    assert order.read_text() == "abcd"
    with pytest.raises(ValueError, match="cycle"):
        reproduce.in_parallel(tasks | {"a": (partial(_note, order, "a"), ["d"])}, {})
    assert order.read_text() == "abcd"

"""The report of made-up values, and tasks side by side."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import micro

from config import UserError, read_json
from pipeline import Pipeline
from tables import claims, compare, report, reproduce
from world import ab

METRICS = """utility train_utility true_clicks lexical words semantic dissimilarity starters known
    resonance value""".split()


def seed_values(number: int, lift: float = 0.5, users: int = 30) -> dict:
    """Every method at about 1, but IceBreaker above by `lift`."""
    rng = np.random.default_rng(number)
    names = [f"u{i}" for i in range(users)]

    def column(mean):
        return dict(zip(names, (mean + 0.1 * rng.standard_normal(users)).tolist(), strict=True))

    methods = dict.fromkeys(m for _, rows in report.TABLES.values() for m in rows)  # in order
    values = {m: {x: column(1 + lift * (m == "IceBreaker")) for x in METRICS} for m in methods}
    for kind in ("all", "rule", "RID"):
        own = {"resonance": column(1.0), "functional": column(0.3), "judge_win": column(0.5)}
        values[f"interests: {kind}"] = own
    for method in ("SFT", "IceBreaker"):
        values[method] |= {"functional": column(0.1), "lexical_compared": column(2.0)}
    days = {x: [1.0, 1.0] for x in ("ctr", "ctr_error", "sessions", "sessions_error")}
    searched = [f"{arm}, list search" for arm in reproduce.SEARCHED]
    arms = (*reproduce.ONLINE, *searched, "teacher", ab.CONTROL)
    people = {arm: dict.fromkeys(ab.COUNTS, 2.0) for arm in arms}
    people["IceBreaker"]["taps"] = 2.2  # a tenth more
    return {
        "values": values,
        "ab": {"days": 2, "lists": 1, "copies": 1, "seed": number, "arms": {
            arm: {"users": dict.fromkeys(names, people[arm]), "cumulative": days} for arm in arms}},
        "topics": {
            x: dict.fromkeys(names, {"Chores": 3, "games": 6 + (x == "IceBreaker")})
            for x in ("history", "RID", "IceBreaker", "deployed retrieval")
        },
        "basis": {
            "above_least": 0.5, "matcher": {"precision": 0.9, "recall": 0.8}, "classifier": 0.5,
            "classifier_on_starters": 0.5, "kept_start": [True, False],
            "rid": {"auc": 0.6, "auc_frequency": 0.5, "auc_recency": 0.5},
            "ranker": {x: {"auc_slot_controlled": 0.6} for x in ("train", "judge")},
        },
        "cases": [{"percentile": 50, "lift": 0.0, "summaries": ["<b>&*"], "interests": ["x"],
                   "starters": {"SFT": ["y"]}}],
    }  # fmt: skip


def test_an_interval_over_seeds_is_students():
    mean, half = report.over_seeds([np.array([1.0]), np.array([2.0]), np.array([3.0])])
    assert (mean, half) == (2.0, pytest.approx(4.3027 / 3**0.5, abs=1e-3))
    assert np.isnan(report.over_seeds([np.array([1.0])])[1])


def test_the_report_holds_every_table_and_claim(tmp_path):
    starts = [{"commit": "x", "minutes": 1.0, "core_hours": 0.5}] * 2
    about = {"command": "c", "seeds": [0, 1], "commit": "x", "config": "y", "starts": starts,
             "processors": 2}  # fmt: skip
    wanted = list(reproduce.TABLES)
    log = [{"time": 1.0, "stage": "sit", "epoch": 0, "loss": 1.0, "learning_rate": 0.1}] * 3
    rows = report.write([seed_values(0), seed_values(1)], wanted, log, about, tmp_path)
    assert len(rows) == len(claims.CLAIMS) >= 22
    page = (tmp_path / "reproduction.md").read_text()
    assert all(f"Table {n}" in page for n in (1, 2, 3, 6, 7, 8, 9)) and "<b>" not in page
    assert "1 (x), 1 (x); 1.0 core hours on 2 processors" in page
    text = (tmp_path / "claims.md").read_text()
    assert all(row["text"] in text for row in rows)
    verdict = {(r["metric"], r["more"], r["less"]): r for r in rows}
    above = verdict["utility", "IceBreaker", "SFT"]
    assert above["verdict"] == "holds" and above["same_sign"] == 2
    assert above["sides"] == pytest.approx([1.5, 1.0], abs=0.05)
    assert verdict["utility", "utility negatives only", "IceBreaker"]["verdict"] == "does not hold"
    kept = verdict["lexical", "IceBreaker", "SFT"]  # the last one is of 95 %
    assert kept["value"] == pytest.approx(kept["sides"][0] - 0.95 * kept["sides"][1])
    online = verdict["CTR", "IceBreaker", "deployed"]
    assert online["verdict"] == "holds" and online["value"] == pytest.approx(100)
    assert verdict["CTR", "SFT", "deployed"]["verdict"] == "undecided"
    assert all((tmp_path / name).is_file() for name in
               ("frontier.png", "rings.png", "ab_days.png", "reward_hacking.png", "rounds.png"))
    assert json.loads((tmp_path / "reproduction.json").read_text())["claims"] == rows


def test_every_method_of_a_table_is_made_and_every_claim_names_known_ones(finished):
    p = Pipeline(micro(finished.parent), describe=False)
    chosen = [compare.reranked(p, m, {p.ids("test")[0]: [[]]}) for m in reproduce.SEARCHED]
    made = {*reproduce.METHODS} | {m for x in chosen for m in x}
    made |= {"teacher", "random starters", "deployed retrieval", "oracle", "popular starters"}
    made |= {"IceBreaker, 1 session", "IceBreaker, 2 sessions"}
    assert {m for _, rows in report.TABLES.values() for m in rows} <= made
    arms = {*reproduce.ONLINE, "teacher", ab.CONTROL}
    arms |= {f"{m}, list search" for m in reproduce.SEARCHED}
    for claim in claims.CLAIMS:
        known = arms if claim.metric in ab.METRICS else made
        assert {m for m in (claim.more, claim.less) if not m.startswith("interests")} <= known
    assert {v for needs in reproduce.NEEDS.values() for v in needs} == {*reproduce.VARIANTS}
    texts = [claim.text for claim in claims.CLAIMS]
    assert len({*texts}) == len(texts)


def test_an_unknown_table_is_refused_before_anything_is_trained():
    with pytest.raises(UserError, match="--reproduce 4: no such table; there are 1 2 3 6"):
        reproduce.reproduce(["1", "4"], 1, "", [], quick=False)


def test_r_user_and_r_score_are_against_the_methods_of_the_table():
    values = {m: {"utility": {"u": x, "v": 0.2}} for m, x in (("PE", 0.1), ("none", 0.3))}
    seed = {"values": values | {"IceBreaker": {"utility": {"u": 0.2, "v": 0.2}}}}
    assert claims.values_of(seed, "IceBreaker", "r_user") == {"u": 1.0, "v": 0.5}
    assert claims.values_of(seed, "IceBreaker", "r_user", "none") == {"u": 0.0, "v": 0.5}
    assert claims.values_of(seed, "IceBreaker", "r_score", "none")["u"] == pytest.approx(-0.1)


def _fail_or_sleep(seconds):
    if not seconds:
        raise KeyError("a variant that fails")
    time.sleep(seconds)


def test_where_one_task_fails_the_others_do_not_go_on_unseen(capsys):
    started = time.monotonic()
    with pytest.raises(KeyError, match="a variant that fails"):
        reproduce.in_parallel({
            f"task {i}": reproduce.Task(_fail_or_sleep, (seconds,))
            for i, seconds in enumerate((600, 0, 600, 600))
        })
    assert time.monotonic() - started < 300
    assert "failed: task 1" in capsys.readouterr().out


def _note_and_sleep(path):
    path.write_text(str(os.getpid()))
    time.sleep(600)


def _work_alone(path):
    reproduce.in_parallel({"a": reproduce.Task(_note_and_sleep, (path,))})


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
        reproduce.in_parallel({"a": reproduce.Task(time.sleep, (1,))}, starts[-1])
    assert starts == read_json(file) and starts[1]["core_hours"] > 0 < starts[0]["minutes"]
    assert [x["commit"] for x in starts] == ["0123456789 with changes", "0123456789"]


def _note(path, name):
    with open(path, "a") as file:
        file.write(name)


def test_a_task_waits_for_those_it_needs(tmp_path):
    order = tmp_path / "order"
    needs = {"c": "b", "b": "a", "a": "", "d": "ac"}
    tasks = {x: reproduce.Task(_note, (order, x), tuple(needs[x])) for x in needs}
    reproduce.in_parallel(tasks)
    assert order.read_text() == "abcd"
    with pytest.raises(ValueError, match="wait for each other"):
        reproduce.in_parallel({"a": reproduce.Task(_note, (order, "a"), ("b",))})

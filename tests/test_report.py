"""Claims by hand, the report of made-up values, and cold-start lists."""

import json
import time

import numpy as np
import pytest

import ab
import report
import reproduce

METRICS = "utility train_utility true_clicks lexical words semantic dissimilarity starters".split()


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
        values[method]["functional"] = column(0.1)
    day = {x: [1.0, 1.0] for x in ab.COUNTS}
    person = dict.fromkeys(ab.COUNTS, 2.0)
    arms = ("PE", "SFT", "SFT+DPO", "IceBreaker", "deployed")
    return {
        "values": values,
        "ab": {"days": 2, "split": "paired", "seed": number, "arms": {
            arm: {"users": dict.fromkeys(names, person), "by_day": day} for arm in arms}},
        "shares": {x: {"Chores": 0.3, "games": 0.7} for x in ("history", "RID", "IceBreaker")},
        "matcher": {"precision": 0.9, "recall": 0.8}, "classifier": 0.5,
        "rid": {"auc": 0.6, "auc_frequency": 0.5, "auc_recency": 0.5},
        "ranker": {x: {"auc_slot_controlled": 0.6} for x in ("train", "judge")},
        "cases": [{"percentile": 50, "lift": 0.0, "summaries": ["<b>&*"], "interests": ["x"],
                   "starters": {"SFT": ["y"]}}],
    }  # fmt: skip


def test_a_verdict_is_where_the_interval_lies():
    seeds = [seed_values(2), seed_values(3)]  # one pair of equals in twenty is not undecided
    claim = report.Claim("1", "", "utility", "IceBreaker", "SFT", "")
    value, low, high = report.bootstrap(report.paired(seeds, claim))
    assert value == pytest.approx(0.5, abs=0.05) and low < value < high and low > 0.4
    verdicts = {row["text"]: row["verdict"] for row in report.judged(seeds, ["1", "9"])}
    assert verdicts["IceBreaker has more utility than SFT"] == "holds"
    assert verdicts["diversity-only negatives have more words"] == "does not hold"
    assert verdicts["vanilla DPO raises utility over SFT"] == "undecided"
    same = [np.array([1.0, 1.0, 1.0])] * 2
    assert report.bootstrap(same) == (1.0, 1.0, 1.0)


def test_an_interval_over_seeds_is_students():
    mean, half = report.over_seeds([np.array([1.0]), np.array([2.0]), np.array([3.0])])
    assert (mean, half) == (2.0, pytest.approx(4.3027 / 3**0.5, abs=1e-3))
    assert np.isnan(report.over_seeds([np.array([1.0])])[1])


def test_the_report_holds_every_table_and_claim(tmp_path):
    about = {"command": "c", "seeds": [0, 1], "commit": "x", "config": "y", "minutes": 1.0,
             "cpu_hours": 1.0, "processors": 2}  # fmt: skip
    wanted = list(reproduce.TABLES)
    log = [{"time": 1.0, "stage": "sit", "epoch": 0, "loss": 1.0, "learning_rate": 0.1}] * 3
    rows = report.write([seed_values(0), seed_values(1)], wanted, log, about, tmp_path)
    assert len(rows) == len(report.CLAIMS) >= 22
    page = (tmp_path / "reproduction.md").read_text()
    assert all(f"Table {n}" in page for n in (1, 2, 3, 6, 7, 8, 9)) and "<b>" not in page
    claims = (tmp_path / "claims.md").read_text()
    assert all(row["text"] in claims for row in rows)
    assert all((tmp_path / name).is_file() for name in
               ("frontier.png", "rings.png", "ab_days.png", "reward_hacking.png", "rounds.png"))
    assert json.loads((tmp_path / "reproduction.json").read_text())["claims"] == rows


def test_every_method_of_a_table_is_made_and_every_claim_names_known_ones():
    made = {*reproduce.METHODS} | {"random starters", "deployed retrieval", "oracle",
        "popular starters", "IceBreaker, 1 session", "IceBreaker, 2 sessions", "SFT, list search",
        "SFT, highest utility", "SFT, MMR", "SFT, DPP", "IceBreaker, list search"}  # fmt: skip
    assert {m for _, rows in report.TABLES.values() for m in rows} <= made
    named = {m for c in report.CLAIMS if c.table != "2" for m in (c.more, c.less)}
    assert {m for m in named if not m.startswith("interests")} <= made
    assert {v for needs in reproduce.NEEDS.values() for v in needs} == {*reproduce.VARIANTS}


def _fail_or_sleep(seconds):
    if not seconds:
        raise KeyError("a variant that fails")
    time.sleep(seconds)


def test_where_one_task_fails_the_others_do_not_go_on_unseen():
    started = time.monotonic()
    with pytest.raises(KeyError, match="a variant that fails"):
        reproduce.in_parallel({
            f"task {i}": (_fail_or_sleep, (seconds,), [], 1.0)
            for i, seconds in enumerate((600, 0, 600, 600))
        })
    assert time.monotonic() - started < 300


def _note(path, name):
    with open(path, "a") as file:
        file.write(name)


def test_a_task_waits_for_those_it_needs(tmp_path):
    order = tmp_path / "order"
    needs = {"c": ["b"], "b": ["a"], "a": [], "d": ["a", "c"]}
    reproduce.in_parallel({x: (_note, (order, x), needs[x], 1.0) for x in needs})
    assert order.read_text() == "abcd"

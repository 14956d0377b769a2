"""The report of made-up values."""

import json

import numpy as np
import pytest
from conftest import micro

from run import Run
from stages.metrics import user_values
from tables import claims, controls, experiments, report
from world import ab

METRICS = """utility train_utility true_clicks cascade_clicks lexical words semantic dissimilarity
    starters known resonance value""".split()


def seed_values(number: int, lift: float = 0.5, users: int = 30) -> dict:
    """Every method at about 1, but IceBreaker above by `lift`."""
    rng = np.random.default_rng(number)
    names = [f"u{i}" for i in range(users)]

    def column(mean):
        return dict(zip(names, (mean + 0.1 * rng.standard_normal(users)).tolist(), strict=True))

    tables = experiments.tables().values()
    methods = dict.fromkeys(m for table in tables for m in experiments.rows_of(table))  # in order
    values = {m: {x: column(1 + lift * (m == "IceBreaker")) for x in METRICS} for m in methods}
    for kind in ("all", "rule", "RID"):
        own = {"resonance": column(1.0), "functional": column(0.3), "judge_win": column(0.5)}
        values[f"interests: {kind}"] = own
    for method in ("SFT", "IceBreaker"):
        values[method] |= {"functional": column(0.1), "lexical_compared": column(4.0)}
    days = {x: [1.0, 1.0] for x in ("ctr", "ctr_error", "sessions", "sessions_error")}
    searched = [f"{arm}, list search" for arm in experiments.SEARCHED]
    arms = (*experiments.ONLINE, *searched, "teacher", ab.CONTROL)
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
            "classifier_on_starters": 0.5,
            "rid": {
                **dict.fromkeys(["auc", "auc_trees", "auc_logistic"], 0.6),
                "auc_frequency": 0.5, "auc_recency": 0.5,
                "gate": {gate: {"f_half": 0.4}
                         for gate in ("groups", "one threshold", "top 1", "top 4")},
            },
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
    wanted = list(experiments.tables())
    log = [{"time": 1.0, "stage": "sit", "epoch": 0, "loss": 1.0, "learning_rate": 0.1}] * 3
    rows = report.write([seed_values(0), seed_values(1)], wanted, log, about, tmp_path)
    assert len(rows) == len(claims.all_claims()) == 116
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
               ("frontier.png", "rings.png", "ab_days.png", "rounds.png"))
    assert json.loads((tmp_path / "reproduction.json").read_text())["claims"] == rows


def test_every_method_of_a_table_is_made_and_every_claim_names_known_ones(finished):
    run = Run(micro(finished.parent), describe=False)
    chosen = [controls.reranked(run, m, {run.ids("test")[0]: [[]]}) for m in experiments.SEARCHED]
    made = {*experiments.methods()} | {m for rows in chosen for m in rows}
    made |= {"teacher", "random starters", "deployed retrieval", "oracle", "popular starters"}
    made |= {"IceBreaker, 1 session", "IceBreaker, 2 sessions"}
    tables = experiments.tables().values()
    assert {m for table in tables for m in experiments.rows_of(table)} <= made
    arms = {*experiments.ONLINE, "teacher", ab.CONTROL}
    arms |= {f"{m}, list search" for m in experiments.SEARCHED}
    for claim in claims.all_claims():
        known = arms if claim.metric in ab.METRICS else made
        assert {m for m in (claim.more, claim.less) if not m.startswith("interests")} <= known
    variants = {*experiments.read()["variants"]}
    assert {v for table in tables for v in table.variants} == variants
    assert {m.variant for m in experiments.methods().values()} == variants | {experiments.MAIN}


def test_r_user_and_r_score_are_against_the_methods_of_the_table():
    values = {m: {"utility": {"u": x, "v": 0.2}} for m, x in (("PE", 0.1), ("none", 0.3))}
    values["IceBreaker"] = {"utility": {"u": 0.2, "v": 0.2}}
    assert user_values(values, "IceBreaker", "r_user") == {"u": 1.0, "v": 0.5}
    assert user_values(values, "IceBreaker", "r_user", "none") == {"u": 0.0, "v": 0.5}
    assert user_values(values, "IceBreaker", "r_score", "none")["u"] == pytest.approx(-0.1)

"""Verdicts of made-up values, and claims that say what the paper's tables do."""

import re

import numpy as np
import pytest
from test_report import seed_values

from files import read_yaml
from stages.metrics import bootstrap
from tables import claims, experiments
from world import ab


def test_a_verdict_is_where_the_interval_lies():
    seeds = [seed_values(2), seed_values(3)]  # one pair of equals in twenty is not undecided
    value, low, high = bootstrap(claims.paired(seeds, "utility", "IceBreaker", "SFT"))
    assert value == pytest.approx(0.5, abs=0.05) and low < value < high and low > 0.4
    verdicts = {row["text"]: row["verdict"] for row in claims.judged(seeds, ["1", "9"])}
    assert verdicts["IceBreaker has more utility than SFT"] == "holds"
    assert verdicts["diversity-only negatives have more keywords"] == "does not hold"
    assert verdicts["vanilla DPO raises utility over SFT"] == "undecided"


def test_a_claim_that_random_starters_pass_too_is_marked_and_reproduces_nothing():
    def row(lift):
        seeds = [seed_values(2), seed_values(3)]
        for seed in seeds:  # as a prompted list that holds one starter of five
            for method, by in (("PE", 0), ("PE+RID", 0), ("random starters", lift)):
                same = seed["values"]["SFT"]
                seed["values"][method] = same | {
                    "lexical": {user: value + by - 0.5 for user, value in same["lexical"].items()}}
        return next(r for r in claims.judged(seeds, ["1"])
                    if r["text"] == "SFT widens the keywords over prompting with RID")

    skill, none = row(0), row(0.5)
    assert skill["verdict"] == none["verdict"] == "holds"
    assert [skill["random_too"], none["random_too"]] == [False, True]
    skill["share"] = none["share"] = 1.0
    assert "1 reproduced" in claims.counted([skill]) and "0 reproduced" in claims.counted([none])
    assert "0 reproduced" in claims.counted([skill | {"seeds": 1}])
    assert "**holds**; so do random starters" in claims.claims_parts([none])["table"]


def test_spread_and_head_of_all_topics_by_hand():
    topics = {"a": {"food": 2, "Chores": 1}, "b": {"food": 1}}
    assert claims.pooled("head", topics) == [0.75]
    assert claims.pooled("spread", topics) == pytest.approx(4 / 3**0.75)
    draws = claims.pooled("head", topics, 400)[1:]  # a and b, twice a, or twice b
    assert set(np.round(draws, 6)) == {0.75, 0.666667, 1.0}


def test_a_claim_of_the_online_test_has_the_papers_figures_and_its_sign():
    online = [c for c in claims.all_claims() if c.table == "2" and c.paper != claims.OURS]
    assert len(online) == 4 * 4 + 3 * 4  # arms, and pairs of arms, in four metrics
    for claim in online:
        lifts = {arm: row[ab.METRICS.index(claim.metric)]
                 for arm, row in read_yaml("configs/paper.yaml")["table2"].items()}
        sides = [side for side in (claim.more, claim.less) if side != ab.CONTROL]
        assert claim.paper == " > ".join(lifts[side] for side in sides)
        above, below = (float(lifts.get(side, "0").strip("*")) for side in (claim.more, claim.less))
        assert above > below  # the deployed retrieval is at 0


def test_a_claim_of_another_table_quotes_that_table():
    column = {"r_user": 0, "utility": 1, "lexical": 2, "semantic": 3}
    quoted = 0
    for claim in claims.all_claims():
        table = read_yaml("configs/paper.yaml").get(f"table{claim.table}")
        if claim.metric not in column or not table or claim.paper == claims.OURS:
            continue
        figures = [table[side][column[claim.metric]] for side in (claim.more, claim.less)]
        numbers = re.findall(r"[\d.]+", claim.paper.partition(" (")[0])
        assert [*map(float, numbers)] == [float(f) for f in figures if f != "–"], claim.text
        assert ">" not in claim.paper or float(numbers[0]) > float(numbers[1]), claim.text
        quoted += 1
    assert quoted == 50


def test_every_claim_names_a_table_a_unit_and_a_reason_once():
    texts, tables = [c.text for c in claims.all_claims()], experiments.tables()
    assert len({*texts}) == len(texts) == 116
    for claim in claims.all_claims():
        assert claim.table in tables and claim.metric in experiments.read("claims")["units"]
    assert {c.metric for c in claims.all_claims() if c.table == "2"} == {*ab.METRICS}

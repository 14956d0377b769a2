"""Verdicts of made-up values."""

import numpy as np
import pytest
from test_report import seed_values

from tables import claims


def test_a_verdict_is_where_the_interval_lies():
    seeds = [seed_values(2), seed_values(3)]  # one pair of equals in twenty is not undecided
    value, low, high = claims.bootstrap(claims.paired(seeds, "utility", "IceBreaker", "SFT"))
    assert value == pytest.approx(0.5, abs=0.05) and low < value < high and low > 0.4
    verdicts = {row["text"]: row["verdict"] for row in claims.judged(seeds, ["1", "9"])}
    assert verdicts["IceBreaker has more utility than SFT"] == "holds"
    assert verdicts["diversity-only negatives have more keywords"] == "does not hold"
    assert verdicts["vanilla DPO raises utility over SFT"] == "undecided"
    same = [np.array([1.0, 1.0, 1.0])] * 2
    assert claims.bootstrap(same) == (1.0, 1.0, 1.0)


def test_spread_and_head_of_all_topics_by_hand():
    topics = {"a": {"food": 2, "Chores": 1}, "b": {"food": 1}}
    assert claims.pooled("head", topics) == [0.75]
    assert claims.pooled("spread", topics) == pytest.approx(4 / 3**0.75)
    draws = claims.pooled("head", topics, 400)[1:]  # a and b, twice a, or twice b
    assert set(np.round(draws, 6)) == {0.75, 0.666667, 1.0}


def test_claims_of_the_online_test_have_the_papers_signs():
    online = [c for c in claims.CLAIMS if c.table == "2" and c.paper != claims.OWN]
    assert len(online) == 4 * 4 + 3 * 4
    for claim in online:
        if claims.ab.CONTROL in (claim.more, claim.less):
            assert (claim.more == claims.ab.CONTROL) == claim.paper.startswith("-")
        else:
            more, less = (float(x.strip("*")) for x in claim.paper.split(" > "))
            assert more > less

"""Verdicts of made-up values."""

import numpy as np
import pytest
from test_report import seed_values

import claims


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

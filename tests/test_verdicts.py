"""Verdicts: an interval, a test of random signs, Holm's correction; the share of an effect."""

import numpy as np
import pytest
from scipy import stats

from tables.verdicts import (
    HOLDS,
    NOT,
    UNDECIDED,
    holm,
    narrow,
    of_interval,
    share_of_effect,
    sign_flip,
    verdicts,
)


def test_few_ones_among_zeros_are_no_evidence():
    """Of four differences all signs are alike in 2 of 16 draws, however many zeros stand beside."""
    gaps = np.zeros(60)
    gaps[:4] = 1
    assert sign_flip([gaps]) == pytest.approx(2 / 16) == sign_flip([-gaps])
    assert sign_flip([np.zeros(60)]) == sign_flip([gaps[:1]]) == 1.0
    interval = np.quantile(np.random.default_rng(0).choice(gaps, (999, 60)).mean(1), [.025, .975])
    assert interval[0] > 0  # which is why the test stands beside it
    assert verdicts([tuple(interval)], [sign_flip([gaps])]) == [UNDECIDED]


def test_holm_by_hand_and_order():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, float("nan")]).tolist() == [1.0, 1.0]  # nan: nothing is known


def test_a_verdict_needs_the_interval_and_the_corrected_test():
    above, below, across = (0.1, 0.2), (-0.2, -0.1), (-0.1, 0.2)
    assert verdicts([above, below, across], [1e-4] * 3) == [HOLDS, NOT, UNDECIDED]
    assert verdicts([above] * 2, [0.03, 0.03]) == [UNDECIDED] * 2  # one of the two alone holds
    assert verdicts([above], [0.03]) == [HOLDS]


def test_p_of_an_interval_is_the_normal_one():
    assert of_interval(1.96, 0.0, 3.92) == pytest.approx(0.05, abs=1e-4)
    assert of_interval(-2.0, -3.0, -1.0) == pytest.approx(2 * stats.norm.sf(2 * 1.959964))
    assert (of_interval(0.0, 0.0, 0.0), of_interval(1.0, 1.0, 1.0)) == (1.0, 0.0)


@pytest.mark.parametrize("paper, more, less, share", [
    ("0.75 > 0.50", 0.5, 0.4, 0.5), ("75 > 50 %", 0.6, 0.4, 1.0), ("0.75 > 0.50", 0.3, 0.4, -0.5),
    ("+50 %", 0.5, 0.4, 0.5), ("+50 > +25 %", 0.6, 0.5, 1.0), ("75 > 50 %", 0.1, 0.0, np.inf),
    ("+0.32", 0.5, 0.4, None), ("Figure 4", 0.5, 0.4, None), ("–", 0.5, 0.4, None),
    ("0.75 > 0.50", 0.5, -0.1, None)])
def test_an_effect_is_relative_to_the_papers(paper, more, less, share):
    assert share_of_effect(paper, more, less) == (share and pytest.approx(share))


def test_what_few_seeds_leave_out_is_said():
    assert "say nothing" in narrow(1) and "50%" in narrow(2) and "75%" in narrow(3)

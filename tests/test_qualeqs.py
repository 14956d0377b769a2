"""The paper's functions against hand values, numpy and invariances; the map of the docs."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import garm
import qualeqs
from files import ROOT

NAN = math.nan


def tensor(*rows, dtype=torch.float64):
    return torch.tensor(rows, dtype=dtype)


SCORES = arrays(np.float64, (4, 5), elements=st.sampled_from([0.0, 1.0]))
REWARDS = arrays(np.float64, (3, 6), elements=st.floats(0, 1))
MASKS = arrays(np.bool_, (3, 6))


# ------------------------------------------------------------------------------ the quality reward


def test_set_reward_by_hand():
    """Three suggestions: one without a fault, one unanswerable, one false and empty."""
    r, r_q = qualeqs.set_reward(
        tensor([1, 0, 1], [1, 1, 1]), tensor([1, 1, 0], [1, 1, 1]), tensor([1, 1, 0], [1, 1, 0]),
        tensor(1, 1),
    )  # fmt: skip
    assert r.tolist() == [[1, 0, 0], [1, 1, 0]]
    assert r_q.tolist() == pytest.approx([1 / 3, 2 / 3])


def test_a_malformed_answer_earns_nothing_and_needs_no_judge():
    good, unjudged = torch.ones(1, 3), torch.full((1, 3), NAN)
    assert qualeqs.set_reward(good, good, good, torch.zeros(1))[1].item() == 0
    assert qualeqs.set_reward(unjudged, unjudged, unjudged, torch.zeros(1))[1].item() == 0


def test_a_failed_call_is_masked_and_not_a_low_score():
    """One of three calls failed: r_q is the mean of the other two; all failed: nan, as `valid`."""
    a = tensor([1, NAN, 0], [NAN, NAN, NAN])
    ones, right = torch.ones(2, 3), torch.ones(2)
    r, r_q = qualeqs.set_reward(a, ones, ones, right)
    assert r[0].isnan().tolist() == [False, True, False] and r_q[0] == 0.5 and r_q[1].isnan()
    # The paper's choice, kept as an option: the same list is now worth less for a server's fault.
    assert qualeqs.set_reward(a, ones, ones, right, True)[1].tolist() == pytest.approx([1 / 3, 0])


def test_failed_rollouts_leave_the_advantages_of_their_group_alone():
    a = tensor([1, 1], [1, 0], [NAN, NAN])  # three rollouts of one context
    _, r_q = qualeqs.set_reward(a, torch.ones(3, 2), torch.ones(3, 2), torch.ones(3))
    rewards = r_q[None]
    masked = garm.group_advantages(rewards, rewards.isfinite())
    assert masked[0, 2] == 0
    torch.testing.assert_close(masked[:, :2], garm.group_advantages(rewards[:, :2]))


@given(SCORES, SCORES, SCORES, st.permutations(range(5)))
def test_the_order_of_candidates_does_not_matter(a, f, i, order):
    a, f, i = map(torch.from_numpy, (a, f, i))
    r, r_q = qualeqs.set_reward(a, f, i, torch.ones(4))
    r2, r_q2 = qualeqs.set_reward(a[:, order], f[:, order], i[:, order], torch.ones(4))
    torch.testing.assert_close(r2, r[:, order])
    torch.testing.assert_close(r_q2, r_q)
    torch.testing.assert_close(qualeqs.disagreement(r2), qualeqs.disagreement(r))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.bfloat16])
def test_flags_and_half_precision_are_computed_in_fp32(dtype):
    ones = torch.ones(2, 3, dtype=dtype)
    r, r_q = qualeqs.set_reward(ones, ones, ones, torch.ones(2, dtype=dtype))
    assert r.dtype == r_q.dtype == qualeqs.disagreement(ones).dtype == torch.float32
    assert qualeqs.disagreement(ones.double()).dtype == torch.float64


# ------------------------------------------------------------------------------------ disagreement


def test_disagreement_by_hand():
    """Of (1, 0, 0): mean 1/3, variance (4 + 1 + 1) / 27 = 2/9; of (1, 0, 1, 0): 1/4."""
    assert qualeqs.disagreement(tensor([1, 0, 0])).item() == pytest.approx(2 / 9)
    assert qualeqs.disagreement(tensor([1, 0, 1, 0])).item() == 0.25
    # 1, 0 and one that was not judged: of two, mean 1/2.
    assert qualeqs.disagreement(tensor([1, 0, NAN])).item() == 0.25


def test_one_list_of_three_has_two_values_of_disagreement():
    """The trap the docstring names: every mixed set of three 0/1 rewards ties."""
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)  # (8, 3)
    u = qualeqs.disagreement(every)
    assert u.numpy() == pytest.approx([0] + [2 / 9] * 6 + [0])
    assert qualeqs.mine_hard(u, 1.0, 0.0).tolist() == [1, 2, 3, 4, 5, 6]  # ties, in their order


@given(REWARDS, MASKS)
def test_disagreement_equals_numpy_over_the_valid(r, valid):
    u = qualeqs.disagreement(torch.from_numpy(r), torch.from_numpy(valid))
    for row, mask, value in zip(r, valid, u.tolist(), strict=True):
        assert value == pytest.approx(row[mask].var() if mask.sum() else 0, abs=1e-12)


@given(REWARDS, MASKS, st.floats(allow_nan=True, allow_infinity=True))
def test_what_is_masked_may_hold_anything(r, valid, junk):
    kept = qualeqs.disagreement(torch.from_numpy(r), torch.from_numpy(valid))
    spoilt = np.where(valid, r, junk)
    torch.testing.assert_close(
        qualeqs.disagreement(torch.from_numpy(spoilt), torch.from_numpy(valid)), kept
    )


@given(st.floats(0, 1), st.integers(1, 40))
def test_all_equal_disagree_by_exactly_nothing(value, k):
    assert qualeqs.disagreement(torch.full((1, k), value)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", range(2, 50))
def test_as_many_bad_ones_disagree_exactly_as_as_many_good_ones(k, dtype):
    """Else, of what ties in truth, rounding would put one kind before the other."""
    for good in range(k + 1):
        r = torch.zeros(2, k, dtype=dtype)
        r[0, :good] = r[1, good:] = 1
        u = qualeqs.disagreement(r)
        assert u[0] == u[1] == pytest.approx(good * (k - good) / k**2)


def test_no_candidates_disagree_about_nothing():
    assert qualeqs.disagreement(torch.zeros(2, 0)).tolist() == [0, 0]
    assert qualeqs.disagreement(torch.zeros(0, 3)).shape == (0,)
    assert qualeqs.disagreement(torch.ones(1, 3), torch.zeros(1, 3)).tolist() == [0]


# ------------------------------------------------------------------------------------------ mining


def test_mining_by_hand():
    u = tensor(0.0, 0.2, 0.25, 0.1, 0.25, NAN)
    assert qualeqs.mine_hard(u, 0.5, 0.0).tolist() == [2, 4, 1]  # round(.5 * 6) of them
    assert qualeqs.mine_hard(u, 1.0, 0.1).tolist() == [2, 4, 1]  # above the floor, not at it
    assert qualeqs.mine_hard(u, 0.0, 0.0).tolist() == []
    assert qualeqs.mine_hard(torch.zeros(9), 1.0, 0.0).tolist() == []  # nothing disagrees


@given(st.lists(st.floats(0, 1), max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_mined_are_the_hardest_above_the_floor(values, share, floor):
    u = torch.tensor(values, dtype=torch.float64)
    mined = qualeqs.mine_hard(u, share, floor).tolist()
    assert len(mined) == len(set(mined)) <= round(share * len(u))
    ranked = [values[i] for i in mined]
    assert ranked == sorted(ranked, reverse=True)  # however little lies between them
    assert all(values[i] > floor for i in mined)
    left = [v for i, v in enumerate(values) if i not in mined and v > floor]
    if len(mined) < round(share * len(u)):
        assert not left
    elif mined:
        assert max(left, default=0) <= values[mined[-1]]


# --------------------------------------------------------------------------------------- iteration


def test_the_first_round_has_clicked_contexts_later_ones_the_hard_too():
    clicked, unclicked = qualeqs.split_clicked([[], [0], [2, 1], []])
    assert (clicked, unclicked) == ([1, 2], [0, 3])
    assert sorted(qualeqs.round_contexts(clicked)) == [1, 2]
    assert sorted(qualeqs.round_contexts(clicked, [3, 2])) == [1, 2, 3]  # 2 is in both: once


def test_a_limited_round_keeps_the_hardest():
    chosen = qualeqs.round_contexts(range(100, 200), [7, 3, 5], limit=2)
    assert sorted(chosen) == [3, 7]
    chosen = qualeqs.round_contexts(range(100, 200), [7, 3, 5], limit=10)
    assert len(chosen) == 10 and {7, 3, 5} < set(chosen)


def test_a_round_is_the_same_for_the_same_generator():
    def order(seed):
        generator = torch.Generator().manual_seed(seed)
        return qualeqs.round_contexts(range(50), [60, 61], 30, generator)

    assert order(1) == order(1) != order(2)


@given(st.integers(0, 30), st.integers(0, 30), st.floats(0, 3))
def test_a_mixture_has_every_domain_row_once_and_general_ones_by_ratio(domain, general, ratio):
    rows = qualeqs.mixture(domain, general, ratio).tolist()
    assert len(rows) == len(set(rows)) and set(range(domain)) <= set(rows)
    assert len(rows) == domain + min(general, round(ratio * domain))
    assert max(rows, default=-1) < domain + general


# ----------------------------------------------------------------------------------------- figures


def test_figures_by_hand():
    """Four sets of three: all good; one false; malformed; a failed call."""
    a = tensor([1, 1, 1], [1, 1, 1], [1, 1, 1], [1, NAN, 1])
    f = tensor([1, 1, 1], [1, 0, 1], [1, 1, 1], [1, NAN, 1])
    i = tensor([1, 1, 1], [1, 1, 1], [1, 1, 1], [0, NAN, 1])
    figures = qualeqs.quality_figures(a, f, i, tensor(1, 1, 0, 1))
    assert figures == pytest.approx({
        "strict_accuracy": 1 / 3,  # of the three sets that were judged whole
        "valid_rate": (3 + 2 + 0 + 1) / 11,
        "answerable": 8 / 11, "factual": 7 / 11, "informative": 7 / 11,
        "format": 3 / 4, "failed": 1 / 12,
    })  # fmt: skip
    by_intent = qualeqs.figures_by(["x", "y", "x", "y"], a, f, i, tensor(1, 1, 0, 1))
    assert by_intent["x"]["strict_accuracy"] == 0.5 and by_intent["y"]["valid_rate"] == 3 / 5


def test_figures_of_nothing_judged_are_nan():
    unjudged = torch.full((2, 3), NAN)
    figures = qualeqs.quality_figures(unjudged, unjudged, unjudged, torch.ones(2))
    assert math.isnan(figures["strict_accuracy"]) and figures["failed"] == 1


@given(SCORES, SCORES, SCORES)
def test_strict_accuracy_is_the_hardest_figure(a, f, i):
    figures = qualeqs.quality_figures(*map(torch.from_numpy, (a, f, i)), torch.ones(4))
    each = min(figures[name] for name in ("answerable", "factual", "informative"))
    assert figures["strict_accuracy"] <= figures["valid_rate"] + 1e-9 <= each + 2e-9


def test_growth_gap_by_hand():
    assert qualeqs.growth_gap(106.81, 100) == pytest.approx(0.0681)  # ChatPV in section 4.2.2


# ------------------------------------------------------------------------------------------- rules


def test_shapes_that_do_not_fit_are_refused():
    ones, row = torch.ones(2, 3), torch.ones(2)
    for call in (
        lambda: qualeqs.set_reward(ones, ones, torch.ones(2, 1), row),
        lambda: qualeqs.set_reward(ones, ones, ones, torch.ones(2, 1)),
        lambda: qualeqs.disagreement(row),
        lambda: qualeqs.disagreement(ones, torch.ones(2)),
        lambda: qualeqs.mine_hard(ones, 0.5, 0),
        lambda: qualeqs.mine_hard(row, 1.5, 0),
        lambda: qualeqs.mixture(1, 1, -1.0),
    ):
        with pytest.raises(ValueError, match=r"\w+: "):
            call()


def test_the_map_of_the_docs_exists():
    """docs/qualeqs.md: each row names functions and tests that exist; no function is left out."""
    page = (ROOT / "docs" / "qualeqs.md").read_text(encoding="utf-8")
    rows = page.partition("| paper | function | test |\n")[2].partition("\n\n")[0].splitlines()
    table = [line.split("|")[1:-1] for line in rows if line.startswith("| ")]
    named = [set(re.findall(r"`(\w+)`", cell)) for row in table for cell in row[1:]]
    functions, tests = set().union(*named[::2]), set().union(*named[1::2])
    public = {
        name for name, x in vars(qualeqs).items()
        if inspect.isfunction(x) and x.__module__ == "qualeqs" and not name.startswith("_")
    }  # fmt: skip
    assert functions == public
    assert tests and tests <= {name for name in globals() if name.startswith("test_")}

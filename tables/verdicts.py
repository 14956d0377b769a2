"""Whether a difference holds: its interval, a sign-flip test, and Holm's correction in its table.

A difference *holds* where the 95 % interval of metrics.bootstrap lies above zero and the test,
corrected for the number of rows of its table, stays below .05; it *does not hold* where both say so
below zero; else it is undecided. The interval alone would let four ones among sixty zeros hold; the
test alone does not see how much trainings differ. *Reproduced* (claims) asks for size too: EFFECT.

Legend: S seeds, U users of one seed, R rows of a table.
"""

import math
import re
from collections.abc import Sequence

import numpy as np
from scipy import stats

ENOUGH, MOST = 0.25, 10  # of the paper's relative effect, for a claim to be reproduced
HOLDS, NOT, UNDECIDED = "holds", "does not hold", "undecided"
LEVEL = 0.05
RULE = (
    "A difference holds where its interval lies above zero and the test of random signs (of online "
    "and pooled metrics: that of their interval), corrected for the rows of its table (Holm), has "
    "p below .05; it does not hold where both say so below zero; else it is undecided.")
EFFECT = (
    "*Effect*: ours, relative, as a share of the paper's; a claim that holds with at least "
    f"{ENOUGH} of it, and not more than {MOST} times it, on more than one seed, is reproduced, "
    "unless random starters, in place of the method, pass too. Where a claim says *at least 95 %* "
    "or *twice*, the difference is to so much of the second side.")
FLIPS = 4_999  # signs are drawn so often: the least p, times the rows of a table, is below LEVEL


def sign_flip(rows: Sequence[np.ndarray]) -> float:
    """Two-sided p of the mean of the seeds' means, each user's difference with either sign.

    rows: paired differences of the users, (U,) of each seed.
    """
    parts = np.concatenate([np.asarray(row, float) / len(row) for row in rows])
    parts = parts[parts != 0]  # whose sign changes nothing
    if len(parts) < 2:
        return 1.0
    return float(stats.permutation_test(
        (parts,), np.sum, permutation_type="samples", vectorized=True, n_resamples=FLIPS, rng=0
    ).pvalue)


def of_interval(value: float, low: float, high: float) -> float:
    """Two-sided p of a value whose 95 % interval is all that is known: as of a normal one."""
    error = (high - low) / (2 * stats.norm.ppf(0.975))
    return float(2 * stats.norm.sf(abs(value) / error)) if error > 0 else float(value == 0)


def holm(p: Sequence[float]) -> np.ndarray:
    """(R,) p values of a table corrected for their number (Holm, 1979)."""
    p = np.nan_to_num(np.asarray(p, float), nan=1.0)
    order, result = np.argsort(p, kind="stable"), np.empty(len(p))
    steps = np.minimum(1, p[order] * np.arange(len(p), 0, -1))
    result[order] = np.maximum.accumulate(steps)
    return result


def verdicts(intervals: Sequence[tuple[float, float]], p: Sequence[float]) -> list[str]:
    """Of each row of one table; intervals: (low, high)."""
    clear = holm(p) < LEVEL
    return [HOLDS if sure and low > 0 else NOT if sure and high < 0 else UNDECIDED
            for (low, high), sure in zip(intervals, clear, strict=True)]


def share_of_effect(paper: str, more: float, less: float) -> float | None:
    """Our relative effect, more / less - 1, as a share of the paper's; None where it quotes none.

    paper: its figures as claims quote them, "0.74 > 0.39", or relative lifts over one base, "+24.7
    %", "+30.4 > +24.7 %"; absolute lifts ("+0.32") tell no relative effect.
    """
    sides = re.fullmatch(r"([\d.]+) > ([\d.]+)(?: %)?", paper)
    lifts = re.fullmatch(r"\+([\d.]+)(?: > \+([\d.]+))? %", paper)
    above, below = (sides.groups() if sides else
                    [1 + float(lift or 0) / 100 for lift in lifts.groups()] if lifts else (1, 0))
    if not float(below) or less < 0 or math.isnan(more + less):
        return None
    return (more / less - 1 if less else math.inf) / (float(above) / float(below) - 1)


def narrow(seeds: int) -> str:
    """What a bootstrap of so few seeds leaves out, for the pages."""
    if seeds == 1:
        return ("One training each: brackets are of the users or contexts alone, and say nothing "
                "of how much trainings differ.")
    return (f"Where trainings differ much more than people do, such an interval of {seeds} seeds "
            f"covers the mean of all trainings with at most {1 - 2 ** (1 - seeds):.0%}.")

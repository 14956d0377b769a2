"""The online A/B test of the paper's section 3.3, on people of the simulated platform.

    python eval.py --reproduce 2 --seeds 1    # Table 2; reproduce.py brings the arms' lists

Each arm shows its own lists to a person on the days after the log. Metrics follow appendix B.1.2.

Departures: "paired" lets every arm meet copies of the same people with the same random numbers, as
only a simulator can, so a few hundred people show what a platform needs millions for; "shares" is
the test that a platform can run. Each person lives through the test `copies` times, each time with
other random numbers and from the next list on, and counts once, with the mean: people stay the
unit of every interval ("shares" has one life, as people have). Taps, a visit, stands beside CTR,
taps a starter: as the last places are looked at least, a list that lacks a starter has the higher
CTR for it. CSR takes a day as the evaluation period: over five weeks nearly everybody starts a
conversation some time.
Unstated in the paper: which test its stars come from. Interests stay as they are on the last day of
the log (eval.py's "True clicks" sees the same day): lists are written once, so drift would only
make those of every arm older by as much.

What a person does in one arm, day by day:
- visits (is active) with probability 1 - exp(-rate * (1 + goodwill)), at most once a day; the rate
  is sessions per day in the log;
- sees the next of the arm's lists, and taps by the world's click probabilities; what was tapped
  before in this test is no longer new; each tap starts a conversation;
- without a tap, starts an own conversation with probability UNAIDED;
- after a tap, has further sessions on that day, as in the log (people.depth), and goodwill grows.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field

import numpy as np

from config import AbConfig
from world import people

# Plausible, chosen before any result, and the same for every arm; never to be tuned for a method.
UNAIDED = 0.8  # the paper: roughly 20 % enter and leave without starting a conversation
GOODWILL_GAIN = 0.1  # a tap that resonates wholly (1) raises the visiting rate by a tenth ...
GOODWILL_CAP = 0.5  # ... by half at the most, however many there were ...
GOODWILL_HALF_LIFE = 7.0  # ... and half of it is gone after a week

CONTROL = "deployed"  # the arm of people.retrieved_lists
COUNTS = ("active_days", "started_days", "sessions", "taps", "shown")
METRICS = ("Active", "Avg.S", "CTR", "CSR", "Taps")
FIGURES = ("value", "control", "lift", "interval", "p")
PAPER = {  # Table 2, in per mille; * significant
    "PE": ("-0.01", "-0.26", "-16.16*", "-0.17", "–"),
    "SFT": ("+0.20", "+0.33", "+6.97*", "-0.05", "–"),
    "SFT+DPO": ("+1.16", "+0.42*", "+56.41*", "+0.68", "–"),
    "IceBreaker": ("+1.84*", "+1.59*", "+94.25*", "+1.27*", "–"),
}

# ---------------------------------------------------------------------------------- the simulation


@dataclass
class Person:
    """One person in one arm."""

    user_id: str
    rate: float
    lists: list[list[str]]
    turn: int = 0  # of the list that is seen next
    goodwill: float = 0.0
    tapped: set[str] = field(default_factory=set)

    def day(self, truth: people.Truth, draws: tuple, cache: dict) -> tuple[int, ...]:
        """What happens on the next day, as COUNTS."""
        visit, own, gaps, taps = draws
        self.goodwill *= 0.5 ** (1 / GOODWILL_HALF_LIFE)
        if visit >= 1 - math.exp(-self.rate * (1 + self.goodwill)):
            return (0,) * len(COUNTS)
        starters = self.lists[self.turn % len(self.lists)] if self.lists else []
        self.turn += 1
        asked = frozenset(self.tapped.intersection(map(people.question, starters)))
        key = (tuple(starters), asked)
        if key not in cache:
            cache[key] = truth.click_probabilities(self.user_id, starters, asked_since=asked)
        tapped = np.flatnonzero(taps[: len(starters)] < cache[key])
        if not len(tapped):
            started = int(own < UNAIDED)
            return 1, started, started, 0, len(starters)
        best = max(truth.resonance(self.user_id, starters[i]) for i in tapped)
        self.tapped.update(people.question(starters[i]) for i in tapped)
        self.goodwill = min(GOODWILL_CAP, self.goodwill + GOODWILL_GAIN * best)
        further = int((gaps < people.depth(best)).sum())
        return 1, 1, len(tapped) + further, len(tapped), len(starters)


def _draws(user_id: str, day: int, slots: int, seed: int, copy: int = 0) -> tuple:
    """Random numbers of a person's day, the same in every arm."""
    rng = np.random.default_rng([seed, copy, day, *user_id.encode()])
    visit, own = rng.random(2)
    gaps = rng.exponential(size=24).cumsum()  # those below m are as many as a Poisson(m) draw
    return visit, own, gaps, rng.random(slots)  # last: more slots change no other number


def simulate(
    truth: people.Truth,
    activity: dict[str, float],
    lists: dict[str, dict[str, list[list[str]]]],
    settings: AbConfig,
    seed: int,
) -> dict:
    """Days 1..settings.days after the log. lists: arm -> user -> lists; activity: sessions per day.

    Returns {"days", "split", "lists", "copies", "seed", "arms": {arm: {"users": {user: COUNTS,
    sums over the days, means over the copies}, "by_day": {count: mean over the arm's users, a day
    each}, "cumulative": {"ctr", "ctr_error", "sessions", "sessions_error": up to each day}}}}.
    Raises ValueError where arms cover different users, or a user has no activity.
    """
    users = sorted(next(iter(lists.values()), {}), key=lambda u: zlib.crc32(u.encode()))
    users = sorted(users)
    if not users or any(set(rows) != set(next(iter(lists.values()))) for rows in lists.values()):
        raise ValueError("simulate: every arm needs lists for the same users, at least one")
    if unknown := [u for u in users if u not in activity or u not in truth.users]:
        raise ValueError(f"simulate: no activity or hidden state of {unknown[:5]}")
    copies = settings.copies
    slots = max(len(x) for rows in lists.values() for u in users for x in [[], *rows[u]])
    counts: dict[str, dict[str, np.ndarray]] = {arm: {} for arm in lists}
    for user in users:
        lives = {arm: np.zeros((settings.days, len(COUNTS))) for arm in lists}
        cache: dict = {}
        for copy in range(copies):
            shown = {arm: lists[arm][user][: settings.lists] for arm in lists}
            people = {arm: Person(user, activity[user], x, copy) for arm, x in shown.items()}
            for day in range(settings.days):
                draws = _draws(user, day + 1, slots, seed, copy)
                for arm, person in people.items():
                    lives[arm][day] += person.day(truth, draws, cache)
        for arm in lists:
            counts[arm][user] = lives[arm] / copies
    return {
        "days": settings.days,
        "split": "paired",
        "lists": settings.lists,
        "copies": copies,
        "seed": seed,
        "arms": {arm: _summary(rows, settings.days) for arm, rows in counts.items()},
    }


def _summary(rows: dict[str, np.ndarray], days: int) -> dict:
    sums = {user: x.sum(0).tolist() for user, x in rows.items()}
    means = np.zeros((len(COUNTS), days))  # of an arm that met nobody: few people, many arms
    if rows:
        means = np.mean(list(rows.values()), axis=0).T
    return {
        "users": {user: dict(zip(COUNTS, x, strict=True)) for user, x in sums.items()},
        "by_day": dict(zip(COUNTS, means.tolist(), strict=True)),
        "cumulative": _cumulative(np.array([*rows.values()])) if rows else {},
    }


def _cumulative(lives: np.ndarray) -> dict[str, list[float]]:
    """(U, days, COUNTS) -> CTR and sessions a user up to each day, with their standard errors over
    users (of the CTR by the delta method)."""
    _, _, sessions, taps, shown = np.moveaxis(lives.cumsum(1), 2, 0)  # (U, days) each
    ctr = taps.sum(0) / np.maximum(shown.sum(0), 1e-9)
    effects = (taps - ctr * shown) / np.maximum(shown.mean(0), 1e-9)
    made = {"ctr": ctr, "sessions": sessions.mean(0)}
    for name, x in (("ctr", effects), ("sessions", sessions)):
        made[f"{name}_error"] = x.std(0) / len(lives) ** 0.5
    return {name: x.tolist() for name, x in made.items()}


# ------------------------------------------------------------------------------ metrics and lifts


def _fractions(result: dict, arm: str) -> np.ndarray:
    """(U, 2, METRICS): numerator and denominator of each metric for each user of an arm."""
    rows = [[user[name] for name in COUNTS] for user in result["arms"][arm]["users"].values()]
    active, started, sessions, taps, shown = np.array(rows, float).reshape(-1, len(COUNTS)).T
    people = np.ones(len(rows))
    above = [active, sessions, taps, started, taps]  # Avg.S: Eq. (11), CTR: (12), CSR: (13), a day
    below = [people * result["days"] / 7, people, shown, active, active]
    return np.stack([np.stack(above, 1), np.stack(below, 1)], 1)


def _ratio(sums: np.ndarray) -> np.ndarray:
    """(..., 2, METRICS) -> (..., METRICS); nan where there is nothing to count."""
    above, below = sums[..., 0, :], sums[..., 1, :]
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


def _samples(by_seed: list[dict], arm: str, n: int) -> np.ndarray:
    """(1+n, METRICS): the metrics, then those of n bootstrap samples of users within each seed.

    "paired": a sample holds the same users in every arm.
    """
    sums = np.zeros((1 + n, 2, len(METRICS)))
    for number, result in enumerate(by_seed):
        fractions = _fractions(result, arm)
        if count := len(fractions):
            own = zlib.crc32(arm.encode()) if result["split"] == "shares" else 0
            rng = np.random.default_rng([number, own])
            weights = rng.multinomial(count, np.full(count, 1 / count), n)  # (n, U)
            sums += np.tensordot(np.vstack([np.ones(count), weights]), fractions, 1)
    return _ratio(sums)


def metrics(by_seed: list[dict], arm: str) -> dict[str, float | None]:
    """METRICS of an arm, as ratios of sums over users and seeds; None: nothing to count."""
    values = _samples(by_seed, arm, 0)[0].tolist()
    return {m: None if math.isnan(x) else x for m, x in zip(METRICS, values, strict=True)}


def _contrast(
    by_seed: list[dict], arm: str, other: str, control: str, n: int
) -> list[tuple[float, list[float]]]:
    """For each metric the lift of an arm less that of another, per mille, and its interval.

    nan where control has 0 or nothing to count.
    """
    a, b, c = (_samples(by_seed, name, n) for name in (arm, other, control))
    gaps = 1000 * np.divide(a - b, c, out=np.full(c.shape, np.nan), where=c > 0)
    made = []
    for value, *draws in gaps.T.tolist():
        ends = [0.025, 0.975]
        made.append(
            (value, [value] * 2 if math.isnan(value) else np.nanquantile(draws, ends).tolist())
        )
    return made


def _p_values(by_seed: list[dict], arm: str, other: str) -> list[float]:
    """For each metric the two-sided z-test of two arms, by the delta method, users the unit."""
    values, effects = [], []  # effects of each user on the metrics: an arm's list of (U, METRICS)
    for name in (arm, other):
        rows = [_fractions(result, name) for result in by_seed]
        total = sum(x.sum(0) for x in rows)
        values.append(_ratio(total))
        below = np.where(total[1] > 0, total[1], np.nan)
        effects.append([(x[:, 0] - values[-1] * x[:, 1]) / below for x in rows])
    variance = np.zeros(len(METRICS))
    for result, x, y in zip(by_seed, *effects, strict=True):
        for z in [x - y] if result["split"] == "paired" else [x, y]:
            variance += z.var(0, ddof=1) * len(z) if len(z) > 1 else 0.0
    error = np.sqrt(variance)  # none (equal arms, one user): no difference is shown, p = 1
    z = np.divide(abs(values[0] - values[1]), error, out=np.zeros(len(METRICS)), where=error > 0)
    return [math.erfc(x / math.sqrt(2)) for x in z]


def lifts(by_seed: list[dict], control: str = CONTROL, bootstrap: int = 1000) -> dict:
    """arm -> metric -> {"value", "control", "lift", "interval", "p"}; by_seed: one result a seed.

    lift: over control, per mille; interval: 95 % bootstrap over users; p: two-sided. These three
    are None where control has 0 or nothing to count.
    """
    result, base = {}, metrics(by_seed, control)
    for arm in (a for a in by_seed[0]["arms"] if a != control):
        own, result[arm] = metrics(by_seed, arm), {}
        gaps = _contrast(by_seed, arm, control, control, bootstrap)
        ps = _p_values(by_seed, arm, control)
        for name, (lift, interval), p in zip(METRICS, gaps, ps, strict=True):
            figures = (None,) * 3 if math.isnan(lift) else (lift, interval, p)
            figures = (own[name], base[name], *figures)
            result[arm][name] = dict(zip(FIGURES, figures, strict=True))
    return result


def beats(
    by_seed: list[dict], arm: str, other: str, metric: str, control: str = CONTROL
) -> tuple[float, list[float]]:
    """(lift of `arm` less lift of `other`, 95 % interval), per mille; nan as in `_contrast`."""
    return _contrast(by_seed, arm, other, control, 1000)[METRICS.index(metric)]


def table(lifts: dict[str, dict]) -> str:
    """Table 2 as measured, and the paper's."""

    def cell(figures: dict) -> str:
        if figures["lift"] is None:
            return "–"
        star = "*" * (figures["p"] < 0.05)
        low, high = figures["interval"]
        return f"{figures['lift']:+.2f}{star} [{low:+.2f}, {high:+.2f}]"

    def row(name: str, cells) -> str:
        return f"| {name} | " + " | ".join(cells) + " |"

    base = [x["control"] for x in next(iter(lifts.values())).values()]
    head = row("Method", METRICS) + "\n" + "|---" * (len(METRICS) + 1) + "|"
    lines = ["Lift over the deployed retrieval in per mille [95 % interval], * p < 0.05:", "", head]
    lines += [row(arm, [cell(x[m]) for m in METRICS]) for arm, x in lifts.items()]
    lines += [row("deployed, absolute", ["–" if x is None else f"{x:.4g}" for x in base])]
    lines += ["", "The paper's Table 2:", "", head, *(row(m, x) for m, x in PAPER.items())]
    return "\n".join(lines) + "\n"

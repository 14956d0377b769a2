"""The online A/B test of the paper's section 3.3, on people of the simulated platform.

    python eval.py --reproduce 2 --seeds 1    # Table 2; tables/reproduce.py brings the arms' lists

What a person does in one arm on each day after the log:
- visits (is active) with probability 1 - exp(-rate * (1 + goodwill)); rate: sessions a day there;
- sees the next of the arm's lists, and taps by the world's click probabilities; what was tapped
  before in this test is no longer new; each tap starts a conversation;
- without a tap, starts a conversation unaided with probability UNAIDED;
- after a tap, has further sessions on that day, as in the log, and goodwill grows.

Departure: every arm meets copies of the same people with the same random numbers, as only a
simulator can, so a few hundred people show what a platform needs millions for. Others are below.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from config import AbConfig
from world.click_model import Truth, further_sessions, question

# Plausible, chosen before any result, and the same for every arm; never to be tuned for a method.
UNAIDED = 0.8  # the paper: roughly 20 % enter and leave without starting a conversation
GOODWILL_GAIN = 0.1  # a tap that resonates wholly (1) raises the visiting rate by a tenth ...
GOODWILL_CAP = 0.5  # ... by half at the most, however many there were ...
GOODWILL_HALF_LIFE = 7.0  # ... and half of it is gone after a week

CONTROL = "deployed"  # the arm of people.retrieved_lists
COUNTS = ("active_days", "started_days", "sessions", "taps", "shown")
# By appendix B.1.2. Departures: Taps, a visit, stands beside CTR, taps a starter, which is higher
# for a list that lacks a starter, as the last places are looked at least. CSR takes a day as the
# evaluation period: over five weeks nearly everybody starts a conversation some time.
METRICS = ("Active", "Avg.S", "CTR", "CSR", "Taps")


@dataclass
class Person:  # in one arm
    user_id: str
    rate: float  # visits a day
    lists: list[list[str]]
    turn: int = 0  # of the list that is seen next
    goodwill: float = 0.0
    tapped: set[str] = field(default_factory=set)  # as `question`s

    def day(self, truth: Truth, draws: tuple, cache: dict) -> tuple[int, ...]:
        """What happens on the next day, as COUNTS."""
        visit, unaided, gaps, taps = draws  # uniform, uniform, arrival times, uniform (slots,)
        self.goodwill *= 0.5 ** (1 / GOODWILL_HALF_LIFE)
        if visit >= 1 - math.exp(-self.rate * (1 + self.goodwill)):
            return (0,) * len(COUNTS)
        starters = self.lists[self.turn % len(self.lists)] if self.lists else []  # (K,)
        self.turn += 1
        asked = frozenset(self.tapped.intersection(map(question, starters)))
        key = (tuple(starters), asked)
        # Unstated: interests stay as on the last day of the log (as in eval's "True clicks"): lists
        # are written once, so drift would only make those of every arm older by as much.
        if key not in cache:  # few lists are seen on many days, in many lives and perhaps arms
            cache[key] = truth.click_probabilities(self.user_id, starters, asked_since=asked)
        tapped = [starters[slot] for slot in np.flatnonzero(taps[: len(starters)] < cache[key])]
        if not tapped:
            started = int(unaided < UNAIDED)
            return 1, started, started, 0, len(starters)
        best = max(truth.resonance(self.user_id, starter) for starter in tapped)
        self.tapped.update(map(question, tapped))
        self.goodwill = min(GOODWILL_CAP, self.goodwill + GOODWILL_GAIN * best)
        further = int((gaps < further_sessions(best)).sum())
        return 1, 1, len(tapped) + further, len(tapped), len(starters)


def _draws(user_id: str, day: int, slots: int, seed: int, copy: int = 0) -> tuple:
    """Random numbers of a person's day, the same in every arm."""
    rng = np.random.default_rng([seed, copy, day, *user_id.encode()])
    visit, unaided = rng.random(2)
    gaps = rng.exponential(size=24).cumsum()  # those below m are as many as a Poisson(m) draw
    return visit, unaided, gaps, rng.random(slots)  # last: more slots change no other number


def simulate(truth: Truth, activity: dict[str, float], lists: dict, settings: AbConfig,
             seed: int) -> dict:
    """Days 1..settings.days after the log: {"days", "lists", "copies", "seed", "arms": {arm:
    {"users": {user: COUNTS, sums over the days, means over the copies}, "by_day": {count: its mean
    over the users on each day}, "cumulative": {"ctr", "ctr_error", "sessions", "sessions_error":
    up to each day}}}}. Raises ValueError where arms differ in users, or a user has no activity.

    activity: user -> sessions per day in the log; lists: arm -> user -> lists of starters.
    """
    users = sorted(next(iter(lists.values()), {}))
    if not users or any(set(rows) != set(users) for rows in lists.values()):
        raise ValueError("simulate: every arm needs lists for the same users, at least one")
    if unknown := [u for u in users if u not in activity or u not in truth.users]:
        raise ValueError(f"simulate: no activity or hidden state of {unknown[:5]}")
    slots = max([0, *(len(x) for arm in lists.values() for rows in arm.values() for x in rows)])
    # Departure: each person lives through the test `copies` times, with other random numbers and
    # from the next list on, and counts once, with the mean: people stay the unit of intervals.
    lives = {arm: np.zeros((len(users), settings.days, len(COUNTS))) for arm in lists}
    for number, user in enumerate(users):
        cache: dict = {}  # (starters, asked) -> click probabilities, of this user
        for copy in range(settings.copies):
            people = {arm: Person(user, activity[user], rows[user][: settings.lists], copy)
                      for arm, rows in lists.items()}
            for day in range(settings.days):
                draws = _draws(user, day + 1, slots, seed, copy)
                for arm, person in people.items():
                    lives[arm][number, day] += person.day(truth, draws, cache)
    arms = {arm: _summary(users, counts / settings.copies) for arm, counts in lives.items()}
    return {"days": settings.days, "lists": settings.lists, "copies": settings.copies,
            "seed": seed, "arms": arms}


def _summary(users: list[str], lives: np.ndarray) -> dict:
    """An arm's part of `simulate`'s result; lives (U, days, COUNTS)."""
    _, _, sessions, taps, shown = np.moveaxis(lives.cumsum(1), 2, 0)  # (U, days) each
    ctr = taps.sum(0) / np.maximum(shown.sum(0), 1e-9)
    effects = (taps - ctr * shown) / np.maximum(shown.mean(0), 1e-9)  # on CTR: the delta method
    root, sums = len(users) ** 0.5, zip(users, lives.sum(1).tolist(), strict=True)
    cumulative = {"ctr": ctr, "ctr_error": effects.std(0) / root,
                  "sessions": sessions.mean(0), "sessions_error": sessions.std(0) / root}
    return {"users": {user: dict(zip(COUNTS, counts, strict=True)) for user, counts in sums},
            "by_day": dict(zip(COUNTS, lives.mean(0).T.tolist(), strict=True)),
            "cumulative": {name: values.tolist() for name, values in cumulative.items()}}


def _fractions(result: dict, arm: str) -> np.ndarray:
    """(U, 2, METRICS): numerator and denominator of each metric for each user of an arm."""
    rows = [[user[name] for name in COUNTS] for user in result["arms"][arm]["users"].values()]
    active, started, sessions, taps, shown = np.array(rows, float).T  # (U,) each
    one, weeks = np.ones(len(rows)), np.full(len(rows), result["days"] / 7)
    above = [active, sessions, taps, started, taps]  # Avg.S: Eq. (11), CTR: (12), CSR: (13), a day
    return np.stack([np.stack(above, 1), np.stack([weeks, one, shown, active, active], 1)], 1)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below; nan where there is nothing to count."""
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


def _samples(by_seed: list[dict], arm: str, n: int) -> np.ndarray:
    """(1 + n, METRICS): the metrics, then those of n bootstrap samples of users within each seed.

    Ratios of sums, not means of users' ratios: hence not the bootstrap of stages/metrics.py.
    """
    sums = np.zeros((1 + n, 2, len(METRICS)))
    for number, result in enumerate(by_seed):
        fractions = _fractions(result, arm)
        users = len(fractions)
        rng = np.random.default_rng([number, 0])  # whatever the arm: it draws the same users
        weights = rng.multinomial(users, np.full(users, 1 / users), n)  # (n, U)
        sums += np.tensordot(np.vstack([np.ones(users), weights]), fractions, 1)
    return _ratio(sums[:, 0], sums[:, 1])


def metrics(by_seed: list[dict], arm: str) -> dict[str, float | None]:
    """METRICS of an arm, as ratios of sums over users and seeds; None: nothing to count."""
    values = _samples(by_seed, arm, 0)[0].tolist()
    return {m: None if math.isnan(v) else v for m, v in zip(METRICS, values, strict=True)}


def _contrast(by_seed: list[dict], arm: str, other: str, control: str, n: int) -> list[tuple]:
    """For each metric (lift of an arm less that of another, 95 % interval), per mille; or nan."""
    a, b, c = (_samples(by_seed, name, n) for name in (arm, other, control))  # (1 + n, METRICS)
    return [  # a nan of every draw makes nanquantile warn
        (lift, [lift] * 2 if math.isnan(lift) else np.nanquantile(draws, [0.025, 0.975]).tolist())
        for lift, *draws in (1000 * _ratio(a - b, c)).T.tolist()]


def _p_values(by_seed: list[dict], arm: str, other: str) -> list[float]:
    """For each metric the two-sided z-test of two arms, by the delta method, users the unit."""
    values, effects = [], []  # effects of each user on the metrics: a seed's (U, METRICS), by arm
    # Unstated: which test the paper's stars come from.
    for name in (arm, other):
        seeds = [_fractions(result, name) for result in by_seed]
        above, below = sum(fractions.sum(0) for fractions in seeds)
        values.append(_ratio(above, below))
        below = np.where(below > 0, below, np.nan)  # (METRICS,)
        effects.append([(f[:, 0] - values[-1] * f[:, 1]) / below for f in seeds])
    gaps = [a - b for a, b in zip(*effects, strict=True)]  # the same people in both arms
    error = np.sqrt(sum(gap.var(0, ddof=1) * len(gap) for gap in gaps if len(gap) > 1))
    # No error (equal arms, one user): no difference is shown, p = 1.
    z = np.divide(abs(values[0] - values[1]), error, out=np.zeros(len(METRICS)), where=error > 0)
    return [math.erfc(score / math.sqrt(2)) for score in z]


def lifts(by_seed: list[dict], control: str = CONTROL, bootstrap: int = 1000) -> dict:
    """arm -> metric -> {"value", "control", "lift", "interval", "p"}; by_seed: one result a seed.

    lift: over control, per mille; interval: 95 % bootstrap over users; p: two-sided. These three
    are None where control has 0 or nothing to count.
    """
    result, base = {}, metrics(by_seed, control)
    for arm in (name for name in by_seed[0]["arms"] if name != control):
        values, result[arm] = metrics(by_seed, arm), {}
        contrast = _contrast(by_seed, arm, control, control, bootstrap)
        ps = _p_values(by_seed, arm, control)
        for metric, (lift, interval), p in zip(METRICS, contrast, ps, strict=True):
            tested = {"lift": lift, "interval": interval, "p": p}
            if math.isnan(lift):
                tested = dict.fromkeys(tested)  # JSON has no nan
            result[arm][metric] = {"value": values[metric], "control": base[metric], **tested}
    return result


def beats(by_seed: list[dict], arm: str, other: str, metric: str) -> tuple[float, list[float]]:
    """As in `lifts`, less the lift of another arm: (lift, 95 % interval), per mille, or nan."""
    return _contrast(by_seed, arm, other, CONTROL, 1000)[METRICS.index(metric)]


def table_rows(lifts: dict[str, dict]) -> list[list[str]]:
    """Table 2: name and a cell for each of METRICS, for each arm and for the control alone."""

    def cell(figures: dict) -> str:
        if figures["lift"] is None:
            return "–"
        star, (low, high) = "*" * (figures["p"] < 0.05), figures["interval"]
        return f"{figures['lift']:+.2f}{star} [{low:+.2f}, {high:+.2f}]"

    control = [figures["control"] for figures in next(iter(lifts.values())).values()]
    return [*([arm, *(cell(figures[m]) for m in METRICS)] for arm, figures in lifts.items()),
            ["deployed, absolute", *("–" if v is None else f"{v:.4g}" for v in control)]]

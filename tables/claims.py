"""Whether the paper's claims, and our own, hold on the values of a reproduction's seeds.

    python eval.py --reproduce all --seeds 3     # results/claims.md; the claims are in claims.yaml

A claim says that one side lies above another; verdicts.py says when that holds.
Unstated in the paper: how its claims were tested; users are drawn again within each seed here.

Legend: S seeds, U users of one seed, C categories of what is counted.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np

from stages.metrics import bootstrap, markdown_table, seeds_again, user_values
from tables import experiments, verdicts
from tables.verdicts import EFFECT, ENOUGH, HOLDS, MOST, NOT, RULE, UNDECIDED
from world import ab

Seeds = list[dict]  # report/values.json of each seed
RANDOM = "random starters"
OURS = "–"  # in place of the paper's figures: a claim of our own
# Metric -> (where values.json has the counts of each user, what is made of the shares (..., C) of
# the categories, sorted by name, in their sum over users).
POOLED: dict[str, tuple[str, Callable]] = {
    # Topics, chores being one of them; 1 to C.
    "spread": ("topics",
               lambda shares: np.exp(-(shares * np.log(np.maximum(shares, 1e-9))).sum(-1))),
    "head": ("topics", lambda shares: shares.max(-1)),
    # Of reward models (garm_values.py): pairs that are "right" or "wrong"; and, of P pairs doubled
    # by flipping, sums by bin of p and of the label: P each, so that all add up to the 2 P rows.
    "accuracy": ("pairs", lambda shares: shares[..., 0]),
    "ece": ("calibration", lambda shares: np.abs(
        np.diff(shares.reshape(*shares.shape[:-1], 2, -1), axis=-2)).sum((-1, -2))),
}


@dataclass(frozen=True)
class Claim:
    """`more` lies above `less` times `factor` in `metric`; claims.yaml says what the fields are."""

    table: str
    text: str
    metric: str
    more: str
    less: str
    paper: str = OURS  # its figures, quoted
    why: str = "not known"  # it does not hold, where that is so
    factor: float = 1.0
    base: str = "PE"  # of metrics.LIFTS


def all_claims(name: str = "claims") -> list[Claim]:
    return [Claim(**fields) for fields in experiments.read(name)["claims"]]


def per_seed(seeds: Seeds, method: str, metric: str, base: str = "PE") -> list[np.ndarray]:
    """Values of the users of each seed, (U,) each."""
    return [np.array([*user_values(s["values"], method, metric, base).values()]) for s in seeds]


def paired(seeds: Seeds, metric: str, more: str, less: str, factor: float = 1.0,
           base: str = "PE") -> list[np.ndarray]:
    """more - factor * less of every user, (U,) for each seed."""
    sides = [[user_values(s["values"], m, metric, base) for m in (more, less)] for s in seeds]
    # Of some users a metric may not be known: no share of chores where no text is understood.
    return [np.array([a[u] - factor * b[u] for u in a if u in b]) for a, b in sides]


def pooled(metric: str, of_user: dict[str, dict], draws: int = 0, seed: int = 0) -> np.ndarray:
    """(1 + draws,): a metric of POOLED of all users' counts, then of bootstrap samples of users.

    of_user: user -> category -> number. Not a mean over users, so metrics.bootstrap does not fit:
    the counts of the users drawn are added up first.
    """
    names = sorted({name for counts in of_user.values() for name in counts})
    users = sorted(of_user)
    counts = np.array([[of_user[u].get(name, 0) for name in names] for u in users])  # (U, C)
    n = len(counts)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)  # (draws, U)
    sums = np.vstack([np.ones(n), weights]) @ counts  # (1 + draws, C)
    total = sums.sum(1, keepdims=True)
    # Of users without any count there is no share: nan, not 0.
    return POOLED[metric][1](sums / np.where(total > 0, total, np.nan))


def pooled_interval(seeds: Seeds, metric: str, more: str, less: str = "",
                    hierarchical: bool = False) -> tuple:
    """(value, low, high) of a metric of POOLED, of `more` or of its difference to `less`; the value
    of each seed; the value of each side."""
    count, key, rng = iter(range(10**6)), POOLED[metric][0], np.random.default_rng(0)
    names = [m for m in (more, less) if m]
    # Who has nothing on one side is drawn there too: sides stay pairs.
    users = [dict.fromkeys([u for m in names for u in s[key][m]], {}) for s in seeds]
    counts = [[every | s[key][m] for every, s in zip(users, seeds, strict=True)] for m in names]

    def sides(draws: int = 2000) -> np.ndarray:  # (sides, S, 1 + draws)
        # The seed's number draws the same users for both, hierarchically anew with each call.
        start = next(count) * len(seeds)
        return np.array([[pooled(metric, rows, draws, start + i) for i, rows in enumerate(side)]
                         for side in counts])

    def gaps() -> np.ndarray:  # (S, draws)
        both = sides()[:, :, 1:]
        return both[0] - both[1] if less else both[0]

    drawn = seeds_again(gaps, rng) if hierarchical else gaps().mean(0)
    now = sides(0)[:, :, 0]  # (sides, S), of the users as they are
    by_seed = now[0] - now[1] if less else now[0]
    return (by_seed.mean(), *np.nanquantile(drawn, [0.025, 0.975])), by_seed, now.mean(1)


# Each way to compare returns (difference, low, high), p of it, the difference of each seed, both
# sides.
def _by_users(seeds: Seeds, claim: Claim, hierarchical: bool) -> tuple:
    rows = paired(seeds, claim.metric, claim.more, claim.less, claim.factor, claim.base)
    # Of all users that a side has, those without the other too.
    sides = [np.mean([values.mean() for values in per_seed(seeds, m, claim.metric, claim.base)])
             for m in (claim.more, claim.less)]
    interval = bootstrap(rows, hierarchical=hierarchical)
    return interval, verdicts.sign_flip(rows), [gaps.mean() for gaps in rows], sides


def _online(seeds: Seeds, claim: Claim, hierarchical: bool) -> tuple:
    arms, results = (claim.more, claim.less, claim.metric), [s["ab"] for s in seeds]
    value, interval = ab.beats(results, *arms)  # per mille
    sides = [ab.beats(results, arm, ab.CONTROL, claim.metric)[0] for arm in arms[:2]]
    by_seed = [ab.beats([one], *arms)[0] for one in results]
    return (value, *interval), verdicts.of_interval(value, *interval), by_seed, sides


def _by_counts(seeds: Seeds, claim: Claim, hierarchical: bool) -> tuple:
    interval, *rest = pooled_interval(seeds, claim.metric, claim.more, claim.less, hierarchical)
    return interval, verdicts.of_interval(*interval), *rest


def judged(seeds: Seeds, wanted: Collection[str], name: str = "claims",
           hierarchical: bool = False) -> list[dict]:
    """Every claim of these tables with its difference, interval, verdict, and on how many seeds the
    difference has the same sign. name: of the YAML file; hierarchical: as of metrics.bootstrap."""
    rows = []
    for claim in (c for c in all_claims(name) if c.table in wanted):
        key, compare = "values", _by_users
        if claim.metric in ab.METRICS:
            key, compare = None, _online
        elif claim.metric in POOLED:
            key, compare = POOLED[claim.metric][0], _by_counts
        if key and not all(m in s[key] for s in seeds for m in (claim.more, claim.less)):
            continue  # a method that was not trained, e.g. fewer rounds were asked for
        (value, low, high), p, by_seed, sides = compare(seeds, claim, hierarchical)
        # Utility is quoted as the lift over the base.
        base = np.mean([row.mean() for row in per_seed(seeds, claim.base, "utility")]) if (
            claim.metric == "utility") else 0.0
        rows.append(vars(claim) | {
            "sides": [*map(float, sides)], "value": float(value),
            "interval": [float(low), float(high)], "p": p,
            # Of how much trainings differ the interval says nothing.
            "same_sign": sum(bool(np.sign(gap) == np.sign(value)) for gap in by_seed),
            "seeds": len(seeds),
            # Random starters, in place of `more`, are above `less` too: no skill is needed.
            "random_too": claim.table == "1" and all(RANDOM in s["values"] for s in seeds) and
                          _by_users(seeds, replace(claim, more=RANDOM), hierarchical)[0][1] > 0,
            "share": verdicts.share_of_effect(claim.paper, *(float(x - base) for x in sides))})
    for table in {row["table"] for row in rows}:  # Holm's correction is for the claims of a table
        some = [row for row in rows if row["table"] == table]
        said = verdicts.verdicts([row["interval"] for row in some], [row["p"] for row in some])
        for row, verdict in zip(some, said, strict=True):
            row["verdict"] = verdict
    return rows


def counted(rows: list[dict]) -> str:
    """Verdicts on the paper's claims and, apart, on our own."""
    parts = []
    for whose, ours in (("of the paper", False), ("of our own", True)):
        some = [row for row in rows if (row["paper"] == OURS) == ours]
        said = [row["verdict"] for row in some]
        hold, open_, fail = (said.count(verdict) for verdict in (HOLDS, UNDECIDED, NOT))
        always = sum(r["verdict"] == HOLDS and r["same_sign"] == r["seeds"] for r in some)
        sized = [row for row in some if row["share"] is not None]
        again = sum(row["verdict"] == HOLDS and ENOUGH <= row["share"] <= MOST
                    and row["seeds"] > 1 and not row["random_too"] for row in sized)
        parts.append(f"{len(some)} claims {whose}: holding {hold} ({always} of them with the same "
                     f"sign on every seed), undecided {open_}, not holding {fail}" + bool(sized) *
                     f"; of {len(sized)} whose size can be compared {again} reproduced")
    return "; ".join(parts)


def claims_page(rows: list[dict], note: str, name: str = "claims") -> str:
    """results/claims.md, or what another YAML file has as its page."""
    return experiments.read(name)["page"].format(
        note=note, counted=counted(rows), rule=f"{RULE} {EFFECT}", **claims_parts(rows, name))


def claims_parts(rows: list[dict], name: str = "claims") -> dict[str, str]:
    """table: a row a claim; why: reasons of those that do not hold."""
    texts, cells, reasons = experiments.read(name), [], {}  # why -> claims that it explains
    for row in rows:
        unit, form = texts["units"][row["metric"]]
        more, less = (format(side, form) for side in row["sides"])
        value, low, high = (f"{gap:+{form}}" for gap in (row["value"], *row["interval"]))
        cells.append([row["table"], row["text"], unit, row["paper"], f"{more} against {less}",
                      f"{value} [{low}, {high}]", f"**{row['verdict']}**" +
                      "; so do random starters" * (row["verdict"] == HOLDS and row["random_too"]),
                      "–" if row["share"] is None else
                      f"> {MOST}" if row["share"] > MOST else f"{row['share']:.2f}",
                      f"{row['same_sign']} of {row['seeds']}" if row["value"] else "–"])
        if row["verdict"] != HOLDS:
            reasons.setdefault(row["why"], []).append(row["text"])
    why = [f"- {'; '.join(claims)}: *{reason}*." for reason, claims in reasons.items()]
    return {"table": markdown_table(texts["head"], cells), "why": "\n".join(why)}

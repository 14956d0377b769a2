"""The paper's claims and our own, and whether each holds on the values of a reproduction's seeds.

    python eval.py --reproduce all --seeds 3     # results/claims.md
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from eval import user_lifts
from world import ab

Seeds = list[dict]  # report/values.json of each seed
UNKNOWN, OWN = "not known", "–"


@dataclass(frozen=True)
class Claim:
    """`more` is above `less` times `factor` in `metric`; for a metric of ab.py both are arms, for
    one of POOLED whose topics are counted (compare.topics)."""

    table: str
    text: str
    metric: str
    more: str
    less: str
    paper: str  # its figures; OWN: our own claim
    why: str = UNKNOWN  # it does not hold, or is undecided, where that is so
    factor: float = 1.0
    base: str = "PE"  # what r_user compares each user's utility with


# Why a claim does not hold here, as far as we know.
_RETRIEVED = (
    "probably because what was tapped or ignored are retrieved lists, far from what the policy "
    "writes, and single taps are chance: the loss ends at about ln 2 (training curves), and the "
    "policy hardly differs from SFT's"
)
_DEPLOYED = (
    "the teacher's lists, from the same interests, do (table 2): probably because the small "
    "generator garbles names"
)
_GARBLED = "probably because the small generator garbles names; the teacher's rules do not"
_FEW = (
    "probably because a list is about as many topics whether the generator is given four interests "
    "or the whole history (tables 1 and 6)"
)
_POPULAR = "probably because they are what most people tapped, about five different things"
_MIXED = (
    "probably because two in five deployed starters are popular or drawn at random (world.py), "
    "about whatever subject"
)
_SHORT = (
    "CTR is per starter shown, and taps lean to the first places of a list: prompting's lists are "
    "the shortest (table 1), and their taps are fewer (Taps)"
)
_RARE = (
    "probably because the base model makes up rare words, and the teacher's forms of questions "
    "have none"
)
_RULE = "the rule's interests resonate hardly more than the whole history (table 6)"
_SAME = (
    "probably because the policy hangs little in the end on what SIT or the pool held: DPO's "
    "chosen lists are picked by the same ranker either way"
)
_LIKELIHOOD = (
    "probably because the chosen list is the same for every kind of negative, and its likelihood "
    "is in the loss (dpo.sft_weight): what is rejected then matters less"
)
_FORMS = (
    "probably because its starters resonate no more than SFT's (below table 1), and what follows a "
    "tap hangs on that: its further taps come from forms of question, not from better subjects"
)
_WIDE = "probably because dpo.weight leaves most of the weight to diversity"
_GOODWILL = (
    "visits follow how much a tapped starter resonates, and prompting's starters, though tapped "
    "less often, are about the person's own subjects (below table 1)"
)
_SEARCHED = "choosing among several lists by the same ranker does much of what DPO learns"
_NEAR = (
    "the ranker reads the trigger interests, so it gives points for being near RID's choice; what "
    "people tap hangs on more, and the small generator garbles names"
)

U, T, L, S, R = "utility", "true_clicks", "lexical", "semantic", "r_user"
UNITS = {  # metric -> what is counted, and how it is written
    U: ("ranker score", ".4f"), T: ("true clicks a list", ".3f"), L: ("keywords a list", ".2f"),
    "words": ("words a list", ".2f"), S: ("topics a list", ".2f"),
    R: ("share of users above the base", ".3f"), "judge_win": ("share of wins", ".3f"),
    "resonance": ("resonance, 0 to 1", ".3f"), "functional": ("share of chores", ".3f"),
    "spread": ("categories, exp(entropy)", ".2f"), "head": ("share of the largest category", ".3f"),
    **{metric: (f"{metric}, lift in per mille", ".1f") for metric in ab.METRICS},
}
ICE = "IceBreaker"
LIFTS = ("r_user", "r_score", "train_r_score")
POOLED = {  # of shares of topic categories (..., C), chores being one of them
    "spread": lambda x: np.exp(-(x * np.log(np.maximum(x, 1e-9))).sum(-1)),
    "head": lambda x: x.max(-1),
}


def _online() -> list[Claim]:
    """Table 2: each arm against the control, with the paper's sign; IceBreaker against each other
    arm, alone and with list search."""
    made, order = [], ("CTR", "CSR", "Avg.S", "Active", "Taps")
    lifts = {arm: dict(zip(ab.METRICS, row, strict=True)) for arm, row in ab.PAPER.items()}
    names = {ICE: ICE, "SFT+DPO": "vanilla DPO", "SFT": "SFT", "PE": "prompting"}
    for (arm, name), metric in product(names.items(), order):
        paper = lifts[arm][metric]
        if paper.startswith("-"):
            text = f"{name} falls behind the deployed retrieval in {metric}"
            why = UNKNOWN if arm != "PE" else _SHORT if metric == "CTR" else _GOODWILL
            made.append(Claim("2", text, metric, ab.CONTROL, arm, paper, why))
        elif paper != OWN or arm == ICE:
            text = f"{name} lifts {metric} over the deployed retrieval"
            made.append(Claim("2", text, metric, arm, ab.CONTROL, paper, _DEPLOYED))
    pairs = ((ICE, "SFT+DPO"), (ICE, "SFT"), ("SFT+DPO", "SFT"))
    for (more, less), metric in product(pairs, order):
        if metric == "Taps" and more != ICE:
            continue
        figures = [lifts[arm][metric] for arm in (more, less)]
        later = metric in ("Avg.S", "Active")
        made.append(Claim("2", f"{names[more]} lifts {metric} over {names[less]}", metric, more,
                          less, OWN if OWN in figures else " > ".join(figures),
                          _RETRIEVED if more != ICE else _FORMS if later else UNKNOWN))
    for (arm, name), metric in product(((ab.CONTROL, "the deployed retrieval"),
                                        ("SFT, list search", "SFT with the same")), order):
        later = arm != ab.CONTROL and metric in ("Avg.S", "Active")
        made.append(Claim("2", f"with list search, IceBreaker lifts {metric} over {name}",
                          metric, "IceBreaker, list search", arm, OWN,
                          _FORMS if later else _DEPLOYED if arm == ab.CONTROL else UNKNOWN))
    return made


CLAIMS = [
    Claim("1", "RID raises utility over prompting with all history", U, "PE+RID", "PE", "+0.32"),
    Claim("1", "by the hidden truth too RID is above prompting with all history", T, "PE+RID", "PE",
          OWN, _NEAR),
    Claim("1", "RID narrows the keywords of prompted lists", L, "PE", "PE+RID", "29.03 > 24.12",
          _FEW),
    Claim("1", "RID narrows the topics of prompted lists", S, "PE", "PE+RID", "6.11 > 4.99", _FEW),
    Claim("1", "SFT raises utility over prompting with RID", U, "SFT", "PE+RID", "0.39 > 0.32"),
    Claim("1", "SFT is above prompting for more users than prompting with RID is", R, "SFT",
          "PE+RID", "0.73 > 0.69"),
    Claim("1", "by the hidden truth too SFT is above prompting with RID", T, "SFT", "PE+RID", OWN),
    Claim("1", "SFT widens the keywords over prompting with RID", L, "SFT", "PE+RID",
          "26.46 > 24.12", _RARE),
    Claim("1", "SFT widens the topics over prompting with RID", S, "SFT", "PE+RID", "5.17 > 4.99"),
    Claim("1", "vanilla DPO raises utility over SFT", U, "SFT+DPO", "SFT", "0.42 > 0.39",
          _RETRIEVED),
    Claim("1", "vanilla DPO is above prompting for more users than SFT is", R, "SFT+DPO", "SFT",
          "0.75 > 0.73", _RETRIEVED),
    Claim("1", "vanilla DPO collapses the keywords", L, "SFT", "SFT+DPO", "26.46 > 13.75",
          _RETRIEVED),
    Claim("1", "vanilla DPO collapses the topics", S, "SFT", "SFT+DPO", "5.17 > 2.64", _RETRIEVED),
    Claim("1", "IceBreaker has more utility than SFT", U, ICE, "SFT", "0.74 > 0.39"),
    Claim("1", "IceBreaker has more utility than vanilla DPO", U, ICE, "SFT+DPO", "0.74 > 0.42"),
    Claim("1", "IceBreaker has more utility than prompting", U, ICE, "PE", "+0.74"),
    Claim("1", "IceBreaker has more utility than prompting with RID", U, ICE, "PE+RID",
          "0.74 > 0.32"),
    Claim("1", "IceBreaker is above prompting for more users than SFT is", R, ICE, "SFT",
          "0.82 > 0.73"),
    Claim("1", "IceBreaker is above prompting for more users than vanilla DPO is", R, ICE,
          "SFT+DPO", "0.82 > 0.75"),
    Claim("1", "IceBreaker is above prompting for more users than prompting with RID is", R, ICE,
          "PE+RID", "0.82 > 0.69"),
    Claim("1", "by the hidden truth too IceBreaker is above SFT", T, ICE, "SFT", OWN),
    Claim("1", "by the hidden truth too IceBreaker is above vanilla DPO", T, ICE, "SFT+DPO", OWN),
    Claim("1", "by the hidden truth too IceBreaker is above prompting", T, ICE, "PE", OWN),
    Claim("1", "by the hidden truth too IceBreaker is above prompting with RID", T, ICE, "PE+RID",
          OWN),
    Claim("1", "by the hidden truth IceBreaker is above the deployed retrieval", T, ICE,
          "deployed retrieval", OWN, _DEPLOYED),
    Claim("1", "by the hidden truth SFT is above random starters", T, "SFT", "random starters", OWN,
          _DEPLOYED),
    Claim("1", "by the hidden truth IceBreaker is above random starters", T, ICE,
          "random starters", OWN, _DEPLOYED),
    Claim("1", "by the hidden truth IceBreaker is above the teacher's lists", T, ICE, "teacher",
          OWN, _GARBLED),
    Claim("1", "by the hidden truth the teacher's lists are above SFT, which imitates them", T,
          "teacher", "SFT", OWN),
    Claim("1", "IceBreaker has more keywords than SFT", L, ICE, "SFT",
          "27.74 > 26.46 (Doubao: 28.83 < 28.97)"),
    Claim("1", "IceBreaker keeps at least 95 % of SFT's keywords", L, ICE, "SFT", OWN, factor=0.95),
    Claim("1", "IceBreaker keeps at least 95 % of SFT's distinct words", "words", ICE,
          "SFT", OWN, factor=0.95),
    Claim("1", "IceBreaker keeps at least 95 % of SFT's topics", S, ICE, "SFT", "5.01 / 5.17",
          factor=0.95),
    Claim("1", "IceBreaker has more keywords than vanilla DPO", L, ICE, "SFT+DPO", "27.74 > 13.75"),
    Claim("1", "IceBreaker has more topics than vanilla DPO", S, ICE, "SFT+DPO", "5.01 > 2.64",
          _RETRIEVED),
    Claim("1", "one list of IceBreaker is about more topics than one of the deployed retrieval", S,
          ICE, "deployed retrieval", OWN, _MIXED),
    *_online(),
    Claim("2", "the teacher's lists lift CTR over the deployed retrieval", "CTR", "teacher",
          ab.CONTROL, OWN),
    Claim("2", "IceBreaker lifts CTR over SFT with list search", "CTR", ICE, "SFT, list search",
          OWN, _SEARCHED),
    Claim("6", "RID's interests beat rule-based ones in pairwise judgement", "judge_win",
          "interests: RID", "interests: rule", "0.93 > 0.07"),
    Claim("6", "RID's interests resonate more than rule-based ones (hidden truth)", "resonance",
          "interests: RID", "interests: rule", OWN),
    Claim("6", "RID's interests resonate more than the whole history (hidden truth)", "resonance",
          "interests: RID", "interests: all", OWN),
    Claim("6", "RID has more utility than rule-based distillation", U, ICE, "rule-based",
          "0.58 > 0.35"),
    Claim("6", "RID has more utility than no distillation", U, ICE, "non-distillation", "+0.58"),
    Claim("6", "RID is above no distillation for more users than rule-based distillation is", R,
          ICE, "rule-based", "0.78 > 0.70", base="non-distillation"),
    Claim("6", "by the hidden truth too RID is above rule-based distillation", T, ICE, "rule-based",
          OWN, _NEAR),
    Claim("6", "by the hidden truth too RID is above no distillation", T, ICE, "non-distillation",
          OWN, _NEAR),
    Claim("6", "rule-based distillation has more utility than none", U, "rule-based",
          "non-distillation", "+0.35", _RULE),
    Claim("6", "no distillation has more keywords than RID", L, "non-distillation", ICE,
          "29.45 > 28.83", _FEW),
    Claim("6", "no distillation has more topics than RID", S, "non-distillation", ICE,
          "6.23 > 5.28", _FEW),
    Claim("6", "RID keeps more keywords than rule-based distillation", L, ICE, "rule-based",
          "28.83 > 25.98"),
    Claim("6", "RID keeps more topics than rule-based distillation", S, ICE, "rule-based",
          "5.28 > 4.87", _FEW),
    Claim("7", "the middle slice has more utility than the early one", U, "middle", "early",
          "0.70 > 0.40"),
    Claim("7", "the latest slice has more utility than the middle one", U, ICE, "middle",
          "0.80 > 0.70"),
    Claim("7", "the middle slice is above prompting for more users than the early one", R, "middle",
          "early", "0.85 > 0.79"),
    Claim("7", "the latest slice is above prompting for more users than the middle one", R, ICE,
          "middle", "0.89 > 0.85"),
    Claim("7", "the latest slice has more utility than the early one", U, ICE, "early",
          "0.80 > 0.40"),
    Claim("7", "keywords become fewer with later slices", L, "early", ICE, "30.76 > 28.83", _WIDE),
    Claim("7", "topics become fewer with later slices", S, "early", ICE, "6.25 > 5.28", _WIDE),
    Claim("8", "SIT on the teacher's lists alone has more utility", U, ICE, "SIT with own lists",
          "0.80 > 0.32", _SAME),
    Claim("8", "SIT on the teacher's lists alone is above prompting for more users", R, ICE,
          "SIT with own lists", "0.89 > 0.83", _SAME),
    Claim("8", "SIT on the teacher's lists alone has more keywords", L, ICE, "SIT with own lists",
          "28.83 > 19.6", _SAME),
    Claim("8", "SIT on the teacher's lists alone has more topics", S, ICE, "SIT with own lists",
          "5.28 > 4.79", _SAME),
    Claim("8", "PMA with the teacher's starters has more utility", U, ICE, "PMA without teacher",
          "0.80 > 0.34", _SAME),
    Claim("8", "PMA with the teacher's starters is above prompting for more users", R, ICE,
          "PMA without teacher", "0.89 > 0.85", _SAME),
    Claim("8", "PMA with the teacher's starters has more keywords", L, ICE, "PMA without teacher",
          "28.83 > 16.12", _SAME),
    Claim("8", "PMA with the teacher's starters has more topics", S, ICE, "PMA without teacher",
          "5.28 > 3.20", _SAME),
    Claim("9", "utility-only negatives have more utility than all kinds together", U,
          "utility negatives only", ICE, "0.36 > 0.35", _LIKELIHOOD),
    Claim("9", "utility-only negatives are above prompting for more users", R,
          "utility negatives only", ICE, "0.85 > 0.84", _LIKELIHOOD),
    Claim("9", "utility-only negatives cost keywords", L, ICE, "utility negatives only",
          "28.83 > 15.18", _LIKELIHOOD),
    Claim("9", "utility-only negatives cost topics", S, ICE, "utility negatives only",
          "5.28 > 2.94", _LIKELIHOOD),
    Claim("9", "diversity-only negatives have more keywords", L, "diversity negatives only", ICE,
          "33.34 > 28.83", _LIKELIHOOD),
    Claim("9", "diversity-only negatives have more topics", S, "diversity negatives only", ICE,
          "6.50 > 5.28", _LIKELIHOOD),
    Claim("9", "diversity-only negatives have less utility", U, ICE, "diversity negatives only",
          "0.35 > 0.08"),
    Claim("9", "diversity-only negatives are above prompting for fewer users", R, ICE,
          "diversity negatives only", "0.84 > 0.58", _LIKELIHOOD),
    Claim("9", "joint-failure negatives alone have less utility", U, ICE, "joint negatives only",
          "0.35 > 0.20", _LIKELIHOOD),
    Claim("9", "joint-failure negatives alone are above prompting for fewer users", R, ICE,
          "joint negatives only", "0.84 > 0.72", _LIKELIHOOD),
    Claim("9", "joint-failure negatives alone have fewer keywords", L, ICE, "joint negatives only",
          "28.83 > 21.3", _LIKELIHOOD),
    Claim("9", "joint-failure negatives alone have fewer topics", S, ICE, "joint negatives only",
          "5.28 > 4.59", _LIKELIHOOD),
    Claim("figure3", "functional topics shrink after RID", "functional", "interests: all",
          "interests: RID", "Figure 3"),
    Claim("figure3", "functional topics shrink further after ISG", "functional", "interests: RID",
          ICE, "Figure 3"),
    Claim("figure3", "IceBreaker's starters spread over more categories than the deployed ones",
          "spread", ICE, "deployed retrieval", "section 3.4", _MIXED),
    Claim("figure3", "their largest category, chores being one, has a smaller share than that of "
          "the deployed ones", "head", "deployed retrieval", ICE, "section 3.4"),
    Claim("serving", "by the hidden truth IceBreaker is above popular starters, which know the "
          "profile alone", T, ICE, "popular starters", OWN, _POPULAR),
    Claim("serving", "by the hidden truth IceBreaker is above SFT's best by list search",
          T, ICE, "SFT, list search", OWN, _SEARCHED),
    Claim("serving", "by the hidden truth list search is above one drawn list",
          T, "IceBreaker, list search", ICE, OWN),
    Claim("beyond", "five rounds keep at least 95 % of three rounds' keywords", L, "round 5", ICE,
          OWN, factor=0.95),
    Claim("beyond", "five rounds have more utility than three", U, "round 5", ICE, OWN),
]


# ---------------------------------------------------------------------------------------- verdicts


def values_of(seed: dict, method: str, metric: str, base: str = "PE") -> dict[str, float]:
    """user -> value; those of LIFTS are against `base`, Eq. (9) and (10)."""
    values = seed["values"]
    if metric not in LIFTS:
        return values[method][metric]
    of = "train_utility" if metric.startswith("train_") else "utility"
    return user_lifts(values[method][of], values[base][of])[metric.removeprefix("train_")]


def paired(
    seeds: Seeds, metric: str, more: str, less: str, factor: float = 1.0, base: str = "PE"
) -> list[np.ndarray]:
    """more - factor * less of every user, seed by seed."""
    rows = []
    for seed in seeds:
        a, b = (values_of(seed, method, metric, base) for method in (more, less))
        rows.append(np.array([a[u] - factor * b[u] for u in a if u in b]))
    return rows


def bootstrap(rows: list[np.ndarray], draws: int = 2000) -> tuple[float, float, float]:
    """(mean of the seeds' means, low, high): users are drawn again within each seed."""
    rng = np.random.default_rng(0)
    means = [x[rng.integers(len(x), size=(draws, len(x)))].mean(1) for x in rows]
    low, high = np.quantile(np.mean(means, axis=0), [0.025, 0.975])
    return float(np.mean([x.mean() for x in rows])), float(low), float(high)


def pooled(
    metric: str, topics: dict[str, dict[str, int]], draws: int = 0, seed: int = 0
) -> np.ndarray:
    """(1 + draws,): a metric of POOLED of all users' topics, then of bootstrap samples of users."""
    names = sorted({name for own in topics.values() for name in own})
    counts = np.array([[topics[u].get(name, 0) for name in names] for u in sorted(topics)])  # (U,C)
    n = len(counts)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)
    sums = np.vstack([np.ones(n), weights]) @ counts  # (1 + draws, C)
    return POOLED[metric](sums / np.maximum(sums.sum(1, keepdims=True), 1))


def _by_users(seeds: Seeds, claim: Claim) -> tuple:
    rows = paired(seeds, claim.metric, claim.more, claim.less, claim.factor, claim.base)
    sides = [
        np.mean([np.mean([*values_of(s, m, claim.metric, claim.base).values()]) for s in seeds])
        for m in (claim.more, claim.less)
    ]
    return *bootstrap(rows), [x.mean() for x in rows], sides


def _online_gap(seeds: Seeds, claim: Claim) -> tuple:
    arms, results = (claim.more, claim.less, claim.metric), [s["ab"] for s in seeds]
    value, interval = ab.beats(results, *arms)
    sides = [ab.beats(results, arm, ab.CONTROL, claim.metric)[0] for arm in arms[:2]]
    return value, *interval, [ab.beats([x], *arms)[0] for x in results], sides


def _pooled_gap(seeds: Seeds, claim: Claim) -> tuple:
    more, less = (
        np.array([pooled(claim.metric, s["topics"][m], 2000, i) for i, s in enumerate(seeds)])
        for m in (claim.more, claim.less)
    )  # (seeds, 1 + draws) each, the same users drawn for both
    gap = (more - less).mean(0)
    sides = [x[:, 0].mean() for x in (more, less)]
    return gap[0], *np.quantile(gap[1:], [0.025, 0.975]), (more - less)[:, 0], sides


def judged(seeds: Seeds, wanted: list[str]) -> list[dict]:
    """Every claim of these tables with its difference, interval, verdict, and on how many seeds the
    difference has the same sign."""
    made = []
    for claim in (c for c in CLAIMS if c.table in wanted):
        kind = (_online_gap if claim.metric in ab.METRICS else
                _pooled_gap if claim.metric in POOLED else _by_users)  # fmt: skip
        if kind is _by_users and not all(
            m in s["values"] for s in seeds for m in (claim.more, claim.less)
        ):
            continue
        value, low, high, signs, sides = kind(seeds, claim)
        verdict = "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
        same = sum(bool(np.sign(x) == np.sign(value)) for x in signs)
        made.append(vars(claim) | {
            "sides": [*map(float, sides)], "value": float(value),
            "interval": [float(low), float(high)], "verdict": verdict, "same_sign": same,
            "seeds": len(seeds),
        })
    return made


def counted(rows: list[dict]) -> str:
    """Verdicts on the paper's claims and, apart, on our own."""
    parts = []
    for whose, some in (("of the paper", [r for r in rows if r["paper"] != OWN]),
                        ("of our own", [r for r in rows if r["paper"] == OWN])):
        verdicts = [r["verdict"] for r in some]
        hold, open_, fail = (verdicts.count(v) for v in ("holds", "undecided", "does not hold"))
        always = sum(r["verdict"] == "holds" and r["same_sign"] == r["seeds"] for r in some)
        parts.append(f"{len(some)} claims {whose}: {hold} hold ({always} of them with the same "
                     f"sign on every seed), {open_} are undecided, {fail} do not hold")  # fmt: skip
    return "; ".join(parts)


_READING = """\
*Ours* are the two sides of a claim, as means. The difference is theirs, paired by user; of online
metrics that of two relative lifts, per mille, of ratios pooled over users and seeds; where a claim
says "at least 95 %", that to 0.95 of the second side. In brackets its 95 % bootstrap interval,
users drawn again within each seed. A claim holds if the interval lies above zero, does not hold if
below; else it is undecided. The interval does not cover how much trainings differ, for which the
last column counts the seeds with a difference of the same sign. Of so many intervals, one in twenty
misses by chance. Of the paper's figures those of table 1 are of Qwen2.5-7B, those of the others of
its Doubao model; in table 2 it stars what is significant there."""
_BUILT_IN = """\
Partly built in: the ranker reads the trigger interests, so that utility rewards being near RID's
choice (the hidden truth stands beside it); chores are left out of RID's labels by a list of words
and come last in the rule teacher's lists, so that they shrink in Figure 3, whose second claim is
our reading of the paper's shift to consumption; a later slice of Table 7 has had more rounds of
training too."""


def claims_page(rows: list[dict], note: str) -> str:
    """results/claims.md."""
    lines = [
        "# The paper's claims, one by one", "", note, "",
        f"{counted(rows)}. (Ours have no figure of the paper.)", "",
        _READING, "", _BUILT_IN, "",
        "| table | claim | metric | paper | ours | difference | verdict | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        unit, form = UNITS[row["metric"]]
        more, less = (f"{x:{form}}" for x in row["sides"])
        value, low, high = (f"{x:+{form}}" for x in (row["value"], *row["interval"]))
        cells = [row["table"], row["text"], unit, row["paper"], f"{more} against {less}",
                 f"{value} [{low}, {high}]", f"**{row['verdict']}**",
                 f"{row['same_sign']} of {row['seeds']}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Why, where some do not hold or are undecided:", ""]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["verdict"] != "holds":
            reasons.setdefault(row["why"], []).append(row["text"])
    lines += [f"- {'; '.join(texts)}: *{why}*." for why, texts in reasons.items()]
    return "\n".join(lines) + "\n"

"""Tables, claims and pictures of a reproduction, from the values of its seeds (reproduce.py).

A cell is the mean over seeds ± the half-width of its 95 % interval over seeds (Student's t). A
claim is a mean difference paired by user with its 95 % bootstrap interval: users are drawn again
within each seed. It holds if the interval lies above zero, does not if below; else it is undecided.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

import ab
import figures
from config import atomic_path, write_json
from eval import COLUMNS, LEGEND, escape

Seeds = list[dict]  # report/values.json of each seed

TABLES = {  # table -> (title, methods, the paper's R-User, R-Score, lexical and semantic of each)
    "1": ("Table 1: methods", {
        "PE": "– | – | 29.03 | 6.11",
        "PE+RID": "+0.69 | +0.32 | 24.12 | 4.99",
        "SFT": "+0.73 | +0.39 | 26.46 | 5.17",
        "SFT+DPO": "+0.75 | +0.42 | 13.75 | 2.64",
        "IceBreaker": "+0.82 | +0.74 | 27.74 | 5.01",
        "teacher": None, "random starters": None, "deployed retrieval": None, "oracle": None,
    }),
    "6": ("Table 6: which interests the aligned generator is given", {
        "non-distillation": "– | – | 29.45 | 6.23",
        "rule-based": "+0.70 | +0.35 | 25.98 | 4.87",
        "IceBreaker": "+0.78 | +0.58 | 28.83 | 5.28",
    }),
    "7": ("Table 7: rounds on later slices of the log, judged by the latest ranker", {
        "early": "+0.79 | +0.40 | 30.76 | 6.25",
        "middle": "+0.85 | +0.70 | 30.82 | 6.14",
        "latest": "+0.89 | +0.80 | 28.83 | 5.28",
    }),
    "8": ("Table 8: training data", {
        "IceBreaker": "+0.89 | +0.80 | 28.83 | 5.28",
        "SIT with own lists": "+0.83 | +0.32 | 19.6 | 4.79",
        "PMA without teacher": "+0.85 | +0.34 | 16.12 | 3.20",
    }),
    "9": ("Table 9: negatives", {
        "utility negatives only": "+0.85 | +0.36 | 15.18 | 2.94",
        "diversity negatives only": "+0.58 | +0.08 | 33.34 | 6.50",
        "joint negatives only": "+0.72 | +0.20 | 21.3 | 4.59",
        "IceBreaker": "+0.84 | +0.35 | 28.83 | 5.28",
    }),
    "beyond": ("Beyond the paper: lambda, choosing when serving, rounds", dict.fromkeys([
        "IceBreaker", "lambda 0.5", "lambda 1.0",
        *(f"{m}{x}" for m in ("SFT", "IceBreaker") for x in (
            ", list search of 1", ", list search of 2", ", list search of 4", ", list search",
            ", list search, beam 1", ", highest utility", ", MMR", ", DPP")),
        "early", "middle", "latest", "round 4", "round 5",
        "IceBreaker, 1 session", "IceBreaker, 2 sessions", "popular starters",
    ])),
    "beta": ("Beyond the paper: beta and the reference of DPO", dict.fromkeys([
        "beta 0.03", "IceBreaker", "beta 0.3", "reference SIT",
    ])),
}


@dataclass(frozen=True)
class Claim:
    """`more` is above `less` times `factor` in `metric`; for a metric of ab.py both are arms."""

    table: str
    text: str
    metric: str
    more: str
    less: str
    paper: str  # its figures; "–": our own claim
    factor: float = 1.0


U, T, L, S = "utility", "true_clicks", "lexical", "semantic"
ONLINE = ("CTR", "CSR", "Avg.S", "Active", "Taps")
CLAIMS = [
    Claim("1", "RID raises utility over prompting with all history", U, "PE+RID", "PE", "+0.32"),
    Claim("1", "RID narrows the words of prompted lists", L, "PE", "PE+RID", "29.03 > 24.12"),
    Claim("1", "RID narrows the topics of prompted lists", S, "PE", "PE+RID", "6.11 > 4.99"),
    Claim("1", "SFT raises utility over prompting with RID", U, "SFT", "PE+RID", "0.39 > 0.32"),
    Claim("1", "SFT widens the words over prompting with RID", L, "SFT", "PE+RID", "26.46 > 24.12"),
    Claim("1", "SFT widens the topics over prompting with RID", S, "SFT", "PE+RID", "5.17 > 4.99"),
    Claim("1", "vanilla DPO raises utility over SFT", U, "SFT+DPO", "SFT", "0.42 > 0.39"),
    Claim("1", "vanilla DPO collapses the words", L, "SFT", "SFT+DPO", "26.46 > 13.75"),
    Claim("1", "vanilla DPO collapses the topics", S, "SFT", "SFT+DPO", "5.17 > 2.64"),
    Claim("1", "IceBreaker has more utility than SFT", U, "IceBreaker", "SFT", "0.74 > 0.39"),
    Claim("1", "IceBreaker has more utility than vanilla DPO", U, "IceBreaker", "SFT+DPO",
          "0.74 > 0.42"),
    Claim("1", "IceBreaker has more utility than prompting", U, "IceBreaker", "PE", "+0.74"),
    Claim("1", "IceBreaker has more utility than prompting with RID", U, "IceBreaker", "PE+RID",
          "0.74 > 0.32"),
    Claim("1", "by the hidden truth too IceBreaker is above SFT", T, "IceBreaker", "SFT", "–"),
    Claim("1", "by the hidden truth too IceBreaker is above vanilla DPO", T, "IceBreaker",
          "SFT+DPO", "–"),
    Claim("1", "by the hidden truth too IceBreaker is above prompting with RID", T, "IceBreaker",
          "PE+RID", "–"),
    Claim("1", "by the hidden truth the teacher's lists are above SFT, which imitates them", T,
          "teacher", "SFT", "–"),
    Claim("1", "IceBreaker keeps at least 95 % of SFT's words", L, "IceBreaker", "SFT",
          "27.74 / 26.46", 0.95),
    Claim("1", "IceBreaker keeps at least 95 % of SFT's words, whatever their weight", "words",
          "IceBreaker", "SFT", "–", 0.95),
    Claim("1", "IceBreaker keeps at least 95 % of SFT's topics", S, "IceBreaker", "SFT",
          "5.01 / 5.17", 0.95),
    Claim("1", "IceBreaker has more words than vanilla DPO", L, "IceBreaker", "SFT+DPO",
          "27.74 > 13.75"),
    Claim("1", "IceBreaker has more topics than vanilla DPO", S, "IceBreaker", "SFT+DPO",
          "5.01 > 2.64"),
    *(
        Claim("2", f"IceBreaker lifts {metric} over {name}", metric, "IceBreaker", other, paper)
        for other, name, papers in (
            ("deployed", "the deployed retrieval", ("+94.25", "+1.27", "+1.59", "+1.84", "–")),
            ("SFT+DPO", "vanilla DPO", ("94.25 > 56.41", "1.27 > 0.68", "1.59 > 0.42",
                                        "1.84 > 1.16", "–")),
            ("SFT", "SFT", ("94.25 > 6.97", "1.27 > -0.05", "1.59 > 0.33", "1.84 > 0.20", "–")),
        )
        for metric, paper in zip(ONLINE, papers, strict=True)
    ),
    *(
        Claim("2", f"with list search, IceBreaker lifts {metric} over {name}",
              metric, "IceBreaker, list search", other, "–")
        for other, name in (("deployed", "the deployed retrieval"),
                            ("SFT, list search", "SFT with the same"))
        for metric in ONLINE
    ),
    Claim("2", "SFT lifts CTR over the deployed retrieval", "CTR", "SFT", "deployed", "+6.97"),
    Claim("2", "the teacher's lists lift CTR over the deployed retrieval", "CTR", "teacher",
          "deployed", "–"),
    Claim("2", "vanilla DPO lifts CTR over SFT", "CTR", "SFT+DPO", "SFT", "56.41 > 6.97"),
    Claim("2", "prompting falls behind the deployed retrieval in CTR", "CTR", "deployed", "PE",
          "-16.16"),
    Claim("6", "RID's interests beat rule-based ones in pairwise judgement", "judge_win",
          "interests: RID", "interests: rule", "0.93 > 0.07"),
    Claim("6", "RID's interests resonate more than rule-based ones (hidden truth)", "resonance",
          "interests: RID", "interests: rule", "–"),
    Claim("6", "RID's interests resonate more than the whole history (hidden truth)", "resonance",
          "interests: RID", "interests: all", "–"),
    Claim("6", "RID has more utility than rule-based distillation", U, "IceBreaker", "rule-based",
          "0.58 > 0.35"),
    Claim("6", "RID has more utility than no distillation", U, "IceBreaker", "non-distillation",
          "+0.58"),
    Claim("6", "rule-based distillation has more utility than none", U, "rule-based",
          "non-distillation", "+0.35"),
    Claim("6", "no distillation has the most words", L, "non-distillation", "IceBreaker",
          "29.45 > 28.83"),
    Claim("6", "RID keeps more words than rule-based distillation", L, "IceBreaker", "rule-based",
          "28.83 > 25.98"),
    Claim("7", "the middle slice has more utility than the early one", U, "middle", "early",
          "0.70 > 0.40"),
    Claim("7", "the latest slice has more utility than the middle one", U, "latest", "middle",
          "0.80 > 0.70"),
    Claim("7", "the latest slice has more utility than the early one", U, "latest", "early",
          "0.80 > 0.40"),
    Claim("7", "words become fewer with later slices", L, "early", "latest", "30.76 > 28.83"),
    Claim("8", "SIT on the teacher's lists alone has more utility", U, "IceBreaker",
          "SIT with own lists", "0.80 > 0.32"),
    Claim("8", "SIT on the teacher's lists alone has more words", L, "IceBreaker",
          "SIT with own lists", "28.83 > 19.6"),
    Claim("8", "PMA with the teacher's starters has more utility", U, "IceBreaker",
          "PMA without teacher", "0.80 > 0.34"),
    Claim("8", "PMA with the teacher's starters has more words", L, "IceBreaker",
          "PMA without teacher", "28.83 > 16.12"),
    Claim("9", "utility-only negatives have the most utility", U, "utility negatives only",
          "IceBreaker", "0.36 > 0.35"),
    Claim("9", "utility-only negatives cost words", L, "IceBreaker", "utility negatives only",
          "28.83 > 15.18"),
    Claim("9", "utility-only negatives cost topics", S, "IceBreaker", "utility negatives only",
          "5.28 > 2.94"),
    Claim("9", "diversity-only negatives have more words", L, "diversity negatives only",
          "IceBreaker", "33.34 > 28.83"),
    Claim("9", "diversity-only negatives have more topics", S, "diversity negatives only",
          "IceBreaker", "6.50 > 5.28"),
    Claim("9", "diversity-only negatives have less utility", U, "IceBreaker",
          "diversity negatives only", "0.35 > 0.08"),
    Claim("9", "joint-failure negatives alone have less utility", U, "IceBreaker",
          "joint negatives only", "0.35 > 0.20"),
    Claim("9", "joint-failure negatives alone have fewer words", L, "IceBreaker",
          "joint negatives only", "28.83 > 21.3"),
    Claim("figure3", "functional topics shrink after RID", "functional", "interests: all",
          "interests: RID", "Figure 3"),
    Claim("figure3", "functional topics shrink further after ISG", "functional", "interests: RID",
          "IceBreaker", "Figure 3"),
]
MORE_METRICS = """\
- **Active**: active days per person and week. **Avg.S**: sessions per person. **CTR**: taps per
  starter shown. **CSR**: share of active days on which a conversation started. **Taps**: taps per
  active day.
- **Known**: share of starters about a topic of the world. **Resonance**: the hidden interest, 0 to
  1, in what a text speaks about; 0 where it is not known. **Chores**: share of
  functional topics among texts whose topic is known. **Wins**: share of the judge's pairwise
  comparisons with the rule-based interests.
"""
# Why a claim does not hold here, as far as we know; text of the claim -> reason.
_RETRIEVED = (
    "the tapped lists are retrieved ones, far from what the policy writes: their log-probability "
    "rises by some 28 nats (training curves), while its own lists hardly change"
)
_DEPLOYED = (
    "the teacher's lists, from the same interests, do (table 2): probably because the small "
    "generator garbles names and writes five starters about few subjects"
)
_FEW = "probably because the small generator writes about one or two subjects, however many it gets"
_CLOSE = (
    "probably because the rules that teach write from the templates that the base model has seen: "
    "the policy's own lists are as good"
)
_LAMBDA = (
    "probably because the chosen list is the same for every kind of negative, and its likelihood "
    "is in the loss (dpo.sft_weight): what is rejected then matters less"
)
_FORMS = (
    "probably because its starters resonate no more than SFT's (below table 1), and what follows a "
    "tap hangs on that: its further taps come from forms of question, not from better subjects"
)
_WIDE = (
    "probably because dpo.weight leaves most of the weight to diversity: with more of it on "
    "utility, words become fewer (lambda 1.0 in table beyond)"
)
WHY: dict[str, str] = {
    "RID narrows the words of prompted lists": _FEW,
    "RID narrows the topics of prompted lists": _FEW,
    "no distillation has the most words": _FEW,
    "IceBreaker lifts Taps over the deployed retrieval": _DEPLOYED,
    "with list search, IceBreaker lifts CSR over the deployed retrieval": _DEPLOYED,
    **{
        f"{start}IceBreaker lifts {metric} over {other}": _FORMS
        for start, other in (("", "SFT"), ("", "vanilla DPO"),
                             ("with list search, ", "SFT with the same"))
        for metric in ("Avg.S", "Active")
    },
    "words become fewer with later slices": _WIDE,
    "SIT on the teacher's lists alone has more words": _CLOSE,
    "diversity-only negatives have more words": _LAMBDA,
    "diversity-only negatives have more topics": _LAMBDA,
    "SFT widens the words over prompting with RID": "probably because the base model makes up rare "
    "words, and the teacher's forms of questions have none",
    "vanilla DPO raises utility over SFT": _RETRIEVED,
    "vanilla DPO collapses the words": _RETRIEVED,
    "vanilla DPO collapses the topics": _RETRIEVED,
    "vanilla DPO lifts CTR over SFT": _RETRIEVED,
    "IceBreaker has more topics than vanilla DPO": "vanilla DPO does not collapse",
    "IceBreaker lifts CTR over the deployed retrieval": _DEPLOYED,
    "IceBreaker lifts CSR over the deployed retrieval": _DEPLOYED,
    "SFT lifts CTR over the deployed retrieval": _DEPLOYED,
    "SIT on the teacher's lists alone has more utility": _CLOSE,
    "PMA with the teacher's starters has more utility": _CLOSE,
    "PMA with the teacher's starters has more words": _CLOSE,
    "utility-only negatives have the most utility": _LAMBDA,
    "utility-only negatives cost words": _LAMBDA,
    "joint-failure negatives alone have less utility": _LAMBDA,
    "joint-failure negatives alone have fewer words": _LAMBDA,
}


# --------------------------------------------------------------------------------------- statistics


def per_seed(seeds: Seeds, method: str, metric: str) -> list[np.ndarray]:
    """Values of the users of each seed; r_user and r_score are against PE."""
    rows = []
    for seed in seeds:
        values = seed["values"]
        if metric in ("r_user", "r_score"):
            own, base = values[method]["utility"], values["PE"]["utility"]
            gap = np.array([own[u] - base[u] for u in base])
            rows.append(gap if metric == "r_score" else (gap > 0) + 0.5 * (gap == 0))
        else:
            rows.append(np.array(list(values[method][metric].values())))
    return rows


def paired(seeds: Seeds, claim: Claim) -> list[np.ndarray]:
    """more - factor * less of every user, seed by seed."""
    rows = []
    for seed in seeds:
        more, less = (seed["values"][m][claim.metric] for m in (claim.more, claim.less))
        rows.append(np.array([more[u] - claim.factor * less[u] for u in more if u in less]))
    return rows


def bootstrap(rows: list[np.ndarray], draws: int = 2000) -> tuple[float, float, float]:
    """(mean of the seeds' means, low, high): users are drawn again within each seed."""
    rng = np.random.default_rng(0)
    means = [x[rng.integers(len(x), size=(draws, len(x)))].mean(1) for x in rows]
    low, high = np.quantile(np.mean(means, axis=0), [0.025, 0.975])
    return float(np.mean([x.mean() for x in rows])), float(low), float(high)


def over_seeds(rows: list[np.ndarray]) -> tuple[float, float]:
    """(mean, half-width of the 95 % interval over seeds by Student's t; nan for one seed)."""
    from scipy.stats import t

    means, n = np.array([x.mean() for x in rows]), len(rows)
    half = t.ppf(0.975, n - 1) * means.std(ddof=1) / n**0.5 if n > 1 else float("nan")
    return float(means.mean()), float(half)


# ------------------------------------------------------------------------------------------ tables


def table(seeds: Seeds, name: str) -> str:
    """One table as markdown; methods that were not trained are left out."""
    title, methods = TABLES[name]
    lines = [f"## {title}", "", "| Method | " + " | ".join(t for t, _, _ in COLUMNS) + " | paper |"]
    lines.append("|---" * (len(COLUMNS) + 2) + "|")
    for method, paper in methods.items():
        if any(method not in seed["values"] for seed in seeds):
            continue
        cells = []
        for _, metric, form in COLUMNS:
            mean, half = over_seeds(per_seed(seeds, method, metric))
            none = method == "PE" and metric in ("r_user", "r_score")
            spread = "" if np.isnan(half) else f" ± {format(half, form.lstrip('+'))}"
            cells.append("–" if none else format(mean, form) + spread)
        text = paper.replace(" | ", " ") if paper else "–"
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {text} |")
    return "\n".join(lines) + "\n"


def cases(seeds: Seeds) -> str:
    """Table 3: users at fixed percentiles of the first seed's lift over SFT."""
    lines = ["## Table 3: cases", "", "Of the first seed, the users at the 10th, 50th and 90th "
             "percentile of IceBreaker's lift over SFT."]
    for case in seeds[0]["cases"]:
        lines += ["", f"**{case['percentile']}th percentile** (lift {case['lift']:+.4f})", ""]
        lines += ["Latest summaries: " + "; ".join(map(escape, case["summaries"])), ""]
        lines += ["Trigger interests: " + "; ".join(map(escape, case["interests"])), ""]
        for method, starters in case["starters"].items():
            lines.append(f"- {method}: " + " · ".join(map(escape, starters)))
    return "\n".join(lines) + "\n"


def judged(seeds: Seeds, wanted: list[str]) -> list[dict]:
    """Every claim of these tables with its difference, interval, verdict, and on how many seeds the
    difference has the same sign."""
    made = []
    for claim in CLAIMS:
        if claim.table not in wanted:
            continue
        if claim.metric in ab.METRICS:
            arms = claim.more, claim.less, claim.metric
            value, (low, high) = ab.beats([s["ab"] for s in seeds], *arms)
            signs = [ab.beats([s["ab"]], *arms)[0] for s in seeds]
        elif all(m in s["values"] for s in seeds for m in (claim.more, claim.less)):
            rows = paired(seeds, claim)
            value, low, high = bootstrap(rows)
            signs = [x.mean() for x in rows]
        else:
            continue
        verdict = "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
        made.append(vars(claim) | {
            "value": value, "interval": [low, high], "verdict": verdict,
            "same_sign": sum(bool(x > 0) == (value > 0) for x in signs), "seeds": len(seeds),
        })
    return made


def counted(rows: list[dict]) -> str:
    """Verdicts on the paper's claims and, apart, on our own."""
    parts = []
    for whose, some in (("of the paper", [r for r in rows if r["paper"] != "–"]),
                        ("of our own", [r for r in rows if r["paper"] == "–"])):
        verdicts = [r["verdict"] for r in some]
        counts = (f"{verdicts.count(v)} {v}" for v in ("holds", "undecided", "does not hold"))
        parts.append(f"{len(some)} claims {whose}: {', '.join(counts)}")
    return "; ".join(parts)


def claims_page(rows: list[dict], note: str) -> str:
    """results/claims.md."""
    lines = [
        "# The paper's claims, one by one", "", note, "",
        f"{counted(rows)}. (Ours have no figure of the paper.)", "",
        "A difference is the mean over users, paired; in brackets its 95 % interval, users drawn "
        "again within each seed: it does not cover how much trainings differ, for which the last "
        "column counts the seeds with a difference of the same sign. Differences of online metrics "
        "are of relative lifts, per mille. Of so many intervals, one in twenty misses by chance.",
        "", "| table | claim | paper | ours | verdict | seeds |", "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["interval"]
        form = "+.1f" if row["metric"] in ab.METRICS else "+.4f"
        ours = f"{row['value']:{form}} [{low:{form}}, {high:{form}}]"
        cells = [row["table"], row["text"], row["paper"], ours, f"**{row['verdict']}**",
                 f"{row['same_sign']} of {row['seeds']}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    failed = [row for row in rows if row["verdict"] != "holds"]
    lines += ["", "Why, where one does not hold or is undecided:", ""]
    lines += [f"- {row['text']}: {WHY.get(row['text'], 'not known')}." for row in failed]
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------- the report


def measured(seeds: Seeds) -> str:
    """What the other figures rest on: rankers, scorer, classifier and matcher against the truth."""
    def cell(values) -> str:
        return f"{np.mean(values):.3f} ({', '.join(f'{v:.3f}' for v in values)})"

    rows = {
        "RID, AUC of revisits on unseen users": [s["rid"]["auc"] for s in seeds],
        "... token frequency": [s["rid"]["auc_frequency"] for s in seeds],
        "... recency": [s["rid"]["auc_recency"] for s in seeds],
        "matcher's precision against hidden subjects": [s["matcher"]["precision"] for s in seeds],
        "matcher's recall": [s["matcher"]["recall"] for s in seeds],
        "topic classifier's accuracy on names left out": [s["classifier"] for s in seeds],
        "users to whom the gate gave more than rid.min_keep interests": [
            s["above_least"] for s in seeds
        ],
        "IceBreaker's share of SFT's keywords, weighed by table 1's lists": [
            np.divide(*(x[0].mean() for x in (per_seed([s], m, "lexical_compared")
                                              for m in ("IceBreaker", "SFT")))) for s in seeds
        ],
    } | {
        f"{name} ranker, AUC with slot controlled": [
            s["ranker"][name]["auc_slot_controlled"] for s in seeds
        ]
        for name in ("train", "judge")
    }
    lines = ["## What the figures rest on", "", "| | mean (each seed) |", "|---|---|"]
    lines += [f"| {name} | {cell(values)} |" for name, values in rows.items()]
    return "\n".join(lines) + "\n"


def spoken_table(seeds: Seeds) -> str:
    """Of what table 1's methods write: the share that the hidden truth understands, resonance."""
    lines = ["What the starters speak of, by the hidden truth:", "",
             "| Method | share about something known | resonance |", "|---|---|---|"]
    for method in TABLES["1"][1]:
        rows = [per_seed(seeds, method, metric) for metric in ("known", "resonance")]
        known, resonance = (over_seeds(row)[0] for row in rows)
        lines.append(f"| {method} | {known:.3f} | {resonance:.3f} |")
    return "\n".join(lines) + "\n"


def interests_table(seeds: Seeds) -> str:
    lines = ["Quality of the interests themselves:", "",
             "| distillation | pairwise wins by the judge | resonance (hidden) | chores |",
             "|---|---|---|---|"]
    for kind in ("all", "rule", "RID"):
        cells = []
        for metric in ("judge_win", "resonance", "functional"):
            known = all(metric in s["values"][f"interests: {kind}"] for s in seeds)
            cells.append(
                f"{over_seeds(per_seed(seeds, f'interests: {kind}', metric))[0]:.3f}"
                if known else "–"
            )
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def online_table(seeds: Seeds) -> str:
    results = [s["ab"] for s in seeds]
    people = ", ".join(str(len(r["arms"][ab.CONTROL]["users"])) for r in results)
    one = results[0]
    how = (f"{one['days']} days; people of each seed in the control arm: {people}; split: "
           f"{one['split']}; lives of each person: {one['copies']}.")  # fmt: skip
    return f"## Table 2: online, simulated\n\n{how}\n\n" + ab.table(ab.lifts(results))


def daily(seeds: Seeds) -> dict[str, dict]:
    """arm -> cumulative CTR and sessions per user by day, with their range over seeds."""
    made = {}
    for arm in seeds[0]["ab"]["arms"]:
        days = [s["ab"]["arms"][arm]["by_day"] for s in seeds]
        ctr = np.array([np.cumsum(d["taps"]) / np.maximum(np.cumsum(d["shown"]), 1e-9)
                        for d in days])  # (seeds, days)  # fmt: skip
        sessions = np.array([np.cumsum(d["sessions"]) for d in days])
        made[arm] = {"day": [*range(1, ctr.shape[1] + 1)]}
        for name, x in (("ctr", ctr), ("sessions", sessions)):
            made[arm] |= {name: x.mean(0).tolist(), f"{name}_low": x.min(0).tolist(),
                          f"{name}_high": x.max(0).tolist()}  # fmt: skip
    return made


def pictures(seeds: Seeds, log: list[dict], folder: Path, wanted: list[str]) -> list[str]:
    """Write the PNGs that these tables allow; returns their names."""
    def point(method: str) -> dict:
        x, y = (bootstrap(per_seed(seeds, method, m)) for m in ("r_score", "lexical"))
        return {"x": x[0], "x_interval": list(x[1:]), "y": y[0], "y_interval": list(y[1:])}

    have = {m for m in seeds[0]["values"] if all(m in s["values"] for s in seeds)}
    figures.curves(log, folder / "training_curves.png")
    names = ["training_curves.png"]
    shown = ["PE", "PE+RID", "SFT", "SFT+DPO", "IceBreaker"]
    sweep = ["IceBreaker", "lambda 0.5", "lambda 1.0"]
    serving = [f"SFT, {x}" for x in ("list search", "highest utility", "MMR", "DPP")]
    lines = {"DPO, lambda 0.2, 0.5, 1": sweep} if {*sweep} <= have else {}
    points = {m: point(m) for m in dict.fromkeys(shown + sweep * bool(lines) + serving)}
    figures.frontier(points, folder / "frontier.png", lines, xlabel="utility: R-Score against PE "
                     "(held-out ranker)", ylabel="distinct keywords per list")
    names.append("frontier.png")
    rows = {}
    for method in shown[1:]:
        rows[method] = {}
        for judge, metric in (("train", "train_utility"), ("held_out", U), ("truth", T)):
            base = np.mean([x.mean() for x in per_seed(seeds, "PE", metric)])
            gap = paired(seeds, Claim("1", "", metric, method, "PE", ""))
            value, low, high = (x / base for x in bootstrap(gap))
            rows[method][judge] = {"lift": value, "interval": [low, high]}
    figures.hacking(rows, folder / "reward_hacking.png", title="Lift over PE, by who judges")
    names.append("reward_hacking.png")
    if "figure3" in wanted:
        s = seeds[0]["shares"]
        figures.rings([
            {"title": "RID", "inner": s["history"], "outer": s["RID"],
             "inner_label": "history", "outer_label": "trigger interests"},
            {"title": "ISG", "inner": s["RID"], "outer": s["IceBreaker"],
             "inner_label": "trigger interests", "outer_label": "starters"},
        ], folder / "rings.png", functional={"Chores"})
        names.append("rings.png")
    if "2" in wanted:
        figures.ab_days(daily(seeds), folder / "ab_days.png", "A/B test: cumulative means up "
                        "to each day; bands: range over seeds")
        names.append("ab_days.png")
    rounds = ["early", "middle", "latest", "round 4", "round 5"]
    if {*rounds} <= have:
        series = {}
        for metric in ("r_score", "lexical"):
            y = [bootstrap(per_seed(seeds, m, metric)) for m in rounds]
            series[metric] = {"x": [*range(1, 6)], **{
                key: [v[i] for v in y] for i, key in enumerate(("y", "low", "high"))}}
        figures.lines({"R-Score": series["r_score"]}, folder / "rounds.png", "round", "R-Score",
                      "Utility and diversity by round", {"keywords": series["lexical"]},
                      "distinct keywords per list")
        names.append("rounds.png")
    return names


def write(
    seeds: Seeds, wanted: list[str], log: list[dict], about: dict, folder: Path
) -> list[dict]:
    """reproduction.md, claims.md, reproduction.json and pictures into `folder`; returns claims."""
    folder.mkdir(parents=True, exist_ok=True)
    note = (
        f"{about['command']}: seeds {about['seeds']}, commit {about['commit']}, config "
        f"{about['config']}. The last start took {about['minutes']:.0f} minutes on "
        f"{about['processors']} processors, {about['cpu_hours']:.1f} core hours; what earlier "
        "starts had trained is not in it."
    )
    legend = __doc__.partition("\n\n")[2]
    more = {"1": spoken_table, "2": online_table, "3": cases, "6": interests_table}
    parts = ["# The paper's tables on the simulated platform\n", note + "\n", legend]
    for name in wanted:
        if name in TABLES:
            parts.append(table(seeds, name))
        if name in more:
            parts.append(more[name](seeds))
    parts += ["## Metrics\n", LEGEND + "\n" + MORE_METRICS, measured(seeds)]
    names = pictures(seeds, log, folder, wanted)
    parts += [f"![{n.removesuffix('.png').replace('_', ' ')}]({n})\n" for n in names]
    rows = judged(seeds, wanted)
    tables = {
        method: {metric: over_seeds(per_seed(seeds, method, metric)) for metric in own}
        for method, own in seeds[0]["values"].items()
        if all(method in s["values"] for s in seeds)
    }
    write_json(folder / "reproduction.json", {"about": about, "methods": tables, "claims": rows})
    pages = {"reproduction.md": "\n".join(parts), "claims.md": claims_page(rows, note)}
    for name, text in pages.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return rows

"""Tables and pictures of a reproduction, from the values of its seeds (reproduce.py).

A cell is the mean over seeds ± the half-width of its 95 % interval over seeds (Student's t). The
paper's figures are of Qwen2.5-7B in table 1, and in the others as of its Doubao model.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from config import atomic_path, write_json
from eval import COLUMNS, LEGEND, PAPER, escape
from tables import figures
from tables.claims import LIFTS, Seeds, bootstrap, claims_page, judged, paired, pooled, values_of
from world import ab

ROUNDS = ["early", "middle", "IceBreaker", "round 4", "round 5"]
CHOICES = [f"{kind}{end}" for kind in ("list search", "MMR", "DPP")
           for end in (", lambda 0.1", "", ", lambda 0.5")]  # fmt: skip
TABLES = {  # table -> (title, methods, the paper's R-User, R-Score, lexical and semantic of each)
    "1": ("Table 1: methods", PAPER | dict.fromkeys(
        ["teacher", "random starters", "deployed retrieval", "oracle"])),
    "6": ("Table 6: which interests the aligned generator is given, against no distillation", {
        "non-distillation": ("–", "–", "29.45", "6.23"),
        "rule-based": ("+0.70", "+0.35", "25.98", "4.87"),
        "IceBreaker": ("+0.78", "+0.58", "28.83", "5.28"),
    }),
    "7": ("Table 7: after a first round on the early slice of the log, a second on the middle one, "
          "a third on the latest; one ranker, of the whole log", {
        "early": ("+0.79", "+0.40", "30.76", "6.25"),
        "middle": ("+0.85", "+0.70", "30.82", "6.14"),
        "IceBreaker": ("+0.89", "+0.80", "28.83", "5.28"),
    }),
    "8": ("Table 8: training data", {
        "IceBreaker": ("+0.89", "+0.80", "28.83", "5.28"),
        "SIT with own lists": ("+0.83", "+0.32", "19.6", "4.79"),
        "PMA without teacher": ("+0.85", "+0.34", "16.12", "3.20"),
    }),
    "9": ("Table 9: negatives", {
        "utility negatives only": ("+0.85", "+0.36", "15.18", "2.94"),
        "diversity negatives only": ("+0.58", "+0.08", "33.34", "6.50"),
        "joint negatives only": ("+0.72", "+0.20", "21.3", "4.59"),
        "IceBreaker": ("+0.84", "+0.35", "28.83", "5.28"),
    }),
    "serving": ("Beyond the paper: choosing when serving, and few sessions", dict.fromkeys([
        "IceBreaker",
        *(f"{m}, {x}" for m in ("SFT", "IceBreaker") for x in (
            "list search of 1", "list search of 2", "list search of 4", "list search, beam 1",
            "list search, all tried", *CHOICES, "highest utility")),
        "IceBreaker, 1 session", "IceBreaker, 2 sessions", "popular starters",
    ])),
    "beyond": ("Beyond the paper: lambda and more rounds", dict.fromkeys([
        "IceBreaker", "lambda 0.5", "lambda 1.0", "early", "middle", "round 4", "round 5",
    ])),
    "beta": ("Beyond the paper: beta and the reference of DPO", dict.fromkeys([
        "beta 0.03", "IceBreaker", "beta 0.3", "reference SIT",
    ])),
}
AGAINST = {"6": "non-distillation"}  # table -> with what R-User and R-Score compare, where not PE


MORE_METRICS = """\
- **Active**: active days per person and week. **Avg.S**: sessions per person. **CTR**: taps per
  starter shown. **CSR**: share of active days on which a conversation started. **Taps**: taps per
  active day.
- **Known**: share of starters about a topic of the world. **Resonance**: the hidden interest, 0 to
  1, in what a text speaks about; 0 where it is not known. **Chores**: share of
  functional topics among texts whose topic is known. **Wins**: share of the judge's pairwise
  comparisons with the rule-based interests. The offline judge counts chores by the list of words
  that keeps them out of RID's labels: read the resonance beside it.
"""


# --------------------------------------------------------------------------------------- statistics


def per_seed(seeds: Seeds, method: str, metric: str, base: str = "PE") -> list[np.ndarray]:
    """Values of the users of each seed; those of claims.LIFTS are against `base`."""
    return [np.array([*values_of(s, method, metric, base).values()]) for s in seeds]


def over_seeds(rows: list[np.ndarray]) -> tuple[float, float]:
    """(mean, half-width of the 95 % interval over seeds by Student's t; nan for one seed)."""
    from scipy.stats import t

    means, n = np.array([x.mean() for x in rows]), len(rows)
    half = t.ppf(0.975, n - 1) * means.std(ddof=1) / n**0.5 if n > 1 else float("nan")
    return float(means.mean()), float(half)


def spread(mean: float, half: float, form: str) -> str:
    return format(mean, form) + ("" if np.isnan(half) else f" ± {format(half, form.lstrip('+'))}")


# ------------------------------------------------------------------------------------------ tables


def table(seeds: Seeds, name: str) -> str:
    """One table as markdown; methods that were not trained are left out."""
    (title, methods), base = TABLES[name], AGAINST.get(name, "PE")
    columns = [*(title for title, _, _ in COLUMNS), "paper: R-User, R-Score, lexical, semantic"]
    lines = [f"## {title}", "", "| Method | " + " | ".join(columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for method, paper in methods.items():
        if any(method not in seed["values"] for seed in seeds):
            continue
        cells = []
        for _, metric, form in COLUMNS:
            mean, half = over_seeds(per_seed(seeds, method, metric, base))
            cells.append("–" if method == base and metric in LIFTS else spread(mean, half, form))
        cells.append(", ".join(paper) if paper else "–")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
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


# --------------------------------------------------------------------------------------- the report


def measured(seeds: Seeds) -> str:
    """What the other figures rest on: rankers, scorer, classifier and matcher against the truth."""
    def cell(values) -> str:
        return f"{np.mean(values):.3f} ({', '.join(f'{v:.3f}' for v in values)})"

    basis = [s["basis"] for s in seeds]

    def share(metric: str) -> list[float]:
        own, sft = (per_seed(seeds, method, metric) for method in ("IceBreaker", "SFT"))
        return [x.mean() / y.mean() for x, y in zip(own, sft, strict=True)]

    rows = {
        "RID, AUC of revisits on unseen users": [x["rid"]["auc"] for x in basis],
        "... token frequency": [x["rid"]["auc_frequency"] for x in basis],
        "... recency": [x["rid"]["auc_recency"] for x in basis],
        **{
            f"{name} ranker, AUC with slot controlled": [
                x["ranker"][name]["auc_slot_controlled"] for x in basis
            ]
            for name in ("train", "judge")
        },
        "matcher's precision against hidden subjects": [x["matcher"]["precision"] for x in basis],
        "matcher's recall": [x["matcher"]["recall"] for x in basis],
        "topic classifier's accuracy on names left out": [x["classifier"] for x in basis],
        "... on IceBreaker's starters, by the hidden truth": [
            x["classifier_on_starters"] for x in basis
        ],
        "users to whom the gate gave more than rid.min_keep interests": [
            x["above_least"] for x in basis
        ],
        **{
            f"in round {n} of DPO no checkpoint was better than its start": [
                float(x["kept_start"][n - 1]) for x in basis
            ]
            for n in range(1, len(basis[0]["kept_start"]) + 1)
        },
        "IceBreaker's share of SFT's keywords, weighed by table 1's lists": share(
            "lexical_compared"
        ),
    }
    lines = ["## What the figures rest on", "", "| | mean (each seed) |", "|---|---|"]
    lines += [f"| {name} | {cell(values)} |" for name, values in rows.items()]
    return "\n".join(lines) + "\n"


def spoken_table(seeds: Seeds) -> str:
    """Of what table 1's methods write: the share that the hidden truth understands, resonance."""
    lines = ["What the starters speak of, by the hidden truth:", "",
             "| Method | share about something known | resonance |", "|---|---|---|"]
    for method in TABLES["1"][1]:
        cells = [spread(*over_seeds(per_seed(seeds, method, metric)), ".3f")
                 for metric in ("known", "resonance")]  # fmt: skip
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def interests_table(seeds: Seeds) -> str:
    lines = ["Quality of the interests themselves:", "",
             "| distillation | pairwise wins by the judge | resonance (hidden) | chores |",
             "|---|---|---|---|"]
    for kind in ("all", "rule", "RID"):
        cells = []
        for metric in ("judge_win", "resonance", "functional"):
            known = all(metric in s["values"][f"interests: {kind}"] for s in seeds)
            own = per_seed(seeds, f"interests: {kind}", metric) if known else []
            cells.append(spread(*over_seeds(own), ".3f") if known else "–")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def online_table(seeds: Seeds) -> str:
    results = [s["ab"] for s in seeds]
    people = ", ".join(str(len(r["arms"][ab.CONTROL]["users"])) for r in results)
    one = results[0]
    how = (f"{one['days']} days; people of each seed in the control arm: {people}; "
           f"lists of each person, in turn: {one['lists']}; lives: {one['copies']}."
           " They are the test users and those on whom the judge ranker was fitted: of neither has "
           "a method learned. Arms with list search write more and show the better part "
           "(ab.searched).")  # fmt: skip
    return f"## Table 2: online, simulated\n\n{how}\n\n" + ab.table(ab.lifts(results))


def mean_shares(seeds: Seeds, stage: str) -> dict[str, float]:
    """Shares of topic categories, means over seeds."""
    counts = [sum(map(Counter, s["topics"][stage].values()), Counter()) for s in seeds]
    names = sorted({name for x in counts for name in x})
    return {name: float(np.mean([x[name] / x.total() for x in counts])) for name in names}


def shares_table(seeds: Seeds) -> str:
    """Figure 3 in figures: how far chores and the largest category lead."""
    lines = ["## Figure 3: topics", "", "Of the texts whose topic is known, means over seeds; the "
             "paper has reduced head dominance relative to the deployed baseline:", "",
             "| | chores | largest category but chores | categories, exp(entropy) of a seed |",
             "|---|---|---|---|"]  # fmt: skip
    for stage in seeds[0]["topics"]:
        own = mean_shares(seeds, stage)
        rest = {k: v for k, v in own.items() if k != "Chores"}
        head = max(rest, key=rest.get)
        wide = spread(*over_seeds([pooled("spread", s["topics"][stage]) for s in seeds]), ".1f")
        lines.append(
            f"| {stage} | {own.get('Chores', 0.0):.3f} | {head} {rest[head]:.3f} | {wide} |"
        )
    return "\n".join(lines) + "\n"


def value_table(seeds: Seeds) -> str:
    """What beam, pool and chooser make of the objective of list search."""
    lines = ["The value of the list chosen, lambda U + (1 - lambda) D with lambda = dpo.weight and "
             "U scaled within the ab.searched lists of a user, of which the rows below choose:", "",
             "| Method | SFT's lists | IceBreaker's lists |", "|---|---|---|"]  # fmt: skip
    for choice in [m.removeprefix("SFT, ") for m in TABLES["serving"][1] if m.startswith("SFT, ")]:
        cells = []
        for method in ("SFT", "IceBreaker"):
            rows = per_seed(seeds, f"{method}, {choice}", "value")
            cells.append(spread(*over_seeds(rows), ".3f"))
        lines.append(f"| {choice} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def daily(seeds: Seeds) -> dict[str, dict]:
    """arm -> CTR, and sessions per user and day, up to each day: means over seeds, with 95 %
    intervals over users (normal; errors of the seeds are independent)."""
    made = {}
    for arm in seeds[0]["ab"]["arms"]:
        days = [s["ab"]["arms"][arm]["cumulative"] for s in seeds]
        if not all(days):  # it met nobody
            continue
        made[arm] = {"day": [*range(1, len(days[0]["ctr"]) + 1)]}
        for name, per in (("ctr", 1), ("sessions", np.array(made[arm]["day"]))):
            mean = np.mean([d[name] for d in days], axis=0) / per
            half = 1.96 * np.sqrt(np.sum(np.square([d[f"{name}_error"] for d in days]), 0)) / per
            low, high = mean - half / len(days), mean + half / len(days)
            made[arm] |= {name: mean.tolist(), f"{name}_low": low.tolist(),
                          f"{name}_high": high.tolist()}  # fmt: skip
    return made


def frontier(seeds: Seeds, wanted: list[str], have: set[str]) -> tuple[dict, dict]:
    """Points and lines of figures.frontier: table 1's methods, and what lambda changes."""
    def point(method: str) -> dict:
        x, y = (bootstrap(per_seed(seeds, method, m)) for m in ("r_score", "lexical"))
        return {"x": x[0], "x_interval": list(x[1:]), "y": y[0], "y_interval": list(y[1:])}

    labels, lines = {}, {}
    trained = {"IceBreaker": "", "lambda 0.5": "λ 0.5", "lambda 1.0": "λ 1"}
    if {*trained} <= have:
        lines["DPO"] = [*trained]
        labels |= trained
    if "serving" in wanted:
        for method, kind in (("SFT", "MMR"), ("SFT", "DPP"), ("SFT", "list search"),
                             ("IceBreaker", "list search")):
            own = [f"{method}, {choice}" for choice in CHOICES if choice.startswith(kind)]
            lines[f"{method}, {kind}"] = [*own, f"{method}, highest utility"]
            labels |= dict(zip(own, ("λ 0.1", "", ""), strict=True))
            labels[f"{method}, highest utility"] = "λ 1"
    labels |= {m: m for m in PAPER}
    return {m: point(m) | {"label": label} for m, label in labels.items()}, lines


def pictures(seeds: Seeds, log: list[dict], folder: Path, wanted: list[str]) -> list[str]:
    """Write the PNGs that these tables allow; returns their names."""
    have = {m for m in seeds[0]["values"] if all(m in s["values"] for s in seeds)}
    figures.curves(log, folder / "training_curves.png", title="Training on the first seed "
                   "(long ones: each step thin, a running mean thick)")
    names = ["training_curves.png"]
    points, lines = frontier(seeds, wanted, have)
    figures.frontier(points, folder / "frontier.png", lines, xlabel="utility: R-Score against PE "
                     "(held-out ranker)", ylabel="distinct keywords per list",
                     title="Utility against diversity; lines: lambda, the weight of utility, is "
                     "0.1, 0.2, 0.5, 1; bars: 95 % over users, of these trainings")
    names.append("frontier.png")
    rows = {}
    for method in [*PAPER][1:]:
        rows[method] = {}
        judges = {"train": "train_utility", "held_out": "utility", "truth": "true_clicks"}
        for judge, metric in judges.items():
            base = np.mean([x.mean() for x in per_seed(seeds, "PE", metric)])
            gap = paired(seeds, metric, method, "PE")
            value, low, high = (x / base for x in bootstrap(gap))
            rows[method][judge] = {"lift": value, "interval": [low, high]}
    figures.hacking(rows, folder / "reward_hacking.png", title="Lift over PE, by who "
                    "judges; whiskers: 95 % over users, of these trainings")
    names.append("reward_hacking.png")
    if "figure3" in wanted:
        s = {stage: mean_shares(seeds, stage) for stage in seeds[0]["topics"]}
        figures.rings([
            {"title": "RID", "inner": s["history"], "outer": s["RID"],
             "inner_label": "history", "outer_label": "trigger interests"},
            {"title": "ISG", "inner": s["RID"], "outer": s["IceBreaker"],
             "inner_label": "trigger interests", "outer_label": "starters"},
        ], folder / "rings.png", functional={"Chores"}, title="Topics, means over seeds")
        names.append("rings.png")
    if "2" in wanted:
        figures.ab_days(daily(seeds), folder / "ab_days.png")
        names.append("ab_days.png")
    if {*ROUNDS} <= have:
        series = {}
        for metric in ("r_score", "lexical"):
            y = [bootstrap(per_seed(seeds, m, metric)) for m in ROUNDS]
            series[metric] = {"x": [*range(1, 6)], **{
                key: [v[i] for v in y] for i, key in enumerate(("y", "low", "high"))}}
        figures.lines({"R-Score": series["r_score"]}, folder / "rounds.png", "round", "R-Score",
                      "Utility and diversity by round; bands: 95 % over users, of these trainings",
                      {"keywords": series["lexical"]},
                      "distinct keywords per list")
        names.append("rounds.png")
    return names


def write(
    seeds: Seeds, wanted: list[str], log: list[dict], about: dict, folder: Path
) -> list[dict]:
    """reproduction.md, claims.md, reproduction.json and pictures into `folder`; returns claims."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = ", ".join(f"{x['minutes']:.0f} ({x['commit']})" for x in about["starts"])
    note = (
        f"{about['command']}: seeds {about['seeds']}, commit {about['commit']}, config "
        f"{about['config']}. Minutes of its starts, which go on with what is there: {starts}; "
        f"{sum(x['core_hours'] for x in about['starts']):.1f} core hours on {about['processors']} "
        f"processors. Methods wrote {seeds[0]['ab']['lists']} lists a user; what chooses when "
        "serving, and the popular starters and the oracle, show one."
    )
    legend = __doc__.partition("\n\n")[2]
    more = {"1": spoken_table, "2": online_table, "3": cases, "6": interests_table,
            "figure3": shares_table, "serving": value_table}  # fmt: skip
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
        method: {
            metric: over_seeds(per_seed(seeds, method, metric))
            for metric in [*own, *LIFTS * ("utility" in own)]
        }
        for method, own in seeds[0]["values"].items()
        if all(method in s["values"] for s in seeds)
    }
    write_json(folder / "reproduction.json", {
        "about": about, "methods": tables, "online": ab.lifts([s["ab"] for s in seeds]),
        "basis": [s["basis"] for s in seeds], "claims": rows,
    })  # fmt: skip
    pages = {"reproduction.md": "\n".join(parts), "claims.md": claims_page(rows, note)}
    for name, text in pages.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return rows

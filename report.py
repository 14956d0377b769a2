"""Tables and pictures of a reproduction, from the values of its seeds (reproduce.py).

A cell is the mean over seeds ± the half-width of its 95 % interval over seeds (Student's t).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import ab
import figures
from claims import Claim, Seeds, bootstrap, claims_page, judged, paired
from config import atomic_path, write_json
from eval import COLUMNS, LEGEND, escape

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
    "serving": ("Beyond the paper: choosing when serving, and few sessions", dict.fromkeys([
        "IceBreaker",
        *(f"{m}{x}" for m in ("SFT", "IceBreaker") for x in (
            ", list search of 1", ", list search of 2", ", list search of 4", ", list search",
            ", list search, beam 1", ", highest utility", ", MMR", ", DPP")),
        "IceBreaker, 1 session", "IceBreaker, 2 sessions", "popular starters",
    ])),
    "beyond": ("Beyond the paper: lambda and more rounds", dict.fromkeys([
        "IceBreaker", "lambda 0.5", "lambda 1.0",
        "early", "middle", "latest", "round 4", "round 5",
    ])),
    "beta": ("Beyond the paper: beta and the reference of DPO", dict.fromkeys([
        "beta 0.03", "IceBreaker", "beta 0.3", "reference SIT",
    ])),
}


MORE_METRICS = """\
- **Active**: active days per person and week. **Avg.S**: sessions per person. **CTR**: taps per
  starter shown. **CSR**: share of active days on which a conversation started. **Taps**: taps per
  active day.
- **Known**: share of starters about a topic of the world. **Resonance**: the hidden interest, 0 to
  1, in what a text speaks about; 0 where it is not known. **Chores**: share of
  functional topics among texts whose topic is known. **Wins**: share of the judge's pairwise
  comparisons with the rule-based interests.
"""


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
        judges = {"train": "train_utility", "held_out": "utility", "truth": "true_clicks"}
        for judge, metric in judges.items():
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

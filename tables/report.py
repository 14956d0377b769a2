"""The report of a reproduction: tables, pictures and claims from the values of its seeds.

    python eval.py --reproduce all --seeds 3      # reproduce.py measures; this writes results/

Section 3 of the paper: tables 1 to 3 and 6 to 9, figure 3, and what experiments.yaml adds.
Departure: every cell has an interval over seeds (Student's t), the paper's have none.

Legend: S seeds, U users of one seed.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from scipy.stats import t

from files import atomic_path, write_json
from stages.metrics import COLUMNS, LEGEND, bootstrap, escape, paper_figures
from tables import experiments, figures
from tables.claims import LIFTS, Seeds, claims_page, judged, paired, pooled, values_of
from world import ab

ROUNDS = ["early", "middle", "IceBreaker", "round 4", "round 5"]  # after 1, 2, ... 5 of DPO


def per_seed(seeds: Seeds, method: str, metric: str, base: str = "PE") -> list[np.ndarray]:
    """Values of the users of each seed, (U,) each; those of claims.LIFTS are against `base`."""
    return [np.array([*values_of(s, method, metric, base).values()]) for s in seeds]


def over_seeds(rows: list[np.ndarray]) -> tuple[float, float]:
    """(mean, half-width of the 95 % interval over seeds by Student's t; nan for one seed)."""
    means, n = np.array([values.mean() for values in rows]), len(rows)  # (S,)
    half = t.ppf(0.975, n - 1) * means.std(ddof=1) / n**0.5 if n > 1 else float("nan")
    return float(means.mean()), float(half)


def spread(rows: list[np.ndarray], form: str) -> str:
    """Mean ± half-width of `over_seeds`; the mean alone for one seed."""
    mean, half = over_seeds(rows)  # a half-width has no sign: "+.2f" without its plus
    return format(mean, form) + ("" if np.isnan(half) else f" ± {format(half, form.lstrip('+'))}")


def markdown_table(head: Iterable[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|---" * len([*head]) + "|")  # Markdown wants it below the head
    return "\n".join(lines) + "\n"


def cell(seeds: Seeds, method: str, metric: str, form: str, base: str = "PE") -> str:
    """A method's mean and interval; – where the metric is not of this method."""
    compared = metric in LIFTS  # a lift over itself says nothing
    if method == base if compared else any(metric not in s["values"][method] for s in seeds):
        return "–"
    return spread(per_seed(seeds, method, metric, base), form)


def method_table(seeds: Seeds, name: str) -> str:
    """The table's methods, every metric; methods that were not trained are left out."""
    table, paper = experiments.tables()[name], paper_figures().get(f"table{name}", {})
    head = ["Method", *(title for title, _, _ in COLUMNS),
            "paper: R-User, R-Score, lexical, semantic"]
    return markdown_table(head, [
        [method, *(cell(seeds, method, metric, form, table.against) for _, metric, form in COLUMNS),
         ", ".join(paper.get(method, ["–"]))]
        for method in experiments.rows_of(table) if all(method in s["values"] for s in seeds)
    ])


def second_table(seeds: Seeds, name: str) -> str:
    """What stands below a table of experiments.yaml: the same methods otherwise seen."""
    table = experiments.tables()[name]
    if name == "1":  # what their starters speak of
        cells = {m: [(m, "known"), (m, "resonance")] for m in table.methods}
    elif name == "6":  # the interests themselves, before anything is written from them
        kinds, metrics = ("all", "rule", "RID"), ("judge_win", "resonance", "functional")
        cells = {kind: [(f"interests: {kind}", m) for m in metrics] for kind in kinds}
    else:  # what beam, pool and chooser make of the objective of list search
        cells = {choice: [(f"{method}, {choice}", "value") for method in experiments.SEARCHED]
                 for choice in table.chosen}
    return markdown_table(table.head, [[label, *(cell(seeds, *pair, ".3f") for pair in pairs)]
                                       for label, pairs in cells.items()])


def lift_tables(results: list[dict]) -> str:
    """Table 2 as measured (ab.simulate's result of each seed) and as in the paper."""
    head, paper = ["Method", *ab.METRICS], paper_figures()["table2"].items()
    return ("Lift over the deployed retrieval in per mille [95 % interval], * p < 0.05:\n\n"
            + markdown_table(head, ab.table_rows(ab.lifts(results))) + "\nThe paper's Table 2:\n\n"
            + markdown_table(head, [[method, *cells] for method, cells in paper]))


def cases(seeds: Seeds) -> str:
    """Table 3: users at fixed percentiles of the first seed's lift over SFT."""
    blocks = []
    for case in seeds[0]["cases"]:  # texts of users: escaped, or one could write into the page
        texts = {k: "; ".join(map(escape, case[k])) for k in ("summaries", "interests")}
        starters = [f"- {m}: " + " · ".join(map(escape, ys)) for m, ys in case["starters"].items()]
        blocks += [f"**{case['percentile']}th percentile** (lift {case['lift']:+.4f})",
                   f"Latest summaries: {texts['summaries']}",
                   f"Trigger interests: {texts['interests']}", "\n".join(starters)]
    return "\n\n".join(blocks) + "\n"


def mean_shares(seeds: Seeds, stage: str) -> dict[str, float]:
    """Shares of topic categories, means over seeds."""
    counts = [sum(map(Counter, s["topics"][stage].values()), Counter()) for s in seeds]
    names = sorted({name for seed in counts for name in seed})
    return {name: float(np.mean([seed[name] / seed.total() for seed in counts])) for name in names}


def shares_table(seeds: Seeds) -> str:
    """Figure 3 in figures: how far chores and the largest category lead."""
    rows = []
    for stage in seeds[0]["topics"]:  # history, RID, IceBreaker, deployed retrieval
        shares = mean_shares(seeds, stage)
        chores = shares.pop("Chores", 0.0)  # a category of its own, and never the "largest" here
        head = max(shares, key=shares.get)
        # Over seeds, of all users of each: not a mean over users.
        wide = spread([pooled("spread", s["topics"][stage]) for s in seeds], ".1f")
        rows.append([stage, f"{chores:.3f}", f"{head} {shares[head]:.3f}", wide])
    return markdown_table(experiments.tables()["figure3"].head, rows)


def measured(seeds: Seeds) -> str:
    """What the other figures rest on: rankers, scorer, classifier and matcher against the truth."""
    basis = [s["basis"] for s in seeds]  # nested: "ranker.judge.ece" is a path into it
    values = {name: [functools.reduce(operator.getitem, path.split("."), b) for b in basis]
              for name, path in experiments.read()["basis"].items()}
    values |= {f"in round {i} of DPO no checkpoint was better than its start": kept
               for i, kept in enumerate(zip(*(b["kept_start"] for b in basis), strict=True), 1)}
    ours, sft = (per_seed(seeds, m, "lexical_compared") for m in ("IceBreaker", "SFT"))
    values["IceBreaker's share of SFT's keywords, weighed by table 1's lists"] = [
        a.mean() / b.mean() for a, b in zip(ours, sft, strict=True)]
    # Few seeds: each one's figure says more than an interval.
    rows = [[name, f"{np.mean(row):.3f} ({', '.join(f'{v:.3f}' for v in row)})"]
            for name, row in values.items()]
    return "## What the figures rest on\n\n" + markdown_table(["", "mean (each seed)"], rows)


def daily(seeds: Seeds, name: str) -> dict[str, dict]:
    """arm -> "ctr" or "sessions" up to each day, as figures.lines has it: means over seeds, 95 %
    intervals over users (normal; errors of the seeds are independent)."""
    arms = {}
    for arm in seeds[0]["ab"]["arms"]:
        days = [s["ab"]["arms"][arm]["cumulative"] for s in seeds]
        if all(days):  # else the arm met nobody
            # (S, days) each; errors are standard errors over users, seeds are independent.
            values, errors = (np.array([d[k] for d in days]) for k in (name, f"{name}_error"))
            x = np.arange(1, values.shape[1] + 1)  # (days,)
            scale = 1 / x if name == "sessions" else 100  # sums up to a day; CTR in per cent
            mean, half = values.mean(0), 1.96 * np.sqrt((errors**2).sum(0)) / len(seeds)
            ends = {"y": mean, "low": mean - half, "high": mean + half}  # of 95 %
            arms[arm] = {"x": x.tolist()} | {k: (scale * end).tolist() for k, end in ends.items()}
    return arms


def draw_frontier(seeds: Seeds, have: set[str], path: Path, title: str) -> None:
    """Table 1's methods, and what lambda changes: in training, and in choosing when serving."""
    drawn = experiments.read()["frontier"]
    # A line is drawn whole or not at all: without its variants there is no sweep.
    lines = {label: points for label, points in drawn.items() if {*points} <= have}
    methods = {*paper_figures()["table1"]}.union(*lines.values())
    points = {m: tuple(bootstrap(per_seed(seeds, m, axis)) for axis in ("r_score", "lexical"))
              for m in sorted(methods)}
    figures.frontier(points, path, lines, "utility: R-Score against PE (held-out ranker)",
                     "distinct keywords per list", title)


def draw_hacking(seeds: Seeds, path: Path, title: str) -> None:
    """Lifts over PE as the training ranker, the held-out one and the hidden truth see them."""
    rows = {method: {} for method in paper_figures()["table1"] if method != "PE"}  # in its order
    for judge, metric in experiments.read()["judges"].items():
        base = over_seeds(per_seed(seeds, "PE", metric))[0]  # units differ: shares of PE's mean
        for method, lifts in rows.items():
            ends = bootstrap(paired(seeds, metric, method, "PE"))
            lifts[judge] = tuple(end / base for end in ends)  # value, low, high
    figures.hacking(rows, path, title)


def draw_rings(seeds: Seeds, path: Path, title: str) -> None:
    panels = [panel | {ring: mean_shares(seeds, panel[ring]) for ring in ("inner", "outer")}
              for panel in experiments.read()["rings"]]  # names of stages become their shares
    figures.rings(panels, path, {"Chores"}, title)


def by_round(seeds: Seeds, metric: str) -> dict[str, dict]:
    """IceBreaker after each of five rounds of DPO, as figures.lines has it."""
    y, low, high = zip(*(bootstrap(per_seed(seeds, m, metric)) for m in ROUNDS), strict=True)
    x = range(1, len(ROUNDS) + 1)  # rounds count from 1
    return {"IceBreaker": {"x": x, "y": y, "low": low, "high": high}}


def pictures(seeds: Seeds, log: list[dict], folder: Path, wanted: list[str]) -> list[str]:
    """Write the PNGs that these tables allow; returns their names."""
    have = {m for m in seeds[0]["values"] if all(m in s["values"] for s in seeds)}
    texts, panel = experiments.read(), figures.Panel
    draw: dict[str, Callable] = {  # name -> how, given path and title
        "training_curves": lambda *to: figures.curves(log, *to, texts["curves"]),
        "frontier": lambda *to: draw_frontier(seeds, have, *to),
        "reward_hacking": lambda *to: draw_hacking(seeds, *to),
    }
    if "figure3" in wanted:
        draw["rings"] = lambda *to: draw_rings(seeds, *to)
    if "2" in wanted:
        day = "day of the test"
        days = [panel("click-through rate (CTR), %", day, daily(seeds, "ctr")),
                panel("sessions per user and day", day, daily(seeds, "sessions"))]
        draw["ab_days"] = lambda *to: figures.lines(days, *to)
    if {*ROUNDS} <= have:
        rounds = [panel("R-Score", "round", by_round(seeds, "r_score")),
                  panel("distinct keywords per list", "round", by_round(seeds, "lexical"))]
        draw["rounds"] = lambda *to: figures.lines(rounds, *to)
    for name, how in draw.items():  # bytes hang on the data alone: Git sees what changed
        how(folder / f"{name}.png", texts["titles"][name])
    return [*draw]


def reproduction_page(seeds: Seeds, wanted: list[str], note: str, names: list[str]) -> str:
    """reproduction.md: the tables that are wanted, what they rest on, the pictures."""
    texts, results = experiments.read(), [s["ab"] for s in seeds]
    people = ", ".join(str(len(one["arms"][ab.CONTROL]["users"])) for one in results)
    # What stands below a table's note, where it is no second_table.
    below = {"2": lambda: lift_tables(results),
             "3": lambda: cases(seeds), "figure3": lambda: shares_table(seeds)}
    parts = ["# The paper's tables on the simulated platform\n", note + "\n", texts["legend"]]
    for name in wanted:  # in the order of experiments.yaml
        table = experiments.tables()[name]
        parts.append(f"## {table.title}\n")
        if table.methods:
            parts.append(method_table(seeds, name))
        if table.note:
            # Days, lists and lives are settings, the same of every seed.
            parts.append(table.note.format(**results[0], people=people) + "\n")
            parts.append(below[name]() if name in below else second_table(seeds, name))
    parts += ["## Metrics\n", LEGEND + "\n" + texts["metrics"], measured(seeds)]
    return "\n".join(parts + [f"![{name.replace('_', ' ')}]({name}.png)\n" for name in names])


def write(
    seeds: Seeds, wanted: list[str], log: list[dict], about: dict, folder: Path
) -> list[dict]:
    """reproduction.md, claims.md, reproduction.json and pictures into `folder`; returns claims."""
    folder.mkdir(parents=True, exist_ok=True)
    minutes = ", ".join(f"{start['minutes']:.0f} ({start['commit']})" for start in about["starts"])
    hours = sum(start["core_hours"] for start in about["starts"])
    note = experiments.read()["about"].format(
        **about, minutes=minutes, hours=hours, lists=seeds[0]["ab"]["lists"])
    rows = judged(seeds, wanted)
    methods = {  # method -> metric -> [mean, half-width over seeds], for who wants to plot it anew
        method: {metric: over_seeds(per_seed(seeds, method, metric))
                 for metric in [*metrics, *LIFTS * ("utility" in metrics)]}
        for method, metrics in seeds[0]["values"].items()
        if all(method in s["values"] for s in seeds)
    }
    write_json(folder / "reproduction.json", {
        "about": about, "methods": methods, "online": ab.lifts([s["ab"] for s in seeds]),
        "basis": [s["basis"] for s in seeds], "claims": rows,
    })
    names = pictures(seeds, log, folder, wanted)  # before the page that shows them
    pages = {"reproduction.md": reproduction_page(seeds, wanted, note, names),
             "claims.md": claims_page(rows, note)}
    for name, text in pages.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return rows

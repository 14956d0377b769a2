"""The report of a reproduction: tables, pictures and claims from the values of its seeds.

    python eval.py --reproduce all --seeds 3      # reproduce.py measures; this writes results/

Section 3 of the paper: tables 1 to 3 and 6 to 9, figure 3, and what experiments.yaml adds.
Departure: every cell has an interval over seeds (Student's t), the paper's have none.

Legend: S seeds, U users of one seed.
"""

import functools
import operator
from collections import Counter
from pathlib import Path

import numpy as np
from scipy.stats import t

from files import read_yaml, write_json, write_text
from stages.metrics import LIFTS, bootstrap, escape, markdown_table
from tables import experiments, figures
from tables.claims import Seeds, claims_page, judged, per_seed, pooled
from world import ab

ROUNDS = ["early", "middle", "IceBreaker", "round 4", "round 5"]  # after 1, 2, ... 5 of DPO


def over_seeds(rows: list[np.ndarray]) -> tuple[float, float]:
    """(mean, half-width of the 95 % interval over seeds by Student's t; nan for one seed)."""
    means, n = np.array([values.mean() for values in rows]), len(rows)  # (S,)
    half = t.ppf(0.975, n - 1) * means.std(ddof=1) / n**0.5 if n > 1 else float("nan")
    return float(means.mean()), float(half)


def spread(rows: list[np.ndarray], form: str) -> str:
    """Mean ± half-width of `over_seeds`; the mean alone for one seed."""
    mean, half = over_seeds(rows)  # a half-width has no sign: "+.2f" without its plus
    return format(mean, form) + ("" if np.isnan(half) else f" ± {format(half, form.lstrip('+'))}")


def in_all(seeds: Seeds) -> list[str]:
    """Methods that every seed has: fewer were trained where fewer rounds were asked for."""
    return [m for m in seeds[0]["values"] if all(m in s["values"] for s in seeds)]


# ------------------------------------------------------------------------------------------- tables


def cell(seeds: Seeds, method: str, metric: str, form: str, base: str = "PE") -> str:
    """A method's mean and interval; – where the metric is not of this method."""
    compared = metric in LIFTS  # a lift over itself says nothing
    if method == base if compared else any(metric not in s["values"][method] for s in seeds):
        return "–"
    return spread(per_seed(seeds, method, metric, base), form)


def method_table(seeds: Seeds, table: experiments.Table, paper: dict[str, list[str]]) -> str:
    """The table's methods, every metric; methods that were not trained are left out."""
    columns, have = read_yaml("stages/metrics.yaml")["columns"], in_all(seeds)
    return markdown_table(
        ["Method", *columns, "paper: R-User, R-Score, lexical, semantic"],
        [[method, *(cell(seeds, method, *column, table.against) for column in columns.values()),
          ", ".join(paper.get(method, ["–"]))]
         for method in experiments.rows_of(table) if method in have])


def second_table(seeds: Seeds, table: experiments.Table) -> str:
    """What stands below a table of experiments.yaml: the same methods otherwise seen."""
    return markdown_table(table.head, [
        [row, *(cell(seeds, method.format(row), metric, ".3f") for method, metric in table.columns)]
        for row in table.rows])


def lift_tables(results: list[dict]) -> str:
    """Table 2 as measured (ab.simulate's result of each seed) and as in the paper."""
    head, paper = ["Method", *ab.METRICS], read_yaml("configs/paper.yaml")["table2"].items()
    return ("Lift over the deployed retrieval in per mille [95 % interval], * p < 0.05:\n\n"
            + markdown_table(head, ab.table_rows(ab.lifts(results))) + "\nThe paper's Table 2:\n\n"
            + markdown_table(head, [[method, *cells] for method, cells in paper]))


def case_texts(seeds: Seeds) -> str:
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


def basis_table(seeds: Seeds) -> str:
    """What the other figures rest on: rankers, scorer, classifier and matcher against the truth."""
    basis = [s["basis"] for s in seeds]  # nested: "ranker.judge.ece" is a path into it
    values = {name: [functools.reduce(operator.getitem, path.split("."), b) for b in basis]
              for name, path in experiments.read()["basis"].items()}
    ours, sft = (per_seed(seeds, m, "lexical_compared") for m in ("IceBreaker", "SFT"))
    values["IceBreaker's share of SFT's keywords, weighed by table 1's lists"] = [
        a.mean() / b.mean() for a, b in zip(ours, sft, strict=True)]
    # Few seeds: each one's figure says more than an interval.
    rows = [[name, f"{np.mean(row):.3f} ({', '.join(f'{v:.3f}' for v in row)})"]
            for name, row in values.items()]
    return markdown_table(["", "mean (each seed)"], rows)


# ----------------------------------------------------------------------------------------- pictures


def days_panel(seeds: Seeds, count: str, ylabel: str) -> figures.Panel:
    """"ctr" or "sessions" of each arm up to each day: means over seeds, 95 % intervals over users
    (normal; errors of the seeds are independent)."""
    arms = {}
    for arm in seeds[0]["ab"]["arms"]:
        days = [s["ab"]["arms"][arm]["cumulative"] for s in seeds]
        if all(days):  # else the arm met nobody
            # (S, days) each; errors are standard errors over users.
            values, errors = (np.array([d[k] for d in days]) for k in (count, f"{count}_error"))
            day = np.arange(1, values.shape[1] + 1)  # (days,)
            scale = 1 / day if count == "sessions" else 100  # sums up to a day; CTR in per cent
            mean, half = values.mean(0), 1.96 * np.sqrt((errors**2).sum(0)) / len(seeds)
            arms[arm] = {"x": day, "y": scale * mean,
                         "low": scale * (mean - half), "high": scale * (mean + half)}  # of 95 %
    return figures.Panel(ylabel, "day of the test", arms)


def rounds_panel(seeds: Seeds, metric: str, ylabel: str) -> figures.Panel:
    """IceBreaker after each of five rounds of DPO."""
    # Of users, as all bands: seeds are too few to show their spread in a picture.
    y, low, high = zip(*(bootstrap(per_seed(seeds, m, metric)) for m in ROUNDS), strict=True)
    line = {"x": range(1, len(ROUNDS) + 1), "y": y, "low": low, "high": high}
    return figures.Panel(ylabel, "round", {"IceBreaker": line})


def frontier_points(seeds: Seeds, have: list[str]) -> tuple[dict, dict]:
    """Points (R-Score, keywords) of table 1's methods and of what lambda changes, in training and
    when serving; the lines through them."""
    # A line is drawn whole or not at all: without its variants there is no sweep.
    lines = {label: points for label, points in experiments.read()["frontier"].items()
             if {*points} <= {*have}}
    methods = {*read_yaml("configs/paper.yaml")["table1"]}.union(*lines.values())
    points = {m: tuple(bootstrap(per_seed(seeds, m, axis)) for axis in ("r_score", "lexical"))
              for m in sorted(methods)}
    return points, lines


def pictures(seeds: Seeds, log: list[dict], folder: Path, wanted: list[str]) -> list[str]:
    """Write the PNGs that these tables allow; returns their names."""
    texts, have, names = experiments.read(), in_all(seeds), []

    def draw(name, picture, *values):  # its bytes hang on the values alone: Git sees what changed
        picture(*values, folder / f"{name}.png", texts["titles"][name])
        names.append(name)

    draw("training_curves", figures.curves, log, texts["curves"])
    draw("frontier", figures.frontier, *frontier_points(seeds, have))
    if "figure3" in wanted:
        panels = [panel | {ring: mean_shares(seeds, panel[ring]) for ring in ("inner", "outer")}
                  for panel in texts["rings"]]  # names of stages become their shares
        draw("rings", figures.rings, panels, {"Chores"})
    if "2" in wanted:
        draw("ab_days", figures.lines, [days_panel(seeds, "ctr", "click-through rate (CTR), %"),
                                        days_panel(seeds, "sessions", "sessions per user and day")])
    if {*ROUNDS} <= {*have}:
        draw("rounds", figures.lines, [
            rounds_panel(seeds, "r_score", "R-Score"),
            rounds_panel(seeds, "lexical", "distinct keywords per list")])
    return names


def reproduction_page(seeds: Seeds, wanted: list[str], note: str, names: list[str]) -> str:
    """reproduction.md: the tables that are wanted, what they rest on, the pictures."""
    texts, results = experiments.read(), [s["ab"] for s in seeds]
    people = ", ".join(str(len(one["arms"][ab.CONTROL]["users"])) for one in results)  # a seed's
    # What stands below a table's note, where it is no second_table.
    below = {"2": lambda: lift_tables(results),
             "3": lambda: case_texts(seeds), "figure3": lambda: shares_table(seeds)}
    tables, paper = [], read_yaml("configs/paper.yaml")
    for name in wanted:  # in the order of experiments.yaml
        table = experiments.tables()[name]
        tables.append(f"## {table.title}\n")
        if table.methods:
            tables.append(method_table(seeds, table, paper.get(f"table{name}", {})))
        if table.note:
            # Days, lists and lives are settings, the same of every seed.
            tables.append(table.note.format(**results[0], people=people) + "\n")
            tables.append(below[name]() if name in below else second_table(seeds, table))
    return texts["page"].format(
        note=note, tables="\n".join(tables), legend=read_yaml("stages/metrics.yaml")["legend"],
        basis=basis_table(seeds),
        pictures="\n".join(f"![{name.replace('_', ' ')}]({name}.png)\n" for name in names))


def write(seeds: Seeds, wanted: list[str], log: list[dict], about: dict,
          folder: Path) -> list[dict]:
    """reproduction.md, claims.md, reproduction.json and pictures into `folder`; returns claims."""
    minutes = ", ".join(f"{start['minutes']:.0f} ({start['commit']})" for start in about["starts"])
    hours = sum(start["core_hours"] for start in about["starts"])
    note = experiments.read()["about"].format(  # the head of both pages
        **about, minutes=minutes, hours=hours, lists=seeds[0]["ab"]["lists"])
    rows, values = judged(seeds, wanted), seeds[0]["values"]
    methods = {  # method -> metric -> [mean, half-width over seeds], for who wants to plot it anew
        method: {metric: over_seeds(per_seed(seeds, method, metric))
                 for metric in [*values[method], *[*LIFTS] * ("utility" in values[method])]}
        for method in in_all(seeds)}
    write_json(folder / "reproduction.json", {
        "about": about, "methods": methods, "online": ab.lifts([s["ab"] for s in seeds]),
        "basis": [s["basis"] for s in seeds], "claims": rows})
    names = pictures(seeds, log, folder, wanted)  # before the page that shows them
    write_text(folder / "reproduction.md", reproduction_page(seeds, wanted, note, names))
    write_text(folder / "claims.md", claims_page(rows, note))
    return rows

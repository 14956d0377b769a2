"""The tables, figures and claims of From Clicks to Preference (paper 003), over seeds.

    python eval.py --reproduce garm --seeds 3              # results/garm.md and its two pictures
    python -m tables.garm results/values/garm-*.json       # the page again, no run needed

Tables 1 to 4, Figures 4 and 6, appendix I. A seed's main run is trained once; what Tables 2 and 3
add (garm.yaml: variants) starts as a copy of it (siblings.py).

Departures: no RL with the paired model, which scores no suggestion alone, and no Skywork reward.
The judge is the offline rule unless roles.judge names an LLM; hidden usefulness stands beside it.

Legend: S seeds, B contexts of one seed.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from scipy import special, stats

import garm
from files import script
from stages.metrics import markdown_table
from tables import experiments, figures
from tables.claims import Seeds, per_seed, pooled_interval
from tables.garm_values import measure_seed, train_run
from tables.report import in_all
from tables.seeds import cell, summary, with_verdicts, written
from tables.siblings import Paper, again


def page_parts(seeds: Seeds) -> dict:
    """What garm.md says beside claims and origin."""
    parts, below = [], {"2": [calibration_table(seeds), sigma_table(seeds)]}
    for number, table in experiments.read("garm")["tables"].items():
        show = accuracy_table if number == "2" else policy_table
        parts += [f"## {table['title']}\n", show(seeds, table), *below.get(number, [])]
    parts += ["## Figure 4: accuracy by quarters of the confidence\n", confidence_table(seeds),
             "## Figure 6: the closed form and Monte-Carlo draws\n", closed_form_table()]
    first = seeds[0]["values"]
    contexts = len(first["what was shown"]["score"]) if "what was shown" in first else 0
    return {"tables": "\n".join(parts), "contexts": contexts, "phrasings": phrasing_table(seeds),
            "observations": observation_table(seeds)}


# ------------------------------------------------------------------------------------------- tables


def pooled_cell(seeds: Seeds, method: str, metric: str, key: str) -> str:
    """A metric of claims.POOLED, e.g. the share of all pairs that are right; key: where it is."""
    if any(not sum(sum(row.values()) for row in s[key].get(method, {}).values()) for s in seeds):
        return "–"
    return written(*pooled_interval(seeds, metric, method, hierarchical=True)[0], ".3f")


def policy_table(seeds: Seeds, table: dict) -> str:
    """Tables 1, 3 and 4: good/same/bad against PE, and the other metrics of garm.yaml."""
    columns, rows, have = experiments.read("garm")["columns"], [], in_all(seeds)
    for method, paper in table["rows"].items():
        if method not in have:  # its variant was not trained
            continue
        good, bad = (np.mean([x.mean() for x in per_seed(seeds, method, metric)]) * 100
                     for metric in ("good", "bad"))
        net = [100 * x for x in per_seed(seeds, method, "net")]  # in points, as the paper's GSB
        # Eq. (1)'s gain is relative to prompting: of means, as a context of no click has no ratio.
        base, clicks = (np.mean([x.mean() for x in per_seed(seeds, m, "click_rate")])
                        for m in ("PE", method))
        rows.append([
            method, f"{good:.0f}/{100 - good - bad:.0f}/{bad:.0f}", summary(net, "+.0f"),
            *(cell(seeds, method, metric, form) for metric, (_, form) in columns.items()),
            f"{100 * (clicks / base - 1):+.1f} %" if base else "–", paper])
    return markdown_table(
        ["", "good/same/bad, %", "net", *(title for title, _ in columns.values()), "CTR gain",
         table["paper"]], rows)


def accuracy_table(seeds: Seeds, table: dict) -> str:
    """Table 2: share of pairs that a reward model orders as people did, by set."""
    sets = experiments.read("garm")["sets"]
    rows = [[name, *(pooled_cell(seeds, f"{name}, {part}", "accuracy", "pairs") for part in sets),
             paper] for name, paper in table["rows"].items() if f"{name}, IID" in seeds[0]["pairs"]]
    return markdown_table(["", *sets, table["paper"]], rows)


def calibration_table(seeds: Seeds) -> str:
    """ECE of the later weeks, pairs in both orders."""
    names = experiments.read("garm")["tables"]["2"]["rows"]
    # In distribution and under policy shift, as section 4.3.3 compares them.
    rows = [[name, *(pooled_cell(seeds, f"{name}, {part}", "ece", "calibration")
                     for part in ("W4", "W4-RFT")), "0.0302, 0.0886" if name == "GaRM" else "–"]
            for name in names if f"{name}, W4" in seeds[0]["calibration"]]
    return markdown_table(["ECE, pairs in both orders", "W4", "W4-RFT", "paper"], rows)


def sigma_table(seeds: Seeds) -> str:
    """Mean sigma, and the mean bound of Eq. (7), of the models that have one."""
    names = experiments.read("garm")["tables"]["2"]["rows"]
    # Without the penalty of Eq. (5) nothing holds sigma at a scale: bounds of models differ by it.
    papers = {"GaRM": "σ about 1; bound 0.331, 0.224", "PURM, without penalty": "σ about 15"}
    rows = [[name, cell(seeds, f"{name}, IID", "sigma", ".3f"),
             *(cell(seeds, f"{name}, {part}", "bound", ".4f") for part in ("W4", "W4-RFT")),
             papers.get(name, "–")]
            for name in names if f"{name}, IID" in in_all(seeds)]
    return markdown_table(["", "mean σ, IID", "mean bound, W4", "W4-RFT", "paper"], rows)


def confidence_table(seeds: Seeds) -> str:
    """Figure 4 in figures; the gap of the mus alone tells what sigma adds to it."""
    rows = [[title, *(pooled_cell(seeds, f"{field}, quarter {q}{part}", "accuracy", "pairs")
                      for q in range(1, 5))]
            for title, field, part in (("the bound (Eq. 7)", "bound", ""),
                                       ("the same, W4-RFT", "bound", ", W4-RFT"),
                                       ("the gap of the μ alone", "gap", ""))]
    return markdown_table(["accuracy by quarters of", "lowest", "second", "third", "highest"], rows)


def phrasing_table(seeds: Seeds) -> str:
    kinds = [*experiments.read("garm")["phrasings"], "what was shown"]
    return markdown_table(["phrasing", "score", "usefulness"], [
        [kind, *(cell(seeds, kind, metric, ".3f") for metric in ("score", "usefulness"))]
        for kind in kinds])


def observation_table(seeds: Seeds) -> str:
    """The three observations as differences of scores, paired by context."""
    rows = []
    for text, more, less in experiments.read("garm")["observations"]:
        if {more, less} <= {*in_all(seeds)}:
            gaps = [np.subtract(*(per_seed([s], kind, "score")[0] for kind in (more, less)))
                    for s in seeds]
            rows.append(([text], gaps, "+.2f"))
    return markdown_table(["observation", "difference", "above zero"], with_verdicts(rows))


# ----------------------------------------------------------------------------------------- figure 6


def integral(mu: float, sigma: float) -> float:
    """Eq. (4), the mean of sigmoid(z) over N(mu, sigma^2)."""
    return float(stats.norm.expect(lambda z: special.expit(mu + sigma * z)))


def closed_form() -> list[dict]:
    """For each pair of Gaussians of garm.yaml: Eq. (4), its closed form, and mean and deviation of
    PURM's estimates by number of draws."""
    settings, result = experiments.read("garm")["figure6"], []
    for number, gaussians in enumerate(settings["gaussians"]):
        # In double precision: the error of the closed form is what is looked for.
        four = [torch.tensor([value], dtype=torch.float64) for value in gaussians]
        mu, sigma = gaussians[0] - gaussians[2], float(np.hypot(gaussians[1], gaussians[3]))
        repeated = [value.repeat(settings["repeats"]) for value in four]
        estimates = []
        for draws in settings["draws"]:
            generator = torch.Generator().manual_seed(number)
            p, _ = garm.purm_monte_carlo(*repeated, draws, generator)  # (repeats,)
            estimates.append((draws, p.mean().item(), p.std().item()))
        result.append({"mu": mu, "sigma": sigma, "integral": integral(mu, sigma),
                       "closed form": garm.preference_probability(*four).item(),
                       "estimates": estimates})
    return result


def closed_form_table() -> str:
    rows = []
    for row in closed_form():
        deviation = {draws: std for draws, _, std in row["estimates"]}
        rows.append([f"{row['mu']:+.1f}, {row['sigma']:.2f}", f"{row['integral']:.4f}",
                     f"{row['closed form'] - row['integral']:+.4f}",
                     *(f"{deviation[draws]:.4f}" for draws in (1000, 2000))])
    return markdown_table(["μ, σ of the difference", "p, Eq. (4)", "error of the closed form",
                           "deviation of 1,000 draws", "of 2,000"], rows)


# ----------------------------------------------------------------------------------------- pictures


def confidence_panel(seeds: Seeds) -> figures.Panel:
    series = {}
    for label, part in (("IID and W1 to W4", ""), ("W4-RFT", ", W4-RFT")):
        names = [f"bound, quarter {q}{part}" for q in range(1, 5)]
        # A small set may leave a quarter without a pair.
        if all(pooled_cell(seeds, name, "accuracy", "pairs") != "–" for name in names):
            y, low, high = zip(*(pooled_interval(seeds, "accuracy", name, hierarchical=True)[0]
                                 for name in names), strict=True)
            series[label] = {"x": [1, 2, 3, 4], "y": y, "low": low, "high": high}
    return figures.Panel("share of pairs that are right", "quarter of the bound (Eq. 7)", series,
                         level=0.5)


def closed_form_panels() -> list[figures.Panel]:
    panels = []
    for row in closed_form():
        draws, mean, std = (np.array(x) for x in zip(*row["estimates"], strict=True))
        constant = {name: {"x": draws, "y": [row[name]] * len(draws)}
                    for name in ("integral", "closed form")}
        panels.append(figures.Panel(
            "p", "draws", {"Monte Carlo, ± a deviation":
                           {"x": draws, "y": mean, "low": mean - std, "high": mean + std},
                           **constant},
            title=f"μ {row['mu']:+.1f}, σ {row['sigma']:.2f}"))
    return panels


def pictures(seeds: Seeds, out: Path) -> None:
    figures.lines([confidence_panel(seeds)], out / "garm_confidence.png",
                  "Figure 4: GaRM's accuracy by its confidence; bands: 95 %")
    figures.lines(closed_form_panels(), out / "garm_closed_form.png",
                  "Figure 6: p(preferred > rejected) by the closed form and by draws")


PAPER = Paper("garm", "dialogues", train_run, measure_seed, page_parts,
              ("values", "pairs", "calibration"), pictures)


if __name__ == "__main__":
    script(lambda: again(PAPER, sys.argv[1:]))

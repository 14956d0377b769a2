"""The one page of all results: for each paper a table, its claims with verdicts, what it cost.

    python -m tables.overview            # results/README.md and its picture, from results/values/

Departure: none of the papers has such a page; overview.yaml says what stands on it.
"""

from pathlib import Path

from files import ROOT, read_json, read_yaml, script, write_text
from stages.metrics import bootstrap, markdown_table
from tables import experiments, figures
from tables.claims import Seeds, claims_parts, counted, judged, per_seed
from tables.report import in_all
from tables.seeds import SeedRun, by_method, cell, read_kept
from tables.verdicts import EFFECT, RULE, narrow


def read_values(name: str, folder: Path) -> tuple[Seeds, float]:
    """Seeds as claims.py reads them, and hours of the clock that they took."""
    files = sorted(folder.glob("seed-*.json" if name == "seeds" else f"{name}-*.json"))
    if name == "seeds":
        runs = [read_kept(SeedRun, file) for file in files]
        return [*map(by_method, runs)], sum(run.hours for run in runs)
    seeds = [*map(read_json, files)]
    # A reproduction trains its seeds side by side: its own starts tell what all took.
    starts = seeds[0]["about"]["starts"] if seeds else []
    return seeds, sum(start["minutes"] for start in starts) / 60


def quoted(name: str, have: list[str]) -> tuple[str, dict[str, str]]:
    """What the paper's figures are; row of the table -> the figures, as other pages have them."""
    if name != "seeds":
        table = experiments.read(name)["tables"]["1"]
        return table["paper"], table["rows"]
    paper = read_yaml("configs/paper.yaml")["table1"]  # of no control
    return "paper: R-User, R-Score", {m: ", ".join(paper.get(m, ["–"])[:2]) for m in have}


def section(paper: dict, folder: Path) -> str:
    """Markdown of one paper; folder: of the page, with values/ in it."""
    texts, name = experiments.read("overview"), paper["name"]
    seeds, hours = read_values(name, folder / "values")
    if not seeds:
        return texts["missing"].format(title=paper["title"])
    have, claims = in_all(seeds), "claims" if name == "seeds" else f"{name}_claims"
    head, rows = quoted(name, have)
    table = [[row, *(cell(seeds, row, *column) for column in paper["columns"].values()), figures]
             for row, figures in rows.items() if row in have]
    judgements = judged(seeds, paper["tables"], claims, hierarchical=True)
    if name == "seeds":  # the siblings' pictures are made with their pages
        # What alignment gains, and what it costs.
        points = {m: tuple(bootstrap(per_seed(seeds, m, axis), hierarchical=True)
                           for axis in ("r_score", "lexical")) for m in have if m != "PE"}
        figures.frontier(
            points, {}, folder / paper["picture"], "Utility and keywords of the methods")
    return texts["section"].format(
        title=paper["title"], page=f"{name}.md", seeds=len(seeds), hours=hours,
        narrow=narrow(len(seeds)), means=markdown_table(["", *paper["columns"], head], table),
        picture=f"![{paper['title']}]({paper['picture']})\n" if paper["picture"] else "",
        counted=counted(judgements), **claims_parts(judgements, claims))


def write(folder: Path) -> None:
    texts = experiments.read("overview")
    sections = "\n".join(section(paper, folder) for paper in texts["papers"])
    page = texts["page"].format(rule=RULE, effect=EFFECT, sections=sections)
    write_text(folder / "README.md", page)
    print(page)


if __name__ == "__main__":
    script(lambda: write(ROOT / "results"))

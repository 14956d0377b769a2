"""The one page of all results: for each paper a table, its claims with verdicts, what it cost.

    python -m tables.overview            # results/README.md and its picture, from results/values/

Departure: none of the papers has such a page; overview.yaml says what stands on it.
"""

from __future__ import annotations

from pathlib import Path

from files import ROOT, read_json, script
from stages.metrics import LIFTS, bootstrap, markdown_table, write_pages
from tables import experiments, figures
from tables.claims import Seeds, claims_parts, counted, judged, per_seed
from tables.report import in_all
from tables.seeds import SeedRun, by_method, read_kept, summary
from tables.verdicts import RULE, narrow


def read_values(paper: dict, folder: Path) -> tuple[Seeds, str]:
    """Seeds as claims.py reads them, and what they cost."""
    files = sorted(folder.glob(paper["values"]))
    if paper["kind"] == "seeds":
        runs = [read_kept(SeedRun, file) for file in files]
        hours, seeds = sum(run.hours for run in runs), [*map(by_method, runs)]
    else:
        seeds = [*map(read_json, files)]
        starts = seeds[0]["about"]["starts"] if seeds else []
        # A reproduction trains its seeds side by side: its own starts tell what all took.
        hours = sum(start["minutes"] for start in starts) / 60
    return seeds, f"{len(seeds)} seeds, {hours:.1f} hours of the clock on two cores, shared."


def section(paper: dict, folder: Path) -> str:
    """Markdown of one paper; folder: of the page, with values/ in it."""
    texts, (seeds, cost) = experiments.read("overview"), read_values(paper, folder / "values")
    if not seeds:
        return texts["missing"].format(title=paper["title"])
    have = in_all(seeds)
    table = [[name, *(shown(seeds, name, *column) for column in paper["columns"].values()), figure]
             for name, figure in paper["rows"].items() if name in have]
    rows = judged(seeds, paper["tables"], paper["claims"], hierarchical=True)
    parts = claims_parts(rows, paper["claims"])
    if paper["kind"] == "seeds":  # the siblings' pictures are made with their pages
        draw(seeds, have, folder / paper["picture"])
    return texts["section"].format(
        title=paper["title"], cost=cost, page=paper["page"], narrow=narrow(len(seeds)),
        table=markdown_table(["", *paper["columns"], paper["head"]], table),
        picture=f"![{paper['title']}]({paper['picture']})\n" if paper["picture"] else "",
        counted=counted(rows), claims=parts["table"], why=parts["why"])


def shown(seeds: Seeds, name: str, metric: str, form: str) -> str:
    """Mean and interval; – where the method has no such metric: PE no lift over itself."""
    of = LIFTS.get(metric, metric)
    if (metric in LIFTS and name == "PE") or any(not s["values"][name].get(of) for s in seeds):
        return "–"
    return summary(per_seed(seeds, name, metric), form)


def draw(seeds: Seeds, methods: list[str], path: Path) -> None:
    """Utility against keywords of the methods: what alignment gains, and what it costs."""
    points = {m: tuple(bootstrap(per_seed(seeds, m, axis), hierarchical=True)
                       for axis in ("r_score", "lexical")) for m in methods if m != "PE"}
    figures.frontier(points, {}, path, "Utility and keywords of the methods")


def write(folder: Path) -> None:
    texts = experiments.read("overview")
    page = texts["page"].format(
        rule=RULE, sections="\n".join(section(paper, folder) for paper in texts["papers"]))
    write_pages(folder, {"README.md": page})
    print(page)


if __name__ == "__main__":
    script(lambda: write(ROOT / "results"))

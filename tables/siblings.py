"""How the sibling papers' tables come about: train what is missing, measure, keep values, write.

    python eval.py --reproduce garm --seeds 3              # or qualeqs: into results/
    python eval.py --reproduce garm --quick                # small, into runs/quick/report
    python eval.py --reproduce garm --seeds 1 --first-seed 100 rl.beta=0.1    # to choose a setting
    python -m tables.garm results/values/garm-*.json       # the page again, no run needed

What a paper trains and prints stands in NAME.yaml, its claims in NAME_claims.yaml, both beside it.
Everything goes on where it was stopped.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from files import ROOT, UserError, read_json, write_text
from tables import experiments
from tables.claims import Seeds, all_claims, claims_page, counted, judged
from tables.experiments import MAIN
from tables.measure import report_folder
from tables.reproduce import measured, seed_config
from tables.verdicts import EFFECT, RULE, narrow


@dataclass(frozen=True)
class Paper:
    """A sibling paper: run.method; the section of its simulated world; functions as of reproduce.py
    that train and measure a seed; parts(seeds): what its page says beside claims and origin;
    pictures(seeds, folder); what the values of a seed hold."""

    name: str
    world: str
    train_run: Callable
    measure_seed: Callable
    parts: Callable[[Seeds], dict]
    holds: tuple[str, ...]
    pictures: Callable[[Seeds, Path], None] = lambda seeds, out: None


def reproduce(paper: Paper, seeds: int, path: str | None, words: list[str], quick: bool,
              first: int = 0) -> None:
    """Train what is missing, measure, and write the report."""
    name, texts = paper.name, experiments.read(paper.name)
    shipped = ROOT / "configs" / f"{name}.yaml"
    path = path or str(shipped)
    whole = seeds >= 3 and not (first or words or quick) and Path(path).resolve() == shipped
    words = [*texts["quick" if quick else "size"], *words]  # the user's come last, and win
    variants = {} if quick else texts.get("variants", {})
    changes = {MAIN: (), **{variant: fields["settings"] for variant, fields in variants.items()}}
    runs = {number: {v: seed_config(words, path, number, v, changes[v], world=paper.world)
                     for v in changes}
            for number in range(first, first + seeds)}
    config = runs[first][MAIN]
    if config.run.method != name or config.data.dialogues or config.data.catalogue:
        raise UserError(f"--reproduce {name}: needs run.method={name}, and what only the simulated "
                        "world can tell: no data.dialogues, no data.catalogue")
    values, about = measured(runs, paper.train_run, paper.measure_seed)
    out = report_folder(config).parent.parent / ("quick" if quick else "partial") / "report"
    out = ROOT / "results" if whole else out
    # Files of thousands of values: five digits are more than they bear.
    values = json.loads(json.dumps(values), parse_float=lambda text: round(float(text), 5))
    for number, one in zip(runs, values, strict=True):  # without spaces: there are thousands
        text = json.dumps({"about": about, **one}, separators=(",", ":"))
        write_text(out / "values" / f"{name}-{number}.json", text)
    write(paper, values, about, out)


def again(paper: Paper, paths: Sequence[str]) -> None:
    """The page from values that a reproduction has kept."""
    if not paths:
        raise UserError(f"python -m tables.{paper.name} FILE ...: values/{paper.name}-*.json of a "
                        "reproduction")
    seeds = [read_json(path) for path in paths]
    if any({"about", *paper.holds} - one.keys() for one in seeds):
        raise UserError(f"these are no values of --reproduce {paper.name}")
    write(paper, seeds, seeds[0]["about"], Path(paths[0]).resolve().parent.parent)


def write(paper: Paper, seeds: Seeds, about: dict, out: Path) -> None:
    """NAME.md and its pictures into `out`; about: which command made the values, and how long."""
    claims, page = f"{paper.name}_claims", out / f"{paper.name}.md"
    rows = judged(seeds, {c.table for c in all_claims(claims)}, claims, hierarchical=True)
    paper.pictures(seeds, out)
    minutes = ", ".join(f"{x['minutes']:.0f} ({x['commit']})" for x in about["starts"])
    hours = sum(x["core_hours"] for x in about["starts"])
    note = (f"`{about['command']}`: seeds {about['seeds']}, commit {about['commit']}, config "
            f"{about['config']}. Minutes of its starts: {minutes}; {hours:.1f} core hours on "
            f"{about['processors']} processors.")
    # From which the page can be made again.
    files = (f"results/values/{paper.name}-{number}.json" for number in about["seeds"])
    text = experiments.read(paper.name)["page"].format(
        note=note, files=" ".join(files), narrow=narrow(len(about["seeds"])),
        rule=f"{RULE} {EFFECT}", **paper.parts(seeds), counted=counted(rows),
        claims=claims_page(rows, "", claims))
    write_text(page, text)
    print(f"{text}\n{counted(rows)}: {page}")

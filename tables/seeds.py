"""Finished runs that differ in their seeds alone: means, differences, and whether targets are met.

    python train.py world.seed=0 run.seed=0 run.name=seed-0      # and 1, 2
    python eval.py --over runs/seed-0 runs/seed-1 runs/seed-2      # results/seeds.md
    python eval.py --over results/values/seed-*.json               # the same page, no run needed
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError, model_validator

from config import Config
from files import ROOT, UserError, read_json, read_yaml, write_text
from run import commit_of
from stages.metrics import LIFTS, bootstrap, escape, markdown_table
from tables.claims import claims_parts, counted, judged, paired, per_seed
from tables.report import in_all
from tables.verdicts import EFFECT, HOLDS, NOT, RULE, UNDECIDED, narrow, sign_flip, verdicts


class SeedRun(BaseModel, extra="forbid", allow_inf_nan=False):
    """What results/values/ keeps of a run; files of it may come from anywhere."""

    name: str = Field(pattern=r"^[^/\\]+$")  # it becomes a file's name
    seeds: tuple[int, int]  # of world and run
    generator: str
    commit: str
    hours: float  # of the clock, all stages, each as it ran last
    processors: int
    settings: dict[str, object]  # "section.key" -> value, without name, place and seeds
    values: dict[str, dict[str, dict[str, float]]]  # metric -> method -> user -> value

    @model_validator(mode="after")
    def _same_users(self):
        users = [{m: {*rows} for m, rows in methods.items()} for methods in self.values.values()]
        base = users and users[0].get("PE")
        if not base or any(some != dict.fromkeys(users[0], base) for some in users):
            raise ValueError("every metric needs the same methods, PE too, and users")
        return self


def flat(settings: dict[str, dict]) -> dict[str, object]:
    """section -> key -> value as "section.key" -> value, without what may differ."""
    return {f"{name}.{key}": value for name, part in settings.items()
            for key, value in part.items() if name != "run" and (name, key) != ("world", "seed")}


def read_kept(kind: type[BaseModel], path: str | Path):
    """A file of results/values/ as its `kind`; raises UserError if it is none."""
    try:
        return kind.model_validate_json(Path(path).read_bytes())
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]  # the first one and where it is
        raise UserError(f"{path}: no values of a run: {fault['loc']}: {fault['msg']}") from None


def read_run(path: str | Path) -> SeedRun:
    """Of a run folder or a file of results/values/; raises UserError if it is neither."""
    folder = Path(path)
    if folder.is_file():
        return read_kept(SeedRun, path)
    done = {file.parent.name: read_json(file, key=str) for file in folder.glob("*/done.json")}
    if "eval" not in done or not (folder / "eval" / "values.json").is_file():
        raise UserError(f"{path}: no finished run: eval/ lacks done.json or values.json; remove "
                        "it, and start train.py with the run's settings again")
    values, settings = (read_json(folder / "eval" / f"{n}.json") for n in ("values", "settings"))
    about = read_json(folder / "environment.json", versions=dict)  # of the last start
    return SeedRun(
        name=folder.resolve().name, generator=Path(done["base"]["model"]).name,
        seeds=(settings["world"]["seed"], settings["run"]["seed"]),
        commit=commit_of(about),
        hours=round(sum(stage.get("seconds", 0) for stage in done.values()) / 3600, 2),
        processors=about["processors"] or 0, settings=flat(settings), values=values)


def refuse_other_settings(runs: list[SeedRun]) -> None:
    """Raise UserError where runs differ in more than seeds and name, or not in both."""
    # An empty generator.model is the default of its day: the weights are compared by name too.
    first, *others = ({**run.settings, "generator": run.generator} for run in runs)
    for run, other in zip(runs[1:], others, strict=True):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise UserError(f"{run.name}: {key} is {other.get(key)!r}, in {runs[0].name} it is "
                                f"{first.get(key)!r}; only seeds and names may differ")
    for i, run in enumerate(runs):
        if any(run.name == other.name or run.seeds == other.seeds for other in runs[:i]):
            raise UserError(f"{run.name}: another run has this name or these seeds")


def changed(run: SeedRun) -> str:
    """The words for train.py that tell the run from the defaults, but for seeds and name."""
    defaults = flat(Config().model_dump())
    words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}"
             # Another version may have had settings that this one does not know.
             for key, value in run.settings.items() if value != defaults.get(key, value)]
    return " ".join(shlex.join(words).split())  # one line, whatever a setting holds


def by_method(run: SeedRun) -> dict:
    """A run as claims.py and report.py read a seed: "values" -> method -> metric -> user."""
    return {"values": {method: {metric: rows[method] for metric, rows in run.values.items()}
                       for method in next(iter(run.values.values()))}}


def summary(rows: list, form: str) -> str:
    """"mean [low, high]" of users' values (U,) of each seed."""
    return written(*bootstrap(rows, hierarchical=True), form)


def cell(seeds: list[dict], method: str, metric: str, form: str) -> str:
    """Mean and interval; – where the method has no such metric: PE no lift over itself."""
    of = LIFTS.get(metric, metric)
    if (metric in LIFTS and method == "PE") or any(
            not s["values"].get(method, {}).get(of) for s in seeds):
        return "–"
    return summary(per_seed(seeds, method, metric), form)


def written(mean: float, low: float, high: float, form: str) -> str:
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def with_verdicts(rows: list[tuple[list[str], list, str]]) -> list[list[str]]:
    """Rows of a table of differences: (first cells, users' differences (U,) of each seed, form)."""
    values = [bootstrap(gaps, hierarchical=True) for _, gaps, _ in rows]
    said = verdicts([ends for _, *ends in values], [sign_flip(gaps) for _, gaps, _ in rows])
    return [[*cells, written(*value, form), f"**{verdict}**"]
            for (cells, _, form), value, verdict in zip(rows, values, said, strict=True)]


def target(rows: list, least: float) -> str:
    """Users' values (U,) of each seed, and whether their interval lies above a target."""
    mean, low, high = bootstrap(rows, hierarchical=True)
    verdict = HOLDS if low > least else NOT if high < least else UNDECIDED
    return f"above {least}: {written(mean, low, high, '.3f')}: **{verdict}**"


def page(runs: list[SeedRun], command: str) -> str:
    """Markdown: the runs, means by method, differences, targets."""
    texts, first, seeds = read_yaml("tables/seeds.yaml"), runs[0], [*map(by_method, runs)]
    have = in_all(seeds)  # methods
    # Without logs no ranker judges, without the simulated world no truth.
    columns = {title: column for title, column in texts["metrics"].items()
               if all(column[0] in run.values for run in runs)}
    means = [[title, *(summary(per_seed(seeds, method, metric), form) for method in have)]
             for title, (metric, form) in columns.items()]
    differences = []
    for title in filter(columns.get, texts["compared"]):
        metric, form = columns[title][0], "+" + columns[title][1].lstrip("+")
        for more, less in (pair for pair in texts["differences"] if {*pair} <= {*have}):
            gaps = paired(seeds, metric, more, less)
            each = ", ".join(format(gap.mean(), form) for gap in gaps)
            differences.append(([f"{more} - {less}", title, each], gaps, form))
    targets = [f"- {title}, {target(per_seed(seeds, method, metric), least)}"
               for title, method, metric, least in texts["targets"]
               if method in have and metric in dict(columns.values())]
    table = [[escape(run.name), *map(str, (*run.seeds, len(next(iter(run.values.values()))["PE"]))),
              escape(run.commit), str(run.hours)] for run in runs]
    size = ", ".join(f"{key} {first.settings.get(key)}" for key in texts["size"])
    # No ranker and no world judges some: no claims then.
    claims = judged(seeds, ["1"], hierarchical=True) if all(
        {"utility", "true_clicks"} <= seed["values"]["PE"].keys() for seed in seeds) else []
    return texts["page"].format(
        command=command, words=changed(first), generator=escape(first.generator), size=size,
        processors=first.processors, hours=sum(run.hours for run in runs),
        runs=markdown_table(texts["runs"], table), targets="\n".join(targets),
        means=markdown_table(["", *map(escape, have)], means),
        differences=markdown_table(texts["head"], with_verdicts(differences)),
        narrow=narrow(len(runs)), rule=RULE, counted=counted(claims), effect=EFFECT,
        **claims_parts(claims))


def write_over(paths: list[str], out: Path) -> None:
    """The page of these runs, and beside it values/NAME.json of each, from which it can be made."""
    runs = [read_run(path) for path in paths]
    refuse_other_settings(runs)
    write_page(page, runs, "--over", out)


def write_page(make: Callable, kept: list, option: str, out: Path) -> None:
    """make(kept, command): a page that begins with the command to make it again from values/."""
    folder = out.resolve().parent
    shown = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    files = [str(shown / "values" / f"{one.name}.json") for one in kept]
    text = make(kept, shlex.join(["python", "eval.py", option, *files]))
    for one in kept:  # without spaces: a seed has thousands of values
        values = json.dumps(one.model_dump(), separators=(",", ":"))
        write_text(folder / "values" / f"{one.name}.json", values)
    write_text(folder / out.name, text)
    print(f"{text}\n{out}")

"""Every table of the paper on the simulated platform, and claim by claim whether it holds.

    python eval.py --reproduce all --seeds 3       # results/reproduction.md, claims.md, pictures
    python eval.py --reproduce all --quick         # minutes: small, into runs/quick/report
    python eval.py --reproduce 1 9 --seeds 1       # some tables, into runs/partial/report
    python eval.py --reproduce 2 --seeds 1 --first-seed 100 rid.min_keep=2    # to choose a setting

A seed's main run (train.py's stages) is trained once; a variant starts as a copy of it, so only the
stages that its settings change run again. What was trained and written is kept, and measured again
where the code has changed since; tasks run side by side, one a core. Seeds from 0 on are reported;
settings were chosen on seeds of 100 and above, but for four that the reported ones had a part in
(README, departures 1, 12, 13 and 15).

What is compared is paired by user: a claim holds where the 95 % interval of the mean difference
(bootstrap over users, within seeds) lies above zero, and does not where it lies below.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pipeline import Pipeline, utilities

import eval as evaluation
import llm
import train
from config import (
    ROOT,
    Config,
    UserError,
    digest,
    environment,
    load_config,
    read_json,
    write_json,
)
from tables import claims, compare, report
from world import ab, people

MAIN = ""  # the variant with the settings as they are
SINGLE = ("utility", "diversity", "joint")
VARIANTS = {  # name -> settings that differ from the seed's main run
    **{f"{kind} negatives only": [f"dpo.negatives=[{kind}]"] for kind in SINGLE},
    "SIT with own lists": ["sit.own_lists=1"],
    "PMA without teacher": ["dpo.teacher_lists=0"],
    "5 rounds": ["dpo.rounds=5"],
    **{f"lambda {x}": [f"dpo.weight={x}"] for x in (0.5, 1.0)},
    **{f"beta {x}": [f"dpo.beta={x}"] for x in (0.03, 0.3)},
    "reference SIT": ["dpo.reference=sit"],
}
TABLES = ("1", "2", "3", "6", "7", "8", "9", "figure3", "serving", "beyond", "beta")
NEEDS = {  # table -> variants
    "8": ["SIT with own lists", "PMA without teacher"],
    "9": [f"{kind} negatives only" for kind in SINGLE],
    "beyond": [v for v in VARIANTS if v.startswith(("5", "lambda"))],
    "beta": [v for v in VARIANTS if v.startswith(("beta", "reference"))],
}
QUICK = """world.users=120 sit.max_rows=60 sit.epochs=2 dpo.max_users=12 dpo.samples=3
    dpo.checkpoints=1 ab.lists=1 ab.searched=2 ab.copies=1 rid.epochs=10
    ranker.epochs=8""".split()


@dataclass(frozen=True)
class Method:
    """Who writes (a saved adapter of a variant's run) from what (which interests)."""

    adapter: str  # "" the base, "sit", "vanilla", "round1", ..., "last"
    interests: str = "RID"  # "RID", "all" (latest first) or "rule"
    variant: str = MAIN


METHODS = {
    "PE": Method("", "all"),
    "PE+RID": Method(""),
    "SFT": Method("sit"),
    "SFT+DPO": Method("vanilla"),
    "IceBreaker": Method("last"),
    "non-distillation": Method("last", "all"),
    "rule-based": Method("last", "rule"),
    "early": Method("round1"),
    "middle": Method("round2"),
    "round 4": Method("round4", variant="5 rounds"),
    "round 5": Method("round5", variant="5 rounds"),
    **{name: Method("last", variant=name) for name in VARIANTS if name != "5 rounds"},
}
ONLINE = ("PE", "SFT", "SFT+DPO", "IceBreaker")  # arms beside the deployed retrieval
SEARCHED = ("SFT", "IceBreaker")  # of these also what list search finds among ab.searched lists


def is_default(path: str) -> bool:
    return Path(path).resolve() == ROOT / "configs" / "tiny.yaml"


def seed_config(words: list[str], path: str, seed: int, variant: str) -> Config:
    """The settings of one run; its folder is named after them, seed and variant."""
    given = words if is_default(path) else [*words, digest(load_config(path))]
    name = "-".join(["reproduce", digest(given)[:6], f"seed{seed}", *variant.split()])
    own = [f"world.seed={seed}", f"run.seed={seed}", f"run.name={name}"]
    if variant:
        own += ["dpo.vanilla=false", *VARIANTS[variant]]
    return load_config(path, [*words, *own])


def train_run(words: list[str], path: str, seed: int, variant: str) -> None:
    """Train a seed's run; a variant starts as hard links to the main one's files."""
    config = seed_config(words, path, seed, variant)
    folder = Path(config.run.root) / config.run.name
    if variant and not folder.exists():
        main = Path(config.run.root) / seed_config(words, path, seed, MAIN).run.name
        part = folder.with_name(f"{folder.name}.tmp")  # a killed copy must not look like a run
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(  # every file of a run is replaced whole, but for the log
            main, part, copy_function=os.link,
            ignore=shutil.ignore_patterns("metrics.jsonl", "report", "*.tmp"),
        )
        part.rename(folder)
    train.run_stages(config, ["dpo"])
    write_starters(Pipeline(config), variant)


# ------------------------------------------------------------------------------- starters, measured


def write_starters(p: Pipeline, variant: str) -> None:
    """report/starters.json of a run: the lists of its methods for the test users.

    Methods of the online test write for the judge users too, of whom no method has learned.
    """
    path = p.run / "report" / "starters.json"
    key = digest(train.stage_key(p, "dpo"), p.config.ab.lists, p.config.ab.searched, METHODS)
    if path.is_file() and read_json(path)["key"] == key:
        return
    made: evaluation.Lists = {}
    for name, method in METHODS.items():
        adapter = compare.adapter_path(p, method.adapter)
        if method.variant != variant or (adapter and not adapter.is_dir()):  # fewer rounds: no such
            continue
        # Test users first, and lists beyond ab.lists apart: a user's random numbers are then the
        # same for every method, and equal policies write equal lists.
        users = p.ids("test") + p.ids("judge") * (name in ONLINE)
        users = [u for u in users if p.states[u][-1].interests]
        inputs = [compare.interests_of(p, u, method.interests) for u in users]
        lists = p.write_lists(adapter, inputs, p.config.ab.lists, p.seed("eval"))
        more = compare.online_lists(p.config.ab)[0] - p.config.ab.lists
        if name in SEARCHED and more:
            rest = p.write_lists(adapter, inputs, more, p.seed("eval", "more"))
            lists = [x + y for x, y in zip(lists, rest, strict=True)]
        made[name] = dict(zip(users, lists, strict=True))
    p.encoder.save()
    write_json(path, {"key": key, "lists": made})


def starters_of(config: Config) -> dict:
    """{"key", "lists": what write_starters wrote}."""
    return read_json(Path(config.run.root) / config.run.name / "report" / "starters.json")


def compared_lists(
    p: Pipeline, truth: people.Truth, main: evaluation.Lists, written: evaluation.Lists
) -> tuple[evaluation.Lists, evaluation.Lists]:
    """What every method shows the test users, and every arm of the online test its people.

    main: starters of the seed's main run; written: those, and its variants'.
    """
    config, users = p.config, list(main["rule-based"])
    online = {arm: main[arm] for arm in ONLINE}
    online |= {f"{arm}, list search": compare.searched_in_turn(p, main[arm]) for arm in SEARCHED}
    online["teacher"] = compare.taught(p, list(main["PE"]), config.ab.lists)
    lists = {
        name: {u: rows[u][: config.ab.lists] for u in users}
        for name, rows in {**written, "teacher": online["teacher"]}.items()
    }
    lists |= compare.few_sessions(p, users) | compare.cold_start(p, users)
    seen = {m: lists[m] for m in (*main, "teacher", "popular starters")}
    lists |= compare.floor_and_ceiling(p, truth, users, seen)
    online[ab.CONTROL] = people.retrieved_lists(
        config.world, [p.users[u] for u in online["PE"]], config.ab.lists, config.run.seed
    )
    lists["deployed retrieval"] = {u: online[ab.CONTROL][u] for u in users}
    return lists, online


def measure_seed(words: list[str], path: str, seed: int, variants: list[str]) -> None:
    """report/values.json of a seed's main run: every value of every method and test user."""
    torch.set_flush_denormal(True)
    llm.quiet_libraries()
    config = seed_config(words, path, seed, MAIN)
    made = [starters_of(seed_config(words, path, seed, v)) for v in (MAIN, *variants)]
    file, key = Path(config.run.root) / config.run.name / "report" / "values.json", None
    env = environment(config)
    if env["uncommitted_changes"] is False:
        key = digest(env["commit"], env["versions"], config, [x["key"] for x in made])
        if file.is_file() and read_json(file).get("key") == key:
            return
    p, truth = Pipeline(config), people.load_truth(Path(config.run.root) / config.run.name / "world")
    main, written = made[0]["lists"], {m: rows for x in made for m, rows in x["lists"].items()}
    users = list(main["rule-based"])
    lists, online = compared_lists(p, truth, main, written)
    pools = {m: {u: main[m][u][: config.ab.searched] for u in users} for m in SEARCHED}
    chosen = {m: compare.reranked(p, m, pools[m]) for m in SEARCHED}
    for rows in chosen.values():
        lists |= rows
    p.encoder(sorted({y for m in lists.values() for u in m.values() for x in u for y in x}))
    classifier = evaluation.TopicClassifier(p.encoder)
    values = values_of_lists(p, truth, lists, classifier)
    values |= compare.interest_values(p, truth, users)
    for method in SEARCHED:
        for name, value in compare.search_values(p, pools[method], chosen[method]).items():
            values[name]["value"] = value
    texts = {
        "history": {u: compare.interests_of(p, u, "all") for u in users},
        "RID": {u: p.states[u][-1].interests for u in users},
        **{
            method: {u: [y for x in rows for y in x] for u, rows in lists[method].items()}
            for method in ("IceBreaker", "deployed retrieval")
        },
    }
    activity = {u: len(p.users[u].sessions) / config.world.days for u in online["PE"]}
    write_json(file, {
        "key": key,
        "values": values,
        "ab": ab.simulate(truth, activity, online, config.ab, seed),
        "topics": {
            name: {u: compare.topics(truth, own) for u, own in rows.items()}
            for name, rows in texts.items()
        },
        "cases": compare.cases(p, values, lists, users),
        "basis": {
            "rid": p.run.figures("rid"),
            "ranker": p.run.figures("ranker"),
            "matcher": compare.matcher_quality(p, truth, p.ids("test")),
            "classifier": classifier.accuracy,
            "classifier_on_starters": compare.classifier_accuracy(
                truth, classifier, [y for own in texts["IceBreaker"].values() for y in own]
            ),
            "above_least": float(
                np.mean([len(p.states[u][-1].interests) > config.rid.min_keep for u in users])
            ),
            "kept_start": [
                p.run.figures(f"dpo/round{n + 1}")["held_out"] <= 1 + 1e-9
                for n in range(config.dpo.rounds)
            ],
        },
    })  # fmt: skip
    p.encoder.save()


def values_of_lists(
    p: Pipeline, truth: people.Truth, lists: evaluation.Lists, classifier
) -> evaluation.PerUser:
    """The metrics of eval.py and compare.py, of every method and test user."""
    def scorer(name: str):
        ranker = p.ranker(name)
        return lambda u, y: utilities(ranker, p.states[u][-1], p.encoder(y)).numpy()

    values = evaluation.measure(
        lists, scorer("judge"), p.encoder, classifier, p.corpus, truth, scorer("train")
    )
    for method in lists:
        values[method] |= compare.spoken_of(truth, lists[method])
    pools = {m: {u: compare.pool_of(x) for u, x in lists[m].items()} for m in evaluation.ORDER}
    values["IceBreaker"]["functional"] = compare.chores(truth, pools["IceBreaker"])
    written = [y for own in pools.values() for pool in own.values() for y in pool]
    count = evaluation.KeywordCounter(written)
    for method in SEARCHED:
        values[method]["lexical_compared"] = {
            u: float(np.mean([count(x) for x in rows])) for u, rows in lists[method].items()
        }
    return values


# ---------------------------------------------------------------------------------------- the whole


@dataclass(frozen=True)
class Task:
    """Work for a process of its own, once the tasks that it needs are done."""

    work: Callable
    arguments: tuple
    needs: tuple[str, ...] = ()
    length: float = 1.0  # beside a variant's, roughly; for the time that is left


def reproduce(
    tables: list[str], seeds: int, path: str, words: list[str], quick: bool, first: int = 0
) -> None:
    """Train what is missing, measure, and write the report."""
    if unknown := [t for t in tables if t not in (*TABLES, "all")]:
        raise UserError(f"--reproduce {unknown[0]}: no such table; there are {' '.join(TABLES)}")
    tables = [t for t in TABLES if t in tables or "all" in tables]
    words = [*(QUICK if quick else []), *words]
    variants = [v for t in tables for v in NEEDS.get(t, [])]
    numbers = list(range(first, first + seeds))
    config = seed_config(words, path, first, MAIN)
    env = environment(config)
    # The base model is one for all; then each seed's main run, its variants, its measurement.
    train.run_stages(config, ["base"])
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started below
    tasks = {}
    for s in numbers:
        main, own = f"seed {s}", {v: f"seed {s}, {v}" for v in variants}
        tasks[main] = Task(train_run, (words, path, s, MAIN), length=3.0)
        for v, name in own.items():
            length = {"SIT with own lists": 2.5, "5 rounds": 2.0}.get(v, 1.0)
            tasks[name] = Task(train_run, (words, path, s, v), (main,), length)
        needs = (main, *own.values())
        tasks[f"{main}, measured"] = Task(measure_seed, (words, path, s, variants), needs)
    root = Path(config.run.root)
    with clock(root / f"{config.run.name.rpartition('-seed')[0]}-starts.json", env) as starts:
        in_parallel(tasks, starts[-1])
    folders = [root / seed_config(words, path, s, MAIN).run.name for s in numbers]
    values = [read_json(f / "report" / "values.json") for f in folders]
    log = [json.loads(x) for x in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    changed = not is_default(path)
    whole = tables == list(TABLES) and seeds >= 3 and not (first or words or changed)
    out = ROOT / "results" if whole else root / ("quick" if quick else "partial") / "report"
    about = {
        "command": "python eval.py --reproduce "
        + ("all" if tables == list(TABLES) else " ".join(tables)) + f" --seeds {seeds}"
        + f" --first-seed {first}" * bool(first) + " --quick" * quick
        + "".join(f" {w}" for w in words if w not in QUICK)
        + f" --config {path}" * changed,
        "seeds": numbers, "config": digest(config), "commit": starts[-1]["commit"],
        "starts": starts, "processors": os.cpu_count(),
    }
    rows = report.write(values, tables, log, about, out)
    print((out / "reproduction.md").read_text(encoding="utf-8"))
    print(f"{claims.counted(rows)}: {out / 'claims.md'}")


@contextlib.contextmanager
def clock(file: Path, env: dict):
    """The starts of a reproduction so far, this one the last: commit, minutes, core hours.

    One that was interrupted counts, one that was killed does not.
    """
    began, commit = time.time(), (env["commit"] or "")[:10]
    commit += " with changes" * bool(env["uncommitted_changes"])
    starts = read_json(file) if file.is_file() else []
    starts.append({"commit": commit, "minutes": 0.0, "core_hours": 0.0})
    try:
        yield starts
    finally:
        starts[-1]["minutes"] = (time.time() - began) / 60
        write_json(file, starts)


def in_parallel(tasks: dict[str, Task], spent: dict[str, float] | None = None) -> None:
    """Run tasks, one process a core; spent["core_hours"] grows with each that ends."""
    work, done, running = 0.0, [], {}
    total, workers = sum(task.length for task in tasks.values()), min(len(tasks), os.cpu_count())
    with ProcessPoolExecutor(workers or 1, multiprocessing.get_context("spawn")) as pool:
        try:
            while len(done) < len(tasks):
                for name, task in tasks.items():
                    if name not in [*done, *running.values()] and {*task.needs} <= {*done}:
                        running[pool.submit(timed, task.work, task.arguments)] = name
                if not running:
                    raise ValueError(f"tasks that wait for each other: {tasks.keys() - {*done}}")
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    done.append(running.pop(future))
                    if future.exception():
                        print(f"failed: {done[-1]}", flush=True)
                    work += future.result()
                    if spent is not None:
                        spent["core_hours"] = work / 3600
                    length = sum(tasks[name].length for name in done)
                    left = work / length * (total - length) / workers / 60
                    line = f"{len(done)} of {len(tasks)}: {done[-1]}, about {left:.0f} minutes left"
                    print(line, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():  # or it goes on, unseen, for minutes
                child.terminate()
            raise


def timed(work, job: tuple) -> float:
    """Seconds of work(*job), its output kept apart: several speak at once."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    started = time.time()
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        work(*job)
    return time.time() - started


def end_with_parent() -> None:
    """A worker whose parent was killed would go on, and write where the next start writes too."""
    multiprocessing.parent_process().join()
    os._exit(1)

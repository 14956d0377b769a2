"""Every table of the paper on the simulated platform, and claim by claim whether it holds.

    python eval.py --reproduce all --seeds 3       # results/reproduction.md, claims.md, pictures
    python eval.py --reproduce all --quick         # minutes: small, into runs/quick/report
    python eval.py --reproduce 1 9 --seeds 1       # some tables, into runs/partial/report
    python eval.py --reproduce 2 --seeds 1 --first-seed 100 rid.min_keep=2    # to choose a setting

A seed's main run (train.py's stages) is trained once; a variant starts as a copy of it, so only the
stages that its settings change run again. What was trained and written is kept, and measured again
where the code has changed since; tasks run side by side, one a core. Seeds from 0 on are reported;
settings were chosen on seeds of 100 and above, but for four that the reported ones had a part in
(docs/departures.md).
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

import train
from config import Config, environment, load_config
from files import ROOT, UserError, digest, read_json, write_json
from tables import claims, experiments, report
from tables.experiments import MAIN
from tables.measure import measure_seed, report_folder, write_starters


def is_default(path: str) -> bool:
    return Path(path).resolve() == ROOT / "configs" / "tiny.yaml"


def seed_config(words: list[str], path: str, seed: int, variant: str = MAIN) -> Config:
    """The settings of one run; its folder is named after them, seed and variant."""
    # The name tells another file's settings; where the default's change, stages run anew.
    given = words if is_default(path) else [*words, digest(load_config(path))]
    name = "-".join(["reproduce", digest(given)[:6], f"seed{seed}", *variant.split()])
    changes = [f"world.seed={seed}", f"run.seed={seed}", f"run.name={name}"]
    if variant:  # the SFT+DPO baseline is the main run's
        changes += ["dpo.vanilla=false", *experiments.read()["variants"][variant]]
    return load_config(path, [*words, *changes])


def train_run(words: list[str], path: str, seed: int, variant: str) -> None:
    """Train a seed's run; a variant starts as hard links to the main one's files."""
    config = seed_config(words, path, seed, variant)
    folder = Path(config.run.root) / config.run.name
    if variant and not folder.exists():
        main = folder.with_name(seed_config(words, path, seed).run.name)
        part = folder.with_name(f"{folder.name}.tmp")  # a killed copy must not look like a run
        shutil.rmtree(part, ignore_errors=True)
        others = shutil.ignore_patterns("metrics.jsonl", "report", "*.tmp")
        # Links will do: every file of a run is replaced whole, but for the log.
        shutil.copytree(main, part, copy_function=os.link, ignore=others)
        part.rename(folder)
    train.run_stages(config, ["dpo"])  # and what it needs, where that is not there
    write_starters(config, variant)


def reproduce(
    names: list[str], seeds: int, path: str, words: list[str], quick: bool, first: int = 0
) -> None:
    """Train what is missing, measure, and write the report of these tables (or "all")."""
    tables = experiments.tables()
    if unknown := [name for name in names if name not in (*tables, "all")]:
        raise UserError(f"--reproduce {unknown[0]}: no such table; there are {' '.join(tables)}")
    names = [name for name in tables if name in names or "all" in names]
    whole = names == list(tables) and seeds >= 3 and not (first or words or quick)
    words = [*experiments.read()["quick"] * quick, *words]  # the user's come last, and win
    variants = [variant for name in names for variant in tables[name].variants]
    numbers = list(range(first, first + seeds))
    configs = [seed_config(words, path, number) for number in numbers]
    env, root = environment(configs[0]), Path(configs[0].run.root)  # one root for all seeds
    tasks = tasks_of(words, path, numbers, variants)
    with clock(root / f"{configs[0].run.name.rpartition('-seed')[0]}-starts.json", env) as starts:
        in_parallel(tasks, starts[-1])
    values = [read_json(report_folder(config) / "values.json") for config in configs]
    log = (report_folder(configs[0]).parent / "metrics.jsonl").read_text().splitlines()
    about = {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seeds": numbers, "config": digest(configs[0]), "commit": starts[-1]["commit"],
        "starts": starts, "processors": os.cpu_count(),
    }
    # Only all of it, as it ships, is what the README speaks of.
    out = root / ("quick" if quick else "partial") / "report"
    out = ROOT / "results" if whole and is_default(path) else out
    rows = report.write(values, names, [json.loads(line) for line in log], about, out)
    print((out / "reproduction.md").read_text(encoding="utf-8"))
    print(f"{claims.counted(rows)}: {out / 'claims.md'}")


@dataclass(frozen=True)
class Task:
    """Work for a process of its own, once the tasks that it needs are done."""

    work: Callable
    arguments: tuple  # both travel to the process: picklable
    needs: tuple[str, ...] = ()  # names of tasks


def tasks_of(words: list[str], path: str, seeds: list[int], variants) -> dict[str, Task]:
    """Each seed's main run, its variants, and its measurement once all of them are there."""
    tasks = {}
    for seed in seeds:
        main, runs = f"seed {seed}", {f"seed {seed}, {v}": v for v in variants}
        tasks[main] = Task(train_run, (words, path, seed, MAIN))
        for name, v in runs.items():
            tasks[name] = Task(train_run, (words, path, seed, v), (main,))
        config, *others = (seed_config(words, path, seed, v) for v in (MAIN, *variants))
        tasks[f"{main}, measured"] = Task(measure_seed, (config, others), (main, *runs))
    return tasks


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
    finally:  # of an interruption too
        starts[-1]["minutes"] = (time.time() - began) / 60  # of the clock, not of cores
        write_json(file, starts)


def in_parallel(tasks: dict[str, Task], spent: dict[str, float]) -> None:
    """Run tasks, one process a core; spent["core_hours"] grows with each that ends."""
    seconds, done, running = 0.0, [], {}  # running: future -> name
    workers = min(len(tasks), os.cpu_count())
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started here: one a core
    # Not forked: torch's threads do not survive a fork.
    with ProcessPoolExecutor(workers or 1, multiprocessing.get_context("spawn")) as pool:
        try:
            while len(done) < len(tasks):
                for name, task in tasks.items():
                    if name not in [*done, *running.values()] and {*task.needs} <= {*done}:
                        running[pool.submit(timed, task.work, task.arguments)] = name
                if not running:  # nothing can start
                    raise ValueError(f"tasks that wait for each other: {tasks.keys() - {*done}}")
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    done.append(running.pop(future))
                    if future.exception():
                        print(f"failed: {done[-1]}", flush=True)
                    seconds += future.result()  # raises what the task raised
                    spent["core_hours"] = seconds / 3600
                    # Roughly: a main run takes as long as three variants.
                    left = seconds / len(done) * (len(tasks) - len(done)) / workers / 60  # minutes
                    print(f"{len(done)} of {len(tasks)}: {done[-1]}, about {left:.0f} minutes left",
                          flush=True)
        except BaseException:  # Ctrl-C too
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():  # or it goes on, unseen, for minutes
                child.terminate()
            raise


def timed(work: Callable, arguments: tuple) -> float:
    """Seconds of work(*arguments), its output kept apart: several speak at once."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # or the processes wait for each other at every operation
    started = time.time()
    with (
        open(os.devnull, "w") as nothing,
        contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing),
    ):
        work(*arguments)
    return time.time() - started


def end_with_parent() -> None:
    """A worker whose parent was killed would go on, and write where the next start writes too."""
    multiprocessing.parent_process().join()
    os._exit(1)  # at once: sys.exit would end this thread alone

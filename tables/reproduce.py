"""Every table of the paper on the simulated platform, and claim by claim whether it holds.

    python eval.py --reproduce all --seeds 3       # results/reproduction.md, claims.md, pictures
    python eval.py --reproduce all --quick         # minutes: small, into runs/quick/report
    python eval.py --reproduce 1 9 --seeds 1       # some tables, into runs/partial/report
    python eval.py --reproduce 2 --seeds 1 --first-seed 100 rid.min_keep=2    # to choose a setting

A seed's main run is trained once; a variant starts as a copy of it, so only the stages that its
settings change run again. What was trained and written is kept, and measured again where the code
has changed since. Seeds from 0 on are reported; settings were chosen on seeds of 100 and above, but
for four that the reported ones had a part in (docs/departures.md).
"""

import contextlib
import multiprocessing
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import partial
from graphlib import TopologicalSorter
from pathlib import Path

import torch

import train
from config import Config, load_config
from files import ROOT, UserError, digest, read_json, read_lines, write_json
from run import commit_of, environment
from tables import claims, experiments, report
from tables.experiments import MAIN
from tables.measure import measure_seed, report_folder, write_starters

FULL_SIZE = ROOT / "configs" / "smollm2.yaml"  # of it, too, the whole goes to results/
# Name -> work for a process of its own (picklable), and the tasks that must be done before.
Tasks = dict[str, tuple[Callable, list[str]]]


def seed_config(words: list[str], path: str | None, seed: int, variant: str = MAIN,
                changes: list[str] = (), world: str = "world") -> Config:
    """The settings of one run; its folder is named after them, seed and variant.

    changes: the variant's settings; world: the section of the simulated platform.
    """
    # The name tells another file's settings; where the default's change, stages run anew.
    given = [*words, digest(load_config(path))] if path else words
    name = "-".join(["reproduce", digest(given)[:6], f"seed{seed}", *variant.split()])
    # Other people and other trainings with each seed.
    seeds = [f"{world}.seed={seed}", f"run.seed={seed}", f"run.name={name}"]
    return load_config(path, [*words, *seeds, *changes])


def train_run(config: Config, variant: str) -> None:
    """Train a seed's run and let its methods write."""
    train.run_stages(config, ["dpo"])  # and what it needs, where that is not there
    write_starters(config, variant)


def train_as_copy(train_run: Callable, config: Config, variant: str, main: Config) -> None:
    """A variant starts as hard links to the main run's files; the main run as nothing."""
    folder = Path(config.run.root) / config.run.name
    if config.run.name != main.run.name and not folder.exists():
        part = folder.with_name(f"{folder.name}.tmp")  # a killed copy must not look like a run
        shutil.rmtree(part, ignore_errors=True)
        others = shutil.ignore_patterns("metrics.jsonl", "report", "*.tmp")
        # Links will do: every file of a run is replaced whole, but for the log.
        shutil.copytree(folder.with_name(main.run.name), part, copy_function=os.link, ignore=others)
        part.rename(folder)  # whole or not at all
    train_run(config, variant)


def reproduce(names: list[str], seeds: int, path: str | None, words: list[str], quick: bool,
              first: int = 0) -> None:
    """Train what is missing, measure, and write the report of these tables (or "all")."""
    tables = experiments.tables()
    if unknown := [name for name in names if name not in (*tables, "all")]:
        raise UserError(f"--reproduce {unknown[0]}: no such table; there are {' '.join(tables)}")
    names = [name for name in tables if name in names or "all" in names]
    whole = names == list(tables) and seeds >= 3 and not (first or words or quick)
    words = [*experiments.read()["quick"] * quick, *words]  # the user's come last, and win
    variants = [MAIN, *(variant for name in names for variant in tables[name].variants)]
    numbers = list(range(first, first + seeds))
    # The SFT+DPO baseline is the main run's.
    changes = {v: ["dpo.vanilla=false", *experiments.read()["variants"][v]] for v in variants if v}
    runs = {number: {v: seed_config(words, path, number, v, changes.get(v, ())) for v in variants}
            for number in numbers}
    values, about = measured(runs, train_run, measure_seed)
    first_run = report_folder(runs[first][MAIN]).parent
    # Only all of it, as it ships, is what the README speaks of.
    out = first_run.parent / ("quick" if quick else "partial") / "report"
    out = ROOT / "results" if whole and (not path or Path(path).resolve() == FULL_SIZE) else out
    rows = report.write(values, names, read_lines(first_run / "metrics.jsonl"), about, out)
    print((out / "reproduction.md").read_text(encoding="utf-8"))
    print(f"{claims.counted(rows)}: {out / 'claims.md'}")


def measured(runs: dict[int, dict[str, Config]], train_run: Callable,
             measure_seed: Callable) -> tuple[list[dict], dict]:
    """values.json of every seed, and how they came about; what is missing is trained and measured.

    runs: seed -> variant -> settings; train_run(config, variant), measure_seed(main, others).
    """
    configs, tasks = [by_variant[MAIN] for by_variant in runs.values()], {}
    env, root = environment(configs[0]), Path(configs[0].run.root)  # one root for all seeds
    for number, by_variant in runs.items():
        tasks |= tasks_of(f"seed {number}", by_variant, train_run, measure_seed)
    with clock(root / f"{configs[0].run.name.rpartition('-seed')[0]}-starts.json", env) as starts:
        in_parallel(tasks, starts[-1])
    return [read_json(report_folder(config) / "values.json") for config in configs], {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seeds": [*runs], "config": digest(configs[0]), "commit": starts[-1]["commit"],
        "starts": starts, "processors": os.cpu_count()}


def tasks_of(seed: str, configs: dict[str, Config], train_run: Callable,
             measure_seed: Callable) -> Tasks:
    """A seed's main run, its variants, and its measurement once all of them are there."""
    # As in_parallel prints them; the main run's is the seed's alone.
    names = {variant: f"{seed}, {variant}".removesuffix(", ") for variant in configs}
    main, *others = configs.values()
    tasks = {name: (partial(train_as_copy, train_run, configs[variant], variant, main),
                    [seed] * bool(variant)) for variant, name in names.items()}
    return tasks | {f"{seed}, measured": (partial(measure_seed, main, others), [*names.values()])}


@contextlib.contextmanager
def clock(file: Path, env: dict):
    """The starts of a reproduction so far, this one the last: commit, minutes, core hours.

    One that was interrupted counts, one that was killed does not.
    """
    began, starts = time.time(), read_json(file) if file.is_file() else []
    starts.append({"commit": commit_of(env), "minutes": 0.0, "core_hours": 0.0})
    try:
        yield starts
    finally:  # of an interruption too
        starts[-1]["minutes"] = (time.time() - began) / 60  # of the clock, not of cores
        write_json(file, starts)


def in_parallel(tasks: Tasks, spent: dict[str, float]) -> None:
    """Run tasks, one process a core; spent["core_hours"] grows with each that ends.

    Raises graphlib.CycleError, a ValueError, if tasks wait for each other, and what a task raises.
    """
    order = TopologicalSorter({name: needs for name, (_, needs) in tasks.items()})
    order.prepare()
    seconds, done, running, workers = 0.0, 0, {}, os.cpu_count()  # running: future -> name
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started here: one a core
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(workers, spawn, start_worker) as pool:
        try:
            while order.is_active():
                running |= {pool.submit(timed, tasks[n][0]): n for n in order.get_ready()}
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name, done = running.pop(future), done + 1
                    if future.exception():
                        print(f"failed: {name}", flush=True)
                    seconds += future.result()
                    order.done(name)
                    spent["core_hours"] = seconds / 3600
                    # Roughly: a main run takes as long as three variants.
                    left = seconds / done * (len(tasks) - done) / min(workers, len(tasks)) / 60
                    print(f"{done} of {len(tasks)}: {name}, about {left:.0f} minutes left",
                          flush=True)
        except BaseException:  # Ctrl-C too
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():  # or it goes on, unseen, for minutes
                child.terminate()
            raise


def timed(work: Callable) -> float:
    started = time.time()
    work()
    return time.time() - started


def start_worker() -> None:
    """One thread, no output of its own (several speak at once), and an end when the parent ends."""
    torch.set_num_threads(1)  # or the processes wait for each other at every operation
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # stdout and stderr, those of libraries in C too
        os.dup2(nothing, stream)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """A worker whose parent was killed would go on, and write where the next start writes too."""
    multiprocessing.parent_process().join()
    os._exit(1)  # at once: sys.exit would end this thread alone

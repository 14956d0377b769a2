"""Rows of `python -m benchmarks.faults` about runs: each breaks one and counts what is left of it.

A row is a function of a Bench (systems in miniature, snapshots before each stage) and of the Row in
which it counts. Every random choice has a seed.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import resource
import shutil
import signal
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch

from benchmarks.kills import (
    System,
    command,
    contents,
    differences,
    forked,
    moments_of,
    put,
    stage,
    watched_saves,
)
from files import atomic_path

METHODS = ("icebreaker", "garm", "qualeqs")
OF_RUNS = ("resume", "atomic", "sigterm", "disk", "settings", "nan", "determinism")
TRAINED = {  # stages in which something is trained
    "icebreaker": ("rid", "ranker", "sit", "dpo"), "garm": ("sft", "reward", "rl"),
    "qualeqs": ("sft", "rl", "mine"),
}


class Bench:
    """Systems with what a run of each holds before every stage, and at its end."""

    def __init__(self, folder: Path, methods: list[str], tries: int):
        self.folder, self.methods, self.tries = folder, methods, tries

    @cached_property
    def systems(self) -> list[System]:
        systems = []
        for method in self.methods:
            (self.folder / method).mkdir()
            systems.append(System(method, self.folder / method))
            systems[-1].config()  # makes its model and log
        return systems

    @cached_property
    def whole(self) -> dict[str, dict[str, Path]]:
        """Method -> stage -> the run before it; "" -> the finished run, made stage by stage."""
        snapshots: dict[str, dict[str, Path]] = {}
        for system in self.systems:
            snapshots[system.method] = here = {}
            for name in [*system.stages, ""]:
                here[name] = system.folder / f"before-{name}"
                if system.run.is_dir():
                    put(system.run, here[name])
                else:
                    here[name].mkdir()
                if name:
                    ended, moments = moments_of(system, stage(system, name))
                    if ended.code:
                        raise SystemExit(f"{system.method} {name}: {ended.said}")
                    self.costs[system.method, name] = ended.cpu
                    self.moments[system.method, name] = moments
        return snapshots

    @cached_property
    def costs(self) -> dict[tuple[str, str], float]:
        """(method, stage) -> CPU seconds of it, undisturbed; filled by `whole`."""
        return {}

    @cached_property
    def moments(self) -> dict[tuple[str, str], int]:
        """(method, stage) -> before and behind how many syncs and renames it can be killed."""
        return {}


def seeded(*purpose) -> random.Random:
    return random.Random(" ".join(map(str, purpose)))


def reason_of(said: str) -> str:
    """The last line that a process has printed."""
    return said.strip().splitlines()[-1][-300:] if said.strip() else ""


# ------------------------------------------------------------------------------------------- kills


def resume(bench: Bench, row) -> None:
    """kill -9 in each stage; the same command again; every byte compared."""
    for system in bench.systems:
        snapshots = bench.whole[system.method]
        names = [*system.stages, ""]
        for name, behind in zip(names, names[1:], strict=False):
            expected = contents(snapshots[behind])
            in_save = max(1, bench.tries // 4)  # the rest at a share of its CPU time
            for number in range(bench.tries):
                rng = seeded("resume", system.method, name, number)
                put(snapshots[name], system.run)
                if number < in_save:
                    at = rng.randrange(1, bench.moments[system.method, name] + 1)
                    ended = forked(system, saving(stage(system, name), at))
                else:
                    share = rng.uniform(0.05, 1.0)
                    ended = forked(system, stage(system, name),
                                   max(0.01, share * bench.costs[system.method, name]))
                check_resumed(system, name, expected, row, ended.code, number)


def saving(work: Callable[[], None], at: int) -> Callable[[], None]:
    """`work`, killed at its `at`-th moment of a save."""

    def killed():
        with watched_saves(at):
            work()

    return killed


def check_resumed(system: System, name: str, expected: dict, row, code: int, number: int) -> None:
    """The same command again, and what came of it."""
    outcome = {-9: "killed and resumed to the same bytes", 0: "ended before the kill, same bytes",
               143: "stopped and resumed to the same bytes"}
    fault, label = "", f"{system.method} {name or 'all'}, try {number}"
    if code not in outcome:
        fault = f"{label}: ended with {code}"
    again = forked(system, stage(system, name) if name else command(system))
    if again.code:
        fault = f"{label}: code {again.code} when resumed: {reason_of(again.said)}"
    elif unlike := differences(system.run, expected):
        fault = f"{label}: differs in {', '.join(unlike[:4])}"
    row.count(outcome.get(code, "?"), fault)


def sigterm(bench: Bench, row) -> None:
    """SIGTERM somewhere in a whole run."""
    for system in bench.systems:
        snapshots = bench.whole[system.method]
        expected = contents(snapshots[""])
        total = sum(cost for (method, _), cost in bench.costs.items() if method == system.method)
        for number in range(max(1, bench.tries // 4)):
            shutil.rmtree(system.run, ignore_errors=True)
            at = seeded("sigterm", system.method, number).uniform(0.05, 0.6) * total
            ended = forked(system, command(system), at, 15)
            left = [path for path in system.run.rglob("*.tmp")]
            if ended.code == 143 and (ended.wall > 30 or left or "to resume" not in ended.said):
                row.count("", f"{system.method}: {ended.wall:.0f} s, {len(left)} files half left")
                continue
            check_resumed(system, "", expected, row, ended.code, number)


def determinism(bench: Bench, row) -> None:
    """All stages in one command against the stages one by one."""
    for system in bench.systems:
        expected = contents(bench.whole[system.method][""])
        shutil.rmtree(system.run, ignore_errors=True)
        ended = forked(system, command(system))
        unlike = differences(system.run, expected)
        fault = reason_of(ended.said) if ended.code else ", ".join(unlike[:4])
        row.count(f"{len(expected)} files identical", fault and f"{system.method}: {fault}")


# ---------------------------------------------------------------------------------- saves, damage


def atomic(bench: Bench, row) -> None:
    every_moment_of_a_save(bench, row)
    for system in bench.systems:
        damage(bench, system, row)


def every_moment_of_a_save(bench: Bench, row) -> None:
    """A file and a folder are written over others; killed at each write, sync and rename."""
    system = bench.systems[0]
    for kind in ("file", "folder"):
        path = system.folder / "save" / kind
        for at in range(1, 40):
            shutil.rmtree(path.parent, ignore_errors=True)
            write_parts(path, kind, "old")
            ended = forked(system, saving(lambda p=path, k=kind: write_parts(p, k, "new"), at))
            if ended.code == 0:
                break  # it has no so many moments
            held = {p.name: p.read_text() for p in (path.rglob("*") if path.is_dir() else [path])
                    if p.is_file()}
            # Of a folder none is allowed too: two renames are needed.
            whole = held in ({n: w * 3 for n in held} for w in ("old", "new")) and (
                kind == "folder" or held)
            row.count("old, new or no folder", "" if whole else f"{kind}, moment {at}: {held}")


def write_parts(path: Path, kind: str, word: str) -> None:
    with atomic_path(path) as temporary:
        if kind == "folder":
            temporary.mkdir()
        for name in ("a", "b") if kind == "folder" else ("",):
            with open(temporary / name if name else temporary, "w") as file:
                for _ in range(3):
                    file.write(word)
                    file.flush()
                    os.fsync(file.fileno())  # a moment at which a watched save can be killed


def damage(bench: Bench, system: System, row) -> None:
    """A byte flipped, or an end cut off, in a file of a finished run."""
    finished = bench.whole[system.method][""]
    expected = contents(finished)
    # A world's hidden state is no artifact: nothing but the evaluation reads it.
    files = [name for name in expected
             if name.split("/")[0] in system.stages and "truth" not in name.split("/")]
    for number in range(bench.tries):
        rng = seeded("damage", system.method, number)
        put(finished, system.run)
        name = rng.choice(files)
        path = system.run / name
        content = bytearray(path.read_bytes())
        if not content:
            continue
        path.unlink()  # a hard link of the snapshot
        if number % 2:
            content = content[: rng.randrange(len(content))]
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        ended = forked(system, command(system))
        lines = [x for x in ended.said.splitlines() if x.startswith("error: ")]
        outcome, fault = "", ""
        if ended.code == 2 and len(lines) == 1 and name.split("/")[0] in lines[0]:
            outcome = "refused in one line"
        elif ended.code == 0 and not differences(system.run, expected):
            outcome = "made again as it was"
        else:
            fault = f"{system.method} {name}: code {ended.code}, {reason_of(ended.said)}"
        row.count(outcome, fault)


# ------------------------------------------------------------------------------ disk, settings, NaN


def disk(bench: Bench, row) -> None:
    """Writing fails in a stage: by a limit on files' size, or in folders that are read-only."""
    for system in bench.systems:
        snapshots, trained = bench.whole[system.method], TRAINED[system.method]
        for number, name in enumerate(trained):
            behind = [*system.stages, ""][system.stages.index(name) + 1]
            for kind in ("full", "read-only"):
                put(snapshots[name], system.run)
                before = contents(system.run)
                limit = seeded("disk", system.method, number).choice((1, 300, 3000))
                spoil = limited(stage(system, name), limit) if kind == "full" else read_only(
                    system, stage(system, name))
                ended = forked(system, spoil)
                lines = [x for x in ended.said.splitlines() if "rror" in x]
                fault, label = "", f"{system.method} {name}, {kind}"
                after = contents(system.run)
                others = [f for f in before if f.split("/")[0] in system.stages
                          and after.get(f) != before[f]]
                if ended.code != 2 or len(lines) != 1 or "Traceback" in ended.said:
                    fault = f"{label}: code {ended.code}, {reason_of(ended.said)}"
                elif others:
                    fault = f"{label}: changed {', '.join(others[:3])}"
                if not fault:
                    again = forked(system, stage(system, name))
                    unlike = differences(system.run, contents(snapshots[behind]))
                    fault = f"{label}: then {again.code}, {unlike[:4]}" if unlike else ""
                row.count(f"{kind}: one line, intact, then finished", fault)


def limited(work: Callable[[], None], most: int) -> Callable[[], None]:
    """`work` where no file can grow beyond so many bytes."""

    def inner():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the kernel ends it without a word
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        work()

    return inner


def read_only(system: System, work: Callable[[], None]) -> Callable[[], None]:
    """`work` where no folder of the run may be written to, by root neither."""

    def inner():
        folders = [folder for folder, *_ in os.walk(system.run)]
        for folder in folders:
            os.chmod(folder, 0o555)
        none, version = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 2)(0x20080522, 0)
        ctypes.CDLL(None).capset(version, none)  # root's right to write anyway
        try:
            work()
        finally:
            for folder in folders:
                os.chmod(folder, 0o755)

    return inner


CHANGES = {  # stage that is there or was begun -> a word that changes it
    "icebreaker": {"world": "world.users=61", "sit": "sit.learning_rate=2e-3",
                   "dpo": "dpo.beta=0.31", "base": "generator.model=elsewhere",
                   "rid": "rid.temperature=0.33", "match": "run.seed=9"},
    "garm": {"sft": "sft.candidates=7", "reward": "reward.variance_weight=0.2",
             "rl": "rl.beta=0.11", "base": "generator.lora_rank=8"},
    "qualeqs": {"sft": "quality.mix=0.7", "rl": "rl.beta=0.11", "mine": "quality.share=0.4",
                "base": "generator.lora_rank=8"},
}


def settings(bench: Bench, row) -> None:
    """Changed settings of a run that is finished, and of one that was killed in the stage."""
    for system in bench.systems:
        snapshots = bench.whole[system.method]
        for name, word in CHANGES[system.method].items():
            for state in ("finished", "begun"):
                put(snapshots["" if state == "finished" else name], system.run)
                if state == "begun" and name == "world":  # nothing is lost: train.refuse_changes
                    continue
                if state == "begun":  # killed near its end
                    forked(system, stage(system, name), 0.9 * bench.costs[system.method, name])
                    if (system.run / name / "done.json").is_file():
                        continue  # it was quicker
                before = (system.run / "config.yaml").read_bytes()
                ended = forked(system, command(system, word))
                field = word.partition("=")[0]
                lines = [x for x in ended.said.splitlines() if x.startswith("error: ")]
                good = (ended.code == 2 and len(lines) == 1 and field in lines[0]
                        and "run.name=" in lines[0] and "to go on" in lines[0]
                        and (system.run / "config.yaml").read_bytes() == before)
                row.count(f"{state}: refused by name", "" if good else
                          f"{system.method} {state} {word}: code {ended.code}, "
                          f"{reason_of(ended.said)}")
        if system.method != "icebreaker":  # the same path, other content
            put(snapshots[""], system.run)
            log = system.folder / "hub" / "log.jsonl"
            kept = log.read_text()
            log.write_text("".join(kept.splitlines(True)[:-1]))
            ended = forked(system, command(system))
            log.write_text(kept)
            good = ended.code == 2 and "data.dialogues, the content" in ended.said
            row.count("other data: refused by name",
                      "" if good else f"{system.method} data: {reason_of(ended.said)}")


def nan(bench: Bench, row) -> None:
    """The loss of the n-th step is NaN or infinite."""
    for system in bench.systems:
        snapshots = bench.whole[system.method]
        for name in TRAINED[system.method]:
            for value in (float("nan"), float("inf")):
                for at in (seeded("nan", system.method, name, value).randrange(1, 3), 1):
                    put(snapshots[name], system.run)
                    ended = forked(system, poisoned(stage(system, name), at, value))
                    if ended.code:  # 0: the stage has no second step
                        break
                steps = re.findall(r"^steps after: (\d+)$", ended.said, re.MULTILINE)
                good = (ended.code == 2 and steps == ["0"] and "no finite number" in ended.said
                        and "Traceback" not in ended.said and "examples: " in ended.said)
                row.count("stopped before the step, named", "" if good else
                          f"{system.method} {name}, {value}: code {ended.code}, steps {steps}, "
                          f"{reason_of(ended.said)}")


def poisoned(work: Callable[[], None], at: int, value: float) -> Callable[[], None]:
    """`work`, whose `at`-th backward() begins with this value; says how many steps came after."""

    def inner():
        calls, backward, step = [0, 0], torch.Tensor.backward, torch.optim.AdamW.step

        def spoiled(loss, *arguments, **how):
            calls[0] += 1
            return backward(loss * value if calls[0] == at else loss, *arguments, **how)

        def counted(optimiser, *arguments, **how):
            calls[1] += calls[0] >= at
            return step(optimiser, *arguments, **how)

        torch.Tensor.backward, torch.optim.AdamW.step = spoiled, counted
        try:
            work()
        finally:
            print(f"steps after: {calls[1]}", flush=True)

    return inner

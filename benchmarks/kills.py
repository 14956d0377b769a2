"""Miniatures of the three systems that are killed: stages in forked processes, which have nothing
to import, and what a run folder holds afterwards.

The encoder is a bag of words behind the real cache, and garm's and qualeqs' policies answer from a
script (tests/), as a random model writes no list; icebreaker samples from the stand-in. All else is
the code as it runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import peft  # noqa: F401 - children find it loaded

import run
import train
from config import Config
from files import ROOT, script
from llm.encoder import Encoder
from roles.suggester import Suggester
from tests import test_garm_stages as garm
from tests import test_qualeqs_stages as qualeqs

SMALL = """world.users=60 world.impressions_per_user=40 world.starter_pool=60 rid.epochs=1
    rid.towers=2 rid.hidden=8 ranker.epochs=1 generator.list_size=3
    generator.max_new_tokens=12 sit.max_rows=6 sit.epochs=1 dpo.max_users=4 dpo.rounds=2
    dpo.samples=2 data.train=0.3 data.judge=0.3 data.valid=0.2 data.test=0.2
    eval.lists=1 eval.bootstrap=20 eval.examples=2 eval.max_users=3 run.name=t""".split()


class Words:
    """In place of MiniLM's model, behind Encoder's cache: a text is the bag of its words."""

    words = garm.Words()

    def encode(self, texts, **how):
        return self.words(texts)

    def get_sentence_embedding_dimension(self):
        return self.words.dim


@dataclass
class System:
    """One of the three methods in miniature."""

    method: str
    folder: Path  # of all that belongs to it

    @property
    def root(self) -> Path:
        return self.folder / "runs"

    @property
    def run(self) -> Path:
        return self.root / self.words_and_name[1]

    @property
    def stages(self) -> list[str]:
        return [name for name in train.METHODS[self.method] if name not in train.ONLY_IF_ASKED]

    @cached_property
    def model(self) -> Path:
        """A random model that knows the words of the log; garm and qualeqs only."""
        factory = type("Factory", (), {"mktemp": lambda _, name: self.folder / name})()
        (self.folder / "hub").mkdir(parents=True, exist_ok=True)
        module = {"garm": garm, "qualeqs": qualeqs}[self.method]
        return module.model_folder.__wrapped__(factory)

    @cached_property
    def words_and_name(self) -> tuple[list[str], str]:
        """Settings as on a command line, and the run's name."""
        if self.method == "icebreaker":
            return ["--config", str(ROOT / "configs/tiny.yaml"), *SMALL], "t"
        logs = self.folder / "hub"
        if self.method == "garm":
            garm.data.write_dialogues(logs / "log.jsonl", garm.log_of(120)) if self.model else None
            files, settings = [f"data.dialogues={logs}/log.jsonl"], garm.SMALL
        else:
            files = [f"data.dialogues={logs}/log.jsonl", f"data.catalogue={logs}/catalogue.jsonl",
                     f"data.policies={logs}/policies.yaml"]
            settings = qualeqs.SMALL
        return [*settings, f"generator.model={self.model}", *files], {"garm": "g"}.get(
            self.method, "q")

    def words(self, *more: str) -> list[str]:
        return [*self.words_and_name[0], f"run.root={self.root}", *more]

    def config(self, *more: str) -> Config:
        words = self.words(*more)
        path = words.pop(1) if words[0] == "--config" else None
        return train.load_config(path, words[1:] if path else words)

    def prepare(self) -> None:
        """In a child: what stands in for models."""
        Encoder.model = Words()
        # Names of packages and of the commit, which are in no comparison, cost as much as a stage.
        run.environment = lambda _: {}
        if self.method != "icebreaker":
            module = {"garm": garm, "qualeqs": qualeqs}[self.method]
            Suggester.rollouts = module.scripted


# ------------------------------------------------------------------------------- forked processes


@dataclass
class Ended:
    code: int  # exit status, or minus the signal
    said: str  # stdout and stderr
    cpu: float  # seconds
    wall: float


def forked(
    system: System, work: Callable[[], None], kill_at: float = 0.0, sign: int = signal.SIGKILL
) -> Ended:
    """Run `work` in a forked process; kill_at: after so many CPU seconds of it send it a signal."""
    started, (reading, writing) = time.monotonic(), os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 2**20)  # all that it says, to be read at its end
    sys.stdout.flush()
    gc.freeze()  # a child's collections leave alone what was imported here
    if not (pid := os.fork()):
        _child(system, work, writing)
    os.close(writing)
    usage, asked = None, None
    clock = (~pid << 3) | 2  # Linux: the CPU clock of another process
    while not usage:
        done, status, rusage = os.wait4(pid, 0 if asked or not kill_at else os.WNOHANG)
        if done:
            usage = rusage
        elif time.clock_gettime(clock) >= kill_at:
            os.kill(pid, sign)
            asked = time.monotonic()
        else:
            time.sleep(0.002)
    wall = time.monotonic() - (asked or started)  # after the signal, where there was one
    code = os.waitstatus_to_exitcode(status)
    with open(reading, errors="replace") as said:
        return Ended(code, said.read(), usage.ru_utime + usage.ru_stime, wall)


def _child(system: System, work: Callable[[], None], stream: int) -> None:
    code = 70  # a traceback
    with contextlib.suppress(BaseException):
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115 - as long as the child
        sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        system.prepare()
        try:
            work()
            code = 0
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # nothing of the parent's is torn down


def command(system: System, *words: str) -> Callable[[], None]:
    """`python train.py WORDS`, as the script runs it."""

    def work():
        sys.argv = ["train.py", *system.words(*words)]
        script(train.main)

    return work


def stage(system: System, *names: str) -> Callable[[], None]:
    return command(system, *(word for name in names for word in ("--stage", name)))


# -------------------------------------------------------------------------------- kills in a save


@contextlib.contextmanager
def watched_saves(at: int | None = None, counter: list | None = None):
    """Count every sync and rename, before and behind it; at the `at`-th moment kill this process.

    counter: [moments so far], for a process that is to end whole.
    """
    counter = counter if counter is not None else [0]

    def moment():
        counter[0] += 1
        if counter[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(call):
        def both(*arguments, **how):
            moment()
            result = call(*arguments, **how)
            moment()
            return result

        return both

    fsync, replace = os.fsync, os.replace
    os.fsync, os.replace = watched(fsync), watched(replace)
    try:
        yield counter
    finally:
        os.fsync, os.replace = fsync, replace


def moments_of(system: System, work: Callable[[], None]) -> tuple[Ended, int]:
    """How many moments of a save it has."""
    count = system.folder / "moments"

    def counted():
        with watched_saves() as counter:
            try:
                work()
            finally:
                count.write_text(str(counter[0]))

    return forked(system, counted), int(count.read_text())


# ----------------------------------------------------------------------------- what a folder holds


def put(source: Path, target: Path) -> None:
    """A copy of a run folder in place of another: hard links, as every file is replaced whole but
    for the log."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=os.link)
    if (log := target / "metrics.jsonl").is_file():
        text = log.read_bytes()
        log.unlink()
        log.write_bytes(text)


def without_times(value):
    """JSON without what hangs on the clock: seconds, lengths of lines that tell them, and digests
    of parts' records, which hold such lengths and are compared themselves."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items()
                if k not in ("time", "seconds", "log", "digest") and not k.endswith("/done.json")}
    return [*map(without_times, value)] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, object]:
    """File -> bytes of everything in a run folder; without times, and without environment.json."""
    files: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or name == "environment.json":
            continue
        files[name] = path.read_bytes()
        with contextlib.suppress(ValueError):  # what is damaged or torn stays bytes
            if path.name == "done.json":
                files[name] = without_times(json.loads(files[name]))
            elif name == "metrics.jsonl":
                files[name] = [without_times(json.loads(x)) for x in files[name].splitlines()]
    return files


def differences(folder: Path, expected: dict[str, object]) -> list[str]:
    """Files that differ, are missing or are too many."""
    now = contents(folder)
    return [name for name in sorted(now.keys() | expected.keys())
            if now.get(name) != expected.get(name)]

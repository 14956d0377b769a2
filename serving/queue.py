"""The engine's one thread: asks of clients in batches, and starters ahead of them in spare time.

A file of its own, as all of it is about threads, and nothing of it about HTTP or the store.
"""

import contextlib
import dataclasses
import logging
import math
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from config import ServeConfig
from serving.engine import MOST_CHARACTERS, Answer, Ask, Engine
from serving.suggest import Suggested, Suggestions

log = logging.getLogger("serve")
WINDOW = 0.004  # seconds: the first ask of a batch waits so long for others
RELOAD_SECONDS = 5.0  # between looks for a newly trained round
RATE = 2000.0  # characters embedded in a second, by a slow machine
SPARE_BATCH = 4  # asks ahead of clients that are written together: small, as a client may come


def where(error: BaseException) -> str:
    """The type of an error and the line that raised it; its text may hold what a user wrote."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"


@dataclass(eq=False)
class Job:  # an ask on its way through the engine's thread
    ask: Ask
    by_id: bool  # of a user of the store; else nothing is kept of it
    # Called from the engine's thread; with a text if it could not be written.
    tell: Callable[[Answer | Suggested | str], None] = lambda item: None
    born: float = dataclasses.field(default_factory=time.monotonic)
    gone: bool = False  # the client has left
    forgotten: bool = False  # the user was deleted meanwhile
    partial: bool = False  # good starters were left out, as the client has them already
    begun: bool = False  # the client has had a starter
    deletions: int = 0  # in the store, when the history was read
    characters: int | None = None  # that must be embedded, once it was counted


class Full(Exception):
    """The queue is full."""


class Queue:
    """One thread that owns the engine, and the asks that wait for it."""

    # The first ask of a client opens a window for others. Where no client waits, asks ahead of
    # clients ("spare" ones) are written, and given up when a client comes.

    def __init__(self, engine: Engine | Suggestions, settings: ServeConfig, metrics, desk):
        self.engine, self.settings, self.metrics, self.desk = engine, settings, metrics, desk
        self.wake = threading.Condition()  # guards what follows
        self.waiting: deque[Job] = deque()
        self.spare: OrderedDict[tuple[str, str], int] = OrderedDict()  # (user, method) -> n
        self.stopped, self.batch_seconds = False, 1.0
        self.deletions = 0  # in the store, as of the last batch; -1: forget after the next one
        metrics.queue.set_function(lambda: len(self.waiting))
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def retry_after(self) -> int:
        """Seconds until the queue should have room: what waits and what is being written."""
        batches = 1 + len(self.waiting) / self.settings.batch
        return max(1, min(60, math.ceil(batches * self.batch_seconds)))

    def submit(self, job: Job) -> None:
        with self.wake:
            if len(self.waiting) >= self.settings.queue or self.stopped:
                raise Full
            self.waiting.append(job)
            self.wake.notify()

    def leave(self, job: Job) -> None:  # its client has left: its place is free at once
        job.gone = True
        with self.wake, contextlib.suppress(ValueError):  # it is being written
            self.waiting.remove(job)

    def ahead(self, user_id: str, method: str, n: int) -> None:
        """Write for a user when there is time, so that n more are ready; not where many wait."""
        with self.wake:
            if len(self.spare) < self.settings.queue and len(self.waiting) < self.settings.batch:
                self.spare[user_id, method] = n
                self.wake.notify()

    def forget(self, user_id: str) -> None:
        with self.wake:
            for key in [key for key in self.spare if key[0] == user_id]:
                del self.spare[key]

    def stop(self) -> None:
        with self.wake:
            self.stopped = True
            self.wake.notify()
        self.thread.join(self.settings.timeout)  # seconds: a batch may have to end

    # --------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        look = time.monotonic() + RELOAD_SECONDS
        while not self.stopped:
            try:
                if time.monotonic() >= look:
                    look = time.monotonic() + RELOAD_SECONDS
                    self.engine.refresh()  # between batches: an answer is of one model
                self._next_batch(look)
                before, self.deletions = self.deletions, self.desk.store.deletions()
                if before != self.deletions:  # through any server of the store
                    self.engine.forget()  # once more: the batch may have read what was deleted
            except Exception as error:  # the thread lives on
                log.error("the engine's thread: %s", where(error))

    def _next_batch(self, until: float) -> None:
        """Write the asks of clients or, if none waits, spare ones; wait `until` then at most."""
        with self.wake:
            self.wake.wait_for(lambda: self.waiting or self.spare or self.stopped,
                               max(0.0, until - time.monotonic()))
            size = self.settings.batch
            if self.waiting:
                window = self.waiting[0].born + WINDOW - time.monotonic()
                self.wake.wait_for(lambda: len(self.waiting) >= size, max(0.0, window))
            jobs = self._take()
            spare = [] if jobs else [
                self.spare.popitem(last=False)  # oldest first
                for _ in range(min(SPARE_BATCH, len(self.spare)))]
        if jobs:
            self._write(jobs)
        else:
            self.write_ahead([(*key, n) for key, n in spare])

    def _take(self) -> list[Job]:
        """The jobs of the next batch: those with little to embed first, as all of it wait for all
        of its texts. A long history counts as if it had come later, so that its turn comes too."""
        for job in self.waiting:
            if job.characters is None:
                job.characters = self.engine.characters(job.ask)
        jobs, characters = [], 0
        for job in sorted(self.waiting, key=lambda job: job.born + job.characters / RATE):
            characters += job.characters
            if len(jobs) == self.settings.batch or (jobs and characters > MOST_CHARACTERS):
                break
            jobs.append(job)
        for job in jobs:
            self.waiting.remove(job)
        return jobs

    def _write(self, jobs: list[Job]) -> None:
        started = time.monotonic()
        try:
            answers = self.engine.write([job.ask for job in jobs], lambda i: jobs[i].gone)
        except Exception as error:
            log.error("a batch of %d failed: %s", len(jobs), where(error))
            for job in jobs:  # one by one, so that a bad ask fails no other
                if len(jobs) > 1 and not job.begun:
                    self._write([job])
                else:
                    job.tell("the models failed; the server's log says where")
            return
        self.batch_seconds = time.monotonic() - started
        for job, answer in zip(jobs, answers, strict=True):
            if answer:  # None: its client has left
                self.metrics.tokens.inc(answer.tokens)
                job.tell(answer)

    def write_ahead(self, spare: list[tuple[str, str, int]]) -> int:
        """Make starters ready for (user, method, n); return for how many there was need."""
        jobs: list[Job] = []

        def gone(i: int) -> bool:  # asked at every step
            if i == 0 and self.desk.in_flight and not self.waiting:
                time.sleep(0.002)  # requests that need no model go first
            return jobs[i].forgotten or bool(self.waiting) or self.stopped

        try:
            for key in spare:
                if job := self.desk.prepare(*key):
                    jobs.append(job)
            answers = self.engine.write([job.ask for job in jobs], gone) if jobs else []
            for job, answer in zip(jobs, answers, strict=True):
                if answer:
                    self.metrics.tokens.inc(answer.tokens)
                    self.desk.finish(job, answer)
                elif not job.forgotten:  # a client came first
                    self.ahead(job.ask.user.user_id, job.ask.method, job.ask.n)
        finally:
            for job in jobs:
                self.desk.release(job)
        return len(jobs)

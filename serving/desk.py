"""Asks on their way: looked up in the store, written in batches, kept. No HTTP (serve.py).

`Desk` decides whether the store already holds the answer to a request; if not, it makes a job of
it. `Batcher` is the one thread that owns the engine. It writes clients' jobs together and, where no
client waits, starters ahead of them, so that the common request is a look-up. A room of its own, as
all of it is about threads and nothing of it about HTTP.
"""

from __future__ import annotations

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
from types import SimpleNamespace

import prometheus_client as prometheus
from tqdm import tqdm

import data
import roles
from config import Config, ServeConfig, digest
from serving.engine import Answer, Ask, Engine
from serving.store import Store

log = logging.getLogger("serve")
WINDOW_SECONDS = 0.004  # the first request of a batch waits so long for others
RELOAD_SECONDS = 5.0  # between looks for a newly trained round
SPARE_BATCH = 4  # asks ahead of clients that are written together: small, as a client may come
MOST_AHEAD = 60  # starters kept ready for a user and method
MOST_SHOWN = 100  # latest lists that tell a user's taste
ALL_SECONDS = 3600.0  # for so long "there are no more good ones" is believed


def make_metrics() -> SimpleNamespace:
    """Of one app. Labels are routes, reasons and sources: nothing of a user."""
    registry = prometheus.CollectorRegistry()
    prometheus.ProcessCollector(registry=registry)
    make = {"registry": registry, "namespace": "icebreaker"}
    steps = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32)
    return SimpleNamespace(
        registry=registry,
        seconds=prometheus.Histogram(
            "request_seconds", "Until the last byte", ["route", "status"], buckets=steps, **make),
        first=prometheus.Histogram(
            "first_starter_seconds", "Until the first starter is sent", buckets=steps, **make),
        queue=prometheus.Gauge("queue_length", "Asks that wait", **make),
        tokens=prometheus.Counter("generated_tokens", "By the generator", **make),
        rejections=prometheus.Counter("rejections", "Requests refused", ["reason"], **make),
        disconnects=prometheus.Counter("disconnects", "Clients that left early", **make),
        starters=prometheus.Counter("starters", "Starters answered", ["source"], **make),
    )  # fmt: skip


def where(error: BaseException) -> str:
    """The type of an error and the line that raised it; its text may hold what a user wrote."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"


# ------------------------------------------------------------------------------ the engine's thread


@dataclass(frozen=True)
class Written:
    answer: Answer
    version: str  # of the model that wrote it


@dataclass(eq=False)
class Job:
    """An ask on its way through the engine's thread."""

    ask: Ask
    known: bool  # of a user whom the store knows by id; else nothing is kept of it
    # Called from the engine's thread; with a text if it could not be written.
    tell: Callable[[Written | str], None] = lambda item: None
    born: float = dataclasses.field(default_factory=time.monotonic)
    gone: bool = False  # the client has left
    forgotten: bool = False  # the user was deleted meanwhile
    partial: bool = False  # good starters were left out, as the client knows them
    begun: bool = False  # the client has had a starter


class Full(Exception):
    """The queue is full."""


class Batcher:
    """One thread that owns the engine. Clients' asks are written in batches: the first one opens a
    window for others. Where no client waits, asks ahead of clients ("spare" ones) are written, and
    given up the moment that a client comes."""

    def __init__(self, engine: Engine, settings: ServeConfig, metrics, desk: Desk):
        self.engine, self.settings, self.metrics, self.desk = engine, settings, metrics, desk
        self.wake = threading.Condition()
        self.waiting: deque[Job] = deque()
        self.spare: OrderedDict[tuple[str, str], int] = OrderedDict()  # (user, method) -> n
        self.stopped, self.batch_seconds = False, 1.0
        metrics.queue.set_function(lambda: len(self.waiting))
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def full(self) -> bool:
        return len(self.waiting) >= self.settings.queue

    @property
    def retry_after(self) -> int:
        """Seconds until the queue should have room: what waits and what is being written."""
        batches = 1 + len(self.waiting) / self.settings.batch
        return max(1, min(60, math.ceil(batches * self.batch_seconds)))

    def submit(self, job: Job) -> None:
        with self.wake:
            if self.full or self.stopped:
                raise Full
            self.waiting.append(job)
            self.wake.notify()

    def leave(self, job: Job) -> None:
        """The client has left: the job's place is free, in the queue at once."""
        job.gone = True
        with self.wake, contextlib.suppress(ValueError):
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
        self.thread.join(self.settings.timeout)

    def _run(self) -> None:
        look = time.monotonic() + RELOAD_SECONDS
        while not self.stopped:
            jobs, spare = self._next(look)
            if time.monotonic() >= look:
                look = time.monotonic() + RELOAD_SECONDS
                self._safely(self.engine.refresh)
            if spare:
                self._safely(self.write_ahead, spare)
            if jobs:
                self._write(jobs)

    @staticmethod
    def _safely(work: Callable, *arguments) -> None:
        try:
            work(*arguments)
        except Exception as error:  # the thread lives on
            log.error("%s failed: %s", work.__name__, where(error))

    def _next(self, until: float) -> tuple[list[Job], list[tuple[str, str, int]]]:
        """The jobs of a batch, or, if none waits, some spare ones; neither from `until` on."""
        with self.wake:
            some = lambda: self.waiting or self.spare or self.stopped  # noqa: E731
            self.wake.wait_for(some, max(0.0, until - time.monotonic()))
            if not self.waiting:
                count = min(SPARE_BATCH, len(self.spare))
                popped = [self.spare.popitem(last=False) for _ in range(count)]
                return [], [(*key, n) for key, n in popped]
            end = self.waiting[0].born + WINDOW_SECONDS
            size = self.settings.batch
            self.wake.wait_for(lambda: len(self.waiting) >= size, max(0.0, end - time.monotonic()))
            return [self.waiting.popleft() for _ in range(min(size, len(self.waiting)))], []

    def _write(self, jobs: list[Job]) -> None:
        started, version = time.monotonic(), self.engine.version
        try:
            answers = self.engine.write([job.ask for job in jobs], lambda i: jobs[i].gone)
        except Exception as error:
            log.error("a batch of %d failed: %s", len(jobs), where(error))
            for job in jobs:
                if len(jobs) > 1 and not job.begun:
                    self._write([job])
                else:
                    job.tell("the models failed; the server's log says where")
            return
        self.batch_seconds = time.monotonic() - started
        for job, answer in zip(jobs, answers, strict=True):
            if answer:
                self.metrics.tokens.inc(answer.tokens)
                job.tell(Written(answer, version))

    def write_ahead(self, spare: list[tuple[str, str, int]]) -> int:
        """Make starters ready for (user, method, n); return for how many there was need."""
        jobs: list[Job] = []

        def gone(i: int) -> bool:
            if i == 0 and self.desk.in_flight and not self.waiting:
                time.sleep(0.002)  # requests that need no model go first
            return jobs[i].forgotten or bool(self.waiting) or self.stopped

        try:
            for key in spare:
                if job := self.desk.prepare(*key):
                    jobs.append(job)
            version = self.engine.version
            answers = self.engine.write([job.ask for job in jobs], gone) if jobs else []
            for job, answer in zip(jobs, answers, strict=True):
                if answer:
                    self.metrics.tokens.inc(answer.tokens)
                    self.desk.finish(job, Written(answer, version))
                elif not job.forgotten:  # a client came first
                    self.ahead(job.ask.user.user_id, job.ask.method, job.ask.n)
        finally:
            for job in jobs:
                self.desk.release(job)
        return len(jobs)


# ------------------------------------------------------------------- before and after the models


def unseen(row: dict | None, avoid: list[str]) -> list[dict]:
    known = {*map(roles.normal_form, avoid)}
    return [s for s in row["starters"] if roles.normal_form(s["text"]) not in known] if row else []


def is_all(row: dict) -> bool:
    """The generator had no more good ones when it was last asked."""
    return row["all"] and time.time() - row["at"] < ALL_SECONDS


class Desk:
    """Turns requests into answers of the store or asks to the engine, and keeps what was written.

    A row that is kept ready holds the last answer for a user, method, history and model: what was
    not yet shown of it is the next answer. `lock` makes each of these steps whole with respect to
    the deletion of a user, after which nothing of that user may be written.
    """

    def __init__(self, config: Config, engine: Engine, store: Store):
        self.settings, self.engine, self.store = config.serve, engine, store
        self.list_size, self.metrics = config.generator.list_size, make_metrics()
        self.arms = dict.fromkeys(config.serve.arms, 1.0)
        self.arms_seed = int(digest(config.run.seed, "arms"), 16)  # not that of the splits
        self.lock, self.jobs, self.in_flight = threading.Lock(), set(), 0
        self.batcher = Batcher(engine, config.serve, self.metrics, self)

    @property
    def methods(self) -> tuple[str, ...]:
        return self.engine.methods

    def arm(self, user_id: str) -> str:
        return data.split_users([user_id], self.arms, self.arms_seed)[user_id]

    def _key(self, user: data.User, version: str, method: str) -> str:
        return digest(self.engine.history_hash(user), version, method)

    def _job(self, user: data.User, method: str, n: int, avoid: list[str]) -> Job:
        lists = list(self.store.shown(user.user_id))[-MOST_SHOWN:]
        shown = [(y, i, i in x.clicked) for x in lists for i, y in enumerate(x.starters)]
        job = Job(Ask(user, n=n, shown=shown, avoid=avoid, method=method), known=True)
        self.jobs.add(job)
        return job

    def look_up(self, asked, request_id: str) -> dict | Job:
        """The answer to a request, if it is ready; else a job, to be released in the end."""
        if asked.user_id is None:
            user = data.User(user_id="inline", profile=asked.profile, sessions=asked.sessions or [])
            method = asked.method or next(iter(self.arms))
            ask = Ask(data.in_time_order(user), n=asked.n, avoid=asked.exclude, method=method,
                      draw=time.time_ns() * asked.refresh)  # fmt: skip
            self.jobs.add(job := Job(ask, known=False))
            return job
        with self.lock:
            user_id, days = asked.user_id, self.settings.repeat_days
            user = self.store.user(user_id)
            if not user or not (user.sessions or user.profile):  # a newcomer
                user = data.User(user_id=user_id, profile=asked.profile, sessions=[])
            method = asked.method or self.arm(user_id)
            row = self.store.ahead(user_id, self._key(user, self.engine.version, method))
            avoid = self.store.seen(user_id, days, offered=asked.refresh) + asked.exclude
            left = unseen(row, avoid)
            whole = row and is_all(row) and len(left) == len(row["starters"])
            if row and (len(left) >= asked.n or (whole and not asked.refresh)):
                left = [s | {"source": "cached"} for s in left]
                return self._reply(user_id, method, asked.n, row, left, request_id)
            job = self._job(user, method, asked.n, avoid)
            job.partial = bool(asked.exclude)
            if asked.refresh:
                job.ask = dataclasses.replace(job.ask, draw=time.time_ns())
            return job

    def keep(self, job: Job, written: Written, request_id: str) -> dict:
        """The reply of a written answer; what it does not show is kept ready."""
        ask, row = job.ask, self._row(written, job)
        with self.lock:  # a job that was released meanwhile, a deletion has not seen
            known = job.known and job in self.jobs and not job.forgotten
            if known:
                key = self._key(ask.user, written.version, ask.method)
                self.store.put_ahead(ask.user.user_id, key, row, ask.method)
            user_id = ask.user.user_id if known else None
            return self._reply(user_id, ask.method, ask.n, row, row["starters"], request_id)

    def _row(self, written: Written, job: Job) -> dict:
        answer = dataclasses.asdict(written.answer)
        few = len(answer["starters"]) < job.ask.n and not job.partial
        return answer | {"model": written.version, "all": few, "at": time.time()}

    def _reply(
        self, user_id: str | None, method: str, n: int, row: dict, left: list[dict], request_id: str
    ) -> dict:
        chosen, impression = left[:n], None
        if user_id is not None and chosen:
            kept = [interest["text"] for interest in row["interests"] if interest["kept"]]
            texts = [starter["text"] for starter in chosen]
            impression = self.store.offer(user_id, kept, texts, method, row["model"])
            if len(left) - len(chosen) < n and not is_all(row):
                self.batcher.ahead(user_id, method, n)
        for starter in chosen:
            self.metrics.starters.labels(starter["source"]).inc()
        return {
            "request_id": request_id, "impression_id": impression, "model": row["model"],
            "method": method, "threshold": row["threshold"], "interests": row["interests"],
            "starters": [{"slot": i, **starter} for i, starter in enumerate(chosen)],
        }  # fmt: skip

    def prepare(self, user_id: str, method: str, n: int) -> Job | None:
        """A job that makes n starters ready beyond all that were offered; None: they are."""
        with self.lock:
            user = self.store.user(user_id)
            if not user or not user.sessions:  # popular starters cost nothing to find
                return None
            row = self.store.ahead(user_id, self._key(user, self.engine.version, method))
            avoid = self.store.seen(user_id, self.settings.repeat_days, offered=True)
            if row and (is_all(row) or len(unseen(row, avoid)) >= n):
                return None
            return self._job(user, method, n, avoid + [s["text"] for s in unseen(row, avoid)])

    def finish(self, job: Job, written: Written) -> None:
        """Put what was written ahead behind what is ready, if the history is still the same."""
        user_id, method, row = job.ask.user.user_id, job.ask.method, self._row(written, job)
        with self.lock:
            user = None if job.forgotten else self.store.user(user_id)
            key = self._key(job.ask.user, written.version, method)
            if not user or self._key(user, written.version, method) != key:
                return
            old = unseen(self.store.ahead(user_id, key),
                         self.store.seen(user_id, self.settings.repeat_days))
            new = unseen(row, [s["text"] for s in old])
            row["starters"], row["all"] = (old + new)[:MOST_AHEAD], row["all"] or not new
            self.store.put_ahead(user_id, key, row, method)

    def release(self, job: Job) -> None:
        self.jobs.discard(job)
        if job.forgotten:  # it has read the user's texts again
            self.engine.forget()

    def put(self, user_id: str, sessions: list[data.Session], profile: dict | None) -> int:
        held = self.store.put_sessions(user_id, sessions, profile)
        self.batcher.ahead(user_id, self.arm(user_id), self.list_size)
        return held

    def delete(self, user_id: str) -> dict[str, int]:
        with self.lock:
            self.batcher.forget(user_id)
            for job in list(self.jobs):
                job.forgotten = job.forgotten or job.ask.user.user_id == user_id
            try:
                return self.store.delete_user(user_id)
            finally:
                self.engine.forget()

    def close(self) -> None:
        self.batcher.stop()
        self.store.close()

    def examples(self) -> list[data.User]:
        """Some simulated people, as the store knows them."""
        users = (self.store.user(user.user_id) for user in self.engine.examples)
        return [user for user in users if user]


def precompute(desk: Desk) -> str:
    """Make starters ready for every user of the store; return what was done."""
    started, written, users = time.time(), 0, desk.store.user_ids()
    size = desk.settings.batch
    for i in tqdm(range(0, len(users), size), "precompute", disable=None, leave=False):
        keys = [(user_id, desk.arm(user_id), desk.list_size) for user_id in users[i : i + size]]
        written += desk.batcher.write_ahead(keys)
    seconds = time.time() - started
    return f"{written} of {len(users)} users written for, the others were ready: {seconds:.1f} s"

"""Before and after the models: is the answer in the store already, and what is kept of a new one?

No HTTP (serve.py) and no thread of its own (queue.py).
"""

import contextlib
import dataclasses
import functools
import threading
import time
from types import SimpleNamespace

import prometheus_client as prometheus

import data
import roles
from config import Config
from files import digest, progress
from serving.bodies import StartersBody
from serving.engine import Answer, Ask, Engine
from serving.queue import Job, Queue
from serving.store import Store
from serving.suggest import DECLINED, Suggested, last_turns

MOST_AHEAD = 60  # starters kept ready for a user and method
MOST_SHOWN = 100  # latest lists that tell a user's taste
ALL_SECONDS = 3600.0  # for so long "there are no more good ones" is believed


def make_metrics() -> SimpleNamespace:
    """Of one app. Labels are routes, reasons and sources: nothing of a user."""
    registry = prometheus.CollectorRegistry()
    prometheus.ProcessCollector(registry=registry)  # memory, CPU seconds, open files
    common = {"namespace": "icebreaker", "registry": registry}
    steps = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32)  # seconds
    histogram = functools.partial(prometheus.Histogram, buckets=steps, **common)
    counter = functools.partial(prometheus.Counter, **common)
    return SimpleNamespace(
        registry=registry,
        seconds=histogram("request_seconds", "Until the last byte", ["route", "status"]),
        first=histogram("first_starter_seconds", "Until the first starter is sent"),
        queue=prometheus.Gauge("queue_length", "Asks that wait", **common),
        tokens=counter("generated_tokens", "By the generator"),
        rejections=counter("rejections", "Requests refused", ["reason"]),
        disconnects=counter("disconnects", "Clients that left early"),
        starters=counter("starters", "Starters answered", ["source"]))


def unseen(row: dict | None, avoid: list[str]) -> list[dict]:
    """The starters of a kept row that are none of `avoid`, however those are spelt."""
    seen = {*map(roles.normal_form, avoid)}
    return [s for s in row["starters"] if roles.normal_form(s["text"]) not in seen] if row else []


def is_all(row: dict) -> bool:
    """The generator had no more good ones when it was last asked."""
    return row["all"] and time.time() - row["at"] < ALL_SECONDS


class Desk:
    """Turns requests into answers of the store or asks to the engine; keeps what was written."""

    # A row that is kept ready holds the last answer for a user, method, history and model: what was
    # not yet shown of it is the next answer. `lock` makes each step below whole with respect to the
    # deletion of a user, after which nothing of that user may be written; a transaction does so
    # where other servers have the same store.

    def __init__(self, config: Config, engine: Engine, store: Store):
        self.settings, self.engine, self.store = config.serve, engine, store
        self.list_size, self.metrics = config.generator.list_size, make_metrics()
        # What the run is for: the routes of the other task answer 404.
        self.task = "starters" if config.run.method == "icebreaker" else "suggestions"
        self.room = config.generator.max_prompt_tokens  # of a conversation
        arms = config.serve.arms if self.task == "starters" else engine.methods
        self.arms = dict.fromkeys(arms, 1.0)  # method -> share, all alike
        self.arms_seed = int(digest(config.run.seed, "arms"), 16)  # not that of the splits
        self.lock, self.jobs = threading.Lock(), set()
        self.in_flight = 0  # requests, counted by front.py
        self.queue = Queue(engine, config.serve, self.metrics, self)

    def arm(self, user_id: str) -> str:  # the method of a user for whom no other is asked
        return data.split_users([user_id], self.arms, self.arms_seed)[user_id]

    def _key(self, user: data.User, model: str, method: str) -> str:
        return digest(self.engine.history_hash(user), model, method)

    def _job(self, ask: Ask, **about) -> Job:
        # An ask with its sessions inline is answered even where the store fails.
        job = Job(ask, **about, deletions=self.store.deletions() if about["by_id"] else 0)
        self.jobs.add(job)
        return job

    def _shown(self, user_id: str) -> list[tuple[str, int, bool]]:  # (starter, slot, tapped)
        lists = [*self.store.taps.shown(user_id)][-MOST_SHOWN:]
        return [(y, i, i in s.clicked) for s in lists for i, y in enumerate(s.starters)]

    def look_up(self, asked: StartersBody, request_id: str) -> dict | Job:
        """The answer to a request, if it is ready; else a job, to be released in the end."""
        draw = time.time_ns() if asked.refresh else 0  # 0: the same answer each time
        if asked.user_id is None:  # sessions of the request itself: nobody's, so nothing is kept
            user = data.User(user_id="inline", profile=asked.profile, sessions=asked.sessions or [])
            method = asked.method or next(iter(self.arms))
            ask = Ask(data.in_time_order(user), asked.n, [], asked.exclude, method, draw)
            return self._job(ask, by_id=False)
        with self.lock, self.store.db.transaction():
            user_id = asked.user_id
            user = self.store.user(user_id)
            if not user or not (user.sessions or user.profile):  # a newcomer: who says it is whom
                user = data.User(user_id=user_id, profile=asked.profile, sessions=[])
            method = asked.method or self.arm(user_id)
            row = self.store.ahead(user_id, self._key(user, self.engine.version, method))
            seen = self.store.taps.seen(user_id, self.settings.repeat_days, asked.refresh)
            left = unseen(row, seen + asked.exclude)
            whole = row and is_all(row) and len(left) == len(row["starters"])  # and more never come
            if row and (len(left) >= asked.n or (whole and not asked.refresh)):
                left = [s | {"source": "cached"} for s in left]
                return self._reply(user_id, method, asked.n, row, left, request_id)
            # Written with the lock open: a deletion marks the job as forgotten.
            ask = Ask(user, asked.n, self._shown(user_id), seen + asked.exclude, method, draw)
            if asked.refresh:  # who asks for others and has seen all has them again, not nothing
                ask = dataclasses.replace(ask, avoid=asked.exclude, again=seen)
            return self._job(ask, by_id=True, partial=bool(asked.exclude))

    def ask_next(self, turns: list[data.Turn], n: int, user_id: str | None = None,
                 language: str | None = None) -> Job:
        """A job that suggests next queries, to be released in the end; user_id None: nobody's."""
        user = data.User(user_id=user_id or "inline", sessions=[])
        kept = last_turns(turns, self.room)
        ask = Ask(user, n, method=next(iter(self.arms)), turns=kept, language=language,
                  left_out=len(turns) - len(kept))
        return self._job(ask, by_id=user_id is not None)

    def _keep_next(self, job: Job, answer: Suggested, request_id: str) -> dict:
        ask, impression = job.ask, None
        chosen = [dataclasses.asdict(suggestion) for suggestion in answer.suggestions]
        stored = self.store.db.transaction() if job.by_id else contextlib.nullcontext()
        with self.lock, stored:
            if chosen and job.by_id and job in self.jobs and not self._is_forgotten(job):
                turns = [{"role": turn.role, "content": turn.content} for turn in ask.turns]
                texts = [suggestion["text"] for suggestion in chosen]
                impression = self.store.taps.offer(
                    ask.user.user_id, turns, texts, ask.method, answer.model)
        for suggestion in chosen:
            self.metrics.starters.labels(suggestion["source"]).inc()
        return {"request_id": request_id, "impression_id": impression, "model": answer.model,
                "method": ask.method, "cut": answer.cut, "declined": answer.declined,
                "reason": DECLINED if answer.declined else None,
                "suggestions": [{"slot": i, **suggestion} for i, suggestion in enumerate(chosen)]}

    def keep(self, job: Job, answer: Answer | Suggested, request_id: str) -> dict:
        """The reply of a written answer; what it does not show is kept ready."""
        if isinstance(answer, Suggested):
            return self._keep_next(job, answer, request_id)
        ask, row = job.ask, self._row(answer, job)
        stored = self.store.db.transaction() if job.by_id else contextlib.nullcontext()
        with self.lock, stored:  # a job that was released meanwhile, a deletion has not seen
            user_id = None  # nobody's: no impression id
            if job.by_id and job in self.jobs and not self._is_forgotten(job):
                user_id, key = ask.user.user_id, self._key(ask.user, answer.model, ask.method)
                self.store.put_ahead(user_id, key, row, ask.method)
            return self._reply(user_id, ask.method, ask.n, row, row["starters"], request_id)

    def _is_forgotten(self, job: Job) -> bool:  # by this server, or by another one of the store
        user_id = job.ask.user.user_id
        job.forgotten = job.forgotten or self.store.was_deleted(user_id, job.deletions)
        return job.forgotten

    def _row(self, answer: Answer, job: Job) -> dict:
        few = len(answer.starters) < job.ask.n and not job.partial  # all the good ones there are
        reason = None if answer.starters else self._why_none(answer, job.ask)
        return dataclasses.asdict(answer) | {"all": few, "at": time.time(), "reason": reason}

    def _why_none(self, answer: Answer, ask: Ask) -> str:
        if not any(interest.kept for interest in answer.interests):
            about = ("no past session is fit to be brought up" if ask.user.sessions
                     else "nothing is known of this person yet")
            # Which one is not echoed: a profile may hold anything.
            of = " in the profile's language" if (ask.user.profile or {}).get("language") else ""
            return f"{about}, and there is no popular starter{of} to show instead"
        if ask.avoid:
            return ("nothing new was good enough, and what was shown in the last "
                    f"{self.settings.repeat_days:g} days is not repeated")
        return "nothing that was written passed the checks (language, length, sense, safety)"

    def _reply(self, user_id: str | None, method: str, n: int, row: dict, left: list[dict],
               request_id: str) -> dict:
        """The first n of what is left of a row; user_id None: nothing is kept of it."""
        chosen, impression = left[:n], None
        if user_id is not None and chosen:
            interests = [interest["text"] for interest in row["interests"] if interest["kept"]]
            texts = [starter["text"] for starter in chosen]
            impression = self.store.taps.offer(user_id, interests, texts, method, row["model"])
            if len(left) - len(chosen) < n and not is_all(row):  # too few for the next request
                self.queue.ahead(user_id, method, n)
        for starter in chosen:
            self.metrics.starters.labels(starter["source"]).inc()
        return {"request_id": request_id, "impression_id": impression, "model": row["model"],
                "method": method, "threshold": row["threshold"], "interests": row["interests"],
                "starters": [{"slot": i, **starter} for i, starter in enumerate(chosen)],
                "reason": None if chosen else row.get("reason")}  # none in a row of before

    def prepare(self, user_id: str, method: str, n: int) -> Job | None:
        """A job that makes n starters ready beyond all that were offered; None: they are."""
        with self.lock, self.store.db.transaction():
            user = self.store.user(user_id)
            if not user or not user.sessions:  # popular starters cost nothing to look for
                return None
            row = self.store.ahead(user_id, self._key(user, self.engine.version, method))
            avoid = self.store.taps.seen(user_id, self.settings.repeat_days, offered=True)
            ready = [s["text"] for s in unseen(row, avoid)]
            if row and (is_all(row) or len(ready) >= n):
                return None
            return self._job(Ask(user, n, self._shown(user_id), avoid + ready, method), by_id=True)

    def finish(self, job: Job, answer: Answer) -> None:
        """Put what was written ahead behind what is ready, if the history is still the same."""
        user_id, method, row = job.ask.user.user_id, job.ask.method, self._row(answer, job)
        with self.lock, self.store.db.transaction():
            user = None if self._is_forgotten(job) else self.store.user(user_id)
            key = self._key(job.ask.user, answer.model, method)
            if not user or self._key(user, answer.model, method) != key:  # sessions came meanwhile
                return
            seen = self.store.taps.seen(user_id, self.settings.repeat_days)
            old = unseen(self.store.ahead(user_id, key), seen)  # a client may have taken some
            new = unseen(row, [s["text"] for s in old])
            row["starters"], row["all"] = (old + new)[:MOST_AHEAD], row["all"] or not new
            self.store.put_ahead(user_id, key, row, method)

    def release(self, job: Job) -> None:
        self.jobs.discard(job)  # from here on a deletion does not see it
        if job.forgotten:  # it has read the user's texts again
            self.queue.deletions = -1  # or, as its client has left, reads them now
            self.engine.forget()

    def put(self, user_id: str, sessions: list[data.Session], profile: dict | None) -> int:
        """Append to a history; return how many sessions are held. Starters are written ahead."""
        held = self.store.put_sessions(user_id, sessions, profile)
        self.queue.ahead(user_id, self.arm(user_id), self.list_size)
        return held

    def delete(self, user_id: str) -> dict[str, int]:
        with self.lock:
            self.queue.forget(user_id)
            for job in list(self.jobs):  # under way: it must keep nothing
                job.forgotten = job.forgotten or job.ask.user.user_id == user_id
            try:
                return self.store.delete_user(user_id)
            finally:  # whether or not the file could be wiped
                self.engine.forget()

    def close(self) -> None:
        self.queue.stop()
        self.store.close()

    def examples(self) -> list[data.User]:
        """Some simulated people, as the store knows them: some may have been deleted."""
        return [user for one in self.engine.examples if (user := self.store.user(one.user_id))]


def precompute(desk: Desk) -> str:
    """Make starters ready for every user of the store; return what was done."""
    started, written, users = time.time(), 0, desk.store.user_ids()
    size = desk.settings.batch
    for i in progress(range(0, len(users), size), "precompute"):
        keys = [(user_id, desk.arm(user_id), desk.list_size) for user_id in users[i : i + size]]
        written += desk.queue.write_ahead(keys)
    seconds = time.time() - started
    return f"{written} of {len(users)} users written for, the others were ready: {seconds:.1f} s"

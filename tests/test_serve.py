"""The server with a deterministic engine: replies, limits, overload, clients that leave, shutdown.

CANARY_REQUESTS=10000 pytest tests/test_serve.py -k canary -s     # 3,000 otherwise
"""

import asyncio
import base64
import contextlib
import gzip
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import httpx
import hypothesis
import pytest
import schemathesis
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

import data
import serve
from config import Config, load_config
from files import ROOT, UserError, digest, write_json
from serving import connections, database, front, queue
from serving.engine import METHODS, Answer, Ask, Interest, Starter
from serving.store import Store

CANARY_REQUESTS = int(os.environ.get("CANARY_REQUESTS", 3000))


class FakeEngine:
    """Starters that quote the user's summaries; every decoding step sleeps."""

    def __init__(self, steps: int = 1, seconds: float = 0.0, most: int = 12):
        self.steps, self.seconds, self.most = steps, seconds, most
        self.version, self.newer, self.methods = "fake-1", None, METHODS
        self.examples, self.sizes, self.forgotten = [], [], 0
        self.slots, self.threads, self.fail = 0, set(), None
        self.asked = []  # (user_id, n, avoid) of every ask
        self.pool = 1000  # questions of each subject

    @staticmethod
    def history_hash(user):
        return digest(user.model_dump(mode="json"))

    def refresh(self):
        changed, self.version = self.newer is not None, self.newer or self.version
        self.newer = None
        return changed

    def forget(self):
        self.forgotten += 1

    @staticmethod
    def characters(ask):
        return sum(len(s.summary or "") for s in ask.user.sessions)

    def write(self, asks, gone):
        self.threads.add(threading.get_ident())
        self.sizes.append(len(asks))
        self.asked += [(a.user.user_id, a.n, [*a.avoid, *a.again]) for a in asks]
        if self.fail:
            raise ValueError(f"{self.fail} {asks[0].user}")
        ready, alive = [self._starters(ask) for ask in asks], set(range(len(asks)))
        for ask, starters in zip(asks, ready, strict=True):
            if ask.begin:
                answer = self._answer(ask, starters)
                ask.begin(answer.interests, answer.threshold)
        for step in range(self.steps):
            self.slots = len(alive)
            time.sleep(self.seconds)
            alive -= {i for i in alive if gone(i)}
            for i in alive:
                if asks[i].emit and step < min(asks[i].n, len(ready[i])):
                    asks[i].emit(ready[i][step])
            if not alive:
                break
        self.slots = 0
        for i in alive:
            for starter in ready[i][self.steps : asks[i].n]:
                if asks[i].emit:
                    asks[i].emit(starter)
        return [self._answer(ask, ready[i]) if i in alive else None for i, ask in enumerate(asks)]

    def _starters(self, ask):
        texts = [s.summary or s.messages[0].content for s in ask.user.sessions]
        source = "generated" if texts else "cold start"
        texts = texts or [f"popular in {(ask.user.profile or {}).get('region', 'the world')}"]
        avoid, again = ({text.casefold() for text in some} for some in (ask.avoid, ask.again))
        every = (Starter(f"{text}: question {k}", 0.5 + 0.1 / k,
                         text if ask.user.sessions else None, source)
                 for k in range(1, self.pool) for text in texts)
        good = [s for s in every if s.text.casefold() not in avoid]
        return ([s for s in good if s.text.casefold() not in again] or good)[: self.most]

    def _answer(self, ask, starters):
        texts = [s.summary or s.messages[0].content for s in ask.user.sessions][:12]
        interests = [Interest(text, 0.5, True) for text in texts]
        return Answer(interests, 0.3 if texts else None, starters, 10 * len(starters), self.version)


def make_app(folder, engine=None, host="127.0.0.1", **settings):
    config = Config()
    config.run.method = getattr(engine, "run_method", "icebreaker")
    for name, value in settings.items():
        assert hasattr(config.serve, name)
        setattr(config.serve, name, value)
    store = Store(Path(folder) / "serve.sqlite")
    return serve.create_app(config, engine or FakeEngine(), store, host)


@contextlib.contextmanager
def running(folder, engine=None, **settings):
    """A real server on a free port."""
    app, sock = make_app(folder, engine, **settings), serve.bound("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    thread = threading.Thread(target=serve.serve, args=(app, sock))
    thread.start()
    try:
        with httpx.Client(base_url=url, timeout=30) as client:
            wait_for(lambda: getattr(app.state.server, "started", False))
            desk = app.state.desk
            yield SimpleNamespace(app=app, desk=desk, engine=desk.engine, store=desk.store,
                                  client=client, port=sock.getsockname()[1])
    finally:
        app.state.server.should_exit = True
        thread.join()


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.005)
    return value


@pytest.fixture
def server(tmp_path):
    with running(tmp_path) as made:
        yield made


def sessions(*summaries):
    return [{"session_id": f"s{i}", "summary": text} for i, text in enumerate(summaries)]


def ask(server, status=200, **body):
    reply = server.client.post("/v1/starters", json=body)
    assert reply.status_code == status, reply.text
    return reply.json()


def put(server, user_id, *summaries, **more):
    body = {"sessions": sessions(*summaries), **more}
    reply = server.client.put(f"/v1/users/{user_id}/sessions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def send(server, impression, *slots, status=200):
    events = [{"impression_id": impression, "type": "shown"}]
    events += [{"impression_id": impression, "type": "tap", "slot": slot} for slot in slots]
    reply = server.client.post("/v1/events", json={"events": events})
    assert reply.status_code == status, reply.text
    return reply.json()


def texts(reply):
    return [starter["text"] for starter in reply["starters"]]


def sources(reply):
    return {starter["source"] for starter in reply["starters"]}


def events_of(text):
    blocks = [block.split("\n", 1) for block in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(value.removeprefix("data: ")))
            for name, value in blocks]


# ------------------------------------------------------------------------------------------ answers


def test_inline_sessions_are_answered_and_not_kept(server, tmp_path):
    reply = ask(server, sessions=[{"summary": "secret trains"}], n=3)
    assert reply["impression_id"] is None and reply["model"] == "fake-1"
    assert reply["method"] == "IceBreaker" and reply["threshold"] == 0.3
    assert reply["interests"] == [{"text": "secret trains", "score": 0.5, "kept": True}]
    assert [s["slot"] for s in reply["starters"]] == [0, 1, 2] and sources(reply) == {"generated"}
    assert reply["starters"][0]["interest"] == "secret trains"
    for path in tmp_path.iterdir():
        assert b"secret trains" not in path.read_bytes()


def test_put_writes_ahead_and_the_answer_is_a_look_up(server):
    assert put(server, "u1", "trains", "tea") == {"user_id": "u1", "sessions": 2}
    wait_for(lambda: server.engine.asked and not server.desk.jobs)
    first = ask(server, user_id="u1")
    assert sources(first) == {"cached"} and len(texts(first)) == 5
    assert texts(ask(server, user_id="u1")) == texts(first)  # nobody saw it yet
    assert len(server.engine.asked) == 1


def test_what_was_shown_is_not_shown_again_and_is_written_after(server):
    put(server, "u1", "trains", "tea")
    lists = []
    for _ in range(8):
        reply = ask(server, user_id="u1", n=5)
        lists.append(texts(reply))
        send(server, reply["impression_id"], 1)
    assert all(len(own) == 5 for own in lists)
    assert len({text for own in lists for text in own}) == 40
    shown = list(server.store.taps.shown("u1"))
    assert [s.starters for s in shown] == lists and shown[0].clicked == [1]
    assert shown[0].interests == ["trains", "tea"] and shown[0].version == "fake-1"


def test_refresh_passes_over_lists_that_were_only_answered(server):
    put(server, "u1", "trains", "tea")
    first, again = ask(server, user_id="u1"), ask(server, user_id="u1", refresh=True)
    third = ask(server, user_id="u1", refresh=True)
    assert len({*texts(first), *texts(again), *texts(third)}) == 15


def test_who_asks_for_others_and_has_seen_all_has_them_again(server):
    server.engine.pool = 8  # seven starters
    put(server, "u1", "trains")
    wait_for(lambda: server.engine.asked and not server.desk.jobs)
    met = []
    for _ in range(6):
        reply = ask(server, user_id="u1", n=5, refresh=True)
        send(server, reply["impression_id"])
        met.append(texts(reply))
    assert len({*met[0], *met[1]}) == 7 and all(met)  # first those that are left
    assert ask(server, user_id="u1")["starters"] == []  # who does not is told nothing twice


def test_excluded_starters_stay_out(server):
    put(server, "u1", "trains")
    first = ask(server, user_id="u1", n=3)
    other = ask(server, user_id="u1", n=3, exclude=[texts(first)[0].upper()])
    assert texts(first)[0] not in texts(other) and len(texts(other)) == 3


def test_fewer_good_starters_are_an_answer_and_not_asked_for_again(tmp_path):
    with running(tmp_path, FakeEngine(most=3)) as server:
        put(server, "u1", "trains")
        wait_for(lambda: server.engine.asked and not server.desk.jobs)
        for _ in range(3):
            assert len(texts(ask(server, user_id="u1"))) == 3
        assert len(server.engine.asked) == 1
        send(server, ask(server, user_id="u1")["impression_id"])
        assert len(texts(ask(server, user_id="u1"))) == 3  # three others
        assert server.engine.asked[1][2]  # told what to avoid


@pytest.mark.parametrize("most, asked, reason", [
    (0, {"sessions": [{"summary": "trains"}]}, "nothing that was written passed the checks"),
    (0, {"sessions": []}, "nothing is known of this person yet"),
    (0, {"user_id": "u2", "profile": {"language": "de-DE"}}, "in the profile's language"),
    (0, {"user_id": "u1"}, "nothing that was written passed"),
    (12, {"user_id": "u1"}, "what was shown in the last 7 days is not repeated"),
])
def test_an_empty_list_has_its_reason(tmp_path, most, asked, reason):
    with running(tmp_path, FakeEngine(most=most)) as server:
        server.engine.pool = 2  # one starter
        put(server, "u1", "trains")
        first = ask(server, user_id="u1")
        if most:
            assert len(texts(first)) == 1 and first["reason"] is None
            send(server, first["impression_id"])
        for _ in range(2):  # written, then ready
            reply = ask(server, **asked)
            assert not texts(reply) and reply["impression_id"] is None and reason in reply["reason"]
            assert events_of(server.client.post(
                "/v1/starters", json={**asked, "stream": True}).text)[-1][1]["reason"] == (
                    reply["reason"])


def test_unknown_user_gets_popular_starters_for_the_profile(server):
    reply = ask(server, user_id="new", profile={"region": "Singapore"})
    assert sources(reply) == {"cold start"} and reply["threshold"] is None
    assert "Singapore" in texts(reply)[0] and reply["impression_id"]
    assert ask(server, profile={"region": "Oslo"})["impression_id"] is None  # nobody at all
    put(server, "new", "trains", profile={"region": "Oslo"})
    wait_for(lambda: server.store.db.rows("SELECT 1 FROM ahead WHERE value LIKE '%trains%'"))
    again = ask(server, user_id="new", profile={"region": "Singapore"})  # the store knows better
    assert sources(again) == {"cached"} and "trains" in texts(again)[0]


def test_users_are_split_over_arms_and_a_method_can_be_named(tmp_path):
    with running(tmp_path, arms=["SFT", "IceBreaker"]) as server:
        met = Counter(ask(server, user_id=f"u{i}")["method"] for i in range(40))
        assert min(met["SFT"], met["IceBreaker"]) > 8
        assert ask(server, user_id="u0")["method"] == ask(server, user_id="u0")["method"]
        assert ask(server, user_id="u0", method="PE")["method"] == "PE"
        server.engine.methods = METHODS[:2]
        fault = ask(server, 422, user_id="u0", method="IceBreaker")["detail"][0]
        assert fault["loc"] == ["body", "method"]
        assert server.client.get("/v1/model").json() == {
            "model": "fake-1", "task": "starters", "methods": ["PE", "SFT"],
            "arms": ["SFT", "IceBreaker"], "chat": None}


def test_stream_says_the_same_as_the_whole_reply(tmp_path):
    with running(tmp_path, FakeEngine(steps=5, seconds=0.02)) as server:
        put(server, "u1", "trains", "tea")
        for expected in ({"generated"}, {"cached"}):
            reply = server.client.post("/v1/starters", json={"user_id": "u1", "stream": True})
            assert reply.headers["content-type"].startswith("text/event-stream")
            told = events_of(reply.text)
            done = told[-1][1]
            assert told[-1][0] == "done" and sources(done) == expected and done["impression_id"]
            assert [x for name, x in told if name == "starter"] == done["starters"]
            assert told[0] == ("interests", {k: done[k] for k in ("threshold", "interests")})
            wait_for(lambda: not server.desk.jobs)


def test_starters_of_a_stream_arrive_as_they_are_written(tmp_path):
    with running(tmp_path, FakeEngine(steps=5, seconds=0.1)) as server:
        body, times = {"sessions": [{"summary": "tea"}], "stream": True}, []
        with server.client.stream("POST", "/v1/starters", json=body) as reply:
            times = [time.monotonic() for line in reply.iter_lines() if line == "event: starter"]
        assert len(times) == 5 and times[-1] - times[0] > 0.3


def test_events_count_once_and_a_bad_one_is_named(server):
    put(server, "u1", "trains")
    impression = ask(server, user_id="u1")["impression_id"]
    assert send(server, impression, 0) == {"recorded": 2}
    assert send(server, impression, 0) == {"recorded": 0}
    assert send(server, impression, 7, status=422)["detail"][0]["loc"] == [
        "body", "events", 1, "slot"]
    forged = impression[:-4] + "AAAA"
    fault = send(server, forged, status=422)["detail"][0]
    assert fault["loc"] == ["body", "events", 0, "impression_id"] and forged not in str(fault)
    assert server.client.get("/v1/ab").json()[0]["taps"] == 1


def test_deletion_leaves_nothing_even_of_an_answer_that_is_being_written(tmp_path):
    with running(tmp_path, FakeEngine(steps=20, seconds=0.02)) as server:
        put(server, "a/b", "trains")  # an id may hold a slash
        replies = []
        slow = threading.Thread(target=lambda: replies.append(ask(server, user_id="a/b", n=7)))
        slow.start()  # beside it lists are written ahead
        wait_for(lambda: any(job.ask.n == 7 for job in [*server.desk.jobs]))
        wait_for(lambda: server.engine.slots)
        removed = server.client.delete("/v1/users/a/b").json()["removed"]
        assert removed["users"] == 1 and removed["sessions"] == 1
        slow.join()
        assert replies[0]["impression_id"] is None
        wait_for(lambda: not server.desk.jobs)
        for table in ("users", "sessions", "lists", "ahead"):
            assert not server.store.db.rows(f"SELECT 1 FROM {table} WHERE user_id='a/b'")
        wait_for(lambda: server.engine.forgotten >= 2)  # by the deletion, and by the answer's end


def test_deleting_nothing_says_so(server):
    put(server, "alice", "trains")
    for path in ("/v1/users/bob", "/v1/users/alice/sessions"):  # the id is alice/sessions
        reply = server.client.delete(path)
        assert reply.status_code == 404
        assert reply.json() == {"detail": "nothing is held of this user"}
    assert server.client.delete("/v1/users/alice").json()["removed"]["sessions"] == 1
    assert server.client.delete("/v1/users/alice").status_code == 404


@pytest.mark.parametrize("name", [
    "alice ", " alice", "alice\x00", "alice\n", "ali  ce", "alice\x7f", "alice\u00a0",
    "alice\ufffd", "..", ".", "../alice", "alice/..", "a/./b"])  # fmt: skip
def test_an_id_that_would_be_another_ones_is_refused(server, name):
    put(server, "alice", "trains")
    for reply in (
        server.client.post("/v1/starters", json={"user_id": name}),
        server.client.put("/v1/users/alice/sessions",
                          json={"sessions": [{"session_id": name, "summary": "tea"}]}),
        server.client.request("DELETE", "/v1/users/" + "".join(f"%{b:02x}" for b in name.encode())),
        server.client.put(f"/v1/users/{''.join(f'%{b:02x}' for b in name.encode())}/sessions",
                          json={"sessions": sessions("tea")}),
    ):
        assert reply.status_code == 422, reply.request.url
        assert "alice" not in reply.text
    assert [s.summary for s in server.store.user("alice").sessions] == ["trains"]
    assert server.store.user_ids() == ["alice"]


def test_half_a_character_is_no_id(server):
    put(server, "alice", "trains")
    for text in (b'{"user_id": "alice\\ud800"}', b'{"user_id": "\\udc00alice"}'):
        reply = server.client.post("/v1/starters", content=text,
                                   headers={"Content-Type": "application/json"})
        assert reply.status_code == 422
    assert server.client.delete("/v1/users/alice%ed%a0%80").status_code == 422
    assert server.client.delete("/v1/users/alice%ff").status_code == 422
    assert server.store.user_ids() == ["alice"]


def test_a_session_id_that_stands_twice_is_refused(server):
    body = {"sessions": [*sessions("tea"), *sessions("trains")]}
    reply = server.client.put("/v1/users/u1/sessions", json=body)
    assert reply.status_code == 422 and "stands twice" in reply.text
    assert server.store.user("u1") is None


def test_lengths_are_told_in_characters(server):
    long = [{"sessions": [{"summary": "x" * 2001}]}, {"user_id": "x" * 201},
            {"exclude": ["x" * 2001]}, {"profile": {"age": "x" * 2001}},
            {"sessions": [{"messages": [{"role": "user", "content": "x" * 32_001}]}]}]
    for body in long:
        (fault,) = ask(server, 422, **body)["detail"]
        assert "characters" in fault["msg"] and "items" not in fault["msg"], fault


def test_examples_are_people_of_the_store(server):
    user = data.User(user_id="u1", profile={"age": "25-34"}, sessions=[])
    server.engine.examples = [user, user.model_copy(update={"user_id": "deleted"})]
    put(server, "u1", "trains", profile={"age": "25-34"})
    assert server.client.get("/v1/examples").json() == [
        {"user_id": "u1", "profile": {"age": "25-34"},
         "sessions": [{"session_id": "s0", "timestamp": None, "summary": "trains"}]}]


# ------------------------------------------------------------------------------ the engine's thread


def test_asks_are_written_in_batches_by_one_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "WINDOW", 0.05)
    with running(tmp_path, FakeEngine(steps=1, seconds=0.05), batch=8) as server:
        asyncio.run(many(server.port, [starters_of(f"subject {i}") for i in range(24)]))
        assert len(server.engine.threads) == 1 and max(server.engine.sizes) == 8
        assert len(server.engine.sizes) < 8


def test_small_asks_go_before_a_large_one_whose_turn_comes_too(tmp_path):
    with running(tmp_path) as server:
        order, write, free = [], server.engine.write, threading.Event()

        def slow(asks, gone):
            order.append([ask.user.sessions[0].summary[:4] for ask in asks])
            free.wait(20)
            return write(asks, gone)

        server.engine.write = slow
        long = {"sessions": [{"summary": "long" + "x" * 1900}] * 20}

        async def one_after_another():
            requests = [starters_of("first"), ("POST", "/v1/starters", long), starters_of("tea")]
            tasks = []
            for i, request in enumerate(requests):
                tasks.append(asyncio.create_task(Connection(server.port).ask(*request)))
                while len(order) + len(server.desk.queue.waiting) <= i:
                    await asyncio.sleep(0.01)
            free.set()
            return await asyncio.gather(*tasks)

        assert {status for status, _, _ in asyncio.run(one_after_another())} == {200}
        assert order == [["firs"], ["tea"], ["long"]]
        desk, now = server.desk, time.monotonic()
        idle = queue.Queue(server.engine, desk.settings, desk.metrics, desk)  # its thread sleeps
    jobs = [queue.Job(Ask(data.User(user_id=str(n), sessions=[
        data.Session(session_id="1", summary="x" * n)]), 5), by_id=False) for n in (2000, 10, 11)]
    for job, waited in zip(jobs, (3, 1, 2), strict=True):
        job.born = now - waited  # the large one came long enough before
    idle.waiting.extend(jobs)
    assert idle._take() == [jobs[0], jobs[2], jobs[1]]
    jobs[0].characters = 10**6
    idle.waiting.extend(jobs)
    assert idle._take() == [jobs[2], jobs[1]] and idle._take() == [jobs[0]]


def test_writing_ahead_gives_way_to_a_client(tmp_path):
    with running(tmp_path, FakeEngine(steps=250, seconds=0.02)) as server:  # 5 s
        put(server, "u1", "trains")
        wait_for(lambda: server.engine.slots)
        server.engine.steps = 1
        started = time.monotonic()
        reply = ask(server, sessions=[{"summary": "tea"}])
        assert len(texts(reply)) == 5 and time.monotonic() - started < 2.5
        wait_for(lambda: server.store.db.rows("SELECT 1 FROM ahead"))  # it was taken up again


def test_a_look_up_is_fast_even_while_lists_are_written_ahead(tmp_path):
    with running(tmp_path) as server:
        put(server, "u1", "trains")
        wait_for(lambda: server.store.db.rows("SELECT 1 FROM ahead"))
        seconds = {}
        for name in ("idle", "writing"):
            if name == "writing":
                server.engine.steps, server.engine.seconds = 10**6, 0.005
                put(server, "u2", "tea")
                wait_for(lambda: server.engine.slots)
            taken = []
            for _ in range(60):
                started = time.perf_counter()
                assert sources(ask(server, user_id="u1")) == {"cached"}
                taken.append(time.perf_counter() - started)
            seconds[name] = statistics.median(taken)
        print(f"look-up: {1000 * seconds['idle']:.1f} ms, {1000 * seconds['writing']:.1f} ms")
        assert max(seconds.values()) < 0.3  # 3 ms on an idle machine; this one may be busy
        server.engine.steps = 1


def test_a_new_round_is_taken_between_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "RELOAD_SECONDS", 0.05)
    with running(tmp_path) as server:
        put(server, "u1", "trains")
        # Else what is still to be written ahead is written by the new round, and lies ready.
        wait_for(lambda: server.engine.asked and not server.desk.jobs)
        first = ask(server, user_id="u1")
        assert first["model"] == "fake-1" and sources(first) == {"cached"}
        server.engine.newer = "fake-2"
        wait_for(lambda: server.engine.version == "fake-2")
        reply = ask(server, user_id="u1")  # more of the round before lie ready
        assert reply["model"] == "fake-2" and sources(reply) == {"generated"}
        assert len(server.engine.asked) == 2


def test_a_failed_batch_is_answered_500_and_the_thread_lives_on(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with running(tmp_path) as server:
        server.engine.fail = "secret"
        assert "secret" not in str(ask(server, 500, sessions=[{"summary": "my illness"}]))
        told = server.client.post(
            "/v1/starters", json={"sessions": [{"summary": "my illness"}], "stream": True})
        assert [name for name, _ in events_of(told.text)] == ["error"]
        put(server, "u1", "my illness")
        wait_for(lambda: server.engine.sizes[2:])
        server.engine.fail = None
        assert len(texts(ask(server, sessions=[{"summary": "tea"}]))) == 5
    assert "ValueError at test_serve.py" in caplog.text
    assert "secret" not in caplog.text and "illness" not in caplog.text


def test_one_bad_ask_fails_no_other_of_its_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "WINDOW", 0.3)

    def fragile(asks, gone):
        for ask in asks:
            if ask.begin:
                ask.begin([], None)
        if any(ask.user.sessions[0].summary == "bad" for ask in asks):
            raise ValueError
        return write(asks, gone)

    with running(tmp_path) as server:
        write, server.engine.write = server.engine.write, fragile
        requests = [starters_of(text, stream=True) for text in ("bad", "tea")]
        bad, good = (text for _, _, text in asyncio.run(many(server.port, requests)))
    assert [name for name, _ in events_of(bad)] == ["interests", "error"]
    names = [name for name, _ in events_of(good)]
    assert names.count("interests") == 1 and names.count("starter") == 5 and names[-1] == "done"


def test_what_takes_too_long_is_answered_504_and_given_up(tmp_path):
    with running(tmp_path, FakeEngine(steps=1000, seconds=0.01), timeout=0.3) as server:
        started = time.monotonic()
        assert "serve.timeout" in ask(server, 504, sessions=[{"summary": "tea"}])["detail"]
        assert time.monotonic() - started < 1
        wait_for(lambda: not server.engine.slots, 1)
        told = server.client.post(
            "/v1/starters", json={"sessions": [{"summary": "tea"}], "stream": True})
        assert events_of(told.text)[-1][0] == "error"
        assert 'rejections_total{reason="timeout"} 2' in server.client.get("/metrics").text


def test_a_failing_store_is_503(server, monkeypatch):
    def full(*_, **__):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(server.store.taps, "record", full)
    reply = server.client.post(
        "/v1/events", json={"events": [{"impression_id": "x", "type": "shown"}]})
    assert reply.status_code == 503 and reply.headers["Retry-After"]


def test_readiness_tells_of_the_store(tmp_path, monkeypatch):
    with running(tmp_path) as server:
        put(server, "u1", "trains")
        usage = shutil.disk_usage(tmp_path)
        assert server.client.get("/readyz").json() == {"status": "ready"}
        monkeypatch.setattr(database.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        reply = server.client.get("/readyz")
        assert reply.status_code == 503 and "store" in reply.json()["detail"]
        monkeypatch.undo()
        # As a disk that turned read-only.
        server.store.db.connection.execute("PRAGMA query_only=ON")
        assert server.client.get("/readyz").status_code == 503
        server.store.db.connection.execute("PRAGMA query_only=OFF")
        assert server.client.get("/readyz").status_code == 200
        for file in tmp_path.glob("serve.sqlite*"):
            file.unlink()
        assert server.client.get("/readyz").status_code == 503
        reply = server.client.put("/v1/users/u1/sessions", json={"sessions": sessions("tea")})
        assert reply.status_code == 503 and "store" in reply.json()["detail"]


def test_a_damaged_store_is_told_by_requests_streams_and_readiness(tmp_path):
    with running(tmp_path) as server:
        server.engine.pool = 2
        put(server, "u1", *(f"trains {i} " + "x" * 900 for i in range(200)))
        wait_for(lambda: server.engine.asked and not server.desk.jobs)
        server.store.db.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with open(server.store.db.path, "r+b") as file:
            size = file.seek(0, 2)
            for place in range(4096, size, 4096):
                file.seek(place)
                file.write(b"\xaa" * 4096)
        server.store.db.connection.execute("PRAGMA cache_size=1")
        server.store.db.connection.execute("PRAGMA shrink_memory")
        assert server.client.post("/v1/starters", json={"user_id": "u1"}).status_code == 503
        assert server.client.get("/readyz").status_code == 503
        assert server.client.get("/livez").status_code == 200
        assert ask(server, sessions=[{"summary": "tea"}])["starters"]  # needs no store
    with pytest.raises(UserError, match="serve.sqlite"):  # one line at the next start
        Store(tmp_path / "serve.sqlite")


@pytest.mark.parametrize("error", [sqlite3.DatabaseError("malformed"), KeyError("secret")])
def test_a_stream_ends_with_an_error_event_whatever_fails(server, monkeypatch, caplog, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(server.desk, "keep", fail)
    body = {"sessions": [{"summary": "tea"}], "stream": True}
    told = events_of(server.client.post("/v1/starters", json=body).text)
    assert told[-1][0] == "error" and "secret" not in str(told) + caplog.text
    assert f"{type(error).__name__} at test_serve.py" in caplog.text


def test_a_user_deleted_by_another_server_of_the_store_stays_deleted(tmp_path):
    """Whatever this one was doing: answering, writing ahead, looking up."""
    with running(tmp_path, FakeEngine(steps=40, seconds=0.05)) as server, \
            contextlib.closing(Store(server.store.db.path)) as other:
        for again in range(2):  # the second time she has come back before
            put(server, "alice", "trains")
            put(server, "bob", *["tea", "more tea"][: again + 1])  # what was ready is stale
            replies = []
            slow = [threading.Thread(
                        target=lambda u=u, r=replies: r.append(ask(server, user_id=u, n=7)))
                    for u in ("alice", "bob", "nobody")]
            for thread in slow:
                thread.start()
            wait_for(lambda: sum(job.ask.n == 7 for job in [*server.desk.jobs]) == 3)
            assert other.delete_user("alice")["users"] == 1
            other.delete_user("nobody")
            for thread in slow:
                thread.join()
            wait_for(lambda: not server.desk.jobs and not server.desk.queue.spare)
            for table in ("users", "sessions", "lists", "ahead"):
                rows = other.db.rows(f"SELECT DISTINCT user_id FROM {table}")
                assert rows == [("bob",)], (table, again)
            assert len([r for r in replies if r["impression_id"]]) == 1


class Rememberer(FakeEngine):
    """Has in memory what a batch has read when it ends; while it is held, a batch goes on."""

    def __init__(self):
        super().__init__()
        self.memory, self.may_end = set(), threading.Event()

    def write(self, asks, gone):
        answers = super().write(asks, gone)
        self.may_end.wait(60)
        self.memory |= {s.summary for ask in asks for s in ask.user.sessions}
        return answers

    def forget(self):
        self.memory.clear()


def test_a_deletion_empties_the_memory_of_every_server_of_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "RELOAD_SECONDS", 0.05)
    with running(tmp_path, Rememberer()) as server, \
            contextlib.closing(Store(server.store.db.path)) as other:
        server.engine.may_end.set()
        for delete in (lambda: server.client.delete("/v1/users/alice"),
                       lambda: other.delete_user("alice")):
            put(server, "alice", "trains")
            wait_for(lambda: server.engine.memory and not server.desk.jobs, 60)
            delete()
            wait_for(lambda: not server.engine.memory, 60)  # though nobody asks for anything
            wait_for(lambda: server.desk.queue.deletions == server.store.deletions(), 60)


def test_memory_is_emptied_after_a_batch_whose_client_has_left(tmp_path):
    with running(tmp_path, Rememberer()) as server:
        server.store.put_sessions("alice", [data.Session(session_id="s", summary="trains")])
        body = {"user_id": "alice", "stream": True}
        with server.client.stream("POST", "/v1/starters", json=body):
            wait_for(lambda: server.engine.asked, 60)
        wait_for(lambda: not server.desk.jobs, 60)
        server.client.delete("/v1/users/alice")
        ended, forget = [], server.engine.forget
        server.engine.forget = lambda: (ended.append(set(server.engine.memory)), forget())
        server.engine.may_end.set()
        wait_for(lambda: ended, 60)
        assert ended == [{"trains"}] and not server.engine.memory


# ------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("body, loc", [
    ({"n": 11}, ["n"]),
    ({"n": "5"}, ["n"]),
    ({"n": True}, ["n"]),
    ({"user_id": ""}, ["user_id"]),
    ({"user_id": "x" * 201}, ["user_id"]),
    ({"user_id": "u1", "sessions": []}, ["sessions"]),
    ({"sessions": [{"summary": "x" * 2001}]}, ["sessions", 0, "summary"]),
    ({"sessions": [{"summary": "fine"}, {}]}, ["sessions", 1]),
    ({"sessions": [{"summary": "x"}] * 501}, ["sessions"]),
    ({"sessions": [{"messages": [{"role": "nobody", "content": "x"}]}]},
     ["sessions", 0, "messages", 0, "role"]),
    ({"sessions": [{"summary": "x", "timestamp": "yesterday"}]}, ["sessions", 0, "timestamp"]),
    ({"sessions": [{"summary": "x"}, {"session_id": "#1", "summary": "y"}]}, ["sessions"]),
    ({"profile": {"pass word": 5}}, ["profile", "*"]),
    ({"exclude": ["x"] * 101}, ["exclude"]),
    ({"method": "GPT"}, ["method"]),
    ({"pass word": 1}, ["*"]),
    ([], []),
])  # fmt: skip
def test_a_bad_field_is_named_and_never_quoted(server, body, loc):
    reply = server.client.post("/v1/starters", json=body)
    assert reply.status_code == 422
    (fault,) = reply.json()["detail"]
    assert fault["loc"] == ["body", *loc] and set(fault) == {"loc", "msg", "type"}
    for quoted in ("xxx", "nobody", "yesterday", "pass word", "GPT"):
        assert quoted not in reply.text


@pytest.mark.parametrize("text", [
    b"{", b"\xff", b'{"n": NaN}', b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}",
    b'{"user_id": "\\ud800"}', b'"\\u0000"', b"",
])  # fmt: skip
def test_broken_json_is_a_client_error(server, text):
    reply = server.client.post("/v1/starters", content=text,
                               headers={"Content-Type": "application/json"})
    assert reply.status_code in (400, 422)


def test_a_large_body_is_refused_with_and_without_a_length(server, monkeypatch):
    monkeypatch.setattr(front, "MAX_BODY", 10_000)
    body = json.dumps({"exclude": ["x" * 1000] * 11}).encode()
    kind = {"Content-Type": "application/json"}
    whole = server.client.post("/v1/starters", content=body, headers=kind)
    chunked = server.client.post(
        "/v1/starters", content=(body[i : i + 500] for i in range(0, len(body), 500)),
        headers=kind)
    for reply in (whole, chunked):
        assert reply.status_code == 413 and "10000 bytes" in reply.json()["detail"]


def test_a_slow_body_is_given_up(tmp_path):
    async def slow():
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /v1/starters HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
                     b"Content-Type: application/json\r\n\r\n{")
        line = await asyncio.wait_for(reader.readline(), 3)
        writer.close()
        return line

    with running(tmp_path, timeout=0.3) as server:
        assert b"408" in asyncio.run(slow())


def opened(server, count, text):
    """So many connections that have sent this text."""
    made = []
    for _ in range(count):
        made.append(socket.create_connection(("127.0.0.1", server.port)))
        with contextlib.suppress(OSError):  # closed already: another needed its place
            made[-1].sendall(text)
    return made


HALF = b"GET /livez HTTP/1.1\r\nHost: loc"


def test_half_a_head_is_given_up_however_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    with running(tmp_path) as server:
        started = time.monotonic()
        (slow,), (idle,) = opened(server, 1, HALF), opened(server, 1, b"")
        (again,) = opened(server, 1, b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert again.recv(99).startswith(b"HTTP/1.1 200")
        again.sendall(HALF)  # of the second request
        with contextlib.suppress(OSError):
            while time.monotonic() - started < 30:
                slow.sendall(b"a")  # a letter at a time
                time.sleep(0.05)
        assert 0.3 < time.monotonic() - started < 20
        for one in (slow, idle, again):
            one.settimeout(2)
            with contextlib.suppress(ConnectionError):
                while one.recv(9999):  # a time-out here: it was not closed
                    pass
            one.close()
        assert ask(server, sessions=[{"summary": "tea"}])["starters"]  # whose connection was kept


def test_half_heads_lock_nobody_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(serve, "descriptors", lambda: 100)  # 50 connections
    with running(tmp_path) as server:
        held = opened(server, 200, HALF)
        wait_for(lambda: len(server.app.state.server.server_state.connections) <= 50)
        for _ in range(2):
            assert httpx.get(f"http://127.0.0.1:{server.port}/livez").status_code == 200
        assert len(server.app.state.server.server_state.connections) <= 50
        for one in held:
            one.close()
    assert not caplog.records


def test_who_never_reads_an_answer_locks_nobody_out(tmp_path, monkeypatch):
    """As many of them as there are places, each with more asked for than the system's buffers."""
    monkeypatch.setattr(connections, "READ_SECONDS", 0.5)
    bound = serve.bound

    def small(*where):  # what accepted connections inherit
        sock = bound(*where)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return sock

    monkeypatch.setattr(serve, "bound", small)
    with running(tmp_path, queue=1, batch=1) as server:  # 8 places
        put(server, "u1", *(f"{k} " + "x" * 1900 for k in range(100)))
        server.engine.examples = [data.User(user_id="u1", sessions=[])]
        deaf = opened(server, 8, b"GET /v1/examples HTTP/1.1\r\nHost: localhost\r\n\r\n" * 40)
        wait_for(lambda: server.desk.in_flight == 8)
        wait_for(lambda: not server.desk.in_flight, 60)
        assert server.client.get("/v1/model").status_code == 200
        for one in deaf:
            one.close()


def test_a_warning_of_a_library_is_logged_seldom():
    seldom, lines = connections.Seldom(), []
    for name, text in [("asyncio", "accept failed")] * 1000 + [("serve", "GET / 200")] * 3:
        record = logging.LogRecord(name, logging.ERROR, "", 0, text, (), None)
        lines += [name] * seldom.filter(record)
    assert lines == ["asyncio", "serve", "serve", "serve"]


def test_bodies_that_dawdle_make_room(tmp_path):
    """As many slow bodies as there are places: the next request is answered, the oldest ended."""
    with running(tmp_path, queue=1, batch=1) as server:  # 8 places
        slow = opened(server, 12, b"POST /v1/starters HTTP/1.1\r\nHost: localhost\r\n"
                      b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
        started = time.monotonic()
        assert len(texts(ask(server, sessions=[{"summary": "tea"}]))) == 5
        assert time.monotonic() - started < 5
        slow[0].settimeout(5)
        assert b"408" in slow[0].recv(999)
        assert slow[11].send(b"}")  # the latest goes on
        for one in slow:
            one.close()


# -------------------------------------------------------------------------------------- who may ask


def calls(app, requests, host="127.0.0.1"):
    """Replies of an app without a server: (method, path, headers) each."""

    async def run():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            return [await client.request(method, path, headers=headers,
                                         json={} if method in ("POST", "PUT") else None)
                    for method, path, headers in requests]

    return asyncio.run(run())


def every_route(app):
    routes = [(method, re.sub(r"\{[^}]*\}", "x", route.path))
              for route in (*app.routes, *serve.router.routes)
              for method in getattr(route, "methods", ())]  # the router itself has none
    assert len(routes) >= 14
    return [r for r in routes if r[1] not in front.OPEN] + [
        ("GET", "/nowhere"), ("GET", "/openapi.json"), ("GET", "/livez/"), ("GET", "/livez%2F.."),
        ("OPTIONS", "/v1/starters"), ("HEAD", "/")]


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_every_route_but_health_needs_the_key_if_one_is_set(tmp_path, monkeypatch, host):
    key = "right-and-long-enough"
    monkeypatch.setenv("ICEBREAKER_KEY", key)
    app = make_app(tmp_path, host=host)

    def basic(password):
        return {"Authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}

    wrong = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}, basic("wrong"),
             {"Authorization": key}, {"Authorization": f"Basic {key}"},
             {"Authorization": f"Bearer {key}\u00ec".encode()}, {"X-Forwarded-For": "127.0.0.1"}]
    for headers in wrong:
        for reply in calls(app, [(*route, headers) for route in every_route(app)]):
            assert reply.status_code == 401, (reply.request.url, headers)
            assert "Basic" in reply.headers["WWW-Authenticate"]
    for headers in ({"Authorization": f"Bearer {key}"}, basic(key)):
        for reply in calls(app, [(*route, headers) for route in every_route(app)]):
            assert reply.status_code not in (401, 403)
    assert [r.status_code for r in calls(app, [("GET", p, {}) for p in front.OPEN])] == [200, 200]


def test_a_line_comes_within_a_second_of_the_start():
    started = time.monotonic()
    made = subprocess.Popen([sys.executable, ROOT / "serve.py", "--run", "nowhere"],
                            stderr=subprocess.PIPE, text=True)
    line, seconds = made.stderr.readline(), time.monotonic() - started
    rest = made.communicate()[1]
    whole = time.monotonic() - started
    assert line.startswith("serve.py: loading") and "error: --run nowhere" in rest
    assert seconds < max(1.0, 0.2 * whole)  # long before the libraries are loaded


def test_another_address_without_a_key_is_refused_at_start(tmp_path, monkeypatch):
    monkeypatch.delenv("ICEBREAKER_KEY", raising=False)
    for key in ("", "k", "x" * 15):  # the last two can be guessed by trying
        monkeypatch.setenv("ICEBREAKER_KEY", key)
        with pytest.raises(UserError, match="ICEBREAKER_KEY"):
            make_app(tmp_path, host="0.0.0.0")
    monkeypatch.delenv("ICEBREAKER_KEY")
    write_json(tmp_path / "config.yaml", {})
    monkeypatch.setattr(sys, "argv", ["serve.py", "--run", str(tmp_path), "--host", "::"])
    monkeypatch.setattr(serve, "Engine", None)  # never reached
    with pytest.raises(UserError, match="ICEBREAKER_KEY"):
        serve.main()
    monkeypatch.setattr(sys, "argv", ["serve.py", "--run", str(tmp_path / "none")])
    with pytest.raises(UserError, match="no run there"):
        serve.main()


@pytest.mark.parametrize("headers, status", [
    ({"Host": "evil.example"}, 403),
    ({"Host": "evil.example:8000"}, 403),
    ({"Host": "127.0.0.1.evil.example"}, 403),
    ({"Host": "localhost"}, 200),
    ({"Host": "[::1]:8000"}, 200),
    ({"Origin": "http://evil.example"}, 403),
    ({"Origin": "null"}, 403),
    ({"Origin": "http://127.0.0.1:3000"}, 403),
    ({"Origin": "http://127.0.0.1"}, 200),
    ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Sec-Fetch-Site": "same-site"}, 403),
    ({"Sec-Fetch-Site": "same-origin"}, 200),
    ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),  # a link to the page
    ({"X-Forwarded-For": "10.0.0.1"}, 403),
    ({"X-Forwarded-Host": "a.example"}, 403),
    ({"X-Real-IP": "10.0.0.1"}, 403),
    ({"Via": "1.1 Caddy"}, 403),
])  # fmt: skip
def test_no_other_site_may_use_a_server_on_this_machine(tmp_path, headers, status, monkeypatch):
    monkeypatch.delenv("ICEBREAKER_KEY", raising=False)
    (reply,) = calls(make_app(tmp_path), [("GET", "/v1/model", headers)])
    assert reply.status_code == status
    if "navigate" in str(headers):
        (reply,) = calls(make_app(tmp_path), [("POST", "/v1/starters", headers)])
        assert reply.status_code == 403


@pytest.mark.parametrize("host, origin, status", [
    ("chat.example", "https://chat.example", 200),
    ("chat.example:443", "https://chat.example", 200),
    ("chat.example", "https://chat.example:443", 200),
    ("CHAT.example:80", "http://chat.example", 200),
    ("chat.example:8000", "http://chat.example:8000", 200),
    ("127.0.0.1:8000", "https://site.example", 200),  # serve.origin
    ("127.0.0.1:8000", "https://site.example:443", 200),
    ("127.0.0.1:8000", "https://site.example:8443", 403),
    ("127.0.0.1:8000", "http://site.example", 403),
    ("127.0.0.1:8000", "https://evil.example", 403),
    ("chat.example", "https://chat.example:8443", 403),
    ("chat.example:8443", "https://chat.example", 403),
    ("chat.example", "https://chat.example.evil.example", 403),
    ("chat.example", "https://chat.example@evil.example", 403),
    ("chat.example", "null", 403),
    ("chat.example", "https://chat.example:port", 403),
    ("", "https://", 403),
])  # fmt: skip
def test_the_own_site_is_known_behind_a_proxy(tmp_path, monkeypatch, host, origin, status):
    monkeypatch.setenv("ICEBREAKER_KEY", "k")
    app = make_app(tmp_path, origin="https://Site.example")
    headers = {"Host": host, "Origin": origin, "X-Forwarded-For": "10.0.0.1",
               "X-Forwarded-Host": "chat.example", "Authorization": "Bearer k"}
    (reply,) = calls(app, [("GET", "/v1/model", headers)])
    assert reply.status_code == status


def test_an_origin_is_a_scheme_and_a_name():
    for wrong in ("chat.example", "https://chat.example/path", "ftp://chat.example"):
        with pytest.raises(UserError, match="serve.origin"):
            load_config(None, [f"serve.origin={wrong}"])


def test_head_is_get_without_a_body(server):
    for path in ("/livez", "/readyz", "/", "/web/app.js", "/v1/model", "/metrics"):
        get, head = (server.client.request(method, path) for method in ("GET", "HEAD"))
        assert head.status_code == get.status_code == 200 and head.content == b""
        assert head.headers["content-type"] == get.headers["content-type"]
    (head,) = calls(server.app, [("HEAD", "/", {})])  # whatever server it runs in
    assert head.content == b"" and int(head.headers["content-length"]) > 1000
    assert server.client.head("/v1/starters").status_code == 405


def test_no_proxy_keeps_a_stream_back(server):
    put(server, "u1", "trains")
    for body in ({"sessions": [{"summary": "tea"}]}, {"user_id": "u1"}):  # written, and ready
        wait_for(lambda: not server.desk.jobs)
        reply = server.client.post("/v1/starters", json={**body, "stream": True})
        assert reply.headers["X-Accel-Buffering"] == "no" and "event: done" in reply.text


def test_a_packed_body_is_of_a_wrong_type(server):
    body = gzip.compress(json.dumps({"sessions": [{"summary": "tea"}]}).encode())
    head = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    reply = server.client.post("/v1/starters", content=body, headers=head)
    assert reply.status_code == 415 and "Content-Encoding" in reply.json()["detail"]


def test_headers_of_every_reply(server):
    kinds = [("GET", "/", 200), ("GET", "/web/app.js", 200), ("GET", "/web/..%2fserve.py", 404),
             ("GET", "/web/nothing", 404), ("GET", "/docs", 200), ("DELETE", "/v1/ab", 405),
             ("POST", "/v1/starters", 415), ("GET", "/livez", 200)]
    for method, path, status in kinds:
        reply = server.client.request(method, path)
        assert reply.status_code == status, path
        assert reply.headers["Content-Security-Policy"] == front.POLICY.decode()
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["Cache-Control"] == "no-store" and reply.headers["X-Request-ID"]
    assert "<script" not in server.client.get("/docs").text


def test_metrics_name_routes_and_no_user(server):
    put(server, "somebody", "trains")
    wait_for(lambda: server.store.db.rows("SELECT 1 FROM ahead"))
    send(server, ask(server, user_id="somebody")["impression_id"])
    ask(server, 422, n=0)
    text = server.client.get("/metrics").text
    assert 'route="/v1/users/{user_id}/sessions",status="2xx"' in text
    assert 'icebreaker_rejections_total{reason="field"} 1.0' in text
    assert 'icebreaker_starters_total{source="cached"} 5.0' in text
    assert "icebreaker_generated_tokens_total 120.0" in text
    for name in ("first_starter_seconds_count", "queue_length", "disconnects_total"):
        assert f"icebreaker_{name}" in text
    assert "somebody" not in text and "trains" not in text


# --------------------------------------------------------------------------------------- under load


def starters_of(summary, **more):
    return "POST", "/v1/starters", {"sessions": [{"summary": summary}], **more}


class Connection:
    """A connection that is kept, over bare asyncio: httpx would be slower than the server."""

    def __init__(self, port):
        self.port, self.streams = port, None

    async def ask(self, method, path, body=None):
        """(status, headers, text). Raises ConnectionError, IncompleteReadError."""
        if self.streams is None or self.streams[1].is_closing():
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        text = b"" if body is None else json.dumps(body).encode()
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                     f"application/json\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = b""
        if "content-length" in headers:
            body = await reader.readexactly(int(headers["content-length"]))
        while "content-length" not in headers:
            size = int(await reader.readline(), 16)
            body += (await reader.readexactly(size + 2))[:-2]
            if not size:
                break
        if headers.get("connection") == "close":
            self.close()
        return int(head[0].split()[1]), headers, body.decode()

    def close(self):
        if self.streams:
            self.streams[1].close()


async def many(port, requests):
    return await asyncio.gather(*(Connection(port).ask(*request) for request in requests))


def test_clients_that_leave_free_their_places(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "WINDOW", 0.3)

    async def leave(server):
        connections = []
        for i in range(50):
            request = starters_of(f"subject {i}", stream=i % 2 == 0)
            connection = Connection(server.port)
            connections.append((connection, asyncio.create_task(connection.ask(*request))))
        while server.engine.slots + len(server.desk.queue.waiting) < 50:
            await asyncio.sleep(0.01)
        for connection, _ in connections:
            connection.close()
        started = time.monotonic()
        while server.engine.slots or server.desk.queue.waiting:
            assert time.monotonic() - started < 1
            await asyncio.sleep(0.002)
        freed = time.monotonic() - started
        await asyncio.gather(*(task for _, task in connections), return_exceptions=True)
        return freed

    with running(tmp_path, FakeEngine(steps=600, seconds=0.05)) as server:
        print(f"50 places free after {1000 * asyncio.run(leave(server)):.0f} ms")
        server.engine.steps = 1
        assert ask(server, sessions=[{"summary": "tea"}])["starters"]
        assert "icebreaker_disconnects_total 50.0" in server.client.get("/metrics").text
        assert not server.desk.jobs


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_while_the_store_is_read_leave_nothing(tmp_path, monkeypatch, stream):
    async def leave():
        connections = [Connection(server.port) for _ in range(5)]
        request = starters_of("tea", stream=stream)
        tasks = [asyncio.create_task(c.ask(*request)) for c in connections]
        while server.desk.in_flight < 5:
            await asyncio.sleep(0.01)
        for connection in connections:
            connection.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    with running(tmp_path, FakeEngine(steps=600, seconds=0.05)) as server:
        look_up = server.desk.look_up
        slow = lambda *words: (time.sleep(0.3), look_up(*words))[1]  # noqa: E731
        monkeypatch.setattr(server.desk, "look_up", slow)
        asyncio.run(leave())
        wait_for(lambda: "icebreaker_disconnects_total 5.0" in server.client.get("/metrics").text)
        wait_for(lambda: not server.desk.jobs and not server.engine.slots, 1)
        assert not server.desk.queue.waiting


SERVE_FAKE = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import serve, test_serve
from types import SimpleNamespace

def engine(config):
    made = test_serve.FakeEngine(steps=5, seconds=0.03)
    users = test_serve.data.read_users({users!r})
    made.run = SimpleNamespace(users={{u.user_id: u for u in users}}, users_file={users!r})
    return made

serve.Engine = engine
serve.script(serve.main)
"""


@contextlib.contextmanager
def started(folder):
    """A process that serves a run in this folder, with a deterministic engine."""
    session = data.Session(session_id="1", summary="tea")
    data.write_users(folder / "users.jsonl", [data.User(user_id="u1", sessions=[session])])
    write_json(folder / "tiny" / "config.yaml", {})  # JSON is YAML
    code = SERVE_FAKE.format(root=str(ROOT), tests=str(ROOT / "tests"),
                             users=str(folder / "users.jsonl"))
    command = [sys.executable, "-c", code, "--run", str(folder / "tiny"), "--port", "0",
               "serve.queue=16", "serve.batch=8"]
    with open(folder / "log", "w") as log:
        made = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        line = made.stdout.readline()
        assert "model fake-1" in line
        made.port, made.folder = int(re.search(r":(\d+) ", line)[1]), folder
        yield made
    finally:
        made.kill()
        made.communicate()


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """The tests below end it."""
    with started(tmp_path_factory.mktemp("process")) as made:
        yield made


def test_overload_is_refused_at_once_and_the_rest_is_served(process):
    met, slowest, waits = Counter(), [], set()

    async def client(number, end):
        connection = Connection(process.port)
        while time.monotonic() < end:
            started = time.monotonic()
            status, headers, _ = await connection.ask(*starters_of(f"subject {number}"))
            met[status] += 1
            if status == 429:
                slowest.append(time.monotonic() - started)
                waits.add(int(headers["retry-after"]))
                await asyncio.sleep(0.1)

    async def crowd():  # four times what the queue and a batch hold
        await asyncio.gather(*(client(i, time.monotonic() + 3) for i in range(4 * (16 + 8))))

    asyncio.run(crowd())
    before = memory(process.pid)
    asyncio.run(crowd())
    grown = memory(process.pid) - before
    assert set(met) == {200, 429} and met[200] > 50 and met[429] > 300
    log = (process.folder / "log").read_text()
    own = [float(x) / 1000 for x in re.findall(r"/v1/starters 429 ([\d.]+) ms", log)]
    ours, theirs = statistics.quantiles(own, n=100), statistics.quantiles(slowest, n=100)
    print(f"{dict(met)}; rejections as clients saw them, of whom 96 share a busy thread: "
          f"median {1000 * theirs[49]:.0f} ms, 95 %: {1000 * theirs[94]:.0f} ms, 99 %: "
          f"{1000 * theirs[98]:.0f} ms; in the server: median {1000 * ours[49]:.1f} ms, 99 %: "
          f"{1000 * ours[98]:.0f} ms, {1000 * max(own):.0f} ms; memory {grown / 2**20:+.1f} MiB")
    # Asked: 0.1 s. The machine may be busy with others, so a test allows for ten times that.
    assert ours[98] < 1.0 and theirs[94] < 1.0 and grown < 20 * 2**20 and min(waits) >= 1


def memory(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_sigterm_lets_requests_in_flight_finish(process):
    met, broken = Counter(), []

    async def client(number):
        connection = Connection(process.port)
        while True:
            sent = time.monotonic()
            try:
                request = starters_of(f"subject {number}", stream=number % 2 == 0)
                status, _, text = await connection.ask(*request)
                met[status] += 1
                assert len(re.findall("question", text)) >= 5
            except (OSError, asyncio.IncompleteReadError):
                return broken.append(sent)

    async def crowd():
        clients = [asyncio.create_task(client(i)) for i in range(16)]
        await asyncio.sleep(1.5)
        process.send_signal(signal.SIGTERM)
        at = time.monotonic()
        await asyncio.gather(*clients)
        return at

    at = asyncio.run(crowd())
    assert process.wait(10) == 0
    assert set(met) == {200} and met[200] >= 32
    early = [at - sent for sent in broken if sent < at - 0.02]
    assert not early, f"in flight and not answered: sent {early} s before the signal"
    log = (process.folder / "log").read_text()
    assert "/v1/starters 200" in log and "Traceback" not in log and "subject" not in log
    assert not (process.folder / "tiny" / "serve.sqlite-wal").exists()  # the store was closed


def test_no_acknowledged_event_is_lost_or_doubled_by_kills(tmp_path):
    """SERVER_KILLS=60 pytest -k kills: the long run."""
    acknowledged: dict[str, list[dict]] = {}  # user -> events

    def client(port, name):
        with contextlib.suppress(httpx.TransportError), \
                httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
            for number in itertools.count():
                user = f"{name}-{number}"
                made = http.post("/v1/starters", json={"user_id": user}).json()["impression_id"]
                events = [{"impression_id": made, "type": "shown"},
                          {"impression_id": made, "type": "tap", "slot": 0}]
                if http.post("/v1/events", json={"events": events}).status_code == 200:
                    acknowledged[user] = events

    for kill in range(int(os.environ.get("SERVER_KILLS", "3"))):
        with started(tmp_path) as process:
            for user, events in [*acknowledged.items()][-2:]:  # said again: known already
                reply = httpx.post(f"http://127.0.0.1:{process.port}/v1/events",
                                   json={"events": events})
                assert reply.json() == {"recorded": 0}, user
            clients = [threading.Thread(target=client, args=(process.port, f"{kill}-{i}"))
                       for i in range(4)]
            for thread in clients:
                thread.start()
            until, before = time.monotonic() + 60, len(acknowledged)
            while len(acknowledged) < before + 2 and time.monotonic() < until:
                time.sleep(0.05)  # a busy machine: a kill before any answer would test nothing
            time.sleep(random.uniform(0, 0.6))
            process.kill()
            for thread in clients:
                thread.join()
    shown = Counter()
    with contextlib.closing(Store(tmp_path / "tiny" / "serve.sqlite")) as store:
        for one in store.taps.shown():
            shown[one.user_id] += 1
            assert one.clicked == [0]
    assert len(acknowledged) >= 3 and not set(acknowledged) - set(shown)
    assert set(shown.values()) == {1}
    print(f"{len(acknowledged)} acknowledged, {len(shown)} kept")


def test_precompute_writes_for_everyone_and_exits(tmp_path, monkeypatch, capsys):
    path = tmp_path / "users.jsonl"
    users = [data.User(user_id=f"u{i}", sessions=[data.Session(session_id="1", summary=f"tea {i}")])
             for i in range(50)]
    data.write_users(path, users)
    write_json(tmp_path / "tiny" / "config.yaml", {})

    def engine(config):
        assert config.run.name == "tiny" and config.run.root == str(tmp_path)
        made = FakeEngine()
        made.run = SimpleNamespace(users={u.user_id: u for u in users}, users_file=path)
        return made

    monkeypatch.setattr(serve, "Engine", engine)
    words = ["serve.py", "--run", str(tmp_path / "tiny"), "--precompute", "serve.batch=8"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    for expected in ("50 of 50 users", "0 of 50 users"):
        serve.main()
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1 and lines[0].startswith(expected)
    store = Store(tmp_path / "tiny" / "serve.sqlite")
    assert len(store.db.rows("SELECT 1 FROM ahead")) == 50
    store.close()


def test_canary_no_text_of_one_user_reaches_another(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    draw, kinds, shares = random.Random(1), Counter(), []

    async def user(number, server, count):
        connection, canary = Connection(server.port), f"canary{number:03d}x"
        user_id, impressions, round_ = f"{canary}-id", [], 0
        known = False
        for _ in range(count):
            kind = draw.choices(["ask", "stream", "refresh", "inline", "put", "events", "delete"],
                                [8, 4, 2, 3, 2, 4, 0.15])[0]
            body = {"user_id": user_id, "n": draw.randint(1, 6), "stream": kind == "stream",
                    "refresh": kind == "refresh", "exclude": [f"{canary} no"] * draw.randint(0, 1),
                    "profile": {"region": canary}}
            if kind == "inline":
                body |= {"user_id": None, "sessions": [{"summary": f"{canary} inline"}]}
            request = ("POST", "/v1/starters", body)
            if kind == "put":
                round_, known = round_ + 1, True
                own = [{"session_id": f"{canary}{round_}", "summary": f"{canary} tea {round_}"}]
                request = ("PUT", f"/v1/users/{user_id}/sessions", {"sessions": own})
            if kind == "events":
                if not impressions:
                    continue
                event = {"impression_id": impressions.pop(), "type": "tap", "slot": 0}
                request = ("POST", "/v1/events", {"events": [event]})
            if kind == "delete":
                request, impressions, known = ("DELETE", f"/v1/users/{user_id}"), [], False
            status, headers, text = await connection.ask(*request)
            assert status == 200 or (kind, status) == ("delete", 404), (kind, status, text)
            kinds[kind] += 1
            found = set(re.findall(r"canary\d+x", text + str(headers)))
            assert found <= {canary}, (kind, found, canary)
            if kind in ("ask", "refresh", "stream", "inline"):
                assert found == {canary}  # the check can fail
                reply = events_of(text)[-1][1] if kind == "stream" else json.loads(text)
                assert (reply["impression_id"] is None) == (kind == "inline")
                if kind != "inline" and known:
                    impressions.append(reply["impression_id"])
                shares.append(sources(reply) == {"cached"})

    async def crowd(server):
        count = -(-CANARY_REQUESTS // 64)
        await asyncio.gather(*(user(i, server, count) for i in range(64)))

    with running(tmp_path, FakeEngine(steps=2, seconds=0.001), queue=128) as server:
        started = time.monotonic()
        asyncio.run(crowd(server))
        print(f"{kinds.total()} requests in {time.monotonic() - started:.1f} s, "
              f"{statistics.mean(shares):.0%} of answers looked up: {dict(kinds)}")
        assert kinds.total() > 0.8 * CANARY_REQUESTS and 0.2 < statistics.mean(shares) < 0.95
        assert len(server.engine.threads) == 1 and max(server.engine.sizes) > 4
        assert "canary" not in server.client.get("/metrics").text
    assert caplog.records and "canary" not in caplog.text


# ---------------------------------------------------------------------------------- the description


def test_no_request_that_the_document_suggests_fails(server, monkeypatch):
    monkeypatch.setattr(front, "MAX_BODY", 2**26)  # 413 would come before 422
    mode, met = schemathesis.GenerationMode, Counter()
    kinds = [mode.POSITIVE, mode.NEGATIVE]
    # The document cannot say that a session has a summary or messages, what an impression id is,
    # or that a text is measured after its space was collapsed.
    beyond = [positive_data_acceptance, negative_data_rejection]

    def check(case):
        met[case.call_and_validate(timeout=10, excluded_checks=beyond).status_code] += 1

    settings = hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None,
                                   suppress_health_check=list(hypothesis.HealthCheck))
    schema = schemathesis.openapi.from_url(f"{server.client.base_url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 15
    for operation in operations:
        for kind in kinds[: 1 if operation.method == "get" else 2]:  # there is no bad GET
            cases = operation.as_strategy(generation_mode=kind)
            settings(hypothesis.given(cases)(check))()
    print(f"by status: {dict(met)}")
    assert met[200] > 20 and met[422] > 20

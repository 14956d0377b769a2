"""IceBreaker over HTTP: starters for a user, histories and taps in, and the page of web/.

    python serve.py --run runs/tiny                  # then open http://127.0.0.1:8000
    python serve.py --run runs/tiny --precompute     # writes lists ahead for every user, and exits
    curl -s http://127.0.0.1:8000/v1/starters -H 'Content-Type: application/json' \\
        -d '{"sessions": [{"summary": "Night trains to Vienna"}], "n": 3}'

A request passes, in this order: front.py (key, origin, size, load), a route, `Desk` of batcher.py
(is the answer in the store? else an ask), `Batcher` (the engine's one thread), `Desk` again (what
is kept of the answer). The API is described by /openapi.json; /docs shows it without a script, as
the usual page loads its scripts from elsewhere, which the content security policy refuses.

No text of a user is in a log, in an error or in a metric, and none becomes a path. Of an ask with
its sessions inline nothing is kept. Retries are safe: PUT replaces, events count once.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import html
import json
import logging
import math
import os
import re
import signal
import socket
import sqlite3
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import prometheus_client as prometheus
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

import data
from config import ROOT, Config, ServeConfig, UserError, file_digest, load_config, script
from serving.desk import Desk, Full, Job, Written, log, precompute, where
from serving.engine import METHODS, Engine
from serving.front import ASK, Front, busy, key_for
from serving.store import Store

STATUSES = (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503, 504)  # beside 200 and 422
MAX_TEXT = 2000  # characters of a summary
TOO_LONG = "not written within serve.timeout; try again"
STORE_FAILED = "the store cannot be used at the moment; try again"

# ----------------------------------------------------------------------- what goes in and comes out


class Interest(BaseModel):
    text: str
    score: float
    kept: bool = Field(description="by the gate: the starters are written for these")


class ShownStarter(BaseModel):
    slot: int
    text: str
    utility: float
    interest: str | None = Field(description="because you asked about ...; null: cold start")
    source: Literal["generated", "cached", "cold start"]


class Reply(BaseModel):
    request_id: str
    impression_id: str | None = Field(description="for /v1/events; null: nothing is kept of it")
    model: str
    method: str
    threshold: float | None
    interests: list[Interest]
    starters: list[ShownStarter] = Field(description="fewer than n where no more are good")


class Held(BaseModel):
    user_id: str
    sessions: int


class Fault(BaseModel):
    detail: str


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Event(Body):
    impression_id: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    type: Literal["shown", "tap"]
    slot: Annotated[int, Field(ge=0, le=100)] | None = None


class Events(Body):
    events: Annotated[list[Event], Field(min_length=1, max_length=100)]


def request_models(limits: ServeConfig) -> SimpleNamespace:
    """The bodies whose limits are settings. A session's messages may be longer than a summary."""
    line = Annotated[data.Text, StringConstraints(max_length=MAX_TEXT)]
    speech = Annotated[data.Text, StringConstraints(max_length=16 * MAX_TEXT)]
    facts = Annotated[dict[data.Name, line], Field(max_length=50)]
    most = Field(max_length=limits.max_sessions)

    class Message(data.Message):
        content: speech

    class Session(data.Session):
        summary: line | None = None
        messages: Annotated[list[Message], Field(max_length=200)] | None = None

    class InlineSession(Session):
        session_id: data.Name | None = None

    class StartersBody(Body):
        user_id: data.Name | None = None
        sessions: Annotated[list[InlineSession], most] | None = None
        profile: facts | None = None
        n: Annotated[int, Field(ge=1, le=10)] = 5
        refresh: bool = False
        exclude: Annotated[list[line], Field(max_length=100)] = []
        method: Literal[METHODS] | None = None
        stream: bool = False

        @field_validator("sessions")
        @classmethod
        def _without_user(cls, sessions, info):
            if sessions is not None and info.data.get("user_id") is not None:
                raise ValueError("either user_id or sessions: inline ones belong to no user")
            return sessions and data.each_once([
                s if s.session_id else s.model_copy(update={"session_id": f"#{i}"})
                for i, s in enumerate(sessions, 1)
            ])

    class SessionsBody(Body):
        sessions: Annotated[list[Session], most]
        profile: facts | None = None

    return SimpleNamespace(Starters=StartersBody, Sessions=SessionsBody)


# ------------------------------------------------------------------------------------------- routes


class Waiter:
    """One client that waits for its job."""

    def __init__(self, desk: Desk, job: Job, request: Request, stream: bool):
        self.desk, self.job, self.request, self.inbox = desk, job, request, asyncio.Queue()
        self.started, self.finished, loop = time.monotonic(), False, asyncio.get_running_loop()

        def tell(item) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self.inbox.put_nowait, item)

        def begin(interests, threshold) -> None:
            shown = [dataclasses.asdict(interest) for interest in interests]
            tell(("interests", {"threshold": threshold, "interests": shown}))

        def emit(starter) -> None:
            job.begun = True
            tell(("starter", dataclasses.asdict(starter)))

        job.tell = tell
        if stream:
            job.ask = dataclasses.replace(job.ask, begin=begin, emit=emit)
        desk.batcher.submit(job)

    @property
    def patience(self) -> float:
        return self.started + self.desk.settings.timeout - time.monotonic()

    async def _kept(self, item: Written | str) -> dict:
        """The reply of what the engine's thread told in the end. Raises HTTPException."""
        self.finished = True
        if isinstance(item, str):
            raise HTTPException(500, item)
        request_id = self.request.state.request_id
        return await asyncio.to_thread(self.desk.keep, self.job, item, request_id)

    def _first(self) -> None:
        self.desk.metrics.first.observe(time.monotonic() - self.started)

    async def reply(self) -> Response:
        left = asyncio.create_task(_left(self.request))
        heard = asyncio.create_task(self.inbox.get())
        try:
            await asyncio.wait({left, heard}, timeout=self.patience, return_when="FIRST_COMPLETED")
            if heard.done():
                reply = await self._kept(heard.result())
                self._first()
                return JSONResponse(reply)
            if left.done():
                return Response(status_code=499)  # for the log: nobody reads it
            self.finished = True
            raise HTTPException(504, TOO_LONG)
        finally:
            left.cancel()
            heard.cancel()
            self.end()

    async def events(self):
        told: Counter[str] = Counter()
        try:
            while isinstance(item := await self._next(), tuple):
                name, value = item
                if name == "interests" and told[name]:  # written again, as its batch had failed
                    continue
                yield sse(name, {"slot": told[name]} | value if name == "starter" else value)
                told[name] += 1
                if name == "starter" and told[name] == 1:
                    self._first()
            reply = await self._kept(item)
            for event in whole_stream(reply, told):
                yield event
        except TimeoutError:
            self.finished = True
            self.desk.metrics.rejections.labels("timeout").inc()
            yield sse("error", {"detail": TOO_LONG})
        except (HTTPException, sqlite3.OperationalError) as error:
            yield sse("error", {"detail": getattr(error, "detail", STORE_FAILED)})

    async def _next(self):
        return await asyncio.wait_for(self.inbox.get(), self.patience)

    def end(self) -> None:
        """The client has its answer or has left: the job's place is free."""
        self.desk.metrics.disconnects.inc(not self.finished)
        self.desk.batcher.leave(self.job)
        self.desk.release(self.job)


class Stream(StreamingResponse):
    """Ends the waiter however the connection ends, even before the first event."""

    def __init__(self, waiter: Waiter):
        super().__init__(waiter.events(), media_type="text/event-stream")
        self.waiter = waiter

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.waiter.end()


async def _left(request: Request) -> None:
    """Return when the client has closed the connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def sse(name: str, value: dict) -> str:
    return f"event: {name}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n"


def whole_stream(reply: dict, told: Counter[str] | None = None) -> list[str]:
    """The events of a reply, but for those that were told by name: the first ones."""
    told = told or Counter()
    events = [("interests", {key: reply[key] for key in ("threshold", "interests")})]
    events = events[told["interests"] :]
    events += [("starter", starter) for starter in reply["starters"][told["starter"] :]]
    return [sse(*event) for event in (*events, ("done", reply))]


def create_app(config: Config, engine: Engine, store: Store, host: str = "127.0.0.1") -> FastAPI:
    """The app that is served on `host`. Raises UserError where that needs a key and has none."""
    key, desk = key_for(config, host), Desk(config, engine, store)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        await asyncio.to_thread(desk.close)

    faults = {status: {"model": Fault} for status in STATUSES}
    app = FastAPI(title="IceBreaker", version="1", docs_url=None, redoc_url=None,
                  redirect_slashes=False, lifespan=lifespan, responses=faults)  # fmt: skip
    app.state.desk, app.state.server = desk, None
    app.add_middleware(Front, desk=desk, host=host, key=key)
    bodies = request_models(config.serve)
    _add_api(app, desk, bodies)
    _add_pages(app, desk)
    fields = {name for model in (*vars(bodies).values(), Event, Events, data.Session, data.Message)
              for name in model.model_fields} | {"body", "path", "user_id"}  # fmt: skip

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError):
        """Which field and why, never what it held: a key of a profile is not named either."""
        faults = [
            {
                "loc": [x if isinstance(x, int) or x in fields else "*" for x in fault["loc"]],
                "msg": fault["msg"],
                "type": fault["type"],
            }
            for fault in error.errors()[:20]
        ]
        return JSONResponse({"detail": faults}, 422)

    @app.exception_handler(sqlite3.OperationalError)
    async def no_store(request: Request, error: sqlite3.OperationalError):
        log.error("store: %s", where(error))
        return JSONResponse({"detail": STORE_FAILED}, 503, {"Retry-After": "1"})

    desk.batcher.thread.start()
    return app


def _add_api(app: FastAPI, desk: Desk, bodies: SimpleNamespace) -> None:
    event = {"type": "object", "properties": {
        "event": {"enum": ["interests", "starter", "done", "error"]},
        "data": {"type": "string", "contentMediaType": "application/json"}}}  # fmt: skip
    stream = {200: {"content": {"text/event-stream": {"schema": event}}}}

    @app.post(ASK, response_model=Reply, responses=stream)
    async def starters(body: bodies.Starters, request: Request):
        """Starters for a user by id, or for the sessions given. stream: server-sent events
        `interests`, `starter` each, `done` with the whole reply, or `error`."""
        if body.method and body.method not in desk.methods:
            raise invalid("method", f"this run has {', '.join(desk.methods)}")
        started = time.monotonic()
        found = await asyncio.to_thread(desk.look_up, body, request.state.request_id)
        if isinstance(found, dict):
            desk.metrics.first.observe(time.monotonic() - started)
            if body.stream:
                return Response("".join(whole_stream(found)), media_type="text/event-stream")
            return JSONResponse(found)
        try:
            waiter = Waiter(desk, found, request, body.stream)
        except Full:
            desk.release(found)
            raise busy(desk) from None
        return Stream(waiter) if body.stream else await waiter.reply()

    @app.put("/v1/users/{user_id:path}/sessions", response_model=Held)
    def put_sessions(user_id: data.Name, body: bodies.Sessions):
        """Append to a user's history; a session_id that is held is replaced."""
        held = desk.put(user_id, body.sessions, body.profile)
        return JSONResponse({"user_id": user_id, "sessions": held})

    @app.delete("/v1/users/{user_id:path}", response_model=dict[str, dict[str, int]])
    def delete_user(user_id: data.Name):
        """Remove everything of a user; how many rows by table."""
        return JSONResponse({"removed": desk.delete(user_id)})

    @app.post("/v1/events", response_model=dict[str, int])
    def events(body: Events):
        """What was shown and tapped: all of these events or none, on the disk when answered.
        How many of them were new."""
        try:
            new = desk.store.record([(e.impression_id, e.type, e.slot) for e in body.events])
        except ValueError as error:  # events[2].slot: reason
            place, _, reason = str(error).partition(": ")
            raise invalid(*re.findall(r"\w+", place), reason) from None
        return JSONResponse({"recorded": new})

    @app.get("/v1/examples")
    def examples():
        """Some simulated people, where the run has them."""
        keys = {"user_id": True, "profile": True,
                "sessions": {"__all__": {"session_id", "timestamp", "summary"}}}  # fmt: skip
        return JSONResponse([u.model_dump(mode="json", include=keys) for u in desk.examples()])

    @app.get("/v1/ab")
    def ab():
        """Taps per shown starter by method."""
        return JSONResponse(desk.store.rates())

    @app.get("/v1/model")
    def model():
        arms = list(desk.arms)
        return {"model": desk.engine.version, "methods": list(desk.methods), "arms": arms}


def invalid(*place_and_reason: str) -> RequestValidationError:
    *place, reason = place_and_reason
    loc = ["body", *(int(x) if x.isdigit() else x for x in place)]
    return RequestValidationError([{"loc": loc, "msg": reason, "type": "value_error"}])


def _add_pages(app: FastAPI, desk: Desk) -> None:
    files = {path.name: path for path in (ROOT / "serving" / "web").iterdir() if path.is_file()}

    @app.get("/livez")
    async def livez():
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz():
        ready = desk.batcher.thread.is_alive() and not getattr(app.state.server, "should_exit", 0)
        return JSONResponse({"status": "ready" if ready else "stopping"}, 200 if ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics():
        text = prometheus.generate_latest(desk.metrics.registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    def docs():
        parts = [
            f"<h2>{verb.upper()} {path}</h2><pre>{html.escape(json.dumps(text, indent=1))}</pre>"
            for path, verbs in app.openapi()["paths"].items() for verb, text in verbs.items()
        ]  # fmt: skip
        schemas = html.escape(json.dumps(app.openapi()["components"], indent=1))
        return HTMLResponse(f"<h1>IceBreaker</h1>{''.join(parts)}<pre>{schemas}</pre>")

    @app.get("/", include_in_schema=False)
    @app.get("/web/{name}", include_in_schema=False)
    def page(name: str = "index.html"):
        if name not in files:
            raise HTTPException(404, "no such page")
        return FileResponse(files[name])


# ----------------------------------------------------------------------------------------- commands


def bound(host: str, port: int) -> socket.socket:
    """A socket at the address, before any model is loaded for nothing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, or asyncio leaves Nagle's algorithm on: 40 ms a reply.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: {error}") from None
    return sock


def serve(app: FastAPI, sock: socket.socket) -> None:
    """Until SIGTERM or SIGINT; requests that are in flight then are finished."""
    grace = math.ceil(app.state.desk.settings.timeout) + 1
    app.state.server = uvicorn.Server(uvicorn.Config(
        app, ws="none", lifespan="on", log_config=None, access_log=False, proxy_headers=False,
        server_header=False, timeout_graceful_shutdown=grace))  # fmt: skip
    app.state.server.run(sockets=[sock])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", default=str(ROOT / "runs" / "tiny"), help="folder of a run")
    parser.add_argument("--host", default="127.0.0.1", help="any other address needs a key")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--precompute", action="store_true", help="write lists ahead, and exit")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    run = Path(arguments.run).resolve()
    if not (run / "config.yaml").is_file():
        raise UserError(f"--run {arguments.run}: no run there; python train.py makes runs/tiny")
    config = load_config(run / "config.yaml", arguments.settings)
    config.run.root, config.run.name = str(run.parent), run.name
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again when done
    # A core is left for HTTP: with all of them the engine's threads wait for each other.
    torch.set_num_threads(max(1, min(torch.get_num_threads(), os.cpu_count() - 1)))
    sys.setswitchinterval(0.0005)  # a request need not wait 5 ms for the engine's thread
    sock = None
    if not arguments.precompute:
        key_for(config, arguments.host)
        sock = bound(arguments.host, arguments.port)
    path = config.serve.store or run / "serve.sqlite"
    store = Store(path, max_sessions=config.serve.max_sessions)
    engine = Engine(config)
    store.import_users(engine.p.users.values(), file_digest(engine.p.users_file))
    if sock is None:
        print(precompute(Desk(config, engine, store)))
        store.close()
        return
    app = create_app(config, engine, store, arguments.host)
    gc.collect()
    gc.freeze()  # or a full collection looks at all of torch, and everyone waits for 0.3 s
    sock.listen(2048)  # who comes before uvicorn is ready waits
    host, port = sock.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    users = len(store.user_ids())
    print(f"{address}  model {engine.version}, {users} users; Ctrl-C ends", flush=True)
    serve(app, sock)


if __name__ == "__main__":
    script(main)

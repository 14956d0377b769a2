"""IceBreaker over HTTP: starters for a user, histories and taps in, and the page of web/.

    python serve.py --run runs/default                  # then open http://127.0.0.1:8000
    python serve.py --run runs/garm                     # next queries inside a conversation
    python serve.py --run runs/default --precompute     # writes lists ahead for all, and exits

A request passes, in this order, these files of serving/: front.py (key, origin, size, load), a
route below, desk.py (is the answer in the store? else an ask), queue.py (the engine's one
thread), engine.py or suggest.py (the models), desk.py again (what is kept of the answer). The API
is described by /openapi.json, which /docs shows, and docs/serving.md has examples.

No text of a user is in a log, in an error or in a metric, and none becomes a path. Of an ask with
its sessions inline nothing is kept. Retries are safe: PUT replaces, events count once.
"""

import argparse
import asyncio
import contextlib
import gc
import logging
import math
import os
import signal
import socket
import sqlite3
import sys
import time
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":  # what follows takes seconds to import, and models some more
    print("serve.py: loading; the address comes when it answers", file=sys.stderr, flush=True)

import prometheus_client as prometheus
import torch
import uvicorn
import yaml
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException as AnyHTTPException

import garm
from config import Config, load_config
from files import ROOT, UserError, file_digest, script
from serving import bodies, openwebui
from serving.answers import Answers
from serving.connections import Seldom, descriptors, limited
from serving.desk import Desk, precompute
from serving.engine import Engine
from serving.front import Front, busy, is_loopback, key_for, refusal
from serving.queue import Full, Job, log, where
from serving.store import Store
from serving.suggest import Suggestions
from serving.taps import BadEvent
from serving.waiter import STORE_FAILED, UNBUFFERED, Stream, Waiter, whole_stream

STATUSES = (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503, 504)  # beside 200 and 422
# Looked up by name: no path is made of what a client sent.
PAGES = {path.name: path for path in (ROOT / "serving" / "web").iterdir() if path.is_file()}


def create_app(config: Config, engine: Engine | Suggestions, store: Store,
               host: str = "127.0.0.1") -> FastAPI:
    """The app that is served on `host`. Raises UserError where that needs a key and has none."""
    key, desk = key_for(host), Desk(config, engine, store)
    app = FastAPI(title="IceBreaker", version="1", docs_url=None, redoc_url=None,
                  redirect_slashes=False, lifespan=lifespan,
                  responses={status: {"model": bodies.Fault} for status in STATUSES},
                  exception_handlers={RequestValidationError: refuse,
                                      AnyHTTPException: refuse_shortly,
                                      sqlite3.DatabaseError: no_store})
    app.state.desk, app.state.server = desk, None  # server: uvicorn's, while it serves
    app.state.answers = Answers(config.endpoint) if config.endpoint.model else None
    app.add_middleware(Front, desk=desk, host=host, key=key)  # before every route, also new ones
    app.include_router(router)
    desk.queue.thread.start()  # last: before, only this thread uses the models
    return app


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI):
    yield
    await asyncio.to_thread(app.state.desk.close)  # when all requests are finished


async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
    # Which field and why, never what it held: a key of a profile is not named either.
    faults = [{"loc": [part if isinstance(part, int) or part in bodies.FIELDS else "*"
                       for part in fault["loc"]], "msg": fault["msg"], "type": fault["type"]}
              for fault in error.errors()[:20]]  # of a body with thousands of faults
    if openwebui.is_path(request.url.path):
        place = ".".join(map(str, faults[0]["loc"][1:]))
        place = "body" if place[:1] in "0123456789" else place  # no JSON, from a character on
        return refusal(request.url.path, HTTPException(400, f"{place}: {faults[0]['msg']}"))
    return JSONResponse({"detail": faults}, 422)


async def refuse_shortly(request: Request, error: AnyHTTPException) -> JSONResponse:
    return refusal(request.url.path, error)


async def no_store(request: Request, error: sqlite3.DatabaseError) -> JSONResponse:
    log.error("store: %s", where(error))  # a full disk, a process that holds the file, damage
    return refusal(request.url.path, HTTPException(503, STORE_FAILED, {"Retry-After": "1"}))


def invalid(reason: str, *place: str | int) -> RequestValidationError:
    # Of a field that pydantic lets through.
    return RequestValidationError([{"loc": ["body", *place], "msg": reason, "type": "value_error"}])


# ------------------------------------------------------------------------------------------- routes

router = APIRouter()
# FastAPI cannot tell from the code that a route may answer with events.
EVENTS = {200: {"content": {"text/event-stream": {"schema": {"type": "object", "properties": {
    "event": {"enum": ["interests", "starter", "context", "suggestion", "text", "done", "error"]},
    "data": {"type": "string", "contentMediaType": "application/json"}}}}}}}


async def _desk(request: Request) -> Desk:  # async, or it would take a thread
    return request.app.state.desk


AppDesk = Annotated[Desk, Depends(_desk)]


async def _starters(desk: AppDesk) -> None:
    if desk.task != "starters":
        raise HTTPException(404, "this run suggests next queries (POST /v1/suggestions); starters "
                            "need a run of run.method=icebreaker")


async def _suggestions(desk: AppDesk) -> None:
    if desk.task != "suggestions":
        raise HTTPException(404, "this run writes starters (POST /v1/starters); next queries need "
                            "a run of run.method=garm or qualeqs")


STARTERS, SUGGESTIONS = [Depends(_starters)], [Depends(_suggestions)]


def waiter_of(desk: Desk, job: Job, request: Request, stream: bool = False) -> Waiter:
    try:
        return Waiter(desk, job, request, stream)
    except Full:
        desk.release(job)
        raise busy(desk) from None


@router.post("/v1/starters", response_model=bodies.Reply, responses=EVENTS, dependencies=STARTERS)
async def starters(body: bodies.StartersBody, request: Request, desk: AppDesk):
    """Starters for a user by id, or for the sessions given. stream: server-sent events
    `interests`, `starter` each, `done` with the whole reply, or `error`."""
    if body.method and body.method not in desk.engine.methods:
        raise invalid(f"this run has {', '.join(desk.engine.methods)}", "method")
    check_number(body.sessions or [], desk)
    started = time.monotonic()
    # In a thread: the store may wait for its disk, and the loop for nobody.
    ready = await asyncio.to_thread(desk.look_up, body, request.state.request_id)
    if isinstance(ready, dict):
        desk.metrics.first.observe(time.monotonic() - started)
        if body.stream:
            return Response("".join(whole_stream(ready)), 200, UNBUFFERED, "text/event-stream")
        return JSONResponse(ready)
    # Whether there is room is asked only now, as what is in the store needs no place.
    waiter = waiter_of(desk, ready, request, body.stream)
    return Stream(waiter) if body.stream else await waiter.reply()


@router.post("/v1/suggestions", response_model=bodies.SuggestionsReply, responses=EVENTS,
             dependencies=SUGGESTIONS)
async def suggestions(body: bodies.SuggestionsBody, request: Request, desk: AppDesk):
    """Next queries behind the turns of a conversation, or a declined answer. stream: server-sent
    events `context`, `suggestion` each, `done` with the whole reply, or `error`."""
    # In a thread: the store may wait for its disk.
    job = await asyncio.to_thread(desk.ask_next, body.turns, body.n, body.user_id, body.language)
    waiter = waiter_of(desk, job, request, body.stream)
    return Stream(waiter) if body.stream else await waiter.reply()


@router.post("/v1/answers", responses=EVENTS)
async def answers(body: bodies.AnswerBody, request: Request, desk: AppDesk):
    """The answer of the chat model at endpoint.model to a conversation, of which nothing is kept.
    Server-sent events `text` each, then `done`, or `error`."""
    if (chat := request.app.state.answers) is None:
        raise HTTPException(404, "no chat model answers here: start with endpoint.base_url=... "
                            "endpoint.model=...")
    if not (answering := chat.begin(body.turns)):
        raise busy(desk)
    return Stream(answering)


OPENAI = {status: {"model": openwebui.ChatFault} for status in STATUSES}


@router.get("/v1/models", responses=OPENAI, dependencies=SUGGESTIONS)
async def models():
    return openwebui.MODELS


@router.get("/v1/models/{name:path}", responses=OPENAI, dependencies=SUGGESTIONS)
async def one_of_the_models(name: str):
    openwebui.check_model(name)
    return openwebui.MODELS["data"][0]


@router.post("/v1/chat/completions", responses=OPENAI, dependencies=SUGGESTIONS)
async def chat_completions(body: openwebui.ChatBody, request: Request, desk: AppDesk):
    """Open WebUI's follow-up task, as of OpenAI's API; its title and tag tasks get empty answers.
    """
    openwebui.check_model(body.model)
    task, turns = openwebui.read_task(body.messages[-1].text)
    request_id = request.state.request_id
    if task in openwebui.EMPTY:
        return openwebui.completion(openwebui.EMPTY[task], request_id, body.stream)
    if task != openwebui.FOLLOW_UPS or not any(turn.role == "user" for turn in turns):
        raise HTTPException(400, "messages: this model answers Open WebUI's follow-up task alone: "
                            'a prompt that asks for {"follow_ups": [...]}, then <chat_history> '
                            "with a line USER: ... in it")
    job = await asyncio.to_thread(desk.ask_next, turns, garm.NUM_SUGGESTIONS)  # nobody's
    reply = await waiter_of(desk, job, request).whole()
    if reply is None:
        return Response(status_code=499)
    texts = [suggestion["text"] for suggestion in reply["suggestions"]]
    return openwebui.completion({openwebui.FOLLOW_UPS: texts}, request_id, body.stream)


def check_number(sessions: list, desk: Desk) -> None:
    if len(sessions) > (most := desk.store.max_sessions):
        raise invalid(f"more than {most}", "sessions")


@router.put("/v1/users/{user_id:path}/sessions", response_model=dict[str, str | int],
            dependencies=STARTERS)
def put_sessions(user_id: bodies.Id, body: bodies.SessionsBody, desk: AppDesk):
    """Append to a user's history; a session_id that is held is replaced. How many are held."""
    # No async, here and below: FastAPI takes a thread, which may wait for the disk.
    check_number(body.sessions, desk)
    held = desk.put(user_id, body.sessions, body.profile)
    return JSONResponse({"user_id": user_id, "sessions": held})


@router.delete("/v1/users/{user_id:path}", response_model=dict[str, dict[str, int]])
def delete_user(user_id: bodies.Id, desk: AppDesk):
    """Remove everything of a user; how many rows by table."""
    if not any((removed := desk.delete(user_id)).values()):  # an id that was mistyped, say
        raise HTTPException(404, "nothing is held of this user")
    return JSONResponse({"removed": removed})


@router.post("/v1/events", response_model=dict[str, int])
def events(body: bodies.EventsBody, desk: AppDesk):
    """What was shown and tapped: all of these events or none, on the disk when answered.
    How many of them were new."""
    try:
        new = desk.store.taps.record([(e.impression_id, e.type, e.slot) for e in body.events])
    except BadEvent as error:
        raise invalid(error.reason, *error.place) from None
    return JSONResponse({"recorded": new})


@router.get("/v1/examples")
def examples(desk: AppDesk):
    """Some simulated people, where the run has them."""
    # Without messages, which the page does not show.
    keys = {"user_id": True, "profile": True,
            "sessions": {"__all__": {"session_id", "timestamp", "summary"}}}
    return JSONResponse([u.model_dump(mode="json", include=keys) for u in desk.examples()])


@router.get("/v1/ab")
def ab(desk: AppDesk):
    """Taps per shown starter by method."""
    return JSONResponse(desk.store.taps.rates())


@router.get("/v1/model")
def model(request: Request, desk: AppDesk):
    """What writes; chat: the model behind /v1/answers, null where there is none."""
    chat = request.app.state.answers
    return {"model": desk.engine.version, "task": desk.task, "methods": desk.engine.methods,
            "arms": list(desk.arms), "chat": chat and chat.settings.model}


@router.get("/livez")
async def livez():  # the process runs
    return {"status": "alive"}


@router.get("/readyz")
async def readyz(request: Request, desk: AppDesk):
    # And takes requests: not any more once it was told to stop.
    if getattr(request.app.state.server, "should_exit", 0) or not desk.queue.thread.is_alive():
        return JSONResponse({"status": "stopping"}, 503)
    await asyncio.to_thread(desk.store.db.check)  # else no_store answers
    return {"status": "ready"}


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(desk: AppDesk):
    text = prometheus.generate_latest(desk.metrics.registry)
    return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)


@router.get("/docs", include_in_schema=False)
def docs(request: Request):  # as text: FastAPI's page needs scripts from elsewhere
    return PlainTextResponse(yaml.safe_dump(request.app.openapi(), sort_keys=False))


@router.get("/", include_in_schema=False)
@router.get("/web/{name}", include_in_schema=False)
def page(name: str = "index.html"):
    if name not in PAGES:
        raise HTTPException(404, "no such page")
    return FileResponse(PAGES[name])


# ----------------------------------------------------------------------------------------- commands


def bound(host: str, port: int) -> socket.socket:
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
    grace = math.ceil(app.state.desk.settings.timeout) + 1  # seconds
    app.state.server = uvicorn.Server(limited(  # front.py logs, without texts and addresses
        app, descriptors(), ws="none", lifespan="on", log_config=None, access_log=False,
        proxy_headers=False, server_header=False, timeout_graceful_shutdown=grace))
    app.state.server.run(sockets=[sock])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", default=str(ROOT / "runs" / "default"), help="folder of a run")
    parser.add_argument("--host", default="127.0.0.1", help="any other address needs a key")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--precompute", action="store_true", help="write lists ahead, and exit")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    run = Path(arguments.run).resolve()
    if not (run / "config.yaml").is_file():
        raise UserError(f"--run {arguments.run}: no run there; python train.py makes runs/default")
    config = load_config(run / "config.yaml", arguments.settings)
    config.run.root, config.run.name = str(run.parent), run.name  # wherever it was moved to
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)  # a line a request; libraries say warnings alone
    logging.getLogger().handlers[0].addFilter(Seldom())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again when done
    # A core is left for HTTP: with all of them the engine's threads wait for each other.
    torch.set_num_threads(max(1, min(torch.get_num_threads(), os.cpu_count() - 1)))
    sys.setswitchinterval(0.0005)  # a request need not wait 5 ms for the engine's thread
    if not arguments.precompute:  # both before any model is loaded for nothing
        key_for(arguments.host)
        sock = bound(arguments.host, arguments.port)
    if arguments.precompute and config.run.method != "icebreaker":
        raise UserError("--precompute: next queries follow what is said, and are not written ahead")
    store = Store(config.serve.store or run / "serve.sqlite")
    if config.run.method != "icebreaker":
        engine = Suggestions(config)
    else:
        engine = Engine(config)
        store.import_users(engine.run.users.values(), file_digest(engine.run.users_file))
    if arguments.precompute:
        print(precompute(Desk(config, engine, store)))
        store.close()  # the desk's thread was never started
        return
    app = create_app(config, engine, store, arguments.host)
    if not is_loopback(arguments.host):
        log.warning("HTTP is readable on its way, the key too: let a proxy with TLS (Caddy, nginx) "
                    "stand before it, and see docs/serving.md")
    gc.collect()
    gc.freeze()  # or a full collection looks at all of torch, and everyone waits for 0.3 s
    sock.listen(2048)  # who comes before uvicorn is ready waits
    host, port = sock.getsockname()[:2]  # --port 0: a free one
    address = f"[{host}]" if ":" in host else host  # of IPv6
    print(f"http://{address}:{port}  model {engine.version}, {len(store.user_ids())} users; "
          "Ctrl-C ends", flush=True)
    serve(app, sock)


if __name__ == "__main__":
    script(main)

"""A client that waits for its answer: for the whole, or for a stream of events as it is written.

Events (server-sent): `interests`, one `starter` each, `done` with the whole reply, or `error`; of
next queries `context` and one `suggestion` each in their place.
"""

import asyncio
import contextlib
import dataclasses
import json
import sqlite3
import time
from collections import Counter
from typing import NamedTuple

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic_core import to_jsonable_python

from serving.desk import Desk
from serving.engine import Answer
from serving.queue import Job, log, where

UNBUFFERED = {"X-Accel-Buffering": "no"}  # or nginx keeps all events until the last
STORE_FAILED = "the store cannot be used at the moment; try again"


class Names(NamedTuple):
    """What the parts of a reply are called as events: its head, then one event an item."""

    head: str
    fields: tuple[str, ...]  # of the reply that the head tells, as Ask.begin is called with them
    item: str
    items: str  # field of the reply


STARTERS = Names("interests", ("interests", "threshold"), "starter", "starters")
NEXT = Names("context", ("cut",), "suggestion", "suggestions")


class Waiter:
    """One client that waits for its job. Raises queue.Full."""

    def __init__(self, desk: Desk, job: Job, request: Request, stream: bool):
        self.desk, self.job, self.request = desk, job, request
        self.inbox: asyncio.Queue = asyncio.Queue()  # (event, value) pairs, then an answer
        self.started, self.finished = time.monotonic(), False  # finished: it did not leave early
        names = self.names = NEXT if job.ask.turns else STARTERS
        loop = asyncio.get_running_loop()

        def tell(item) -> None:  # called from the engine's thread, as are the next two
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self.inbox.put_nowait, item)

        def begin(*head) -> None:
            tell((names.head, dict(zip(names.fields, to_jsonable_python(head), strict=True))))

        def emit(item) -> None:
            job.begun = True
            tell((names.item, dataclasses.asdict(item)))

        job.tell = tell
        if stream:  # else the engine need not look at every step for starters that are whole
            job.ask = dataclasses.replace(job.ask, begin=begin, emit=emit)
        desk.queue.submit(job)

    async def _next(self):  # raises HTTPException after serve.timeout seconds in all
        patience = self.started + self.desk.settings.timeout - time.monotonic()
        try:
            return await asyncio.wait_for(self.inbox.get(), patience)
        except TimeoutError:
            self.finished = True
            raise HTTPException(504, "not written within serve.timeout; try again") from None

    async def _kept(self, item: Answer | str) -> dict:  # the reply; raises HTTPException for a text
        self.finished = True
        if isinstance(item, str):
            raise HTTPException(500, item)
        request_id = self.request.state.request_id
        # In a thread, as the store may wait for its disk.
        return await asyncio.to_thread(self.desk.keep, self.job, item, request_id)

    def _note_first(self) -> None:
        self.desk.metrics.first.observe(time.monotonic() - self.started)

    async def reply(self) -> Response:
        reply = await self.whole()
        return Response(status_code=499) if reply is None else JSONResponse(reply)

    async def whole(self) -> dict | None:
        """The reply; None: the client has left, and nobody reads one (499, for the log)."""
        # Behind the body, which was read, comes only that the client has left.
        left = asyncio.create_task(self.request.receive())
        heard = asyncio.create_task(self._next())
        try:
            await asyncio.wait({left, heard}, return_when="FIRST_COMPLETED")
            if not heard.done():
                return None
            reply = await self._kept(heard.result())
            self._note_first()
            return reply
        finally:
            left.cancel()
            heard.cancel()
            self.end()

    async def events(self):
        told: Counter[str] = Counter()
        try:
            while isinstance(item := await self._next(), tuple):  # else the answer or an error
                name, value = item
                if name == self.names.head and told[name]:  # written again, as its batch had failed
                    continue
                if name == self.names.item:
                    value = {"slot": told[name]} | value
                    if not told[name]:
                        self._note_first()
                told[name] += 1
                yield sse(name, value)
            for event in whole_stream(await self._kept(item), told):
                yield event
        except HTTPException as error:
            if error.status_code == 504:  # the status of the reply was 200 long ago
                self.desk.metrics.rejections.labels("timeout").inc()
            yield sse("error", {"detail": error.detail})
        except sqlite3.DatabaseError as error:
            log.error("store: %s", where(error))
            yield sse("error", {"detail": STORE_FAILED})
        except Exception as error:  # else the stream would be cut without a word
            log.error("a stream: %s", where(error))
            yield sse("error", {"detail": "internal error; the server's log says where"})

    def end(self) -> None:  # the client has its answer or has left: the job's place is free
        self.desk.metrics.disconnects.inc(not self.finished)  # by 0 or 1
        self.desk.queue.leave(self.job)
        self.desk.release(self.job)


class Stream(StreamingResponse):  # ends the waiter however the connection ends
    def __init__(self, waiter: Waiter):
        super().__init__(waiter.events(), media_type="text/event-stream", headers=UNBUFFERED)
        self.waiter = waiter

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)  # cancelled where the client leaves
        finally:  # a generator's own does not run where it never began
            self.waiter.end()


def sse(name: str, value: dict) -> str:
    return f"event: {name}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n"


def whole_stream(reply: dict, told: Counter[str] | None = None) -> list[str]:
    """The events of a reply, but for those that were told by name: the first ones."""
    told, names = told or Counter(), NEXT if NEXT.items in reply else STARTERS
    head = [(names.head, {key: reply[key] for key in names.fields})]
    # Those that were streamed come first in the reply, in the same order.
    items = [(names.item, item) for item in reply[names.items][told[names.item] :]]
    return [sse(*event) for event in (*head[told[names.head] :], *items, ("done", reply))]

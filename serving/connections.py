"""Below HTTP: how many connections there may be, for how long one may say or read nothing, its log.

uvicorn bounds none: some hundred clients that each send half a request's head, or never read what
they asked for, would keep all others out, and where no file descriptor is left, asyncio writes a
traceback for every try.
"""

import logging
import resource
import time

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0  # for the head of a request, from the first byte or the connection on
READ_SECONDS = 30.0  # in which a client must read what fills a buffer (asyncio's: 48 kB)
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
LOG_SECONDS = 10.0  # between two equal warnings of libraries


def descriptors(wanted: int = 8192) -> int:
    """How many file descriptors this process may have, after asking for that many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(soft, wanted)


def limited(app, limit: int, **settings) -> uvicorn.Config:
    """uvicorn's settings for at most limit / 2 connections; limit: file descriptors."""
    class Bounded(Connection):
        # The rest: what waits to be accepted, files, the store.
        most_connections = max(1, limit // 2)

    return uvicorn.Config(app, http=Bounded, backlog=max(1, limit // 4), **settings)


class Connection(H11Protocol):
    """One that is closed where a head takes too long, where its answer is not read, or where
    another needs its place."""

    most_connections = 1000
    timer = None  # runs while no request is under way
    unread = None  # runs while the buffer of what is sent is full

    @property
    def silent(self) -> "dict[Connection, None]":
        """The connections of this server without a request, the oldest first."""
        return self.server_state.__dict__.setdefault("silent", {})

    def connection_made(self, transport) -> None:
        # Whoever says nothing makes room; where all are at work, the newcomer is turned away.
        crowded = len(self.connections) >= self.most_connections
        super().connection_made(transport)
        if crowded:
            next(iter(self.silent), self).transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._watch(lost=True)
        if self.unread:
            self.unread.cancel()

    def _watch(self, lost: bool = False) -> None:
        if self.conn.their_state is h11.IDLE and not lost:
            # Not begun anew with each byte: they may come one by one for ever.
            self.timer = self.timer or self.loop.call_later(HEAD_SECONDS, self._give_up)
            self.silent.setdefault(self)
        elif self.timer:
            self.timer.cancel()
            self.timer = None
            self.silent.pop(self, None)

    def _give_up(self) -> None:
        self.transport.write(TOO_SLOW)
        self.transport.close()


class Seldom(logging.Filter):
    """Lets a warning of a library through once in LOG_SECONDS: clients can cause as many as they
    like. Of requests the server logs itself, in front.py."""

    def __init__(self):
        super().__init__()
        self.last: dict[tuple, float] = {}  # when each was last let through

    def filter(self, record: logging.LogRecord) -> bool:
        what, now = (record.name, record.levelno, str(record.msg)), time.monotonic()
        if record.name == "serve" or now - self.last.get(what, -LOG_SECONDS) >= LOG_SECONDS:
            self.last = {what: now} if len(self.last) > 1000 else self.last | {what: now}
            return True
        return False

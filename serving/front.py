"""What every request passes before it reaches a route of serve.py: key, origin, size, load.

On the way back: headers that shut scripts and other sites out, one line of log, metrics. It is
plain ASGI, as a wrapper that reads requests itself hides from a route that its client has left.
"""

import asyncio
import base64
import binascii
import contextlib
import hmac
import ipaddress
import os
import time
import uuid
from urllib.parse import urlsplit

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from files import UserError
from serving import openwebui
from serving.desk import Desk
from serving.queue import log, where

MAX_BODY = 2**20  # bytes
KEY_VARIABLE = "ICEBREAKER_KEY"  # of the environment: the clients' key
SHORTEST_KEY = 16  # characters
OPEN = ("/livez", "/readyz")  # for whoever watches the process; they say nothing of a user
POLICY = b"default-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
HEADERS = [(b"content-security-policy", POLICY), (b"x-content-type-options", b"nosniff"),
           (b"referrer-policy", b"no-referrer"), (b"cache-control", b"no-store")]
# The metric `rejections` counts statuses under these names.
REASONS = {401: "key", 403: "origin", 408: "slow", 413: "size", 415: "type", 422: "field",
           429: "queue", 504: "timeout"}


def is_loopback(name: str | None) -> bool:
    with contextlib.suppress(ValueError):  # a name, not an address
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost"


def key_for(host: str) -> str:
    """The clients' key. Raises UserError where an address needs one and there is none."""
    key = os.environ.get(KEY_VARIABLE, "")
    if not key and not is_loopback(host):
        raise UserError(f"--host {host}: others can reach this address; put the key that clients "
                        f"must send in the variable {KEY_VARIABLE}")
    if len(key) < SHORTEST_KEY and not is_loopback(host):  # else it can be guessed by trying
        raise UserError(f"{KEY_VARIABLE}: a key of at least {SHORTEST_KEY} characters, as "
                        "others can reach the server; openssl rand -hex 16 makes one")
    return key


class Front:
    """The outermost layer (ASGI): what it does not let through reaches no route, a new one too."""

    def __init__(self, app, desk: Desk, host: str, key: str):
        self.app, self.desk, self.settings = app, desk, desk.settings
        self.local, self.key = is_loopback(host), key.encode()
        # Requests under way: asks beyond the queue are refused by it, this bounds all others.
        self.most = 4 * (self.settings.queue + self.settings.batch)
        self.reading: dict[asyncio.Timeout, None] = {}  # bodies on their way, the oldest first

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":  # else a web socket: there is none
                await self.app(scope, receive, send)
            return
        started, status, request_id = time.perf_counter(), 499, uuid.uuid4().hex  # 499: left early
        bare = scope["method"] == "HEAD"  # of whatever is there to GET, without the body
        scope = scope | {"method": "GET"} if bare else scope
        scope.setdefault("state", {})["request_id"] = request_id
        headers = [*HEADERS, (b"x-request-id", request_id.encode())]

        async def answer(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = message | {"headers": [*message["headers"], *headers]}
            elif bare:
                message = message | {"body": b""}
            await send(message)

        under_way = False
        try:
            self._check(scope)  # before the body is read
            if body := await self._whole(scope, receive):
                self.desk.in_flight += (under_way := True)
                if self.desk.in_flight > self.most:
                    raise busy(self.desk)
                await self.app(scope, body, answer)
        except HTTPException as error:  # before a route was reached
            await refusal(scope["path"], error)(scope, receive, answer)
        except Exception as error:  # uvicorn would log its text
            log.error("%s: %s", request_id, where(error))
            if status == 499:  # nothing was sent yet
                error = HTTPException(500, "internal error; the server's log says where")
                await refusal(scope["path"], error)(scope, receive, answer)
        finally:
            self.desk.in_flight -= under_way
            self._note(scope, status, time.perf_counter() - started)

    def _note(self, scope, status: int, seconds: float) -> None:
        # The route's pattern, never the path, which may name a user.
        route = getattr(scope.get("route"), "path_format", "other")  # other: none was reached
        self.desk.metrics.seconds.labels(route, f"{status // 100}xx").observe(seconds)
        if status in REASONS:
            self.desk.metrics.rejections.labels(REASONS[status]).inc()
        if route not in OPEN:
            log.info("%s %s %d %.1f ms %s", scope["method"], route, status, 1000 * seconds,
                     scope["state"]["request_id"])

    def _check(self, scope) -> None:  # raises HTTPException unless the request may go on
        if scope["path"] in OPEN:
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        # A browser sends a Basic password by itself, and other sites' pages can reach a server on
        # this machine under a name of theirs: so these headers, and Host, count beside the key.
        site, origin = headers.get(b"sec-fetch-site", "none"), headers.get(b"origin")
        visit = scope["method"] == "GET" and headers.get(b"sec-fetch-mode") == "navigate"  # a link
        host = headers.get(b"host", "").lower()
        foreign = origin is not None and not self._is_own(origin, host)
        if foreign or (site not in ("same-origin", "none") and not visit):
            raise HTTPException(403, "a page of another site may not use this server")
        if self.key and not self._has_key(headers):
            wanted = {"WWW-Authenticate": 'Basic realm="IceBreaker, key as password"'}
            raise HTTPException(401, "the server's key is needed: Authorization: Bearer", wanted)
        # Without a key: asked on this machine, by a name of it, and not passed on by a proxy.
        proxied = any(name in (b"forwarded", b"via", b"x-real-ip")
                      or name.startswith(b"x-forwarded-") for name in headers)
        here = self.local and not proxied and is_loopback((scope.get("server") or [""])[0])
        if not self.key and not (here and is_loopback(_name_of(host))):
            raise HTTPException(403, "Host: use 127.0.0.1 or localhost, or set a key")
        # A route's pattern ends before a last line break: "alice\n" would be alice there.
        if any(ord(c) < 32 for c in scope["path"]):
            fault = {"loc": ["path"], "msg": "holds a control character", "type": "value_error"}
            raise HTTPException(422, [fault])  # in the shape of every 422
        kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
        # A form of another site can send any other type without asking first.
        if scope["method"] in ("POST", "PUT", "PATCH") and kind != "application/json":
            raise HTTPException(415, "Content-Type: application/json")
        if headers.get(b"content-encoding", "identity").lower() != "identity":
            raise HTTPException(415, "Content-Encoding: a body is read as it is sent, not unpacked")

    def _is_own(self, origin: str, host: str) -> bool:
        # A page of serve.origin, or of the address that was asked: ports may be left out there.
        page = _address(origin)
        asked = page and _address(f"{page[0]}://{host}")
        return page is not None and page in (asked, _address(self.settings.origin))

    def _has_key(self, headers: dict[bytes, str]) -> bool:
        scheme, _, value = headers.get(b"authorization", "").partition(" ")
        sent, scheme = value.strip().encode("latin-1"), scheme.lower()
        with contextlib.suppress(binascii.Error):
            if scheme == "basic":  # what a browser asks its user for
                sent = base64.b64decode(sent, validate=True).partition(b":")[2]
            # In constant time.
            return scheme in ("basic", "bearer") and hmac.compare_digest(sent, self.key)
        return False

    async def _whole(self, scope, receive):
        """The body, read within its limits, as a `receive`; None where the client has left."""
        text = bytearray()  # bytes would be copied for each part
        try:
            async with asyncio.timeout(self.settings.timeout) as limit:
                if len(self.reading) >= self.most:  # not who comes is refused, but who dawdles
                    self.reading.pop(oldest := next(iter(self.reading)))
                    oldest.reschedule(0)
                self.reading[limit] = None
                async for part in Request(scope, receive).stream():
                    text += part
                    if len(text) > MAX_BODY:
                        raise HTTPException(413, f"body: more than {MAX_BODY} bytes")
        except TimeoutError:
            raise HTTPException(408, "body: too slow (serve.timeout)") from None
        except ClientDisconnect:
            return None
        finally:
            self.reading.pop(limit, None)
        # Whole, as routes wait for the client to leave, which shows only behind the body.
        body = [{"type": "http.request", "body": bytes(text), "more_body": False}]

        async def again():  # once the body, then what tells that the client has left
            return body.pop() if body else await receive()

        return again


def _address(origin: str) -> tuple[str, str, int] | None:
    # (scheme, name, port) of "https://chat.example"; None: it has none, as "null".
    with contextlib.suppress(ValueError):  # a port that is no number
        parts = urlsplit(origin.lower())
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        return (parts.scheme, parts.hostname, port) if parts.hostname and port else None
    return None


def _name_of(host: str) -> str | None:  # the header Host without a port
    with contextlib.suppress(ValueError):
        return urlsplit(f"//{host}").hostname
    return None


def refusal(path: str, error) -> JSONResponse:  # error: an HTTPException
    """The reply that tells an error, in the shape that the clients of this path read."""
    content = {"detail": error.detail}
    if openwebui.is_path(path):
        content = openwebui.fault(error.status_code, error.detail)
    return JSONResponse(content, error.status_code, error.headers)


def busy(desk: Desk) -> HTTPException:
    after = {"Retry-After": str(desk.queue.retry_after)}
    return HTTPException(429, "busy; try again after Retry-After seconds", after)

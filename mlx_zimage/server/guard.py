"""What a request must pass before anything reads it. The server is meant for the programs of one person, or for those
who have its key; a web page that the person happens to visit must not be able to use it.

- The Host header must name this machine: DNS rebinding gives a page's own name our address.
- A browser's request must come from our own origin, or from one that --cors names.
- The key is compared in constant time.
- Bodies are limited in size and time, before they are parsed.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import re
import socket
from collections.abc import Collection
from dataclasses import dataclass, field

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ADJUSTED, Refusal, answer, unavailable

MAX_BODY = 32 * 2**20  # bytes: a photo of 24 MB in base64
MAX_BODIES = 8 * MAX_BODY  # of all requests in progress together
BODY_S = 60.0  # to send a body in
HEAD_S = 5.0  # to send a request's head in
# Names under which containers reach the machine they run on; no one can register them.
CONTAINER_HOSTS = ("host.docker.internal", "host.containers.internal", "host.lima.internal")
PAGE = "/"
OPEN = ("/health", "/v1/images/results/", "/page/")  # need no key: the names of results cannot be guessed
HOST = re.compile(r"(?:\[([0-9a-f:.]{2,45})\]|([a-z0-9_.-]{1,253}?)\.?)(?::\d{1,5})?")
METHODS, HEADERS = "GET, POST, OPTIONS", "Authorization, Content-Type"
EXPOSED = f"{ADJUSTED}, Retry-After"


@dataclass(frozen=True)
class Access:
    """Who may use the server: the address that it listens on, its key, and the origins of allowed web pages."""

    host: str = "127.0.0.1"
    key: str | None = None
    origins: Collection[str] = field(default_factory=frozenset)

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)

    def knows(self, host: str) -> bool:
        """Whether a Host header names this machine."""
        name = host_name(host)
        if name in ("localhost", self.host.lower(), *CONTAINER_HOSTS) or is_loopback(name):
            return True
        if self.loopback:
            return False
        machine = socket.gethostname().lower().removesuffix(".local")
        return name in (machine, f"{machine}.local") or is_address(name)  # a page cannot rebind an address

    def admits(self, authorization: str) -> bool:
        """Whether an Authorization header has the key: as a bearer token, or as a basic password."""
        scheme, _, value = authorization.strip().partition(" ")
        given = value.strip()
        if scheme.lower() == "basic":
            try:
                user, _, password = base64.b64decode(given, validate=True).decode().partition(":")
            except (binascii.Error, ValueError):
                return False
            given = password or user
        elif scheme.lower() != "bearer":
            return False
        return self.key is None or hmac.compare_digest(given.encode(), self.key.encode())


def host_name(host: str) -> str:
    """The name in a Host header, without the port; "" if it is malformed."""
    match = HOST.fullmatch(host.lower())
    return (match[1] or match[2]) if match else ""


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(name: str) -> bool:
    return name == "localhost" or (is_address(name) and ipaddress.ip_address(name).is_loopback)


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, access: Access):
        self.app, self.access = app, access
        self.held = 0  # bytes of the bodies of requests in progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        origin = headers.get("origin", "")
        allowed = origin in self.access.origins

        async def with_cors(message: Message) -> None:
            if message["type"] == "http.response.start" and allowed:
                found = MutableHeaders(raw=message["headers"])
                found["Access-Control-Allow-Origin"] = origin
                found["Access-Control-Expose-Headers"] = EXPOSED
                found.add_vary_header("Origin")
                message = {**message, "headers": found.raw}
            await send(message)

        try:
            self.check(headers, allowed or is_visit(path, headers))
            if scope["method"] == "OPTIONS" and allowed:
                asked = headers.get("access-control-request-headers", HEADERS)  # OpenAI's SDK adds some of its own
                answered = {"Access-Control-Allow-Methods": METHODS, "Access-Control-Allow-Headers": asked}
                await Response(status_code=204, headers=answered)(scope, receive, with_cors)
                return
            if not (path == PAGE or path.startswith(OPEN)) and self.access.key is not None:
                self.check_key(headers)
            check_length(headers)
        except Refusal as refusal:
            await answer(path, refusal)(scope, receive, with_cors)
            return
        body = Body(receive, self)
        try:
            await self.app(scope, body.receive, with_cors)
        finally:
            self.held -= body.size

    def check(self, headers: Headers, allowed: bool) -> None:
        """Refuse a name that is not this machine's, and a web page that was not allowed."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self.access.knows(hosts[0]):
            raise Refusal(403, "the Host header does not name this server; use the address that it printed")
        if allowed:
            return
        origins = headers.getlist("origin")
        foreign = any(origin not in (f"http://{hosts[0]}", f"https://{hosts[0]}") for origin in origins)
        if foreign or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise Refusal(
                403, "requests from web pages of other origins are refused; --cors ORIGIN allows those from ORIGIN"
            )

    def check_key(self, headers: Headers) -> None:
        given = headers.getlist("authorization")
        if len(given) != 1 or not self.access.admits(given[0]):
            wanted = {"WWW-Authenticate": 'Bearer realm="mlx-zimage"'}
            message = "expected the server's API key, as a bearer token or as the password of basic authentication"
            raise Refusal(401, message, headers=wanted)


def is_visit(path: str, headers: Headers) -> bool:
    """Whether a browser is opening the page, perhaps from a link on another page, which cannot read it."""
    return path == PAGE and headers.get("sec-fetch-mode") == "navigate" and "origin" not in headers


def check_length(headers: Headers) -> None:
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise Refusal(400, "Content-Length must be a whole number")
    if len(length) > 12 or int(length) > MAX_BODY:
        raise too_large()


def too_large() -> Refusal:
    return Refusal(413, f"the request is larger than {MAX_BODY // 2**20} MiB; send a smaller image")


class Body:
    """The body of one request, within limits of size and time."""

    def __init__(self, receive: Receive, guard: Guard):
        self.size = 0
        self._receive, self._guard = receive, guard
        self._complete = False
        self._until = asyncio.get_running_loop().time() + BODY_S

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()  # waits for the client to disconnect
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise Refusal(408, f"the body of the request did not arrive within {BODY_S:g} s") from None
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self.size += size
            self._guard.held += size
            self._complete = not message.get("more_body", False)
            if self.size > MAX_BODY:
                raise too_large()
            if self._guard.held > MAX_BODIES:
                raise unavailable("the server is receiving too many large images at once; try again later")
        return message


class Protocol(H11Protocol):
    """uvicorn's protocol, which on its own would wait forever for a request's head, and fail twice on what is not
    HTTP."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head_after(None)

    def on_response_complete(self) -> None:
        last = self.cycle
        self._timer.cancel()
        super().on_response_complete()  # continues with the next request, if it has arrived already
        self._expect_head_after(last)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, unless an answer has begun; the application can no longer answer it."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            head = h11.Response(status_code=400, headers=[("Content-Length", "0"), ("Connection", "close")])
            for event in (head, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _expect_head_after(self, last: object) -> None:
        self._timer = self.loop.call_later(HEAD_S, self._check_head, last)

    def _check_head(self, last: object) -> None:
        if self.cycle is last and not self.transport.is_closing():
            self.transport.close()

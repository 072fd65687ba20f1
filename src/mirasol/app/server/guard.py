"""What every request passes first: who asks, how much, how slowly, and how many at a time."""

import asyncio
import base64
import json
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from mirasol.app.server.refusals import Refusal
from mirasol.app.server.service import Service

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
# For requests by other paths: a path may contain what somebody typed.
ROUTES = ("/v1/models", "/v1/chat/completions", "/v1/score", "/v1/files", "/v1/realtime", "/healthz", "/metrics", "/")
KEY_PROTOCOL = "openai-insecure-api-key."  # how browsers, which cannot set headers, send the key to a WebSocket


class Gone(Exception):
    """A client that does not take its answer."""


class Guard:
    """The outermost layer of the app (ASGI): refuses what is not allowed before anything is read, counts and times the
    rest, and writes a line about each request."""

    def __init__(self, app: Callable[..., Awaitable[None]], service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        exchange = Exchange(self.service, scope, receive, send)
        try:
            self._check(scope, exchange)
        except Refusal as refusal:
            await exchange.refuse(refusal)
            exchange.write_down()
            return
        self.service.open += scope["type"] == "http"
        try:
            await self._run(scope, exchange)
        finally:
            self.service.open -= scope["type"] == "http"
            self.service.body_bytes -= exchange.counted
            exchange.write_down()

    async def _run(self, scope: MutableMapping[str, Any], exchange: "Exchange") -> None:
        limit = self.service.settings.caps.max_request if scope["type"] == "http" else None
        try:
            async with asyncio.timeout(limit):
                await self.app(scope, exchange.receive, exchange.send)
        except TimeoutError:
            if exchange.status is None:
                await exchange.refuse(Refusal(503, f"not answered within {limit:g} s", "timeout"))
            else:
                exchange.abort()
        except Gone:
            return  # the answer is not complete: the connection is closed
        except Refusal as refusal:  # raised where no handler of the app is around
            await exchange.refuse(refusal)

    def _check(self, scope: MutableMapping[str, Any], exchange: "Exchange") -> None:
        """Raises Refusal for a request that nothing is done for."""
        settings, service = self.service.settings, self.service
        check_origin(exchange.headers, settings.api_key is None and settings.is_local, settings.server_names)
        if settings.api_key is not None and scope["path"] != "/healthz":
            check_key(exchange.headers, settings.api_key)
        if scope["path"] == "/healthz":
            return
        if service.stopping:
            raise Refusal(503, "the server is being stopped", "stopping")
        if scope["type"] == "http" and service.open >= settings.caps.max_open:
            most = f"{service.open} requests are open, which is the limit: ask again later"
            raise Refusal(429, most, "too_many_requests")
        check_body_headers(exchange.headers, settings.caps.max_body)


def check_origin(headers: dict[str, str], only_local: bool, names: tuple[str, ...]) -> None:
    """Refuses pages of other sites that a browser shows. Without a key (`only_local`) the server must also be called by
    a local name, or one that is known: a site may have its own name mean 127.0.0.1."""
    host = headers.get("host", "")
    if only_local and read_host(f"//{host}") not in ("localhost", "127.0.0.1", "::1", *names):
        raise Refusal(400, "this Host is not the server's: give it as --server-name", "wrong_host")
    origin = headers.get("origin")
    if origin is None:
        return
    if read_host(origin) not in names and origin.lower().partition("://")[2] != host.lower():
        raise Refusal(400, "a page of another site may not ask: give its host as --server-name", "wrong_origin")


def read_host(url: str) -> str | None:
    """The name of the host in a URL; None where it has none."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def check_key(headers: dict[str, str], key: str) -> None:
    """Raises Refusal (401) unless the key is given: as a bearer, or by browsers as the password that they ask for, with
    any name, or as a WebSocket's protocol."""
    kind, _, given = headers.get("authorization", "").partition(" ")
    offered = [part.strip() for part in headers.get("sec-websocket-protocol", "").split(",")]
    keys = [part.removeprefix(KEY_PROTOCOL) for part in offered if part.startswith(KEY_PROTOCOL)]
    if kind.lower() == "bearer":
        keys.append(given.strip())
    elif kind.lower() == "basic":
        keys.append(read_password(given.strip()))
    if not any(secrets.compare_digest(each.encode(), key.encode()) for each in keys):
        raise Refusal(401, "no API key, or a wrong one: send it as Authorization: Bearer …", "invalid_api_key")


def read_password(credentials: str) -> str:
    """The password in what a browser sends (RFC 7617); "" where there is none."""
    try:
        return base64.b64decode(credentials, validate=True).decode("utf-8").partition(":")[2]
    except ValueError:
        return ""


def check_body_headers(headers: dict[str, str], most: int) -> None:
    """Raises Refusal for a body that is announced too large (413) or compressed (415)."""
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise Refusal(400, "content-length is not a number", "invalid_value")
    if int(length) > most:
        raise Refusal(413, f"a body of {length} bytes exceeds the limit of {most}", "too_large")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "compressed bodies are not read: send it as it is", "unsupported_encoding")


class Exchange:
    """A request and its answer on their way through the guard."""

    def __init__(self, service: Service, scope: MutableMapping[str, Any], receive: Receive, send: Send):
        self.service, self.scope = service, scope
        self._receive, self._send = receive, send
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self.id = f"req_{secrets.token_hex(12)}"
        self.began = time.monotonic()
        self.status: int | None = None
        self.counted = self.received = self.sent = 0
        self._body_ended = scope["type"] != "http"
        self.facts: dict[str, Any] = {}
        scope.setdefault("state", {})["exchange"] = self

    async def receive(self) -> Message:
        """The next part of the request. Raises Refusal: 408 where it is sent too slowly, 413 where it is too large."""
        if self._body_ended:
            return await self._receive()
        caps = self.service.settings.caps
        left = self.began + caps.max_upload - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.001, min(caps.max_idle, left)))
        except TimeoutError as error:
            raise Refusal(408, "the request was sent too slowly", "timeout") from error
        size = len(message.get("body", b""))
        self.received += size
        self.counted += size
        self.service.body_bytes += size
        if self.received > caps.max_body:
            raise Refusal(413, f"the body exceeds the limit of {caps.max_body} bytes", "too_large")
        if self.service.body_bytes > caps.max_bodies:
            raise Refusal(503, "too many large requests at a time: ask again later", "overloaded")
        self._body_ended = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Passes on a part of the answer, unless the client does not take it."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.id.encode())]
        elif message["type"] == "websocket.accept":
            self.status = 101
        self.sent += len(message.get("body", b""))
        try:
            await asyncio.wait_for(self._send(message), self.service.settings.caps.max_send)
        except TimeoutError:
            self.abort()

    def abort(self) -> None:
        """Ends the connection to a client that does not read."""
        raise Gone("the client does not take its answer")

    async def refuse(self, refusal: Refusal) -> None:
        """Answers with an error, unless an answer has begun."""
        if self.status is not None:
            self.abort()
        is_socket = self.scope["type"] == "websocket"
        if is_socket and "websocket.http.response" not in self.scope.get("extensions", {}):
            self.status = refusal.status
            await self._send({"type": "websocket.close", "code": 1008, "reason": refusal.code or ""})
            return
        prefix = "websocket.http.response" if is_socket else "http.response"
        content = json.dumps(refusal.body).encode()
        headers = {"content-type": "application/json", "content-length": str(len(content)), **refusal.headers}
        headers["x-request-id"] = self.id
        self.status, self.sent = refusal.status, len(content)
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": f"{prefix}.start", "status": refusal.status, "headers": pairs})
        await self._send({"type": f"{prefix}.body", "body": content})

    def write_down(self) -> None:
        """The line about this request, and its numbers."""
        path, seconds = self.scope["path"], time.monotonic() - self.began
        known = "/v1/files" if path.startswith("/v1/files/") else path
        route = known if known in ROUTES else "other"
        status = self.status or 499  # the client left
        self.service.metrics.requests.labels(route, status).inc()
        self.service.metrics.seconds.labels(route).observe(seconds)
        self.service.journal.write(
            "request", id=self.id, method=self.scope.get("method", "WEBSOCKET"), route=route, status=status,
            seconds=round(seconds, 4), bytes_in=self.received, bytes_out=self.sent, **self.facts,
        )  # fmt: skip

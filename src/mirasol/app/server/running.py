"""Running the app: the sockets, connections that say nothing, and a graceful stop."""

import asyncio
import json
import logging
import socket
import time
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from mirasol.app.server.journal import Journal
from mirasol.app.server.refusals import Refusal
from mirasol.app.server.service import Service
from mirasol.app.server.settings import Caps
from mirasol.errors import UserError

BUSY = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n"
_REFUSAL = json.dumps(Refusal(400, "this is not a request of HTTP", "invalid_request").body)
INVALID = (
    "HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: application/json\r\n"
    f"content-length: {len(_REFUSAL)}\r\n\r\n{_REFUSAL}"
).encode()
HEAD_BYTES = 2**16  # the head of a request
BACKLOG = 128  # connections that wait to be accepted


def make_protocol(caps: Caps) -> type[H11Protocol]:
    """uvicorn's HTTP protocol, with as many connections as the caps allow, and none that keeps its head to itself.

    A request that is answered before its end is read on for a while, and what comes is dropped: a connection that is
    closed under it would be reset, and the answer lost.
    """

    class CappedProtocol(H11Protocol):
        head_timer: asyncio.TimerHandle | None = None
        is_upgraded = False  # to a WebSocket

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > caps.max_connections:
                transport.write(BUSY)
                transport.close()
                return
            self.head_timer = self.loop.call_later(caps.max_idle, transport.close)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.watch()

        def watch(self) -> None:
            """Has the connection closed where a request is not complete in time, unless its answer is being made."""
            if self.cycle is not None and not self.cycle.response_complete:
                self.stop_timer()
            elif self.head_timer is None and not self.is_upgraded and not self.transport.is_closing():
                begun = self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]
                if begun:
                    self.head_timer = self.loop.call_later(caps.max_idle, self.transport.close)

        def handle_websocket_upgrade(self, event: h11.Request) -> None:
            self.is_upgraded = True
            self.stop_timer()
            super().handle_websocket_upgrade(event)

        def connection_lost(self, exc: Exception | None) -> None:
            self.stop_timer()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
                self.transport.write(INVALID)
            self.transport.close()

        def stop_timer(self) -> None:
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None

    return CappedProtocol


class GracefulServer(uvicorn.Server):
    """Told to stop (SIGTERM, SIGINT), it refuses new requests (503) and ends when the open ones are answered, or after
    `caps.stop_seconds`; told twice, at once."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service, self.stop_at = service, 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.stopping:
            super().handle_exit(sig, frame)
            return
        self.service.stopping = True
        self.stop_at = time.monotonic() + self.service.settings.caps.stop_seconds

    async def on_tick(self, counter: int) -> bool:
        service = self.service
        if service.stopping:
            is_idle = service.open == 0 and service.sessions == 0
            self.should_exit = self.should_exit or is_idle or time.monotonic() > self.stop_at
        return await super().on_tick(counter)


class JournalHandler(logging.Handler):
    """Writes what uvicorn has to say as lines of the journal, in one line each and without what a request said."""

    def __init__(self, journal: Journal):
        super().__init__(logging.WARNING)
        self.journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        self.journal.write("server", level=record.levelname, message=record.getMessage().strip()[:200])


def write_logs_to(journal: Journal) -> None:
    """Has the libraries' own logs written to the journal. The form reader's repeat bytes of forms: left out."""
    logging.getLogger("python_multipart").disabled = True
    for name in ("uvicorn", "websockets"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [JournalHandler(journal)], False


def make_server(app: FastAPI) -> GracefulServer:
    """A server for the app, as its settings say."""
    service: Service = app.state.service
    settings = service.settings
    caps = settings.caps
    write_logs_to(service.journal)
    options: dict[str, Any] = {
        "http": make_protocol(caps), "log_config": None, "access_log": False, "server_header": False,
        "timeout_keep_alive": 10, "timeout_graceful_shutdown": 2, "h11_max_incomplete_event_size": HEAD_BYTES,
        "ws_max_size": caps.max_body, "ws_max_queue": 4,
        # A client that sends faster than the model reads could not answer a ping; silent ones end by max_session_idle.
        "ws_ping_interval": None,
        "ws_per_message_deflate": False, "backlog": BACKLOG, "proxy_headers": False, "lifespan": "on",
    }  # fmt: skip
    return GracefulServer(uvicorn.Config(app, host=settings.host, port=settings.port, **options), service)


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket: who connects from now on waits until the server runs.

    Raises:
        UserError: the address is taken, or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {host} --port {port}: cannot listen there ({why}): give another one") from error
    listening.set_inheritable(False)
    return listening

"""A server inside the test's process, on a free port of the loopback address."""

import asyncio
import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
from fastapi import FastAPI

from mirasol.app.server.answerer import Answerer
from mirasol.app.server.app import make_app
from mirasol.app.server.journal import Journal
from mirasol.app.server.running import GracefulServer, make_server, open_socket
from mirasol.app.server.service import Service
from mirasol.app.server.settings import ServerSettings


@dataclass
class Served:
    """A running server, a client of it, and what it writes down."""

    url: str
    port: int
    service: Service
    client: httpx2.Client
    written: io.StringIO
    server: GracefulServer
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    @property
    def answerer(self) -> Answerer:
        return self.service.answerer

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The events in the log."""
        return [json.loads(line) for line in self.written.getvalue().splitlines()]

    def ask(self, content: Any, **fields: Any) -> httpx2.Response:
        """Asks one question."""
        messages = fields.pop("messages", [{"role": "user", "content": content}])
        return self.client.post("/v1/chat/completions", json={"messages": messages, **fields})

    def upload(self, path: Path, name: str | None = None, kind: str = "video/mp4") -> httpx2.Response:
        """Uploads a file."""
        files = {"file": (name or path.name, path.read_bytes(), kind)}
        return self.client.post("/v1/files", data={"purpose": "user_data"}, files=files)

    def is_fine(self) -> bool:
        """Whether it answers."""
        return self.client.get("/healthz").json() == {"status": "ok"}


@contextlib.contextmanager
def serve(
    settings: ServerSettings, answerer: Answerer, mount: Callable[[FastAPI], object] = lambda _: None
) -> Iterator[Served]:
    """Serves in a thread until the context ends, with what `mount` adds to the app."""
    written = io.StringIO()
    listening = open_socket("127.0.0.1", 0)
    port = listening.getsockname()[1]
    app = make_app(replace(settings, port=port), answerer, Journal(written))
    mount(app)
    server, loop = make_server(app), asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve(sockets=[listening])))
    thread.start()
    url = f"http://127.0.0.1:{port}"
    key = {"authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    try:
        with httpx2.Client(base_url=url, headers=key, timeout=60, trust_env=False) as client:
            yield Served(url, port, app.state.service, client, written, server, loop, thread)
    finally:
        server.should_exit = True
        thread.join()
        loop.close()


def make_data_url(path: Path, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def video(path: Path) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": make_data_url(path)}}


def file(number: str) -> dict[str, Any]:
    return {"type": "file", "file": {"file_id": number}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def wait_until(is_so: Callable[[], object], seconds: float = 60) -> None:
    """Waits for what happens in another thread; raises when it does not happen."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            raise TimeoutError(f"did not happen within {seconds} s")
        time.sleep(0.01)

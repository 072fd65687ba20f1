"""A hub on loopback: the few routes of huggingface.co that huggingface_hub asks for models."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROUTES = {
    "info": re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?"),
    "tree": re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/?]+)(?:\?.*)?"),
    "file": re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)"),
}


@dataclass
class Repository:
    """One model: its files, its commit, and its fault (`gated`, `cut`: files end early, `down`: error 500)."""

    files: dict[str, bytes]
    commit: str
    fault: str | None = None
    branches: tuple[str, ...] = ("main",)

    @classmethod
    def of_folder(cls, folder: Path, commit: str) -> "Repository":
        return cls({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}, commit)


@dataclass
class Hub:
    """The repositories by name, and every path that was asked for."""

    repositories: dict[str, Repository]
    endpoint: str = ""
    asked: list[str] = field(default_factory=list)


@contextlib.contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """A hub with these repositories while the context lasts."""
    hub = Hub(repositories)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self, hub)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer(request: BaseHTTPRequestHandler, hub: Hub) -> None:
    hub.asked.append(request.path)
    matches = {kind: route.fullmatch(request.path) for kind, route in ROUTES.items()}
    kind = next((kind for kind, match in matches.items() if match), None)
    if re.fullmatch(
        r"/api/models/[^/]+/[^/]+/(commits/.*|discussions.*)", request.path
    ):  # where conversions are proposed
        return send_json(request, [] if "/commits/" in request.path else {"discussions": [], "count": 0, "start": 0})
    if kind is None:  # folders of a repository, which has none here
        return refuse(request, 404, "EntryNotFound")
    found = matches[kind]
    repository = hub.repositories.get(found[1])
    if repository is None:
        return refuse(request, 401, "RepoNotFound")  # what huggingface.co says to those who have not logged in
    if repository.fault == "down":
        return refuse(request, 500, "")
    if (found[2] or "main") not in (*repository.branches, repository.commit):
        return refuse(request, 404, "RevisionNotFound")
    if kind == "file":
        if repository.fault == "gated":
            return refuse(request, 403, "GatedRepo")
        if found[3] not in repository.files:
            return refuse(request, 404, "EntryNotFound")
        return send_file(request, repository, repository.files[found[3]])
    if kind == "info":
        return send_json(request, {
            "id": found[1], "sha": repository.commit, "siblings": [{"rfilename": name} for name in repository.files]
        })  # fmt: skip
    return send_json(request, [
        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        for name, content in repository.files.items()
    ])  # fmt: skip


def refuse(request: BaseHTTPRequestHandler, status: int, code: str) -> None:
    request.send_response(status)
    request.send_header("X-Error-Code", code)
    request.send_header("Content-Length", "0")
    request.end_headers()


def send_json(request: BaseHTTPRequestHandler, values: object) -> None:
    content = json.dumps(values).encode()
    request.send_response(200)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    request.wfile.write(content)


def send_file(request: BaseHTTPRequestHandler, repository: Repository, content: bytes) -> None:
    request.send_response(200)
    request.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
    request.send_header("X-Repo-Commit", repository.commit)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(content[: len(content) // 2] if repository.fault == "cut" else content)

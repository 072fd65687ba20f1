"""`mirasol serve`: an HTTP server that OpenAI's clients speak to."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mirasol.errors import UserError

if TYPE_CHECKING:
    from fastapi import FastAPI
    from jsonargparse import ArgumentParser, Namespace

    from mirasol.app.server.settings import ServerSettings
    from mirasol.cli.common import MakeParser

HELP = "answer questions over HTTP, in OpenAI's wire format"
DESCRIPTION = """Serves one checkpoint: OpenAI's chat completions with video, image and sound, uploaded files, scores of
candidates, and realtime sessions over a WebSocket (docs/serving.md). It is reached from this machine alone unless
--host says otherwise, and then asks for --api-key. Every request is a line of JSON on stderr, without what was asked.

  mirasol serve tiny
  mirasol serve tiny --host 0.0.0.0 --api-key @/run/secrets/mirasol-key --server-name ask.example.org
  mirasol serve runs/demo --allow-host media.example.org --max-body 268435456"""
NEEDED = ("fastapi", "uvicorn", "websockets", "prometheus_client", "python_multipart")


def add_arguments(parser: ArgumentParser, make: MakeParser) -> None:
    """Declares the arguments. The caps are those of `mirasol.app.server.settings.Caps`."""
    from mirasol.app.server.settings import Caps

    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="tiny (shipped), a run's folder or a checkpoint folder"
    )
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at; 0: a free one")
    parser.add_argument("--api-key", type=str, metavar="KEY|@FILE", help="what clients must send, or the file it is in")
    parser.add_argument("--insecure", action="store_true", help="let anybody who reaches --host ask, without a key")
    parser.add_argument(
        "--server-name",
        type=str,
        action="append",
        metavar="NAME",
        help="a name that it is reached by (may be repeated)",
    )
    parser.add_argument(
        "--allow-host",
        type=str,
        action="append",
        metavar="HOST[:PORT]",
        help="a host to fetch media from (may be repeated)",
    )
    parser.add_argument("--name", type=str, help="what the model is called; CHECKPOINT's last part by default")
    parser.add_argument("--no-page", action="store_true", help="the API alone, without the page at /")
    parser.add_argument("--log-questions", action="store_true", help="write questions into the log")
    parser.add_argument("--device", type=str, default="auto", help="where to compute: auto, cpu, cuda or mps")
    parser.add_argument("--threads", type=int, help="threads that compute on the CPU")
    for cap in dataclasses.fields(Caps):
        kind = float if isinstance(cap.default, float) else int
        option = f"--{cap.name.replace('_', '-')}"
        parser.add_argument(option, type=kind, default=cap.default, help=cap.metadata["help"])


def run(options: Namespace) -> None:
    """Loads the checkpoint and serves it until a signal comes."""
    from importlib.util import find_spec

    from mirasol.cli.common import check_positive

    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(f"mirasol serve needs {', '.join(missing)}: pip install 'mirasol[serve]'")
    if not 0 <= options.port < 2**16:
        raise UserError(f"--port {options.port}: choose 0 to 65535")
    if options.threads is not None:
        check_positive("--threads", options.threads)
    serve(options, read_settings(options))


def read_settings(options: Namespace) -> ServerSettings:
    """The server's settings. Raises UserError for those that do not go together."""
    from mirasol.app.server.settings import Caps, ServerSettings

    names = [field.name for field in dataclasses.fields(Caps)]
    return ServerSettings(
        host=options.host,
        port=options.port,
        api_key=read_key(options.api_key),
        insecure=options.insecure,
        server_names=tuple(name.lower() for name in options.server_name or ()),
        allow_hosts=tuple(options.allow_host or ()),
        name=options.name or Path(options.checkpoint).resolve().name,
        log_questions=options.log_questions,
        caps=Caps(**{name: options[name] for name in names}),
    )


def read_key(text: str | None) -> str | None:
    """The key, or the one in the file after an @: a key on the command line is seen by all users of the machine."""
    if text is None or not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key {text}: this file cannot be read: give another one") from error


def serve(options: Namespace, settings: ServerSettings) -> None:
    """Serves until a signal comes."""
    import torch

    from mirasol.app.server.answerer import Answerer
    from mirasol.app.server.app import make_app
    from mirasol.app.server.running import make_server, open_socket
    from mirasol.checkpoint import load_answerer
    from mirasol.cli.common import check_device
    from mirasol.media.isolation.decoders import start_decoder

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    listening = open_socket(settings.host, settings.port)
    start_decoder()  # is ready by the time the checkpoint is loaded
    answerer = Answerer(load_answerer(options.checkpoint, check_device(options.device)), settings.caps.max_batch)
    try:
        app = make_app(settings, answerer)
        page = add_page(app, settings, listening.getsockname()[1], wanted=not options.no_page)
        server = make_server(app)
        for line in [*describe_start(settings, listening.getsockname()[1]), page]:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
        server.run(sockets=[listening])
    finally:
        answerer.close()


def add_page(app: FastAPI, settings: ServerSettings, port: int, wanted: bool) -> str:
    """Mounts the page, where it is wanted and can be; returns the line that says so, or why not."""
    from mirasol.app.page.blocks import is_available, mount_page

    if not wanted:
        return "mirasol: no page (--no-page)"
    if not is_available():
        return "mirasol: no page: it needs gradio: pip install 'mirasol[page]'"
    mount_page(app)
    how = "; the browser asks for a name (any will do) and the API key" if settings.api_key else ""
    return f"mirasol: page at http://{show_host(settings)}:{port}/{how}"


def show_host(settings: ServerSettings) -> str:
    """The host as a URL has it."""
    return f"[{settings.host}]" if ":" in settings.host else settings.host


def describe_start(settings: ServerSettings, port: int) -> list[str]:
    """What is said before the first request: where, and who may ask."""
    shown = show_host(settings)
    who = "whoever has the API key" if settings.api_key else "anybody on this machine"
    if settings.api_key is None and not settings.is_local:
        who = "ANYBODY WHO REACHES THIS ADDRESS (--insecure)"
    return [f"mirasol: {settings.name} at http://{shown}:{port}/v1, for {who}"]

"""The page itself, and how it is mounted on the server's app."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request

from mirasol.app.page.asking import Shown, answer_on_page
from mirasol.app.page.examples import EXAMPLES, render_example
from mirasol.app.server.app import add_error_handlers
from mirasol.app.server.refusals import Refusal
from mirasol.app.server.service import Service

if TYPE_CHECKING:
    import gradio

HERE = Path(__file__).parent
FORGET_SECONDS = 3600  # after which uploads are removed
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def is_available() -> bool:
    """Whether what the page is made with is installed."""
    return find_spec("gradio") is not None


def mount_page(app: FastAPI) -> FastAPI:
    """Mounts the page at `/` of the server's app. It loads nothing from other hosts, and tells none of its use."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    service: Service = app.state.service
    folder = service.folder / "page"
    folder.mkdir()
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    import gradio

    @app.api_route("/v1/{path:path}", methods=METHODS)
    async def refuse_unknown(path: str) -> None:
        raise HTTPException(404)

    mounted = gradio.mount_gradio_app(
        app, make_blocks(service, folder), "/", footer_links=[], run_history=False, enable_monitoring=False, pwa=False,
        ssr_mode=False, mcp_server=False, max_file_size=service.settings.caps.max_body, show_error=False,
        theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=(HERE / "page.css").read_text(encoding="utf-8"),
        head=f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
    )  # fmt: skip
    for route in mounted.routes:
        if isinstance(getattr(route, "app", None), FastAPI):
            add_error_handlers(route.app, service)
            route.app = UploadCap(route.app, folder, service.settings.caps.max_stored)
    return mounted


def make_blocks(service: Service, folder: Path) -> "gradio.Blocks":
    """The page: a clip, a question, the answer and where it came from; and a tab for camera and microphone."""
    import gradio

    async def answer(path: str | None, sound: str | None, question: str, candidates: str) -> AsyncIterator[Shown]:
        paths = [each for each in (path, sound) if each]
        async for shown in answer_on_page(service, folder, paths, question or "", candidates or ""):
            yield shown

    def show_example(name: str | None) -> tuple[Any, ...]:
        if name not in EXAMPLES:
            return *[gradio.skip()] * 4, "", "", ""
        shown = render_example(name, folder / "examples")
        return str(shown.path), None, shown.question, "\n".join(shown.candidates), "", "", ""

    with gradio.Blocks(title="Mirasol", analytics_enabled=False, delete_cache=(60, FORGET_SECONDS)) as blocks:
        gradio.Markdown("# Mirasol\nAsk about what is seen and heard.")
        with gradio.Tab("A clip"):
            with gradio.Row():
                with gradio.Column():
                    example = gradio.Dropdown(list(EXAMPLES), value=None, label="Shipped example")
                    player = gradio.Video(
                        label="Clip: upload or record", sources=["upload", "webcam"], elem_id="player"
                    )
                    with gradio.Accordion("Or a sound without pictures", open=False, elem_id="alone"):
                        sound = gradio.Audio(
                            label="Sound: upload or record", sources=["upload", "microphone"], type="filepath",
                            elem_id="sound", waveform_options={"show_recording_waveform": False},
                        )  # fmt: skip
                with gradio.Column():
                    question = gradio.Textbox(
                        label="Question", placeholder="which shape is seen last?", max_length=1000
                    )
                    candidates = gradio.Textbox(label="Candidates, one a line (optional)", lines=3)
                    ask = gradio.Button("Ask", variant="primary", elem_id="ask")
                    answered = gradio.HTML(elem_id="answer")
                    bars = gradio.HTML(elem_id="candidates")
            timeline = gradio.HTML(elem_id="timeline")
        with gradio.Tab("Live"):
            gradio.HTML((HERE / "live.html").read_text(encoding="utf-8"))
        shown = [answered, bars, timeline]
        limit = service.settings.caps.max_batch
        asked: dict[str, Any] = {"inputs": [player, sound, question, candidates], "outputs": shown,
                                 "show_progress": "hidden", "concurrency_limit": limit,
                                 "api_visibility": "private"}  # fmt: skip
        ask.click(answer, **asked)
        question.submit(answer, **asked)
        filled = [player, sound, question, candidates, *shown]
        example.input(show_example, example, filled, api_visibility="private")
    blocks.queue(max_size=service.settings.caps.max_open)
    return blocks


class UploadCap:
    """Refuses uploads while those that are there fill what may be stored (ASGI)."""

    def __init__(self, app: Callable[..., Awaitable[None]], folder: Path, most: int):
        self.app, self.folder, self.most = app, folder, most

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith("/upload"):
            length = int(Request(scope).headers.get("content-length", "0"))
            stored = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
            if stored + length > self.most:
                raise Refusal(413, f"uploads fill the {self.most} bytes that may be stored", "storage_full")
        await self.app(scope, receive, send)

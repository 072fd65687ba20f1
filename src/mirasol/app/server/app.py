"""The app: routes, what guards them, and what becomes of errors."""

import contextlib
import traceback
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, WebSocket
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response

from mirasol.app.server.answerer import Answerer, Stopping
from mirasol.app.server.chat import create_completion
from mirasol.app.server.guard import Guard
from mirasol.app.server.journal import Journal
from mirasol.app.server.realtime.session import run_session
from mirasol.app.server.refusals import Refusal
from mirasol.app.server.routes import create_score, describe_model, upload_file
from mirasol.app.server.service import Service
from mirasol.app.server.settings import ServerSettings


def make_app(settings: ServerSettings, answerer: Answerer, journal: Journal | None = None) -> FastAPI:
    """The server's app, with its `Service` as `app.state.service`. More can be mounted on it: what is mounted passes
    the same guard. The answerer is closed by whoever made it, after the app has ended."""
    service = Service(settings, answerer, journal)

    @contextlib.asynccontextmanager
    async def live(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            service.close()

    # No pages about the API: they load scripts of other sites.
    app = FastAPI(title="mirasol", lifespan=live, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.add_middleware(Guard, service=service)
    add_routes(app, service)
    add_error_handlers(app, service)
    return app


def add_routes(app: FastAPI, service: Service) -> None:
    """The routes of OpenAI's API, those of files and scores, and those of whoever runs the server."""
    files = service.files

    @app.get("/v1/models")
    async def list_models() -> Any:
        return {"object": "list", "data": [describe_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Any:
        if name != service.settings.name:
            raise Refusal(404, f"no such model here: ask {service.settings.name!r}", "model_not_found", "model")
        return describe_model(service)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await create_completion(service, request)

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        return await create_score(service, request)

    @app.post("/v1/files")
    async def upload(request: Request) -> Response:
        return await upload_file(service, request)

    @app.get("/v1/files")
    async def list_files() -> Any:
        return {"object": "list", "data": [file.body for file in files.list()], "has_more": False}

    @app.get("/v1/files/{number}")
    async def get_file(number: str) -> Any:
        return files.get(number).body

    @app.delete("/v1/files/{number}")
    async def delete_file(number: str) -> Any:
        return {"id": files.delete(number).id, "object": "file", "deleted": True}

    @app.websocket("/v1/realtime")
    async def realtime(websocket: WebSocket) -> None:
        await run_session(service, websocket)

    @app.get("/healthz")
    async def health() -> Response:
        status = "stopping" if service.stopping else "ok"
        return JSONResponse({"status": status}, 503 if service.stopping else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.format(), media_type="text/plain; version=0.0.4")


def add_error_handlers(app: FastAPI, service: Service) -> None:
    """Every error in the shape of OpenAI's."""

    async def answer(_: Request, refusal: Refusal) -> Response:
        return JSONResponse(refusal.body, refusal.status, refusal.headers)

    async def answer_http_error(request: Request, error: HTTPException) -> Response:
        known = {404: "no such path", 405: f"this path is not for {request.method}"}
        status = 404 if error.status_code == 405 else error.status_code
        return await answer(request, Refusal(status, known.get(error.status_code, str(error.detail)), "not_found"))

    async def answer_stopping(request: Request, _: Exception) -> Response:
        return await answer(request, Refusal(503, "the server is being stopped", "stopping"))

    async def answer_leaving(request: Request, _: Exception) -> Response:
        return await answer(request, Refusal(408, "the client has left", "client_left"))

    async def answer_bug(_: Request, error: Exception) -> Response:
        trace = "".join(traceback.format_exception(error))[-4000:]
        service.journal.write("bug", error=trace)
        body = {"error": {"message": "an error of the server", "type": "server_error", "param": None, "code": None}}
        return JSONResponse(body, 500)

    app.add_exception_handler(Refusal, answer)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(Stopping, answer_stopping)
    app.add_exception_handler(ClientDisconnect, answer_leaving)
    app.add_exception_handler(Exception, answer_bug)

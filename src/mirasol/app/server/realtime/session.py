"""GET /v1/realtime: one WebSocket session, its events in both directions, and what it may take."""

import asyncio
import base64
import binascii
import json
import secrets
import time
from collections.abc import Callable
from contextlib import aclosing, suppress
from typing import Any

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from mirasol.app.server.answerer import Stopping
from mirasol.app.server.asking import AnswerSoFar, encode_prompt, follow_answer
from mirasol.app.server.guard import KEY_PROTOCOL
from mirasol.app.server.parameters import read_choosing, read_number, read_text
from mirasol.app.server.realtime.stream import SessionStream
from mirasol.app.server.refusals import Refusal, refuse
from mirasol.app.server.routes import check_candidates, describe_candidate
from mirasol.app.server.service import Service
from mirasol.errors import UserError, quote_text
from mirasol.evaluation.answer import rank_candidates
from mirasol.json_values import InvalidJson, parse_json

MOST_QUESTIONS = 8  # of one session at a time
MOST_EVENTS = 256  # that a client has not taken
WAITING_BYTES = 2**23  # of media that the decoder has not taken: then the session is read no further
CLOSE_CODES = {408: 1008, 413: 1009, 503: 1012}
QUESTION_FIELDS = frozenset(
    {
        *("type", "id", "question", "candidates", "max_tokens", "max_completion_tokens", "temperature", "top_p"),
        *("seed", "stop"),
    }
)


async def run_session(service: Service, websocket: WebSocket) -> None:
    """Serves one session until it is closed, by either side or for what it takes."""
    try:
        session = open_session(service, websocket)
    except Refusal as refusal:
        await websocket.state.exchange.refuse(refusal)
        return
    service.sessions += 1
    try:
        offered = websocket.scope.get("subprotocols", [])
        chosen = next((each for each in offered if not each.startswith(KEY_PROTOCOL)), None)
        await websocket.accept(subprotocol=chosen)
        await session.run()
    except WebSocketDisconnect:
        pass  # the client is gone
    finally:
        try:
            await asyncio.shield(session.close())
        finally:
            service.sessions -= 1


def open_session(service: Service, websocket: WebSocket) -> "Session":
    """A session as its address asks for. Raises Refusal: 429 for one too many, 400 for an impossible window or
    an unknown way to drop."""
    most = service.settings.caps.max_sessions
    if service.sessions >= most:
        raise Refusal(429, f"{most} realtime sessions are open, which is the limit", "too_many_sessions")
    longest = service.answerer.processor.feature_extractor.max_chunks
    window = websocket.query_params.get("window", str(longest))
    if not (window.isascii() and window.isdigit() and 1 <= int(window[:9]) <= longest):
        raise Refusal(400, f"window={quote_text(window)}: choose 1 to {longest} chunks", "invalid_value", "window")
    drop = websocket.query_params.get("drop", "false")
    if drop not in ("true", "false"):
        raise Refusal(400, f"drop={quote_text(drop)}: choose true or false", "invalid_value", "drop")
    return Session(service, websocket, int(window), drop == "true")


class Session:
    """A realtime session.

    window: how many chunks each layer of the model looks back over
    drop: whether whole chunks of a recording are dropped while the model is behind; else the client has to wait
    """

    def __init__(self, service: Service, websocket: WebSocket, window: int, drop: bool = False):
        self.service, self.websocket, self.window, self.drop = service, websocket, window, drop
        self.caps = service.settings.caps
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.stream = SessionStream(service.answerer, self.caps, window, self._tell_from_thread, drop)
        self.received, self.waiting, self.reason = 0, 0, "closed by the client"
        self.questions: set[asyncio.Task[None]] = set()
        self._media: asyncio.Queue[tuple[Callable[..., Any], tuple[Any, ...], int]] = asyncio.Queue()
        self._room = asyncio.Event()
        self._failure: asyncio.Future[Refusal] = self.loop.create_future()
        self._handlers = {
            "media.append": self._append, "frames.append": self._append_frame, "audio.append": self._append_sound,
            "media.end": self._end, "question.ask": self._ask, "session.close": None,
        }  # fmt: skip

    async def run(self) -> None:
        """Receives until the end, while events are sent and media is taken by tasks of their own."""
        workers = [asyncio.create_task(self._send_events()), asyncio.create_task(self._take_media())]
        self.tell({"type": "session.created", "session": self._describe()})
        try:
            await self._receive()
        except Refusal as refusal:
            self.reason = refusal.message
            self.tell({"type": "error", **refusal.body})
            await self._finish_events(workers[0], CLOSE_CODES.get(refusal.status, 1008))
        else:
            self.tell({"type": "session.closed", "chunks": self.stream.chunks, "reason": self.reason})
            await self._finish_events(workers[0], 1000)
        finally:
            for task in (*workers, *self.questions):
                task.cancel()

    async def close(self) -> None:
        """Ends what the session still has running."""
        for task in self.questions:
            task.cancel()
        await asyncio.to_thread(self.stream.close)
        self.service.journal.write(
            "session", chunks=self.stream.chunks, bytes_in=self.received, reason=self.reason[:200]
        )

    def tell(self, event: dict[str, Any]) -> None:
        """Sends an event, in its turn."""
        self.events.put_nowait(event)
        if self.events.qsize() > MOST_EVENTS:
            self._fail(Refusal(408, "the client does not take its events", "slow_client"))

    def _tell_from_thread(self, event: dict[str, Any]) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self._note_chunk, event)

    def _note_chunk(self, event: dict[str, Any]) -> None:
        if event["type"] == "chunk.encoded":
            self.service.metrics.chunks.labels(event["missing"] or "encoded").inc()
            if event["state_bytes"] > self.caps.max_session_state:
                most = f"the state of {event['state_bytes']} bytes exceeds the limit: open one with a smaller window"
                self._fail(Refusal(413, most, "too_large"))
        self.tell(event)

    def _fail(self, refusal: Refusal) -> None:
        if not self._failure.done():
            self._failure.set_result(refusal)

    def _describe(self) -> dict[str, Any]:
        media = self.stream.media
        return {
            "id": f"sess_{secrets.token_hex(12)}", "model": self.service.settings.name, "window": self.window,
            "drop": self.drop,
            "chunk_seconds": media.chunk_seconds, "sample_rate": media.sample_rate,
            "max_bytes": self.caps.max_session_bytes, "max_idle": self.caps.max_session_idle,
        }  # fmt: skip

    async def _receive(self) -> None:
        """Handles messages until the client closes the session. Raises Refusal where the session ends for a reason."""
        last = time.monotonic()
        receiving = asyncio.ensure_future(self.websocket.receive())
        try:
            while True:
                await asyncio.wait([receiving, self._failure], timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
                if self._failure.done():
                    raise self._failure.result()
                if not receiving.done():
                    self._check_time(last)
                    continue
                message, last = receiving.result(), time.monotonic()
                if message["type"] == "websocket.disconnect" or not await self._handle(message):
                    return
                receiving = asyncio.ensure_future(self.websocket.receive())
        finally:
            receiving.cancel()

    def _check_time(self, last: float) -> None:
        if self.service.stopping:
            raise Refusal(503, "the server is being stopped", "stopping")
        if time.monotonic() - last > self.caps.max_session_idle and not self.questions and not self.waiting:
            raise Refusal(408, f"nothing was sent for {self.caps.max_session_idle:g} s", "timeout")

    async def _handle(self, message: dict[str, Any]) -> bool:
        """Handles a message; whether the session goes on. What cannot be understood is answered with an error, and does
        not end it. Raises Refusal (413) for one byte too many."""
        content, text = message.get("bytes"), message.get("text")
        self.received += len(content if content is not None else text or "")
        if self.received > self.caps.max_session_bytes:
            most = f"more than {self.caps.max_session_bytes} bytes were sent, which is the limit"
            raise Refusal(413, most, "too_large")
        number = None
        try:
            if content is not None:
                await self._queue(len(content), self.stream.append, content)
                return True
            event = read_event(text or "", tuple(self._handlers))
            number = event.get("id") if isinstance(event.get("id"), str) else None
            handler = self._handlers[event["type"]]
            if handler is None:
                return False
            await handler(event)
        except Refusal as refusal:
            self.tell({"type": "error", "id": number, **refusal.body})
        except UserError as error:
            self.tell({"type": "error", "id": number, **refuse(error).body})
        return True

    async def _append(self, event: dict[str, Any]) -> None:
        content = read_bytes(event, "media", WAITING_BYTES)
        await self._queue(len(content), self.stream.append, content)

    async def _append_frame(self, event: dict[str, Any]) -> None:
        width, height = (read_number(event, name, 0, 1, 2**14, whole=True) for name in ("width", "height"))
        if not 0 < width * height <= self.caps.max_pixels:
            raise Refusal(422, f"a picture of {width}x{height} exceeds {self.caps.max_pixels} pixels", "too_large")
        second = read_number(event, "time", None, 0, 10**9)
        content = read_bytes(event, "pixels", 3 * self.caps.max_pixels)
        if second is None or len(content) != 3 * width * height:
            raise Refusal(
                400, "frames.append: give time, width, height, and 3 x width x height bytes of RGB", "invalid_value"
            )
        frame = np.frombuffer(content, np.uint8).reshape(height, width, 3)
        await self._queue(len(content), self.stream.append_frame, frame, float(second))

    async def _append_sound(self, event: dict[str, Any]) -> None:
        content = read_bytes(event, "audio", WAITING_BYTES)
        rate = read_number(event, "rate", self.stream.media.sample_rate, 4000, 192_000, whole=True)
        second = read_number(event, "time", None, 0, 10**9)
        if not content or len(content) % 2:
            raise Refusal(400, "audio.append: give 16-bit samples", "invalid_value", "audio")
        await self._queue(len(content), self.stream.append_sound, np.frombuffer(content, "<i2"), rate, second)

    async def _end(self, _: dict[str, Any]) -> None:
        await self._queue(0, self.stream.end)

    async def _queue(self, size: int, take: Callable[..., Any], *arguments: Any) -> None:
        """Has media taken in its turn; waits while much of it waits."""
        self.waiting += size
        self._media.put_nowait((take, arguments, size))
        while self.waiting > WAITING_BYTES and not self._failure.done():
            self._room.clear()
            await asyncio.wait([asyncio.ensure_future(self._room.wait()), self._failure], return_when="FIRST_COMPLETED")

    async def _take_media(self) -> None:
        while True:
            take, arguments, size = await self._media.get()
            try:
                await asyncio.to_thread(take, *arguments)
            except Refusal as refusal:
                self.tell({"type": "error", **refusal.body})
            except UserError as error:
                self.tell({"type": "error", **refuse(error).body})
            except Stopping:
                self._fail(Refusal(503, "the server is being stopped", "stopping"))
            except Exception as error:
                self.service.journal.write("failure", error=f"{type(error).__name__}: {error}"[:500])
                self._fail(Refusal(503, "the media could not be taken now", "overloaded"))
            self.waiting -= size
            self._room.set()

    async def _ask(self, event: dict[str, Any]) -> None:
        if unknown := [name for name in event if name not in QUESTION_FIELDS]:
            raise Refusal(400, f"{quote_text(unknown[0])}: not supported here", "unknown_parameter", unknown[0][:80])
        if len(self.questions) >= MOST_QUESTIONS:
            raise Refusal(429, f"{MOST_QUESTIONS} questions are open: wait for an answer", "too_many_requests")
        prompt, choosing = read_text(event, "question"), read_choosing(event, self.caps)
        candidates = event.get("candidates")
        if candidates is not None:
            candidates = check_candidates(candidates, self.caps.max_candidates)
        ids = encode_prompt(self.service.answerer.processor, prompt)
        number = event.get("id")
        if number is not None and not (isinstance(number, str) and len(number) <= 64):
            raise Refusal(400, "id: give a short text", "invalid_value", "id")
        answer = self._score(number, prompt, candidates) if candidates else self._answer(number, ids, choosing)
        task = asyncio.create_task(self._guard(number, answer))
        self.questions.add(task)
        task.add_done_callback(self.questions.discard)

    async def _guard(self, number: str | None, answering: Any) -> None:
        try:
            await answering
        except Refusal as refusal:
            self.tell({"type": "error", "id": number, **refusal.body})
        except UserError as error:
            self.tell({"type": "error", "id": number, **refuse(error).body})
        except Stopping:
            self._fail(Refusal(503, "the server is being stopped", "stopping"))

    async def _take_outputs(self) -> tuple[Any, int]:
        """The latents of now, and the number of chunks. Raises Refusal (400) before the first chunk."""

        def take() -> tuple[Any, int]:
            return self.stream.take_outputs(), self.stream.chunks

        outputs, chunks = await asyncio.wrap_future(self.service.answerer.run(take))
        if outputs is None:
            raise Refusal(400, "nothing has been seen yet: a chunk has to be complete first", "no_media")
        return outputs, chunks

    async def _answer(self, number: str | None, ids: list[int], choosing: Any) -> None:
        began = time.monotonic()
        outputs, chunks = await self._take_outputs()
        answer, first = AnswerSoFar(), None
        async with aclosing(follow_answer(self.service, outputs, ids, choosing, answer)) as pieces:
            async for piece in pieces:
                first = time.monotonic() - began if first is None else first
                if piece.text:
                    self.tell({"type": "answer.delta", "id": number, "text": piece.text})
        self.tell(
            {
                "type": "answer.done", "id": number, "answer": answer.text, "probability": answer.probability,
                "reason": answer.reason, "chunks": chunks, "end": chunks * self.stream.media.chunk_seconds,
                "first_token_seconds": round(first or 0.0, 4),
            }
        )  # fmt: skip

    async def _score(self, number: str | None, prompt: str, candidates: list[str]) -> None:
        outputs, chunks = await self._take_outputs()
        answerer = self.service.answerer
        ranked = answerer.run(rank_candidates, answerer.model, answerer.processor, outputs, prompt, candidates)
        scores = [describe_candidate(one) for one in await asyncio.wrap_future(ranked)]
        self.tell({"type": "scores.done", "id": number, "scores": scores, "chunks": chunks})

    async def _send_events(self) -> None:
        while (event := await self.events.get()) is not None:
            await self.websocket.send_text(json.dumps(event))

    async def _finish_events(self, sender: asyncio.Task[None], code: int) -> None:
        """Sends what is left, and closes."""
        self.events.put_nowait(None)
        with suppress(TimeoutError, WebSocketDisconnect, RuntimeError):
            await asyncio.wait_for(sender, self.caps.max_send)
            await asyncio.wait_for(self.websocket.close(code, self.reason[:100]), self.caps.max_send)


def read_event(text: str, known: tuple[str, ...]) -> dict[str, Any]:
    """The event in a message. Raises Refusal (400) for anything else."""
    try:
        event = parse_json(text)
    except InvalidJson as error:
        raise Refusal(400, f"the message is not JSON: {error.reason}", "invalid_json") from error
    kind = event.get("type") if isinstance(event, dict) else None
    if kind not in known:
        raise Refusal(400, f"type: choose {', '.join(known)}", "invalid_value", "type")
    return event


def read_bytes(event: dict[str, Any], name: str, most: int) -> bytes:
    """The bytes of a field in base64. Raises Refusal: 400 for anything else, 413 for more than `most`."""
    value = event.get(name)
    if not isinstance(value, str):
        raise Refusal(400, f"{name}: give base64 text", "invalid_type", name)
    if len(value) > most * 4 / 3 + 4:
        raise Refusal(413, f"{name}: more than {most} bytes at a time", "too_large", name)
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, f"{name}: not base64", "invalid_value", name) from error

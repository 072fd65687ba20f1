"""POST /v1/chat/completions: OpenAI's wire format, answered at once or as a stream of events."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from mirasol.app.server.asking import (
    AnswerSoFar,
    encode_prompt,
    finish_answer,
    follow_answer,
    is_sure,
    read_conversation_of,
    read_json,
)
from mirasol.app.server.clips import EncodedClip
from mirasol.app.server.parameters import check_fields, check_model, read_choosing, read_flag
from mirasol.app.server.questions import Choosing, ChosenToken
from mirasol.app.server.refusals import Refusal
from mirasol.app.server.service import Service
from mirasol.media.tokenizer import TextCoder

Value = TypeVar("Value")
LEFT = 408  # which nobody receives
NO_BUFFER = {"cache-control": "no-cache", "x-accel-buffering": "no"}


@dataclass(frozen=True)
class Completion:
    """A request that was understood and whose clip is encoded."""

    service: Service
    clip: EncodedClip
    prompt: list[int]
    choosing: Choosing
    id: str
    created: int
    with_logprobs: bool
    with_usage: bool

    def describe_usage(self, answer: AnswerSoFar) -> dict[str, int]:
        """Tokens of the text that was read and written; the end of an answer is not counted."""
        read, written = len(self.prompt), answer.count
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def describe_tokens(self, tokens: Sequence[ChosenToken]) -> dict[str, Any] | None:
        """The tokens with their log-probabilities, where they were asked for."""
        if not self.with_logprobs:
            return None
        processor = self.service.answerer.processor
        found = []
        for token in tokens:
            others = [describe_token(processor, *other) for other in token.alternatives]
            found.append({**describe_token(processor, token.id, token.log_probability), "top_logprobs": others})
        return {"content": found, "refusal": None}

    def describe_answer(self, answer: AnswerSoFar) -> dict[str, Any]:
        """What is said in addition to OpenAI's fields."""
        sure = is_sure(self.service, self.clip, answer.probability)
        facts = {"probability": answer.probability, "not_sure": None if sure is None else not sure}
        return {**facts, "clip": self.clip.facts}

    def wrap(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """An object of OpenAI's API."""
        service = self.service
        return {
            "id": self.id, "object": kind, "created": self.created, "model": service.settings.name,
            "system_fingerprint": service.fingerprint, "choices": choices, **more,
        }  # fmt: skip


async def create_completion(service: Service, request: Request) -> Response:
    """Answers the last question of a conversation. Raises Refusal."""
    fields = check_fields(await read_json(request))
    check_model(fields, service.settings.name)
    choosing = read_choosing(fields, service.settings.caps)
    streams, options = read_flag(fields, "stream"), fields.get("stream_options", {})
    if not isinstance(options, dict) or (options and not streams):
        raise Refusal(400, "stream_options: give an object, and stream=true", "invalid_type", "stream_options")
    with_logprobs, with_usage = read_flag(fields, "logprobs"), read_flag(options, "include_usage")
    conversation = await read_conversation_of(service, fields.pop("messages", None))
    prompt = encode_prompt(service.answerer.processor, conversation.prompt)
    clip = await service.clips.get(conversation)
    number = f"chatcmpl-{secrets.token_hex(12)}"
    completion = Completion(service, clip, prompt, choosing, number, int(time.time()), with_logprobs, with_usage)
    note_question(service, request, conversation.prompt)
    if streams:
        return await start_stream(completion)
    answer = await run_while_connected(request, finish_answer(service, clip.encoded, prompt, choosing))
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": answer.reason}
    choice["logprobs"] = completion.describe_tokens(answer.tokens)
    more = {"usage": completion.describe_usage(answer), "mirasol": completion.describe_answer(answer)}
    return JSONResponse(completion.wrap("chat.completion", [choice], **more))


async def start_stream(completion: Completion) -> Response:
    """The answer as server-sent events. What fails before the first piece is answered as an error. Raises Refusal."""
    events = write_events(completion)
    first = await anext(events)

    async def continue_stream() -> AsyncIterator[str]:
        async with aclosing(events):
            yield first
            try:
                async for event in events:
                    yield event
            except Refusal as refusal:
                yield format_event(refusal.body)

    # Proxies must not wait for more of it.
    return StreamingResponse(continue_stream(), media_type="text/event-stream", headers=NO_BUFFER)


async def write_events(completion: Completion) -> AsyncIterator[str]:
    """The events of an answer, one for each piece. Raises Refusal."""
    answer = AnswerSoFar()
    unused = {"usage": None} if completion.with_usage else {}
    delta: dict[str, Any] = {"role": "assistant"}
    pieces = follow_answer(completion.service, completion.clip.encoded, completion.prompt, completion.choosing, answer)
    async with aclosing(pieces):
        async for piece in pieces:
            if not (piece.text or piece.tokens or delta):
                continue
            choice = {"index": 0, "delta": {**delta, "content": piece.text}, "finish_reason": None}
            choice["logprobs"] = completion.describe_tokens(piece.tokens)
            delta = {}
            yield format_event(completion.wrap("chat.completion.chunk", [choice], **unused))
    last = {"index": 0, "delta": {}, "finish_reason": answer.reason, "logprobs": None}
    more = {**unused, "mirasol": completion.describe_answer(answer)}
    yield format_event(completion.wrap("chat.completion.chunk", [last], **more))
    if completion.with_usage:
        yield format_event(completion.wrap("chat.completion.chunk", [], usage=completion.describe_usage(answer)))
    yield "data: [DONE]\n\n"


def format_event(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value)}\n\n"


async def run_while_connected(request: Request, work: Coroutine[Any, Any, Value]) -> Value:
    """The result of `work`, which is cancelled when the client leaves. Raises Refusal, if only for the log."""

    async def wait_for_leaving() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_leaving())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refusal(LEFT, "the client has left", "client_left")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


def note_question(service: Service, request: Request, prompt: str) -> None:
    """Adds the question to the line about this request, where the server was told to."""
    if service.settings.log_questions:
        request.state.exchange.facts["question"] = prompt


def describe_token(processor: TextCoder, number: int, log_probability: float) -> dict[str, Any]:
    """A token as OpenAI's log-probabilities have it: its text, and its bytes, which alone may be no characters."""
    content = read_token_bytes(processor, number)
    text = processor.tokenizer.convert_ids_to_tokens(number) if content is None else content.decode("utf-8", "replace")
    return {"token": text, "logprob": log_probability, "bytes": None if content is None else list(content)}


def read_token_bytes(processor: TextCoder, number: int) -> bytes | None:
    """The bytes that a token of a byte-level vocabulary stands for; None for a special one."""
    tokenizer = processor.tokenizer
    if number in tokenizer.all_special_ids:
        return None
    symbols, known = tokenizer.convert_ids_to_tokens(number), map_symbols_to_bytes()
    if symbols is None or not all(symbol in known for symbol in symbols):
        return None
    return bytes(known[symbol] for symbol in symbols)


@lru_cache(maxsize=1)
def map_symbols_to_bytes() -> dict[str, int]:
    """The symbols of byte-level vocabularies: printable bytes stand for themselves, the others for what follows 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}

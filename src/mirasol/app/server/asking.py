"""From a request's body to a question in the batch, and its pieces back to the request."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from mirasol.app.server.answerer import Stopping
from mirasol.app.server.clips import EncodedClip
from mirasol.app.server.fetching import fetch_part
from mirasol.app.server.messages import Conversation, MediaPart, read_messages
from mirasol.app.server.questions import Choosing, ChosenToken, Piece, Question
from mirasol.app.server.refusals import Refusal, refuse
from mirasol.app.server.service import Service
from mirasol.errors import UserError
from mirasol.json_values import InvalidJson, parse_json
from mirasol.media.tokenizer import TextCoder
from mirasol.model.outputs import MirasolEncoderOutput

LARGE_BODY = 2**20  # parsed in another thread, so that others need not wait for it


async def read_json(request: Request) -> Any:
    """The value of a request's body. Raises Refusal: 415 for another type than JSON, 400 for what is not JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "send JSON, as Content-Type: application/json", "unsupported_media")
    content = await request.body()
    try:
        return await asyncio.to_thread(parse_json, content) if len(content) > LARGE_BODY else parse_json(content)
    except UnicodeDecodeError as error:
        raise Refusal(400, "the body is not UTF-8", "invalid_json") from error
    except InvalidJson as error:
        where = "" if error.line is None else f" at line {error.line}, column {error.column}"
        raise Refusal(400, f"the body is not JSON: {error.reason}{where}", "invalid_json") from error


async def read_conversation_of(service: Service, messages: Any) -> Conversation:
    """The conversation of a request's messages, with the media of other hosts fetched. Raises Refusal."""
    caps, allowed = service.settings.caps, service.settings.allow_hosts

    async def fetch(url: str, kind: str) -> MediaPart:
        return await asyncio.to_thread(fetch_part, url, kind, allowed, caps.max_body, caps.max_upload)

    return await read_messages(messages, caps, fetch, service.files.find_part)


def encode_prompt(processor: TextCoder, prompt: str) -> list[int]:
    """The ids of a prompt from <bos> to <sep>. Raises Refusal (400) for one that is too long."""
    try:
        return processor.encode_text([prompt])["decoder_input_ids"][0].tolist()
    except UserError as error:
        raise refuse(error, "messages") from error


@dataclass
class AnswerSoFar:
    """What has arrived of an answer."""

    text: str = ""
    tokens: list[ChosenToken] = field(default_factory=list)
    reason: str | None = None
    probability: float = 0.0

    @property
    def count(self) -> int:
        """Tokens of the answer, without its end."""
        return len(self.tokens)


async def follow_answer(
    service: Service, encoded: MirasolEncoderOutput, prompt: list[int], choosing: Choosing, so_far: AnswerSoFar
) -> AsyncIterator[Piece]:
    """The pieces of the answer to a question, which is given up when nobody waits for the next piece any more.

    Raises:
        Refusal: 503 when the server stops, or the model fails.
    """
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue()

    def pass_on(piece: Piece) -> None:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(arrived.put_nowait, piece)

    question = Question(encoded, prompt, choosing, service.answerer.processor, pass_on)
    began = loop.time()
    try:
        service.answerer.ask(question)
        while so_far.reason is None:
            piece = await arrived.get()
            if piece.error is not None:
                raise piece.error
            if not so_far.tokens and not so_far.text:
                service.metrics.first_token.observe(loop.time() - began)
            so_far.text += piece.text
            so_far.tokens += piece.tokens
            so_far.reason, so_far.probability = piece.reason, question.probability
            yield piece
    except Stopping as error:
        raise Refusal(503, "the server is being stopped", "stopping") from error
    except Refusal:
        raise
    except Exception as error:
        service.journal.write("failure", error=f"{type(error).__name__}: {error}"[:500])
        raise Refusal(503, "the model could not answer now: ask again later", "overloaded") from error
    finally:
        question.is_cancelled = True
        service.metrics.tokens.inc(so_far.count)


async def finish_answer(
    service: Service, encoded: MirasolEncoderOutput, prompt: list[int], choosing: Choosing
) -> AnswerSoFar:
    """The complete answer to a question. Raises Refusal as `follow_answer`."""
    so_far = AnswerSoFar()
    async with aclosing(follow_answer(service, encoded, prompt, choosing, so_far)) as pieces:
        async for _ in pieces:
            pass
    return so_far


def is_sure(service: Service, clip: EncodedClip, probability: float) -> bool | None:
    """Whether the checkpoint is sure of an answer; None where that was never measured."""
    doubt = service.doubt
    if doubt is None:
        return None
    limit = doubt.highest_surprise
    is_strange = limit is not None and clip.surprise is not None and clip.surprise > limit
    return probability >= doubt.threshold and not is_strange

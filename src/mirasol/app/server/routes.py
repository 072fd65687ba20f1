"""The other routes: models, files, scores, health and numbers."""

from typing import Any

import anyio
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mirasol.app.server.answerer import Answerer, Stopping
from mirasol.app.server.asking import is_sure, read_conversation_of, read_json
from mirasol.app.server.clips import EncodedClip
from mirasol.app.server.messages import Conversation, check_type
from mirasol.app.server.parameters import check_fields, check_model, check_text
from mirasol.app.server.refusals import Refusal, refuse
from mirasol.app.server.service import Service
from mirasol.errors import UserError
from mirasol.evaluation.answer import RankedCandidate, rank_candidates

SCORE_FIELDS = frozenset({"model", "messages", "candidates"})
LONGEST_NAME = 255
ANIMATIONS = ("image/gif", "image/apng")  # and animated WebP, which is to be sent as a video


def describe_model(service: Service) -> dict[str, Any]:
    """The model as OpenAI's API lists it."""
    return {"id": service.settings.name, "object": "model", "created": service.created, "owned_by": "mirasol"}


async def upload_file(service: Service, request: Request) -> Response:
    """Keeps a file of a form, once its media was decoded and encoded: later questions find its latents.

    Raises:
        Refusal: 400, 413, 415, 422 for what is not such a form or not media that can be used; 429.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise Refusal(415, "send a form, as Content-Type: multipart/form-data", "unsupported_media")
    try:
        async with request.form(max_files=1, max_fields=8, max_part_size=64 * 1024) as form:
            file, purpose = form.get("file"), form.get("purpose", "user_data")
            if not isinstance(file, UploadFile):
                raise Refusal(400, "file: missing, or without a file name", "missing_file", "file")
            if not isinstance(purpose, str) or len(purpose) > 64:
                raise Refusal(400, "purpose: give a short text", "invalid_value", "purpose")
            for name in form:
                if name not in ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]"):
                    raise Refusal(400, f"{name[:80]!r}: not supported here", "unknown_parameter", name[:80])
            check_text(purpose, "purpose")
            if file.content_type:
                check_type(file.content_type, "file")
            if not file.size:
                raise Refusal(400, "file: empty", "invalid_value", "file")
            shown = "".join(letter for letter in (file.filename or "") if letter.isprintable())[:LONGEST_NAME]
            kind = choose_kind(file.content_type or "")
            stored = await service.files.add(file.file, file.size, shown, purpose, kind)
    except HTTPException as error:
        raise Refusal(400, f"the form cannot be read: {error.detail}", "invalid_form") from error
    except (UnicodeError, ValueError, KeyError, LookupError) as error:
        raise Refusal(400, "the form cannot be read", "invalid_form") from error
    try:
        part = await service.files.find_part(stored.id)
        await service.clips.get(Conversation("", (part,)))
    except BaseException:
        with anyio.CancelScope(shield=True):
            service.files.delete(stored.id)
        raise
    return JSONResponse(stored.body)


def choose_kind(media_type: str) -> str:
    """How a file of this type is read: as one picture, or in time."""
    is_still = media_type.startswith("image/") and media_type not in ANIMATIONS
    return "image" if is_still else "video"


async def create_score(service: Service, request: Request) -> Response:
    """Ranks candidate answers to the last question of a conversation. Raises Refusal."""
    fields = check_fields(await read_json(request), SCORE_FIELDS)
    check_model(fields, service.settings.name)
    candidates = check_candidates(fields.get("candidates"), service.settings.caps.max_candidates)
    conversation = await read_conversation_of(service, fields.pop("messages", None))
    clip = await service.clips.get(conversation)
    ranked = await score_candidates(service, clip, conversation.prompt, candidates)
    return JSONResponse(
        {
            "object": "list",
            "model": service.settings.name,
            "data": [describe_candidate(one) for one in ranked],
            "mirasol": {"not_sure": is_unsure(service, clip), "clip": clip.facts},
        }
    )


def is_unsure(service: Service, clip: EncodedClip) -> bool | None:
    """Whether the clip is unlike all that the checkpoint was measured on; None where that is not known."""
    sure = is_sure(service, clip, 1.0)
    return None if sure is None else not sure


def describe_candidate(one: RankedCandidate) -> dict[str, Any]:
    """A candidate with its share of all candidates, and the probability of exactly this answer."""
    return {"object": "score", "candidate": one.text, "share": one.share, "probability": one.probability}


def check_candidates(candidates: Any, most: int) -> list[str]:
    """The candidates. Raises Refusal (400) unless they are at least two different texts, none of them empty."""
    name = "candidates"
    if not isinstance(candidates, list) or not 2 <= len(candidates) <= most:
        raise Refusal(400, f"candidates: give a list of 2 to {most} texts", "invalid_value", name)
    if not all(isinstance(each, str) and each.strip() and len(each) <= 1000 for each in candidates):
        raise Refusal(400, "candidates: each is a text of 1 to 1000 characters", "invalid_value", name)
    if len(set(candidates)) < len(candidates):
        raise Refusal(400, "candidates: one appears twice: give it once", "invalid_value", name)
    return [check_text(each, name) for each in candidates]


async def score_candidates(
    service: Service, clip: EncodedClip, prompt: str, candidates: list[str]
) -> list[RankedCandidate]:
    """The candidates, the most likely first. Raises Refusal: 400 for texts that are too long, 503."""
    import asyncio

    answerer: Answerer = service.answerer
    try:
        found = answerer.run(rank_candidates, answerer.model, answerer.processor, clip.encoded, prompt, candidates)
        return await asyncio.wrap_future(found)
    except Stopping as error:
        raise Refusal(503, "the server is being stopped", "stopping") from error
    except UserError as error:
        raise refuse(error, "candidates") from error

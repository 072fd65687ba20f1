"""The messages of a conversation → a prompt, and the parts that its clip is made of."""

import base64
import binascii
import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirasol.app.server.parameters import check_text
from mirasol.app.server.refusals import Refusal, refuse
from mirasol.app.server.settings import Caps
from mirasol.errors import UserError, quote_text
from mirasol.media.inputs.conversation import read_conversation

DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[^;,]*)*);base64,", re.IGNORECASE)
OTHER_TYPES = ("application/octet-stream", "application/ogg", "application/mp4", "application/mxf")
PARTS = {"video_url": "video", "image_url": "image", "input_audio": "audio", "file": "video"}
ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class MediaPart:
    """A video, image or sound. digest: SHA-256 of its content, which is in memory or in a file."""

    kind: str
    digest: str
    content: bytes | None = None
    path: Path | None = None


@dataclass(frozen=True)
class Conversation:
    """The prompt of the last question of a conversation, and what it is about: a picture, a sound, or both."""

    prompt: str
    parts: tuple[MediaPart, ...]

    @property
    def key(self) -> tuple[tuple[str, str], ...]:
        """What the clip is made of."""
        return tuple((part.kind, part.digest) for part in self.parts)


Fetch = Callable[[str, str], Awaitable[MediaPart]]  # of a URL and the kind of part it is
FindFile = Callable[[str], Awaitable[MediaPart]]  # of an uploaded file's id


async def read_messages(messages: Any, caps: Caps, fetch: Fetch, find_file: FindFile) -> Conversation:
    """The conversation of a request. `fetch` reads a URL of another machine, `find_file` an uploaded file.

    Raises:
        Refusal: 400 for messages that cannot be understood, 413, 415 for media; those of `fetch` and `find_file`.
    """
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "messages: give a list of at least one message", "invalid_type", "messages")
    if len(messages) > caps.max_messages:
        most = f"{len(messages)} messages exceed the limit of {caps.max_messages}"
        raise Refusal(400, most, "too_many_messages", "messages")
    parts: dict[str, MediaPart] = {}
    found = []
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if not isinstance(message, dict):
            raise Refusal(400, f"{where}: not an object", "invalid_type", where)
        found.append(await _read_message(message, where, parts, fetch, find_file))
    try:
        exchange = read_conversation(found)
    except UserError as error:
        raise refuse(error, "messages") from error
    if exchange.target is not None:
        raise Refusal(400, "messages: end with a question, not with an answer", "invalid_value", "messages")
    if exchange.clip is None:
        raise Refusal(
            400, "messages: no media: add a part video_url, image_url, input_audio or file", "missing_media", "messages"
        )
    names = [exchange.clip[kind] for kind in ("video", "audio") if kind in exchange.clip]
    return Conversation(exchange.prompt, tuple(parts[name] for name in names))


async def _read_message(
    message: Mapping[str, Any], where: str, parts: dict[str, MediaPart], fetch: Fetch, find_file: FindFile
) -> dict[str, Any]:
    """A message as transformers' conversations have it; its media are added to `parts`, under their names there."""
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise Refusal(400, f"{where}.role: choose {', '.join(ROLES)}", "invalid_value", f"{where}.role")
    for name, value in message.items():
        if name not in ("role", "content", "name", "refusal") and value not in (None, []):
            raise Refusal(400, f"{where}: {quote_text(name)} is not supported", "unknown_parameter", where)
    content = message.get("content")
    if isinstance(content, str):
        return {"role": ROLES[role], "content": check_text(content, f"{where}.content")}
    if not isinstance(content, list) or not content:
        raise Refusal(400, f"{where}.content: give a text or a list of parts", "invalid_type", f"{where}.content")
    read = []
    for number, part in enumerate(content):
        place = f"{where}.content[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise Refusal(400, f"{place}.text: give a text", "invalid_type", place)
            read.append({"type": "text", "text": check_text(part["text"], place)})
        elif isinstance(kind, str) and kind in PARTS:
            if ROLES[role] != "user":
                raise Refusal(400, f"{place}: media belong into a user's message", "invalid_value", place)
            media = await _read_media(part, kind, place, fetch, find_file)
            name = f"part-{len(parts)}"
            parts[name] = media
            read.append({"type": media.kind, media.kind: name})
        else:
            known = ", ".join(("text", *PARTS))
            raise Refusal(400, f"{place}.type: choose {known}", "invalid_value", f"{place}.type")
    return {"role": ROLES[role], "content": read}


async def _read_media(part: Mapping[str, Any], kind: str, place: str, fetch: Fetch, find_file: FindFile) -> MediaPart:
    value = part.get(kind)
    if isinstance(value, str) and kind in ("video_url", "image_url"):
        value = {"url": value}
    if not isinstance(value, dict):
        raise Refusal(400, f"{place}.{kind}: give an object", "invalid_type", place)
    if kind == "input_audio":
        return MediaPart("audio", *_decode(value.get("data"), f"{place}.input_audio.data"))
    if kind == "file":
        if isinstance(value.get("file_id"), str):
            return await find_file(value["file_id"])
        url, place = value.get("file_data"), f"{place}.file.file_data"
    else:
        url, place = value.get("url"), f"{place}.{kind}.url"
    if not isinstance(url, str):
        raise Refusal(400, f"{place}: give a text", "invalid_type", place)
    if url[:5].lower() == "data:":
        return MediaPart(PARTS[kind], *decode_data_url(url, place))
    return await fetch(url, PARTS[kind])


def decode_data_url(url: str, place: str) -> tuple[str, bytes]:
    """Digest and content of a data URL. Raises Refusal: 400 for one that cannot be read, 415 for one that is not of a
    video, an image or a sound."""
    match = DATA_URL.match(url[:1000])
    if match is None:
        raise Refusal(400, f"{place}: not a data URL of the form data:video/mp4;base64,…", "invalid_value", place)
    check_type(match[1] or "application/octet-stream", place)
    return _decode(url[match.end() :], place)


def check_type(kind: str, place: str) -> None:
    """Raises Refusal (415) for a media type that is not one of video, image or sound."""
    kind = kind.partition(";")[0].strip().lower()
    if kind.partition("/")[0] not in ("video", "audio", "image") and kind not in OTHER_TYPES:
        raise Refusal(
            415, f"{place}: {quote_text(kind)} is not a video, an image or a sound", "unsupported_media", place
        )


def _decode(data: Any, place: str) -> tuple[str, bytes]:
    if not isinstance(data, str):
        raise Refusal(400, f"{place}: give base64 text", "invalid_type", place)
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, f"{place}: not base64", "invalid_value", place) from error
    if not content:
        raise Refusal(400, f"{place}: empty", "invalid_value", place)
    return hash_content([content]), content


def hash_content(pieces: Sequence[bytes]) -> str:
    """SHA-256 of bytes in pieces."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()

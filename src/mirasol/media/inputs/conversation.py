"""A conversation in the format of transformers' chat templates → a clip, a prompt and a target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mirasol.errors import UserError
from mirasol.media.inputs.arguments import is_file

_SOURCES = {"video": ("video", "url", "path"), "audio": ("audio", "url", "path"), "image": ("image", "url", "path")}
_SETTINGS = {"video": ("fps", "times"), "audio": ("sampling_rate",), "image": ()}


@dataclass(frozen=True)
class Exchange:
    """A question about one clip. clip: what `ClipReader` takes, None without media. target: the answer, if any."""

    clip: dict[str, Any] | None
    prompt: str
    target: str | None


def split_conversations(conversation: Any) -> tuple[list[Sequence[Mapping[str, Any]]], bool]:
    """The conversations of a batch, and whether it is one: a single conversation is a list of messages."""
    if not isinstance(conversation, list | tuple) or not conversation:
        raise UserError("conversation: give a list of messages, or a list of such lists")
    if isinstance(conversation[0], Mapping):
        return [conversation], False
    return list(conversation), True


def read_conversation(messages: Sequence[Mapping[str, Any]]) -> Exchange:
    """The exchange of a conversation: system and user messages are clip and prompt, a last answer is the target.

    Earlier questions and answers become the first lines of the prompt (`join_turns`).

    Raises:
        UserError: a role or a part that is unknown, answers without a question, more than one video or sound.
    """
    media: dict[str, Any] = {}
    turns: list[tuple[str, str]] = []
    texts: list[str] = []
    target = None
    for message in messages:
        role, content = message.get("role"), message.get("content") or []
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if role not in ("system", "user", "assistant"):
            raise UserError(f"role={role!r} of a message: choose system, user or assistant")
        if target is not None:
            if role == "assistant":
                raise UserError("two answers in a row in a conversation: put a question between them")
            turns.append(("\n".join(texts), target))
            texts, target = [], None
        if role == "assistant":
            if not texts:
                raise UserError("a conversation that begins with an answer: begin with a question")
            target = " ".join(_read_text(part, "an answer") for part in parts)
            continue
        for part in parts:
            if part.get("type") in _SOURCES:
                _add_media(part, media)
            else:
                texts.append(_read_text(part, "a question"))
    if not texts:
        raise UserError("a conversation without text: add a part {'type': 'text', 'text': …}")
    return Exchange(media or None, join_turns(turns, "\n".join(texts)), target)


def join_turns(turns: Sequence[tuple[str, str]], prompt: str) -> str:
    """The prompt of a later question about a clip: earlier questions with their answers, then it, a line each."""
    return "\n".join([*(line for turn in turns for line in turn), prompt])


def _add_media(part: Mapping[str, Any], media: dict[str, Any]) -> None:
    kind = part["type"]
    given = [part[key] for key in _SOURCES[kind] if part.get(key) is not None]
    if len(given) != 1:
        raise UserError(f"a part of type {kind}: give one of {', '.join(_SOURCES[kind])}, found {len(given)}")
    unknown = [key for key in part if key not in ("type", *_SOURCES[kind], *_SETTINGS[kind])]
    if unknown:
        raise UserError(f"unknown key {unknown[0]!r} of a part of type {kind}")
    name = "audio" if kind == "audio" else "video"
    if name in media:
        raise UserError(f"several parts of {name} in one conversation: a clip has one")
    settings = {key: part[key] for key in _SETTINGS[kind] if part.get(key) is not None}
    value = given[0]
    if kind == "image" and not is_file(value):
        value, settings = [value], {"fps": 1.0}
    media |= {name: value, **settings}


def _read_text(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise UserError(f"a part of type {part.get('type')!r} in {place}: known are text, video, audio and image")
    return part["text"]

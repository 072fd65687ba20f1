"""Media → encoded clips: decoded in other processes, encoded once, and kept for further questions."""

import asyncio
import dataclasses
import os
import secrets
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mirasol.app.server.answerer import Answerer
from mirasol.app.server.messages import Conversation, MediaPart
from mirasol.app.server.refusals import Refusal
from mirasol.app.server.settings import Caps
from mirasol.errors import BadClip, UserError
from mirasol.evaluation.answer import encode_clips, measure_surprise
from mirasol.media.clip import Clip
from mirasol.media.feature_extractor import MirasolFeatureExtractor
from mirasol.media.inputs.values import ClipReader
from mirasol.media.isolation.decoders import DecoderEnded
from mirasol.media.limits import Limits
from mirasol.model.outputs import MirasolEncoderOutput

Value = TypeVar("Value")
MOST_NOTES = 20


@dataclass(frozen=True)
class EncodedClip:
    """What questions are asked of.

    encoded: one clip's latents and their mask. seconds, chunks: of the clip. notes: irregularities of its file.
    surprise: how unlike the training data it looks; None without a picture
    """

    encoded: MirasolEncoderOutput
    seconds: float
    chunks: int
    notes: tuple[str, ...]
    surprise: float | None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, all that is kept of it but a few words."""
        return sum(
            each.untyped_storage().nbytes() for each in (self.encoded.last_hidden_state, self.encoded.latent_mask)
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What a client is told of the clip."""
        return {"seconds": round(self.seconds, 3), "chunks": self.chunks, "notes": list(self.notes[:MOST_NOTES])}


Key = tuple[tuple[str, str], ...]


class LatentMemory:
    """Encoded clips by what they are made of; the ones used longest ago go when their bytes exceed `most`."""

    def __init__(self, most: int):
        self.most, self.nbytes = most, 0
        self._clips: OrderedDict[Key, EncodedClip] = OrderedDict()

    def __len__(self) -> int:
        return len(self._clips)

    def get(self, key: Key) -> EncodedClip | None:
        """The clip, which counts as used now; None where it is not kept."""
        clip = self._clips.get(key)
        if clip is not None:
            self._clips.move_to_end(key)
        return clip

    def put(self, key: Key, clip: EncodedClip) -> None:
        """Keeps the clip, unless it is larger than all that may be kept."""
        self.drop(key)
        if clip.nbytes > self.most:
            return
        self._clips[key] = clip
        self.nbytes += clip.nbytes
        while self.nbytes > self.most:
            self.drop(next(iter(self._clips)))

    def drop(self, key: Key) -> None:
        """Forgets a clip."""
        clip = self._clips.pop(key, None)
        if clip is not None:
            self.nbytes -= clip.nbytes


class Clips:
    """Encodes what conversations are about. Of one event loop; decoding is done by `caps.max_decoders` processes.

    count: receives "hit" or "miss" of the latents that are kept
    """

    def __init__(self, answerer: Answerer, caps: Caps, folder: Path, count: Callable[[str], None] = lambda _: None):
        self.answerer, self.caps, self.folder, self.count = answerer, caps, folder, count
        self.memory = LatentMemory(caps.max_latents)
        self._running: dict[Key, asyncio.Task[EncodedClip]] = {}
        self._decoders = ThreadPoolExecutor(caps.max_decoders, thread_name_prefix="decode")

    async def get(self, conversation: Conversation) -> EncodedClip:
        """The clip of a conversation. Requests for the same clip at the same time wait for one encoding.

        Raises:
            Refusal: 422 for media that cannot be used, 503 where no decoder can be started.
        """
        key = conversation.key
        clip = self.memory.get(key)
        self.count("miss" if clip is None else "hit")
        if clip is not None:
            return clip
        if key not in self._running:
            task = asyncio.create_task(self._encode(key, conversation.parts))
            self._running[key] = task
            task.add_done_callback(lambda task: (self._running.pop(key, None), task.cancelled() or task.exception()))
        return await asyncio.shield(self._running[key])

    async def _encode(self, key: Key, parts: tuple[MediaPart, ...]) -> EncodedClip:
        clip, tensors = await self.run_decoder(read_tensors, parts)
        clip = await asyncio.wrap_future(self.answerer.run(encode_clip, self.answerer, clip, tensors))
        self.memory.put(key, clip)
        return clip

    async def run_decoder(self, read: Callable[..., Value], parts: tuple[MediaPart, ...]) -> Value:
        """What `read_tensors` or `read_clip` makes of the parts, when one of the `max_decoders` is free. Raises
        Refusal."""
        extractor = self.answerer.processor.feature_extractor
        work = partial(read, extractor, parts, self.caps.media_limits, self.folder)
        return await asyncio.get_running_loop().run_in_executor(self._decoders, work)

    def close(self) -> None:
        """Ends the threads."""
        self._decoders.shutdown(wait=False, cancel_futures=True)


def encode_clip(answerer: Answerer, clip: Clip, tensors: dict[str, Tensor]) -> EncodedClip:
    """Encodes a clip, in the thread of the model."""
    whole = encode_clips(answerer.model, answerer.processor, [tensors])
    surprise = measure_surprise(answerer.model, answerer.processor, tensors, whole)
    # Questions need no more than these; clones, so that nothing else stays in memory with them.
    kept = MirasolEncoderOutput(whole.last_hidden_state.clone(), whole.latent_mask.clone())
    timeline = clip.timeline
    return EncodedClip(kept, timeline.end - timeline.start, timeline.num_chunks, clip.notes, surprise)


def read_tensors(
    extractor: MirasolFeatureExtractor, parts: tuple[MediaPart, ...], limits: Limits, folder: Path
) -> tuple[Clip, dict[str, Tensor]]:
    """The tensors of a clip, and the clip without its pictures and samples. Raises Refusal as `read_clip`."""
    clip = read_clip(extractor, parts, limits, folder)
    return _describe_clip(clip), extractor.tensors(clip)


def read_clip(extractor: MirasolFeatureExtractor, parts: tuple[MediaPart, ...], limits: Limits, folder: Path) -> Clip:
    """Decodes the parts of a clip in other processes. A decoder that ended, perhaps by somebody else's fault, is given
    one more chance.

    Raises:
        Refusal: as `Clips.get`.
    """
    with ExitStack() as removed_later:
        paths = [(part.kind, _give_path(part, folder, removed_later)) for part in parts]
        try:
            return _read_twice(extractor, paths, limits)
        except BadClip as error:
            reason = _leave_out_fix(error.reason.replace(error.file, os.path.basename(error.file)))
            raise Refusal(422, f"the media cannot be used: {reason}", "unusable_media", "messages") from error
        except UserError as error:
            raise _refuse_clip(error) from error


def _give_path(part: MediaPart, folder: Path, removed_later: ExitStack) -> str:
    """Where a part lies, or is written to for now."""
    if part.path is not None:
        return str(part.path)
    path = folder / f"part-{secrets.token_hex(16)}"
    removed_later.callback(path.unlink, missing_ok=True)
    path.write_bytes(part.content)
    return str(path)


def _read_twice(extractor: MirasolFeatureExtractor, paths: list[tuple[str, str]], limits: Limits) -> Clip:
    try:
        return _read_clip(extractor, paths, limits)
    except DecoderEnded:
        return _read_clip(extractor, paths, limits)


def _read_clip(extractor: MirasolFeatureExtractor, paths: list[tuple[str, str]], limits: Limits) -> Clip:
    """The clip of a picture or video, a sound, or both."""
    value: dict[str, Any] = {}
    for kind, path in paths:
        if kind == "image":
            value |= {"video": [extractor.read_image(path, limits=limits)], "fps": 1.0}
        else:
            value[kind] = path
    return ClipReader(partial(extractor.read, limits=limits), extractor.grid, extractor.media)(value)


def _refuse_clip(error: UserError) -> Refusal:
    if "no process can be started" in str(error):
        return Refusal(503, "no decoder can be started now: ask again later", "overloaded")
    said = str(error).partition(": ")[2] or str(error)  # the file's name here is the server's own
    return Refusal(422, f"the media cannot be used: {said}", "unusable_media", "messages")


def _leave_out_fix(reason: str) -> str:
    """Limits are raised by whoever runs the server."""
    return reason.partition("raise it in Python")[0].rstrip(" ,:").removesuffix(", or").rstrip()


def _describe_clip(clip: Clip) -> Clip:
    """The clip without its pictures and samples, of which only the tensors are needed."""
    return dataclasses.replace(clip, frames=clip.frames[:0], frame_times=clip.frame_times[:0], waveform=torch.zeros(0))

"""Chunk features of clips on disk: what frozen encoders gave once."""

import contextlib
import os
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mirasol.data.clip_cache import ClipCache, Room, Window, name_file
from mirasol.errors import BadClip, UserError
from mirasol.files import copy_folder_permissions
from mirasol.media.feature_extractor import MirasolFeatureExtractor

# Goes up whenever features may be computed or stored otherwise than before.
FEATURE_FORMAT = 1
# The fields of the model's `MirasolChunkFeatures` in a batch: [clip, chunk, token, width], [clip, chunk, patch, value].
FEATURES = ("video_features", "audio_features", "video_target", "audio_target")
MASKS = ("video_mask", "audio_mask")
STORED_DTYPES = {"fp32": None, "bf16": torch.bfloat16}  # None: the dtype that they were computed in


class FeatureCache:
    """Chunk features of clips, one safetensors file each, which processes and runs may share.

    A file's name is a hash of the clip (as the clip cache knows it), of what the features were computed with, and of
    the dtype, so that a changed clip or other weights never get stale features. Files are written atomically, with a
    checksum; a damaged one is removed, and its clip is computed again. Once the limit or the disk is reached nothing is
    added any more.

    clips: knows the clips, and how they are decoded
    computed_with: a hash of weights and settings
    dtype: `bf16` rounds what is stored, and what is used before it is stored alike; `fp32` keeps all as computed
    limit: bytes that the folder's files may take, None for any
    stages: names of the recipe's stages that use the features

    Raises:
        UserError: a folder that cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        clips: ClipCache,
        computed_with: str,
        dtype: str = "fp32",
        limit: int | None = None,
        stages: Collection[str] = (),
    ):
        self.folder, self.clips, self.computed_with, self.dtype = Path(folder), clips, computed_with, dtype
        self.stages = frozenset(stages)
        self.damaged = 0
        self.full: str | None = None
        self._room = Room(self.folder, limit, "data.feature_cache_limit")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"data.feature_cache={folder}: cannot be created ({error.strerror}): give another folder"
            ) from error

    def file(self, window: Window) -> Path:
        """The file of the window's features, which may not exist yet. Raises BadClip where the media file is
        missing."""
        # Sound at the edges of a window that is cut out of its clip differs from that of one decoded alone.
        is_cut = window[0] in self.clips.whole
        key = [FEATURE_FORMAT, self.computed_with, self.dtype, is_cut, self.clips.make_key(window)]
        return name_file(self.folder, key)

    def has_if_readable(self, window: Window) -> bool:
        """Whether the features of the window are there, and the media file too."""
        try:
            return self.file(window).exists()
        except BadClip:
            return False

    def load(self, window: Window) -> dict[str, Tensor] | None:
        """The window's features and masks, in the dtypes that they were computed in; None where they are not there, or
        damaged, which is counted. Raises BadClip as `file`."""
        file = self.file(window)
        try:
            with safe_open(file, framework="pt") as stored:
                facts = stored.metadata()
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            if _compute_checksum(tensors) != facts["checksum"]:
                raise ValueError("its checksum differs")
            return {name: value.to(getattr(torch, facts[name])) for name, value in tensors.items()}
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{file}: damaged file in the feature cache ({error}): computed again", stacklevel=2)
        self.damaged += 1
        with contextlib.suppress(OSError):
            size = file.stat().st_size
            file.unlink()
            self._room.take(-size)
        return None

    def round(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The features as they will be once they were stored and loaded."""
        stored = STORED_DTYPES[self.dtype]
        return {
            name: value if stored is None or name in MASKS else value.to(stored).to(value.dtype)
            for name, value in tensors.items()
        }

    def keep(self, window: Window, tensors: Mapping[str, Tensor]) -> str | None:
        """Stores the window's features and masks. Returns the reason where nothing will be added from now on."""
        if self.full is not None:
            return None
        stored = STORED_DTYPES[self.dtype]
        facts = {name: str(value.dtype).removeprefix("torch.") for name, value in tensors.items()}
        small = {
            name: (value if stored is None or name in MASKS else value.to(stored)).cpu().contiguous()
            for name, value in tensors.items()
        }
        content = save(small, facts | {"checksum": _compute_checksum(small), "media": window[0]})
        file = self.file(window)
        unfinished = file.with_suffix(f".{os.getpid()}.unfinished")
        try:
            if not self._room.take(len(content)):
                self.full = f"data.feature_cache_limit={self._room.limit / 1e9:g} GB is reached"
                return self.full
            file.parent.mkdir(exist_ok=True)
            unfinished.write_bytes(content)
            copy_folder_permissions(unfinished)
            os.replace(unfinished, file)
        except OSError as error:
            self.full = error.strerror or str(error)
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
                self._room.take(-len(content))
        return self.full


def _compute_checksum(tensors: Mapping[str, Tensor]) -> str:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"


def collate_features(
    clips: Sequence[Mapping[str, Any]], extractor: MirasolFeatureExtractor, frames: Tensor | None = None
) -> dict[str, Tensor]:
    """A batch of clips of which some have features (`FeatureCache.load`) and others are decoded
    (`MirasolFeatureExtractor.tensors`, without the video where `frames` has it).

    Masks bool [clip, chunk], features [clip, chunk, token, width] with zeros for the decoded clips; these have video
    and audio as `MirasolFeatureExtractor.collate` gives them, masks of their own (`uncached_video_mask`,
    `uncached_audio_mask`) and in `uncached`, int [clip, 2], their rows and numbers of chunks.
    """
    lengths = [len(clip["video_mask"]) for clip in clips]
    longest = max(lengths)
    media = {"chunk_mask": torch.arange(longest)[None] < torch.tensor(lengths)[:, None]}
    for name in MASKS:
        media[name] = place_rows(clips, name, longest)
    found = next((clip for clip in clips if "video_features" in clip), {})
    media |= {name: place_rows(clips, name, longest) for name in FEATURES if name in found}
    uncached = [row for row, clip in enumerate(clips) if "video_features" not in clip]
    if uncached:
        decoded = extractor.collate([dict(clips[row]) for row in uncached], frames)
        media |= {"video": decoded["video"], "audio": decoded["audio"]}
        media |= {f"uncached_{name}": decoded[name] for name in MASKS}
        media["uncached"] = torch.tensor([(row, lengths[row]) for row in uncached])
    return media


def place_rows(clips: Sequence[Mapping[str, Tensor]], name: str, longest: int) -> Tensor:
    """The tensors of that name [chunk, ...] as one [clip, chunk, ...]; zeros where a clip has none or ends."""
    like = next(clip[name] for clip in clips if name in clip)
    batch = like.new_zeros(len(clips), longest, *like.shape[1:])
    for row, clip in zip(batch, clips, strict=True):
        if name in clip:
            row[: len(clip[name])] = clip[name]
    return batch


def complete_features(
    media: dict[str, Tensor], compute: Callable[[int, dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The batch of `collate_features` with features of all clips; `compute(row, tensors)` gives those of one, whose
    tensors are video, audio, video_mask and audio_mask of its chunks."""
    media = dict(media)
    rows = media.pop("uncached", None)
    media.pop("damaged", None)
    if rows is None:
        return media
    names = {"video": "video", "audio": "audio", **{name: f"uncached_{name}" for name in MASKS}}
    decoded = {name: media.pop(key) for name, key in names.items()}
    longest = media["chunk_mask"].shape[1]
    for place, (row, length) in enumerate(rows.tolist()):
        features = compute(row, {name: value[place, :length] for name, value in decoded.items()})
        for name in FEATURES:
            if name not in features:
                continue
            if name not in media:
                media[name] = features[name].new_zeros(len(media["chunk_mask"]), longest, *features[name].shape[1:])
            media[name][row, :length] = features[name]
    return media

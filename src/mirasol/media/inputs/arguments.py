"""Which clips transformers' arguments mean, and which values are files. Needs no media library."""

import os
from collections.abc import Mapping
from typing import Any

from mirasol.errors import UserError, quote_text


def is_file(value: Any) -> bool:
    """Whether a value is a path, bytes, an encoded value of `datasets` or a decoder that `datasets` made of one."""
    if isinstance(value, str | os.PathLike | bytes) or getattr(value, "_hf_encoded", None):
        return True
    return isinstance(value, Mapping) and set(value) <= {"path", "bytes"} and any(value.values())


def find_file(value: Any) -> tuple[str | os.PathLike | None, bytes | None]:
    """The path of a media file, or what it contains.

    Raises:
        UserError: a file on another machine.
    """
    value = getattr(value, "_hf_encoded", None) or value
    path, content = value, None
    if isinstance(value, bytes):
        path, content = None, value
    elif isinstance(value, Mapping):
        path, content = value.get("path"), value.get("bytes")
    if content is None and isinstance(path, str):
        path = path.removeprefix("file://")
        if "://" in path:
            raise UserError(f"{quote_text(path)}: files of other machines are not read: download it first")
    return path, content


def gather_clips(
    videos: Any = None,
    audio: Any = None,
    images: Any = None,
    fps: Any = None,
    sampling_rate: float | None = None,
    video_metadata: Any = None,
) -> list[dict[str, Any]]:
    """The clips of transformers' arguments, as `ClipReader` takes them: one or a list of videos, sounds or images.

    fps: of frames in memory, one number or one for each video. video_metadata: transformers' `VideoMetadata` or a
    mapping like it, for each video.

    Raises:
        UserError: other numbers of one than of the other.
    """
    seen, heard = _split(videos, 4), _split(audio, 1)
    if images is not None:
        if videos is not None:
            raise UserError("images and videos were given: a clip has one of them")
        pictures = images if isinstance(images, list | tuple) else [images]
        seen, fps = [picture if is_file(picture) else [picture] for picture in pictures], 1.0
    count = max(len(seen), len(heard))
    metadata = video_metadata if isinstance(video_metadata, list | tuple) else [video_metadata] * count
    rates = fps if isinstance(fps, list | tuple) else [fps] * count
    for name, values in (("videos", seen), ("audio", heard), ("video_metadata", metadata), ("fps", rates)):
        if values and len(values) != count:
            raise UserError(f"{len(values)} of {name} for {count} clips: give as many of each")
    clips: list[dict[str, Any]] = [{} for _ in range(count)]
    for number, clip in enumerate(clips):
        if seen:
            clip["video"] = seen[number]
            if not is_file(seen[number]) and not hasattr(seen[number], "get_frames_played_at"):
                clip |= _find_times(metadata[number], rates[number])
        if heard:
            clip |= {"audio": heard[number], "sampling_rate": sampling_rate}
    return clips


def _find_times(metadata: Any, fps: float | None) -> dict[str, Any]:
    """The settings `fps` or `times` of frames with transformers' metadata."""
    if metadata is None:
        return {"fps": fps}
    get = metadata.get if isinstance(metadata, Mapping) else lambda name: getattr(metadata, name, None)
    rate, indices = get("fps"), get("frames_indices")
    if rate is None or indices is None:
        return {"fps": fps if rate is None else rate}
    return {"times": [index / rate for index in indices]}


def _split(values: Any, axes: int) -> list[Any]:
    """One video (of frames with 4 axes) or sound (1 axis), or a list of them, as a list."""
    if values is None:
        return []
    if isinstance(values, tuple) and len(values) == 2 and isinstance(values[1], int):
        return [values]  # samples and their rate
    if not isinstance(values, list | tuple):
        return list(values) if getattr(values, "ndim", 0) > max(axes, 2) else [values]
    first = values[0] if values else None
    of_one = hasattr(first, "convert") or isinstance(first, int | float) or getattr(first, "ndim", 9) == axes - 1
    return [values] if of_one else list(values)

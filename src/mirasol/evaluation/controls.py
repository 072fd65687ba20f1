"""Controls: the same checkpoint and questions, but part of what it could see or hear is taken away.

A model that answers from sight, hearing and their binding in time must fall back to chance where its source is gone;
one that does not has found a leak in the data.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mirasol.errors import UserError

# One clip as `MirasolFeatureExtractor.tensors` gives it: video [T, F, 3, H, W], audio [T, S, M], video_mask, audio_mask
# [T]. No batch axis, so a control cannot depend on what a clip is batched with.
ClipTensors = Mapping[str, Tensor]


def no_video(clip: ClipTensors) -> dict[str, Tensor]:
    """The clip without its video: what the model gets of a file that has none."""
    return {**clip, "video": torch.zeros_like(clip["video"]), "video_mask": torch.zeros_like(clip["video_mask"])}


def no_audio(clip: ClipTensors) -> dict[str, Tensor]:
    """The clip without its audio: what the model gets of a silent file."""
    return {**clip, "audio": torch.zeros_like(clip["audio"]), "audio_mask": torch.zeros_like(clip["audio_mask"])}


def no_media(clip: ClipTensors) -> dict[str, Tensor]:
    """The clip with neither; what remains is the question and the clip's length."""
    return no_audio(no_video(clip))


def shifted_audio(clip: ClipTensors) -> dict[str, Tensor]:
    """The clip with its audio moved against its video by half its chunks (rounded down), around the end to the start.

    Both streams hold all they held, only their alignment is gone. A clip of one chunk stays as it is.
    """
    half = len(clip["audio_mask"]) // 2
    return {**clip, "audio": clip["audio"].roll(half, 0), "audio_mask": clip["audio_mask"].roll(half, 0)}


CONTROLS: dict[str, Callable[[ClipTensors], dict[str, Tensor]]] = {
    "no_video": no_video,
    "no_audio": no_audio,
    "no_media": no_media,
    "shifted_audio": shifted_audio,
}


def apply_control(name: str | None, clip: ClipTensors) -> dict[str, Tensor]:
    """The clip under the control of that name, unchanged for None. Raises UserError for an unknown name."""
    if name is None:
        return dict(clip)
    if name not in CONTROLS:
        raise UserError(f"unknown control {name!r}: choose {', '.join(CONTROLS)}")
    return CONTROLS[name](clip)

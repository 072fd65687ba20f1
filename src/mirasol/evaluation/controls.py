"""Controls: the same checkpoint and questions, with part of the clip removed.

A model that answers from sight, hearing and their binding in time must fall back to chance where that evidence is
missing; a model that does not has found a leak in the data.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mirasol.errors import UserError
from mirasol.media.augment import shift_audio

# One clip from `MirasolFeatureExtractor.tensors`: video [T, F, 3, H, W], audio [T, S, M], video_mask, audio_mask [T].
# No batch axis, so a control cannot depend on what a clip is batched with.
ClipTensors = Mapping[str, Tensor]


def remove_video(clip: ClipTensors) -> dict[str, Tensor]:
    """The clip without its video: what the model gets for a file without a video stream."""
    return {**clip, "video": torch.zeros_like(clip["video"]), "video_mask": torch.zeros_like(clip["video_mask"])}


def remove_audio(clip: ClipTensors) -> dict[str, Tensor]:
    """The clip without its audio: what the model gets for a silent file."""
    return {**clip, "audio": torch.zeros_like(clip["audio"]), "audio_mask": torch.zeros_like(clip["audio_mask"])}


def remove_media(clip: ClipTensors) -> dict[str, Tensor]:
    """The clip without both; the question and the clip's length remain."""
    return remove_audio(remove_video(clip))


CONTROLS: dict[str, Callable[[ClipTensors], dict[str, Tensor]]] = {
    "no_video": remove_video,
    "no_audio": remove_audio,
    "no_media": remove_media,
    "shifted_audio": shift_audio,
}


def apply_control(name: str | None, clip: ClipTensors) -> dict[str, Tensor]:
    """The clip under the control of that name, unchanged for None. Raises UserError for an unknown name."""
    if name is None:
        return dict(clip)
    if name not in CONTROLS:
        raise UserError(f"unknown control {name!r}: choose {', '.join(CONTROLS)}")
    return CONTROLS[name](clip)

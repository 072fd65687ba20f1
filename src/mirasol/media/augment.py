"""Augmentation of a clip's compact tensors, as `MirasolFeatureExtractor.tensors` gives them.

What a clip becomes follows from its tensors, the settings and a seed. All its frames share one shift, one crop and one
flip.
"""

import math
import random
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float16, Shaped, UInt8
from torch import Tensor
from torch.nn import functional as F

from mirasol.config.augment import Augment, SpecAugment, compute_shift_step
from mirasol.media.spectrogram import SILENCE

# Shapes of a crop, width to height: what image models are usually trained with.
LEAST_RATIO, LARGEST_RATIO = 3 / 4, 4 / 3
# What a clip or a batch has of each chunk's audio, by name.
_OF_AUDIO = frozenset(("audio", "audio_mask", "audio_features", "audio_target"))
# Frames are decoded at most this many times as wide as the model takes them, so that a cache stays affordable.
LARGEST_DECODING = 2.0


def compute_decode_size(image_size: int, crop: float) -> int:
    """How large, in pixels, frames have to be decoded for crops down to this share of their area: so that the smallest
    one still has `image_size` pixels a side, and not an enlarged few; but no more than twice that."""
    return math.ceil(image_size * min(crop**-0.5, LARGEST_DECODING))


def augment_clip(tensors: Mapping[str, Tensor], augment: Augment, image_size: int, seed: int) -> dict[str, Tensor]:
    """A clip as one step sees it: shifted, cropped to `image_size` pixels, mirrored, parts of its spectrogram hidden.

    Each draws from a generator of its own, seeded by `seed` and its name, so that switching one on or off leaves the
    others as they are. `mixup` needs two clips, and is not done here.
    """
    result = dict(tensors)
    if augment.time_shift:
        (chunks, frames), bands = result["video"].shape[:2], result["audio"].shape[1]
        most = min(augment.time_shift, chunks * frames // 2)
        result = shift_clip(result, draw_shift(most, compute_shift_step(frames, bands), _make_generator(seed, "shift")))
    if augment.crop < 1:
        side = result["video"].shape[-1]
        box = draw_crop_box(augment.crop, side, _make_generator(seed, "crop"))
        result["video"] = crop_video(result["video"], box, image_size)
    if augment.flip and _make_generator(seed, "flip").random() < augment.flip:
        result["video"] = result["video"].flip(-1)
    if augment.spec_augment.frequency_masks or augment.spec_augment.time_masks:
        generator = _make_generator(seed, "spec_augment")
        result["audio"] = mask_spectrogram(result["audio"], result["audio_mask"], augment.spec_augment, generator)
    return result


def _make_generator(seed: int, name: str) -> random.Random:
    return random.Random(f"{seed} {name}")


def draw_shift(most: int, step: int, generator: random.Random) -> int:
    """Frames to shift by, at most `most` either way, in multiples of `step`."""
    return step * generator.randint(-(most // step), most // step)


def shift_clip(tensors: Mapping[str, Tensor], frames: int) -> dict[str, Tensor]:
    """The clip as if it had begun `frames` frames earlier (its content comes later) or, where negative, later.

    What is outside the clip is treated as the reader treats what is outside a stream: the nearest frame is held,
    sound is silence, and a chunk that is entirely outside has neither. Picture and sound move by
    the same time, so `frames` is a multiple of `compute_shift_step`.
    """
    video, audio = tensors["video"], tensors["audio"]
    (chunks, per_chunk), bands = video.shape[:2], audio.shape[1]
    assert frames * bands % per_chunk == 0, (frames, per_chunk, bands)
    frame, is_seen = _find_sources(tensors["video_mask"], per_chunk, frames)
    mel_frame, is_heard = _find_sources(tensors["audio_mask"], bands, frames * bands // per_chunk)
    video_mask, audio_mask = is_seen.any(dim=1), is_heard.any(dim=1)
    pictures = video.flatten(0, 1)
    if video_mask.any():
        # Video is there from one frame on up to another, so the nearest frame that is there is found by clamping.
        there = tensors["video_mask"].repeat_interleave(per_chunk).nonzero()[:, 0]
        pictures = pictures[frame.flatten().clamp(there[0], there[-1])].unflatten(0, (chunks, per_chunk))
        video = pictures * video_mask[:, None, None, None, None]
    else:
        video = torch.zeros_like(video)
    heard = audio.flatten(0, 1)[mel_frame.clamp(0, chunks * bands - 1)]
    heard = torch.where(is_heard[..., None], heard, torch.full_like(heard, SILENCE))
    audio = heard * audio_mask[:, None, None]
    return {"video": video, "audio": audio, "video_mask": video_mask, "audio_mask": audio_mask}


def shift_audio(clip: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The clip with its audio shifted against its video by half its chunks (rounded down), wrapping around; so are
    features of its audio, where it has any.

    Both streams keep all their content and lose only their alignment. A clip of one chunk is unchanged.
    """
    half = len(clip["audio_mask"]) // 2
    return {name: value.roll(half, 0) if name in _OF_AUDIO else value for name, value in clip.items()}


def _find_sources(
    mask: Bool[Tensor, " chunk"], per_chunk: int, shift: int
) -> tuple[Shaped[Tensor, "chunk part"], Bool[Tensor, "chunk part"]]:
    """Which of the clip's frames each frame is after the shift, and whether that one is there."""
    source = torch.arange(len(mask) * per_chunk) - shift
    inside = (source >= 0) & (source < len(source))
    there = inside & mask.repeat_interleave(per_chunk)[source.clamp(0, len(source) - 1)]
    return source.unflatten(0, (-1, per_chunk)), there.unflatten(0, (-1, per_chunk))


def draw_crop_box(least: float, side: int, generator: random.Random) -> tuple[int, int, int, int]:
    """Top, left, height and width in pixels of a part of a square picture: its share of the area between `least` and 1,
    its shape between 3:4 and 4:3 as far as that fits in, its place anywhere."""
    area = generator.uniform(least, 1.0)
    # Wider than 1/area (or narrower than area) it would reach over the edge.
    ratio = math.exp(generator.uniform(math.log(max(LEAST_RATIO, area)), math.log(min(LARGEST_RATIO, 1 / area))))
    height, width = (
        max(1, min(side, round(side * part))) for part in (math.sqrt(area / ratio), math.sqrt(area * ratio))
    )
    return generator.randint(0, side - height), generator.randint(0, side - width), height, width


def crop_video(
    video: UInt8[Tensor, "chunk frame 3 side side"], box: tuple[int, int, int, int], image_size: int
) -> UInt8[Tensor, "chunk frame 3 image_size image_size"]:
    """The same part of every frame, scaled to `image_size` pixels (bilinear, antialiased)."""
    top, left, height, width = box
    result = video.new_empty(*video.shape[:3], image_size, image_size)
    for chunk, target in zip(video, result, strict=True):
        part = chunk[..., top : top + height, left : left + width]
        target.copy_(F.interpolate(part, (image_size, image_size), mode="bilinear", antialias=True))
    return result


def mask_spectrogram(
    audio: Float16[Tensor, "chunk mel_frame mel"],
    audio_mask: Bool[Tensor, " chunk"],
    masks: SpecAugment,
    generator: random.Random,
) -> Float16[Tensor, "chunk mel_frame mel"]:
    """The log-mel with some bands of frequency and of time at the clip's mean; absent chunks stay as they are.

    The mean, as in SpecAugment itself, carries no information. The floor would be silence, which can be heard, and
    questions may be about it.
    """
    if not audio_mask.any():
        return audio
    chunks, bands, bins = audio.shape
    frames = chunks * bands
    hidden = torch.zeros(frames, bins, dtype=torch.bool)
    for _ in range(masks.frequency_masks):
        width = generator.randint(0, min(masks.frequency_width, bins))
        first = generator.randint(0, bins - width)
        hidden[:, first : first + width] = True
    widest = min(masks.time_width, int(masks.time_share * frames))
    for _ in range(masks.time_masks):
        width = generator.randint(0, widest)
        first = generator.randint(0, frames - width)
        hidden[first : first + width] = True
    mean = audio[audio_mask].float().mean()
    hidden = hidden.view(audio.shape) & audio_mask[:, None, None]
    return torch.where(hidden, mean.to(audio.dtype), audio)

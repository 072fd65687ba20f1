"""Frames and samples in memory → a `Clip`, as a file with them would be read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from jaxtyping import Float32, Float64, UInt8

from mirasol.config.media import MediaConfig
from mirasol.errors import UserError
from mirasol.media.clip import Clip
from mirasol.media.timeline import ChunkGrid, cut_into_chunks, describe_cut
from mirasol.media.video import TIME_TOLERANCE, UPRIGHT, draw_square

SOURCE = "frames in memory"  # what messages call them


@dataclass(frozen=True)
class Pictures:
    """Frames, each on show from its time until the next one's; the last one until `end`. Seconds."""

    frames: Sequence[Any]
    times: Float64[np.ndarray, " frame"]
    end: float


@dataclass(frozen=True)
class Sound:
    """Mono samples at `rate` Hz from second `start` on."""

    samples: Float32[np.ndarray, " sample"]
    rate: int
    start: float = 0.0
    channels: int = 1

    @property
    def end(self) -> float:
        return self.start + len(self.samples) / self.rate


def make_pictures(frames: Any, fps: float | None = None, times: Any = None) -> Pictures:
    """Frames with their rate (`fps`) or the second at which each begins (`times`).

    frames: [frame, height, width, 3] or [frame, 3, height, width] of an array or tensor, or a sequence of such pictures
        or of PIL images; uint8, or floats from 0 to 1

    Raises:
        UserError: no frames, neither or both of rate and times, or times that do not ascend.
    """
    if not len(frames):
        raise UserError("video has no frames: give at least one")
    if (fps is None) == (times is None):
        raise UserError(f"fps={fps} and times={times}: frames need one of the two, their rate or their seconds")
    if fps is not None:
        if not 0 < float(fps) < float("inf"):
            raise UserError(f"fps={fps}: must be positive and finite")
        return Pictures(frames, np.arange(len(frames)) / float(fps), len(frames) / float(fps))
    times = np.asarray(times, np.float64)
    if times.shape != (len(frames),) or not np.isfinite(times).all() or (np.diff(times) <= 0).any() or times[0] < 0:
        raise UserError(f"times of {len(frames)} frames: give as many ascending seconds from 0 on")
    # The last frame is on show for as long as frames usually are.
    usual = float(np.median(np.diff(times))) if len(times) > 1 else 0.04
    return Pictures(frames, times, float(times[-1]) + usual)


def make_sound(samples: Any, sampling_rate: float | None) -> Sound:
    """Samples with their rate in Hz: [sample], [channel, sample] or [sample, channel], whichever axis is shorter being
    the channels, which are averaged; floats in [-1, 1], or integers in the range of their type.

    Raises:
        UserError: no rate, or samples of another shape or with values that are not finite.
    """
    if sampling_rate is None:
        raise UserError("audio of an array needs its rate: give sampling_rate in Hz")
    if int(sampling_rate) != sampling_rate or sampling_rate < 1:
        raise UserError(f"sampling_rate={sampling_rate}: give a whole number of Hz")
    samples = to_array(samples)
    if samples.ndim not in (1, 2) or not samples.size:
        raise UserError(f"audio of shape {samples.shape}: give [sample] or [channel, sample]")
    values = samples.astype(np.float64)
    if samples.dtype == np.uint8:
        values = (values - 128) / 128
    elif samples.dtype.kind == "i":
        values /= -float(np.iinfo(samples.dtype).min)
    channels = 1
    if values.ndim == 2:
        axis = int(values.shape[0] > values.shape[1])
        channels, values = values.shape[axis], values.mean(axis=axis)
    if not np.isfinite(values).all():
        raise UserError("audio has samples that are not finite numbers")
    return Sound(values.astype(np.float32), int(sampling_rate), channels=channels)


def to_array(values: Any) -> np.ndarray:
    """An array, tensor (of any device) or sequence of numbers as an array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
        return values.numpy()
    return np.asarray(values)


def make_clip(pictures: Pictures | None, sound: Sound | None, grid: ChunkGrid, media: MediaConfig) -> Clip:
    """The clip that a file with these frames and this sound would be read as."""
    end = max(part.end for part in (pictures, sound) if part is not None)
    timeline = cut_into_chunks(0.0, end, grid)
    edges, notes = np.array(timeline.edges), describe_cut(timeline, grid)
    frames, times, shown = np.zeros((0, 3, media.image_size, media.image_size), np.uint8), np.zeros(0), edges[1:] < 0
    if pictures is not None:
        wanted = np.array(timeline.frame_times).ravel() + TIME_TOLERANCE
        chosen = np.clip(np.searchsorted(pictures.times, wanted, side="right") - 1, 0, None)
        frames = draw_frames(pictures.frames, chosen, media)
        times = pictures.times[chosen]
        shown = (edges[:-1] < pictures.end) & (edges[1:] > pictures.times[0])
    clip = Clip(
        torch.from_numpy(frames), torch.from_numpy(times), torch.zeros(0), 0.0, media.sample_rate, timeline,
        torch.zeros(timeline.num_chunks, dtype=torch.bool), torch.from_numpy(shown), tuple(notes),
    )  # fmt: skip
    return clip if sound is None else replace_sound(clip, sound)


def replace_sound(clip: Clip, sound: Sound) -> Clip:
    """The clip with other sound, on the clip's own timeline; what exceeds it is noted."""
    waveform, edges = resample(sound, clip.sample_rate), np.array(clip.timeline.edges)
    notes = list(clip.notes)
    if sound.channels > 1:
        notes.append(f"audio of {sound.channels} channels mixed to one")
    if sound.end > edges[-1] + 1e-3 and not any("ignored" in note for note in notes):
        notes.append(f"the last {sound.end - edges[-1]:.3f} s of the audio are ignored: the video ends before")
    heard = (edges[:-1] < sound.end) & (edges[1:] > sound.start)
    return replace(
        clip, waveform=torch.from_numpy(waveform), waveform_start=sound.start, audio_present=torch.from_numpy(heard),
        notes=tuple(notes),
    )  # fmt: skip


def resample(sound: Sound, rate: int) -> Float32[np.ndarray, " sample"]:
    """The samples at another rate, by the resampler that files are read with."""
    if sound.rate == rate:
        return sound.samples
    frame = AudioFrame.from_ndarray(sound.samples[None], format="fltp", layout="mono")
    frame.sample_rate = sound.rate
    resampler = AudioResampler(format="fltp", layout="mono", rate=rate)
    made = [each.to_ndarray()[0] for each in (*resampler.resample(frame), *resampler.resample(None))]
    return np.concatenate([*made, np.zeros(0, np.float32)])


def draw_frames(frames: Sequence[Any], chosen: np.ndarray, media: MediaConfig) -> UInt8[np.ndarray, "frame 3 h w"]:
    """The chosen frames, fitted into squares as those of a file are."""
    drawn = np.zeros((len(chosen), 3, media.image_size, media.image_size), np.uint8)
    reformatter, before = VideoReformatter(), None
    for place, number in enumerate(chosen.tolist()):
        if number == before:
            drawn[place] = drawn[place - 1]
            continue
        picture = VideoFrame.from_ndarray(to_pixels(frames[number]), format="rgb24")
        draw_square(picture, drawn[place], UPRIGHT, media.fit, SOURCE, reformatter)
        before = number
    return drawn


def to_pixels(frame: Any) -> UInt8[np.ndarray, "height width 3"]:
    """One picture as RGB bytes. Raises UserError for another shape, or floats outside of 0 to 1."""
    if hasattr(frame, "convert"):  # of PIL
        return np.asarray(frame.convert("RGB"))
    pixels = to_array(frame)
    if pixels.ndim == 2:
        pixels = pixels[..., None].repeat(3, axis=-1)
    if pixels.ndim == 3 and pixels.shape[-1] != 3 and pixels.shape[0] == 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or not pixels.size:
        raise UserError(f"a frame of shape {pixels.shape}: give [height, width, 3] or [3, height, width]")
    if pixels.dtype.kind == "f":
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise UserError(f"a frame of floats from {pixels.min():g} to {pixels.max():g}: give 0 to 1, or uint8")
        pixels = (pixels * 255).round()
    elif pixels.dtype != np.uint8:
        raise UserError(f"a frame of {pixels.dtype}: give uint8, or floats from 0 to 1")
    return np.ascontiguousarray(pixels.astype(np.uint8))

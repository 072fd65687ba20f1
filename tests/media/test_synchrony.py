"""A flash and a click rendered at the same instant come out at the same instant, in the same chunk."""

import numpy as np
import pytest
import torch
from media_making import Audio, Video, grey, steady, write_media

from mirasol import MirasolFeatureExtractor, read_clip
from mirasol.media.timeline import ChunkGrid

EVENTS = (0.36, 1.24, 2.64)  # seconds; on frames of 25 per second, none near an edge of a chunk of half a second
SECONDS = 3.2
FLASH_SECONDS = 0.16

CONTAINERS = [
    ("a.mp4", "libx264", "aac", 44_100),
    ("a.mp4", "libx264", "aac", 48_000),
    ("a.mkv", "libx264", "libopus", 48_000),
    ("a.mkv", "libx264", "aac", 44_100),
    ("a.webm", "libvpx-vp9", "libopus", 48_000),
    ("a.webm", "libvpx", "vorbis", 44_100),
    ("a.webm", "libvpx", "vorbis", 48_000),
    ("a.ts", "libx264", "aac", 48_000),
    ("a.mov", "libx264", "pcm_s16le", 44_100),
]


def uneven_times() -> list[float]:
    """Frame times at variable rate, with a frame exactly at every event."""
    generator = np.random.default_rng(0)
    times = list(np.cumsum(generator.uniform(0.02, 0.12, size=60)) - 0.02)
    apart = [t for t in times if t < SECONDS and min(abs(t - e) for e in EVENTS) > 0.015]
    return sorted([0.0, *EVENTS, *(round(t, 3) for t in apart if t > 0.015)])


def clicks(rate: int, offset: float, channels: int) -> np.ndarray:
    """Silence with a click, two milliseconds of falling noise, at every event."""
    samples = np.zeros(round(SECONDS * rate), np.float32)
    length = round(0.002 * rate)
    shape = np.random.default_rng(1).uniform(-1, 1, length) * np.linspace(1, 0.2, length)
    shape[0] = 1
    for event in EVENTS:
        samples[round(event * rate) :][:length] = 0.9 * shape
    return np.tile(samples, (channels, 1))


def write_events(path, video_codec, audio_codec, rate, *, times=None, offset=0.0, b_frames=0):
    times = times or steady(round(SECONDS * 25), 25)
    lit = [any(event - 1e-9 <= t < event + FLASH_SECONDS for event in EVENTS) for t in times]
    pictures = [grey(235 if on else 16) for on in lit]
    layout = "stereo" if audio_codec == "vorbis" else "mono"
    video = Video(pictures, [t + offset for t in times], codec=video_codec, b_frames=b_frames)
    samples = clicks(rate, offset, 2 if layout == "stereo" else 1)
    return write_media(path, video, Audio([(offset, samples)], rate, audio_codec, layout))


def flash_times(clip) -> list[float]:
    """When each flash begins: the time of the first bright frame after a dark one."""
    bright = clip.frames[:, :, 16, 16].float().mean(1) > 128
    begins = bright & ~torch.cat([torch.tensor([False]), bright[:-1]])
    return clip.frame_times[begins].tolist()


def click_times(clip) -> list[float]:
    """When each click is loudest."""
    loud = clip.waveform.abs().clone()
    found = []
    for _ in EVENTS:
        peak = int(loud.argmax())
        found.append(clip.waveform_start + peak / clip.sample_rate)
        loud[max(0, peak - 3200) : peak + 3200] = 0
    return sorted(found)


def assert_in_step(path, frame_seconds: float, tolerance: float = 0.005, start: float | None = None) -> None:
    clip = read_clip(path, ChunkGrid(50, chunk_seconds=0.5), image_size=32, start=start, threads=1)
    flashes, heard = flash_times(clip), click_times(clip)
    assert len(flashes) == len(EVENTS)
    # A packet of encoder delay may stand before the first sample where the container does not say that it is cut.
    zero = flashes[0] - EVENTS[0]
    assert 0 <= zero + 1e-3 <= frame_seconds
    for event, flash, click in zip(EVENTS, flashes, heard, strict=True):
        assert abs(flash - zero - event) <= 0.002
        assert abs(click - flash) <= tolerance, (path, click - flash)


@pytest.mark.parametrize(("name", "video", "audio", "rate"), CONTAINERS)
def test_flash_and_click_are_within_five_milliseconds(tmp_path, name, video, audio, rate):
    assert_in_step(write_events(tmp_path / name, video, audio, rate), 0.04)


@pytest.mark.parametrize(("name", "video", "audio", "rate"), CONTAINERS)
def test_they_are_when_the_container_starts_late(tmp_path, name, video, audio, rate):
    assert_in_step(write_events(tmp_path / name, video, audio, rate, offset=7.4), 0.04)


@pytest.mark.parametrize(("name", "video", "audio", "rate"), CONTAINERS)
def test_they_are_at_variable_frame_rate(tmp_path, name, video, audio, rate):
    assert_in_step(write_events(tmp_path / name, video, audio, rate, times=uneven_times()), 0.04)


def test_they_are_with_b_frames(tmp_path):
    assert_in_step(write_events(tmp_path / "a.mp4", "libx264", "aac", 44_100, b_frames=3), 0.04)


@pytest.mark.parametrize(("name", "video", "audio", "rate"), CONTAINERS)
@pytest.mark.parametrize("offset", [0.0, 7.4])
def test_they_are_in_the_same_chunk_of_the_models_tensors(tmp_path, name, video, audio, rate, offset):
    extractor = MirasolFeatureExtractor(chunk_seconds=0.5)
    tensors = extractor.tensors(extractor.read(write_events(tmp_path / name, video, audio, rate, offset=offset)))
    bright = tensors["video"][:, :, :, 16, 16].float().amax((1, 2)) > 128
    loud = tensors["audio"].float().amax((1, 2)) > 0.2
    assert bright.nonzero().flatten().tolist() == [int(event // 0.5) for event in EVENTS]
    assert torch.equal(bright, loud)


@pytest.mark.parametrize(("name", "video", "audio", "rate"), CONTAINERS)
@pytest.mark.parametrize("offset", [0.0, 7.4])
def test_they_are_in_a_window_into_the_file(tmp_path, name, video, audio, rate, offset):
    clip = read_clip(
        write_events(tmp_path / name, video, audio, rate, offset=offset),
        ChunkGrid(50, chunk_seconds=0.5),
        image_size=32,
        start=2.1,
        end=3.1,
        threads=1,
    )
    (flash,) = flash_times(clip)
    click = clip.waveform_start + int(clip.waveform.abs().argmax()) / clip.sample_rate
    assert abs(flash - EVENTS[2]) <= 0.04
    assert abs(click - flash) <= 0.005


def test_the_yardstick_notices_a_shift(tmp_path):
    """The same measurement fails on a file whose click is ten milliseconds late."""
    path = tmp_path / "a.mov"
    late = np.roll(clicks(48_000, 0.0, 1), 480, axis=1)
    lit = [any(event - 1e-9 <= k / 25 < event + FLASH_SECONDS for event in EVENTS) for k in range(80)]
    video = Video([grey(235 if on else 16) for on in lit], steady(80, 25))
    write_media(path, video, Audio([(0, late)], 48_000, "pcm_s16le"))
    with pytest.raises(AssertionError):
        assert_in_step(path, 0.04)

"""A window equals the slice of the whole file, however the file is made."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from media_making import Audio, Video, number_of, ramp, steady, write_media

from mirasol import ChunkGrid, read_clip
from mirasol.media.reader import Reading

GRID = ChunkGrid(4, chunk_seconds=0.5)
CODECS = {  # picture, sound, rate of the sound
    "mp4": ("libx264", "aac", 16_000),
    "mov": ("libx264", "pcm_s16le", 16_000),
    "mkv": ("libx264", "aac", 16_000),
    "webm": ("libvpx", "libopus", 16_000),
    "ts": ("libx264", "aac", 16_000),
    "flv": ("libx264", "aac", 44_100),
    "avi": ("mpeg4", "pcm_s16le", 16_000),
}
ORDERS = {"interleaved": 0.0, "sound 40 s ahead": 40.0, "pictures 40 s ahead": -40.0, "sound, then pictures": 1e6}


def sweep(seconds: float, rate: int) -> np.ndarray:
    """A tone that rises slowly and never repeats."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (100 + 5 * time) * time)).astype(np.float32)[None]


def make(folder, container: str, fps: float, b_frames: int, order: str, times=None, seconds=None):
    picture, sound, rate = CODECS[container]
    count = max(4, min(480, round(60 * fps)))
    times = times or steady(count, fps)
    seconds = seconds or times[-1] + 1 / fps
    if picture != "libx264":
        b_frames = 0
    track = Video(ramp(len(times)), times, codec=picture, rate=max(1, round(fps)), group=12, b_frames=b_frames)
    path = folder / f"{container}-{fps:g}-{b_frames}-{order.replace(' ', '')}.{container}"
    return write_media(path, track, Audio([(0, sweep(seconds, rate))], rate=rate, codec=sound), late=ORDERS[order])


def read(path, **settings):
    return read_clip(path, GRID, image_size=32, threads=1, **settings)


def check_window(path, monkeypatch, start: float, end: float, whole) -> None:
    clip = read(path, start=start, end=end)
    with monkeypatch.context() as patched:
        patched.setattr(Reading, "seek", lambda self: True)  # decode all from the beginning
        sequential = read(path, start=start, end=end)
    assert clip.frame_times.tolist() == sequential.frame_times.tolist()
    assert torch.equal(clip.frames, sequential.frames)
    assert clip.video_present.tolist() == sequential.video_present.tolist()
    assert clip.audio_present.tolist() == sequential.audio_present.tolist()
    assert clip.notes == sequential.notes
    assert clip.waveform_start == pytest.approx(sequential.waveform_start, abs=1e-3)
    assert len(clip.waveform) == pytest.approx(len(sequential.waveform), abs=16)
    # And what the whole file shows then.
    times = whole.frame_times.unique()
    wanted = torch.tensor(clip.timeline.frame_times).flatten().double()
    shown = times[(torch.searchsorted(times, wanted + 1e-6, right=True) - 1).clamp_min(0)]
    assert clip.frame_times.tolist() == shown.tolist()
    numbers = dict(zip(whole.frame_times.tolist(), map(number_of, whole.frames), strict=True))
    assert [number_of(frame) for frame in clip.frames] == [numbers[time] for time in shown.tolist()]
    first = round((clip.waveform_start - whole.waveform_start) * 16_000)
    heard = clip.waveform[1000:-1000].numpy()
    if len(heard) > 1000:
        # Containers that count milliseconds place a run of sound by the median of its first stamps.
        assert max(correlation(heard, whole.waveform.numpy(), first + 1000 + lag) for lag in range(-16, 17)) > 0.99


def correlation(heard: np.ndarray, waveform: np.ndarray, first: int) -> float:
    expected = waveform[first : first + len(heard)]
    return float(np.corrcoef(expected, heard[: len(expected)])[0, 1]) if first >= 0 and len(expected) > 500 else 0.0


def windows(whole) -> list[tuple[float, float]]:
    length = whole.timeline.end
    return [(0.0, 1.0), (0.45 * length, 0.45 * length + 1.0), (length - 1.2, length)]


def check_file(path, monkeypatch, fps: float) -> None:
    """Windows at the beginning, in the middle and at the end; of the whole file every frame is read."""
    length = read(path).timeline.end
    whole = read_clip(path, ChunkGrid(max(8, round(2.5 * fps * length)), num_chunks=1), image_size=32, threads=1)
    for start, end in windows(whole):
        check_window(path, monkeypatch, start, end, whole)


QUICK = [
    *((container, fps, 2, "interleaved") for container, fps in zip(CODECS, itertools.cycle((0.05, 30)))),
    *((container, 1, 2, "sound 40 s ahead") for container in ("mkv", "webm", "ts", "avi")),
    ("mkv", 2, 0, "pictures 40 s ahead"),
    *((container, 2, 2, "sound, then pictures") for container in ("mkv", "ts")),
    ("mp4", 240, 2, "interleaved"),
]


@pytest.mark.parametrize(("container", "fps", "b_frames", "order"), QUICK)
def test_a_window_equals_the_slice_of_the_whole_file(tmp_path, monkeypatch, container, fps, b_frames, order):
    check_file(make(tmp_path, container, fps, b_frames, order), monkeypatch, fps)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("b_frames", [0, 3])
@pytest.mark.parametrize("fps", [0.05, 0.5, 1, 5, 25, 240])
@pytest.mark.parametrize("container", CODECS)
def test_a_window_equals_the_slice_in_every_combination(tmp_path, monkeypatch, container, fps, b_frames, order):
    if container == "flv" and order != "interleaved":
        pytest.skip("FLV writers refuse packets that are not in the order of their times")
    check_file(make(tmp_path, container, fps, b_frames, order), monkeypatch, fps)


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])
def test_still_screen_recordings(tmp_path, monkeypatch, container):
    """The picture changes in the first two seconds and 38 s later; the sound goes on."""
    times = [*steady(10, 5), *steady(10, 5, 40.0)]
    path = make(tmp_path, container, 5, 0, "interleaved", times=times, seconds=42.0)
    clip = read(path, start=20.0, end=22.0)
    assert {number_of(frame) for frame in clip.frames} == {9}
    assert clip.audio_present.all()
    assert clip.video_present.all()
    check_file(path, monkeypatch, 5)


def test_a_window_of_a_program_stream_equals_the_slice(tmp_path, monkeypatch):
    """In MPEG program streams many frames have no time of their own."""
    track = Video(ramp(300), steady(300, 25), codec="mpeg2video", tick=Fraction(1, 25))
    path = write_media(tmp_path / "a.mpg", track, Audio([(0, sweep(12, 48_000))], codec="mp2"))
    check_file(path, monkeypatch, 25)


@pytest.mark.parametrize(
    ("name", "start", "wanted"),
    [
        ("sq1.mkv", 45.0, {45, 46}),
        ("sq1.ts", 45.0, {45, 46}),
        ("f2_fps1.mkv", 20.0, None),
        ("f2_fps2.mkv", 20.0, None),
        ("f2_fps0.5.mkv", 20.0, None),
        ("f2_fps0.5.ts", 20.0, None),
        ("f2_audio_then_video.mkv", 20.0, None),
        ("vfr_still.mp4", 20.0, {125}),
        ("vfr_still.mkv", 20.0, {125}),
    ],
)
def test_reported_files_whose_streams_are_far_apart(faults, monkeypatch, name, start, wanted):
    clip = read_clip(faults / name, GRID, image_size=96, threads=1, start=start, end=start + 2)
    assert clip.audio_present.all()
    assert clip.video_present.all()
    if wanted is not None:
        assert {number_of_bars(frame) for frame in clip.frames} == wanted
    with monkeypatch.context() as patched:
        patched.setattr(Reading, "seek", lambda self: True)
        sequential = read_clip(faults / name, GRID, image_size=96, threads=1, start=start, end=start + 2)
    assert clip.frame_times.tolist() == sequential.frame_times.tolist()
    assert clip.notes == sequential.notes


def number_of_bars(frame) -> int:
    """A frame's number from 16 vertical bars, least significant bit at the left."""
    size = frame.shape[-1]
    row = frame.float().mean(0)[size // 2 - 2 : size // 2 + 2].mean(0)
    bars = row.view(16, -1)[:, size // 48 : -(size // 48)].mean(1)
    return sum(int(bar > 128) << k for k, bar in enumerate(bars))

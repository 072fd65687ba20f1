"""Windows into long files: sought, not decoded from the beginning; memory holds the frames asked for."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from media_making import Audio, Video, number_of, ramp, steady, tone, write_media

from mirasol import BadClip, read_clip
from mirasol.media import video as video_stream
from mirasol.media.timeline import ChunkGrid

GRID = ChunkGrid(4, chunk_seconds=0.5)


def read(path, grid=GRID, **settings):
    return read_clip(path, grid, image_size=32, threads=1, **settings)


@pytest.fixture(scope="module", params=["long.mp4", "long.mkv", "long.ts"])
def long_file(tmp_path_factory, request):
    """120 s: 600 numbered frames, a keyframe every 2 s, B-frames; a tone that rises slowly and never repeats."""
    path = tmp_path_factory.mktemp("long") / request.param
    picture = Video(ramp(600), steady(600, 5), rate=5, group=10, b_frames=2)
    time = np.arange(120 * 48_000) / 48_000
    rising = 0.5 * np.sin(2 * np.pi * (40 + 0.3 * time) * time).astype(np.float32)
    return write_media(path, picture, Audio([(0, rising[None])]))


@pytest.mark.parametrize("start", [0.0, 0.1, 59.9, 60.0, 60.07, 117.0])
def test_a_window_is_what_the_whole_file_shows_there(long_file, start):
    whole = read(long_file, ChunkGrid(1200, num_chunks=1))
    clip = read(long_file, start=start, end=start + 2)
    wanted = torch.tensor(clip.timeline.frame_times).flatten()
    times = whole.frame_times.unique()
    shown = times[torch.searchsorted(times, wanted.double() + 1e-6, right=True) - 1]
    torch.testing.assert_close(clip.frame_times, shown)
    numbers = [number_of(frame) for frame in clip.frames]
    assert numbers == [round(float(time - times[0]) * 5) for time in shown]
    first = round((start - whole.waveform_start) * 16_000)
    expected = whole.waveform[max(first, 0) :][: len(clip.waveform)]
    assert len(clip.waveform) >= 1.9 * 16_000
    assert (clip.waveform - expected)[100:-100].abs().max() < 0.2, "within a millisecond, Matroska's unit of time"


def test_a_window_late_in_the_file_decodes_its_own_group_of_pictures_only(long_file):
    clip = read(long_file, start=100.5, end=102.5)
    assert clip.video_counts.frames_decoded <= 40, "of 600; the window spans 10 frames and touches two groups of 10"
    assert clip.audio_counts.frames_decoded < 800, "of 5,600"


def test_few_frames_from_a_long_file_decode_few_groups(long_file):
    clip = read(long_file, ChunkGrid(1, num_chunks=6))
    assert [number_of(frame) for frame in clip.frames] == pytest.approx([50, 150, 250, 350, 450, 550], abs=1)
    assert clip.video_counts.frames_decoded <= 6 * 20
    assert clip.video_counts.frames_converted == 6


def test_reading_may_stop_long_before_the_end(tmp_path):
    """Without sound nothing after the last wanted frame is read, and that is not taken for a file cut short."""
    path = write_media(tmp_path / "a.mp4", Video(ramp(200), steady(200, 10), rate=10, group=10))
    clip = read(path, ChunkGrid(2, num_chunks=1))
    assert [number_of(frame) for frame in clip.frames] == [50, 150]


def test_a_window_of_a_silent_or_a_sound_file(tmp_path):
    silent = write_media(tmp_path / "a.mp4", Video(ramp(200), steady(200, 10), rate=10, group=10))
    clip = read(silent, start=15.0, end=16.0)
    assert number_of(clip.frames[0]) == 150
    assert clip.video_counts.frames_decoded < 40
    pieces = [(0.0, tone(30.0, hertz=200)), (30.0, tone(30.0, hertz=2000))]
    sound = read(write_media(tmp_path / "a.m4a", Audio(pieces)), start=29.0, end=31.0)
    crossings = [(half[1:] * half[:-1] < 0).sum() for half in sound.waveform.split(16_000)]
    assert crossings[0] == pytest.approx(400, abs=10)
    assert crossings[1] == pytest.approx(4000, abs=10)
    assert sound.audio_counts.frames_decoded < 400


def test_a_file_without_a_second_keyframe_is_decoded_from_its_beginning(tmp_path):
    path = write_media(
        tmp_path / "a.mp4", Video(ramp(100), steady(100, 10), rate=10, group=1000), Audio([(0, tone(10))])
    )
    clip = read(path, start=8.0, end=9.0)
    assert [number_of(frame) for frame in clip.frames] == [80, 81, 83, 84, 85, 86, 88, 89]


def test_a_window_after_the_video_has_ended(tmp_path):
    path = write_media(tmp_path / "a.mp4", Video(ramp(50), steady(50, 25)), Audio([(0, tone(20))]))
    clip = read(path, start=18.0, end=19.0)
    assert not clip.video_present.any()
    assert clip.audio_present.all()
    assert {number_of(frame) for frame in clip.frames} == {49}
    assert any("video ends" in note for note in clip.notes)


def test_a_window_before_the_video_begins(tmp_path):
    path = write_media(tmp_path / "a.mkv", Video(ramp(50), steady(50, 25, 20)), Audio([(0, tone(22))]))
    clip = read(path, start=2.0, end=3.0)
    assert not clip.video_present.any()
    assert clip.audio_present.all()
    assert any("video has no frame in this window" in note for note in clip.notes)


def test_a_window_in_which_there_is_no_audio(tmp_path):
    path = write_media(tmp_path / "a.mp4", Video(ramp(500), steady(500, 25)), Audio([(0, tone(2))]))
    clip = read(path, start=10.0, end=11.0)
    assert not clip.audio_present.any()
    assert len(clip.waveform) == 0
    assert number_of(clip.frames[0]) == 251
    assert any("audio has no sample in this window" in note for note in clip.notes)
    assert clip.audio_counts.frames_decoded <= 2


@pytest.mark.parametrize(
    ("start", "end", "words"),
    [
        (1.0, 1.0, "has no length"),
        (1.5, 1.0, "has no length"),
        (2.5, None, "starts at 2.5 s, but the file lasts 2.000 s"),
        (2.0, None, "starts at 2 s, but the file lasts"),
        (0.0, 9.0, "ends at 9 s, but the file lasts 2.000 s"),
        (-1.0, 1.0, "from 0 on"),
        (float("nan"), 1.0, "from 0 on"),
        (0.0, float("inf"), "from 0 on"),
    ],
)
def test_impossible_windows_are_refused(tmp_path, start, end, words):
    path = write_media(tmp_path / "a.mp4", Video(ramp(50), steady(50, 25)))
    with pytest.raises(BadClip, match=words) as caught:
        read(path, start=start, end=end)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_window_that_ends_a_little_past_the_end_is_read_to_the_end_with_a_note(tmp_path):
    clip = read(write_media(tmp_path / "a.mp4", Video(ramp(50), steady(50, 25))), start=1.0, end=2.3)
    assert clip.timeline.end == 2.0
    assert any("window end 2.3 s is past the end" in note for note in clip.notes)


MEASURE = r"""
    import pathlib, re, sys
    from mirasol.media.reader import read_clip
    from mirasol.media.timeline import ChunkGrid
    before = None
    for chunks in (1, 16):
        clip = read_clip(sys.argv[1], ChunkGrid(8, num_chunks=chunks), image_size=64, threads=1)
        # Not getrusage: the peak it tells of begins as that of the process which started this one.
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
        before, growth = before or peak, peak - (before or peak)
    assert len(clip.frames) == 128
    print(growth, clip.video_counts.frames_decoded)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_holds_only_the_frames_asked_for(tmp_path):
    """128 frames of ten minutes of video: the peak grows by the frames kept, not by the 400 that are decoded."""
    pictures = ramp(400, width=640, height=480)
    path = write_media(tmp_path / "a.mp4", Video(pictures, steady(400, 2 / 3), rate=1, group=400))
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    growth, decoded = map(int, result.stdout.split())
    assert decoded >= 395
    kept = 128 * 3 * 64 * 64 / 1024
    assert growth < kept + 16_000, f"{growth} kB; the decoded frames are {decoded * 640 * 480 * 1.5 / 1024:.0f} kB"


def test_packets_that_wait_are_capped(tmp_path, monkeypatch):
    """Without a second keyframe all packets before the window are of its group of pictures."""
    path = write_media(tmp_path / "a.mp4", Video(ramp(400), steady(400, 10), rate=10, group=1000, b_frames=2))
    whole = read(path, start=38.0, end=39.0)
    cap, waiting = 5_000, []
    feed = video_stream.FrameSampler.feed
    monkeypatch.setattr(video_stream, "HELD_BYTES", cap)
    monkeypatch.setattr(
        video_stream.FrameSampler, "feed", lambda self, packet: (feed(self, packet), waiting.append(self._held_bytes))
    )
    clip = read(path, start=38.0, end=39.0)
    assert torch.equal(clip.frames, whole.frames)
    assert clip.frame_times.tolist() == whole.frame_times.tolist()
    assert cap / 2 < max(waiting) <= cap

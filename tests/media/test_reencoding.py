"""Media encoded anew: smaller pictures, and every picture and sound at the time that it had."""

import shutil

import av
import numpy as np
import pytest
import torch
from media_making import Audio, Video, grey, number_of, ramp, steady, tone, write_media
from test_synchrony import CONTAINERS, EVENTS, click_times, flash_times, uneven_times, write_events

from mirasol import read_clip
from mirasol.errors import UserError
from mirasol.media.limits import Limits
from mirasol.media.reader import probe_media
from mirasol.media.timeline import ChunkGrid
from mirasol.media.transcode import Reencoding, reencode_media

GRID = ChunkGrid(50, chunk_seconds=0.5)


def read(path, **settings):
    return read_clip(path, GRID, image_size=32, threads=1, **settings)


def anew(path, size=32, fps=None):
    """The file encoded anew, beside the old one."""
    target = path.with_name("anew.mp4")
    assert reencode_media(path, target, Reencoding(size, fps)) == ""
    return target


@pytest.mark.parametrize(("name", "video", "audio", "rate"), CONTAINERS)
@pytest.mark.parametrize(("offset", "steady_rate"), [(0.0, True), (7.4, False)])
def test_flash_and_click_keep_their_times(tmp_path, name, video, audio, rate, offset, steady_rate):
    times = None if steady_rate else uneven_times()
    path = write_events(tmp_path / name, video, audio, rate, times=times, offset=offset)
    old, new = read(path), read(anew(path))
    assert len(flash_times(new)) == len(EVENTS)
    torch.testing.assert_close(old.frame_times, new.frame_times, rtol=0, atol=2e-5)
    for before, after in zip(click_times(old), click_times(new), strict=True):
        assert abs(before - after) <= 1e-3
    assert abs(probe_media(path).duration - probe_media(path.with_name("anew.mp4")).duration) <= 1e-4
    assert torch.equal(old.audio_present, new.audio_present)
    assert torch.equal(old.video_present, new.video_present)


def test_a_window_shows_and_sounds_the_same(tmp_path):
    path = write_events(tmp_path / "a.mkv", "libx264", "libopus", 48_000, offset=7.4)
    old, new = read(path, start=2.1, end=3.1), read(anew(path), start=2.1, end=3.1)
    assert flash_times(old) == pytest.approx(flash_times(new), abs=1e-4)
    at = [int(clip.waveform.abs().argmax()) / clip.sample_rate + clip.waveform_start for clip in (old, new)]
    assert at[0] == pytest.approx(at[1], abs=1e-3)


@pytest.mark.parametrize(("start", "seconds"), [(0.8, 1.2), (0.0, 1.1), (0.0, 3.9)])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_sound_that_begins_late_or_is_shorter_or_longer_does_so_still(tmp_path, name, start, seconds):
    codec = "aac" if name == "a.mp4" else "libopus"
    sound = Audio([(start, tone(seconds))], codec=codec)
    path = write_media(tmp_path / name, Video(ramp(75), steady(75, 25)), sound)
    old, new = read(path), read(anew(path))
    assert torch.equal(old.audio_present, new.audio_present)
    assert abs(old.waveform_start - new.waveform_start) <= 0.025  # AAC's delay, where the container cannot cut it
    assert len(old.frames) == len(new.frames)


def test_video_that_begins_late_does_so_still(tmp_path):
    path = write_media(
        tmp_path / "a.mkv", Video(ramp(50), steady(50, 25, 1.1)), Audio([(0, tone(3.1))], codec="libopus")
    )
    old, new = read(path), read(anew(path))
    assert torch.equal(old.video_present, new.video_present) and not new.video_present[0]
    torch.testing.assert_close(old.frame_times, new.frame_times, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "aac"), ("a.mkv", "pcm_s16le")])
def test_gaps_in_the_sound_stay_gaps(tmp_path, name, codec):
    pieces = [(0.0, tone(0.6)), (2.1, tone(0.7))]
    path = write_media(tmp_path / name, Video(ramp(75), steady(75, 25)), Audio(pieces, codec=codec))
    old, new = read(path), read(anew(path))
    assert old.audio_present.tolist() == new.audio_present.tolist()
    assert not new.audio_present.all()


def test_sound_that_mp4_can_hold_is_not_touched(tmp_path):
    path = write_events(tmp_path / "a.mp4", "libx264", "aac", 44_100)
    assert torch.equal(read(path).waveform, read(anew(path)).waveform)


def test_every_frame_is_there_and_fewer_are_where_that_is_asked(tmp_path):
    path = write_media(tmp_path / "a.mp4", Video(ramp(60, 128, 96), steady(60, 30), b_frames=2, rate=30))
    dense = ChunkGrid(30, chunk_seconds=1.0)
    old = read_clip(path, dense, image_size=32, threads=1)
    every = read_clip(anew(path, 48), dense, image_size=32, threads=1)
    assert [number_of(f) for f in every.frames] == [number_of(f) for f in old.frames]
    with av.open(str(anew(path, 48, fps=8))) as few:
        times = [float(frame.time) for frame in few.decode(video=0)]
    assert len(times) == 16
    assert times == pytest.approx([np.ceil(k * 30 / 8 - 1e-9) / 30 for k in range(16)], abs=1e-4)
    assert probe_media(anew(path, 48, fps=8)).duration == pytest.approx(2.0, abs=1e-4)


def test_pictures_are_scaled_down_never_up(tmp_path):
    path = write_media(tmp_path / "a.mp4", Video(ramp(5, 192, 96), steady(5, 25)))
    assert probe_media(anew(path, 48)).video.display_size == (96, 48)
    assert probe_media(anew(path, 256)).video.display_size == (192, 96)


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotation_and_pixel_shape_are_applied(tmp_path, rotation):
    from fractions import Fraction

    pictures = [
        np.kron(
            np.array([[[220, 20, 20], [20, 220, 20]], [[20, 20, 220], [200, 200, 200]]], np.uint8),
            np.ones((32, 48, 1), np.uint8),
        )
    ] * 5
    video = Video(pictures, steady(5, 25), rotation=rotation, aspect=Fraction(4, 3))
    path = write_media(tmp_path / "a.mp4", video)
    old, new = read(path), read(anew(path, 64))
    assert probe_media(path.with_name("anew.mp4")).video.sample_aspect_ratio == 1
    assert (old.frames.float() - new.frames.float()).abs().mean() < 4


@pytest.mark.parametrize("full_range", [False, True])
def test_colours_stay(tmp_path, full_range):
    def mark(stream):
        stream.codec_context.color_range = 2 if full_range else 1

    pictures = [np.full((48, 64, 3), (200, 60, 90), np.uint8), grey(250), grey(5)]
    path = write_media(tmp_path / "a.mp4", Video(pictures, steady(3, 2), prepare=mark, group=1))
    old, new = read(path), read(anew(path, 48))
    assert (old.frames.float() - new.frames.float()).abs().max() <= 6


def test_the_same_file_gives_the_same_bytes(tmp_path):
    path = write_events(tmp_path / "a.webm", "libvpx", "vorbis", 44_100)
    first = anew(path).read_bytes()
    assert anew(path).read_bytes() == first


@pytest.mark.parametrize("name", ["fire2.mp4", "muted_b.mp4", "sample_with_vorbis_audio.mkv", "no_duration.webm"])
def test_real_clips_keep_their_chunks_and_times(real_data, tmp_path, name):
    path = tmp_path / name
    shutil.copy(real_data / "clips" / name, path)
    old, new = (read_clip(file, ChunkGrid(4, chunk_seconds=0.5), image_size=32) for file in (path, anew(path, 64)))
    assert old.timeline.edges == pytest.approx(new.timeline.edges, abs=1e-3)
    torch.testing.assert_close(old.frame_times, new.frame_times, rtol=0, atol=1e-3)
    assert torch.equal(old.audio_present, new.audio_present)
    assert torch.equal(old.video_present, new.video_present)
    assert (old.frames.float() - new.frames.float()).abs().mean() < 3
    # The shift at which both sounds agree best is none.
    starts = [round(clip.waveform_start * clip.sample_rate) for clip in (old, new)]
    sounds = [clip.waveform[max(starts) - start :] for clip, start in zip((old, new), starts, strict=True)]
    length = min(map(len, sounds))
    if length and sounds[0].abs().max() > 1e-3:
        first, second = (torch.fft.rfft(sound[:length], 2 * length) for sound in sounds)
        assert int(torch.fft.irfft(first * second.conj()).argmax()) == 0


def test_sound_alone_and_damage_are_kept_as_they_are(tmp_path):
    target = tmp_path / "new.mp4"
    sound = write_media(tmp_path / "a.wav", Audio([(0, tone(1))], codec="pcm_s16le"))
    assert reencode_media(sound, target, Reencoding(32)) == "no video"
    noise = np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3), np.uint8)
    video = write_media(tmp_path / "a.mkv", Video(list(noise), steady(20, 10)))
    content = bytearray(video.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(3000)
    video.write_bytes(content)
    assert "damaged" in reencode_media(video, target, Reencoding(32))
    # Windows of a file may be read that is too long to be read whole.
    assert reencode_media(video, target, Reencoding(32), Limits(max_seconds=1)) == "longer than 1 s"


@pytest.mark.parametrize(
    ("text", "message"), [("big", "write SIZE or SIZE@FPS"), ("33", "an even number"), ("64@0", "must be positive")]
)
def test_impossible_settings_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        Reencoding.parse(text)


def test_settings_are_written_as_they_are_read():
    for text in ("64", "64@8", "112@12.5"):
        assert str(Reencoding.parse(text)) == text

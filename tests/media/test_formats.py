"""Formats beyond the usual containers: animated PNG and WebP, raw video, and refusals by name."""

import itertools
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from media_making import number_of, ramp
from PIL import Image

from mirasol import BadClip, ChunkGrid, read_clip
from mirasol.media import container
from mirasol.media.formats import animated_webp
from mirasol.media.integrity import describe_early_end, find_truncated_end
from mirasol.media.limits import Limits
from mirasol.media.reader import probe_media
from mirasol.media.transcode import Reencoding, reencode_media

GRID = ChunkGrid(4, chunk_seconds=0.4)
COUNT = 24
# Milliseconds of each picture: they differ, so that a frame has to be at its own time.
DURATIONS = [100] * (COUNT // 2) + [200] * (COUNT // 2)
STARTS = [0, *itertools.accumulate(DURATIONS)][:-1]


def read(path, **window):
    return read_clip(path, GRID, image_size=32, threads=1, **window)


def has_note(clip, words: str) -> bool:
    return any(words in note for note in clip.notes)


def draw_moving(number: int) -> Image.Image:
    """A square that moves on a still ground, so that animations store a part of each picture."""
    picture = np.full((64, 64, 3), 40, np.uint8)
    left = 2 * number
    picture[20:36, left : left + 12] = (255, 10 * number, 0)
    return Image.fromarray(picture)


def write_animation(path: Path, **options: object) -> Path:
    first, *others = [draw_moving(number) for number in range(COUNT)]
    first.save(path, save_all=True, append_images=others, duration=DURATIONS, lossless=True, **options)
    return path


def write_raw(path: Path, codec: str, pictures: list[np.ndarray], rate: int, more: str = "", kind: str | None = None):
    """A raw stream, H.264 and HEVC with B-frames. Returns its path."""
    options: dict = {"mpeg2video": {"bf": "2"}, "mpeg1video": {"bf": "2"}, "mpeg4": {"bf": "2"}}
    options |= {"libx264": {"bf": "3", "g": "12"}, "libx265": {"x265-params": f"bframes=3:keyint=12:log-level=0{more}"}}
    with av.open(str(path), "w", format=kind) as out:
        stream = out.add_stream(codec, rate=rate, options=options.get(codec, {}))
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def assert_a_window_is_the_slice(path: Path, start: float, end: float) -> None:
    full, part = read(path), read(path, start=start, end=end)
    first = round(start / 0.4) * GRID.frames_per_chunk
    wanted = full.frames[first : first + len(part.frames)]
    assert np.array_equal(np.asarray(part.frames), np.asarray(wanted))
    assert part.frame_times.tolist() == full.frame_times[first : first + len(part.frames)].tolist()


@pytest.fixture(params=["a.png", "a.apng", "a.webp"])
def animation(request, tmp_path) -> Path:
    name = request.param
    return write_animation(tmp_path / name, format="WEBP" if name.endswith("webp") else "PNG")


def test_animations_show_every_picture_at_its_time(animation):
    clip = read(animation)
    assert clip.timeline.end == pytest.approx(sum(DURATIONS) / 1000, abs=0.001)
    wanted = np.concatenate(clip.timeline.frame_times)
    for moment, time, picture in zip(wanted, clip.frame_times.tolist(), np.asarray(clip.frames), strict=True):
        number = max(k for k, start in enumerate(STARTS) if start / 1000 <= moment + 1e-3)
        assert time == pytest.approx(STARTS[number] / 1000, abs=0.001)
        exact = np.asarray(draw_moving(number).resize((32, 32), Image.Resampling.BOX)).transpose(2, 0, 1)
        assert np.abs(picture.astype(int) - exact).max() <= 2


def test_a_window_of_an_animation_equals_the_slice(animation):
    assert_a_window_is_the_slice(animation, 1.2, 2.4)
    assert_a_window_is_the_slice(animation, 2.0, 3.2)


def test_animated_webp_is_named(tmp_path):
    info = probe_media(write_animation(tmp_path / "a.mp4", format="WEBP"))
    assert (info.container, info.video.codec, info.duration) == ("webp", "webp", pytest.approx(3.6))
    assert find_truncated_end(tmp_path / "a.mp4") is None


def test_transparent_animated_webp_is_shown_on_black(tmp_path):
    pictures = [Image.new("RGBA", (32, 32), (200, 200, 200, alpha)) for alpha in (255, 128, 0)]
    path = tmp_path / "a.webp"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=400, lossless=True, exact=True)
    clip = read(path)
    assert clip.frames[:, 0, 16, 16].tolist() == [200] * 4 + [100] * 4 + [0] * 4
    assert has_note(clip, "transparent")
    assert reencode_media(path, tmp_path / "b.mp4", Reencoding(16)) == "transparent"


def test_pictures_without_a_duration_are_shown_as_browsers_do(tmp_path):
    path = tmp_path / "a.webp"
    first, *others = [draw_moving(number) for number in range(8)]
    first.save(path, save_all=True, append_images=others, duration=0)
    assert read(path).timeline.end == pytest.approx(0.8)


def test_damaged_animated_webp(tmp_path):
    good = write_animation(tmp_path / "a.webp").read_bytes()
    bad = tmp_path / "bad.webp"
    bad.write_bytes(good[: len(good) // 2])
    with pytest.raises(BadClip, match=f"cut short: its header says {len(good)} bytes, {len(good) // 2} are there"):
        read(bad)
    # Nothing but the header.
    bad.write_bytes(good[:30] + bytes(len(good) - 30))
    with pytest.raises(BadClip, match="not an animated WebP file that can be decoded") as caught:
        read(bad)
    assert "\n" not in str(caught.value)


def test_limits_of_animated_webp(tmp_path, monkeypatch):
    path = write_animation(tmp_path / "a.webp")
    with pytest.raises(BadClip, match="pictures of 64x64 exceed the limit"):
        read(path, limits=Limits(max_pixels=63 * 64))
    monkeypatch.setattr(animated_webp, "MOST_PIXELS", COUNT * 64 * 64 - 1)
    with pytest.raises(BadClip, match="24 pictures of 4096 pixels are too many: convert it to mp4"):
        read(path)


def test_animated_png_that_is_cut_short_is_noticed(tmp_path):
    path = write_animation(tmp_path / "a.png")
    assert describe_early_end(path, "apng") == ""
    path.write_bytes(path.read_bytes()[:-200])
    assert describe_early_end(path, "apng") == "its last chunk is missing"


RAW = [
    *(("a.h264", "libx264", "H.264", rate, None) for rate in (10, 50)),
    *(("a.hevc", "libx265", "HEVC", rate, None) for rate in (10, 50)),
    *(("a.m4v", "mpeg4", "MPEG-4 video", rate, "m4v") for rate in (10, 50)),
    *(("a.m2v", "mpeg2video", "MPEG-1 or 2 video", rate, "mpeg2video") for rate in (25, 50)),
    ("a.m1v", "mpeg1video", "MPEG-1 or 2 video", 25, "mpeg1video"),
]


@pytest.mark.parametrize(("name", "codec", "words", "rate", "kind"), RAW)
def test_raw_video_has_the_rate_of_its_header(tmp_path, name, codec, words, rate, kind):
    if codec not in av.codecs_available:
        pytest.skip(f"no {codec} in this build of PyAV: it would show that raw {words} is read")
    path = write_raw(tmp_path / name, codec, ramp(40), rate, kind=kind)
    clip = read(path)
    assert clip.timeline.end == pytest.approx(40 / rate)
    assert has_note(clip, f"raw {words} has no times: {rate} frames a second, as its header states")
    # In the order in which they are shown, each at its own time, none of them late.
    numbers = [number_of(picture) for picture in clip.frames]
    assert numbers == [round(time * rate) for time in clip.frame_times.tolist()]
    assert probe_media(path).video.average_rate == rate
    if rate == 10:
        assert_a_window_is_the_slice(path, 1.2, 2.8)
    assert reencode_media(path, tmp_path / "b.mp4", Reencoding(16)) == "its video has no presentation times"


def test_raw_video_without_a_rate_is_read_at_an_assumed_one(tmp_path):
    if "libx265" not in av.codecs_available:
        pytest.skip("no libx265 in this build of PyAV: it would show that a rate is assumed and noted")
    path = write_raw(tmp_path / "a.hevc", "libx265", ramp(40), 50, ":vui-timing-info=0")
    clip = read(path)
    assert clip.timeline.end == pytest.approx(40 / 25)
    assert has_note(clip, "raw HEVC has no times: 25 frames a second, which is assumed: its header states no rate")


@pytest.mark.parametrize(("codec", "kind", "words"), [("mjpeg", "mjpeg", "Motion JPEG"), ("libsvtav1", "obu", "AV1")])
def test_raw_video_of_formats_that_state_no_rate(tmp_path, codec, kind, words):
    if codec not in av.codecs_available:
        pytest.skip(f"no {codec} in this build of PyAV: it would show that raw {words} is read")
    path = write_raw(tmp_path / "a.raw", codec, ramp(40), 10, kind=kind)
    clip = read(path)
    assert clip.timeline.end == pytest.approx(40 / 25)
    assert has_note(clip, f"raw {words} has no times: 25 frames a second, which is assumed: its header states no rate")
    numbers = [number_of(picture) for picture in clip.frames]
    assert numbers == [round(time * 25) for time in clip.frame_times.tolist()]
    assert_a_window_is_the_slice(path, 0.4, 1.2)


@pytest.mark.parametrize("end", ["", "MPO", "cut"])
def test_a_still_jpeg_is_no_motion_jpeg(tmp_path, end):
    path, picture = tmp_path / "a.mp4", draw_moving(0)
    more = {"save_all": True, "append_images": [draw_moving(1)]} if end == "MPO" else {}
    picture.save(path, format="MPO" if end == "MPO" else "JPEG", **more)
    content = path.read_bytes()
    path.write_bytes(content[:-50] if end == "cut" else content)
    with pytest.raises(BadClip, match="is a JPEG image, which is not read"):
        read(path)


def test_formats_that_ffmpeg_knows_are_refused_by_its_name(tmp_path, monkeypatch):
    raw = tmp_path / "raw.mp4"
    raw.write_bytes(b"YUV4MPEG2 W64 H48 F10:1 C420jpeg\n" + (b"FRAME\n" + bytes(64 * 72)) * 10)
    monkeypatch.setattr(container.threading, "active_count", lambda: 1)
    reason = "seems to be a file of FFmpeg's format yuv4mpegpipe, which is not read: read are mp4, mov, "
    with pytest.raises(BadClip, match=reason) as caught:
        read(raw)
    assert "\n" not in str(caught.value)
    # While other threads decode, FFmpeg's log is left alone.
    monkeypatch.setattr(container.threading, "active_count", lambda: 2)
    with pytest.raises(BadClip, match="not a media file that can be read"):
        read(raw)


def test_a_still_picture_with_the_name_of_an_animation_is_refused(tmp_path):
    for name, words in (("a.apng", "PNG image"), ("a.webp", "WebP image")):
        draw_moving(0).save(tmp_path / name, format=words.split()[0].upper())
        with pytest.raises(BadClip, match=f"is a {words}, which is not read: read are mp4, mov, "):
            read(tmp_path / name)

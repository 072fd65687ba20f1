"""What bad files get: one clear line that names file and reason."""

import pickle
import random
from fractions import Fraction

import av
import pytest
from media_making import Audio, Video, grey, ramp, steady, tone, write_media

from mirasol import BadClip, ChunkGrid, Limits, UserError, read_clip
from mirasol.media import video as video_stream
from mirasol.media.reader import probe_media

GRID = ChunkGrid(4, chunk_seconds=0.5)


def read(path, **settings):
    return read_clip(path, GRID, image_size=32, threads=1, **settings)


def refused(path, words: str, **settings):
    with pytest.raises(BadClip, match=words) as caught:
        read(path, **settings)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert caught.value.file == str(path)


@pytest.fixture
def good(tmp_path):
    noise = random.Random(0)
    pictures = ramp(100, 128, 96)
    for picture in pictures:
        picture[::3, ::3] = noise.randrange(256)
    return write_media(
        tmp_path / "good.mp4",
        Video(pictures, steady(100, 25)),
        Audio([(0, tone(4))]),
        options={"movflags": "faststart"},
    )


def test_missing_file(tmp_path):
    refused(tmp_path / "missing.mp4", "no such file")
    with pytest.raises(BadClip, match="no such file"):
        probe_media(tmp_path / "missing.mp4")


def test_folder(tmp_path):
    refused(tmp_path, "not a file")


def test_empty_file(tmp_path):
    path = tmp_path / "empty.mp4"
    path.touch()
    refused(path, "the file is empty")


@pytest.mark.parametrize(
    "text",
    [
        "just some text\n" * 100,
        "1\n00:00:00,000 --> 00:00:01,000\nsubtitles\n",
        "ffconcat version 1.0\nfile other.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nother.ts\n#EXT-X-ENDLIST\n",
        "P3\n1 1\n255\n0 0 0\n",
    ],
    ids=["prose", "subtitles", "concat list", "playlist", "picture"],
)
def test_text_renamed_mp4(tmp_path, text):
    path = tmp_path / "text.mp4"
    path.write_text(text)
    refused(path, "not a media file that can be read|seems to be a file of FFmpeg's format (srt|concat|ppm_pipe)")


def test_noise(tmp_path):
    path = tmp_path / "noise.mp4"
    path.write_bytes(random.Random(0).randbytes(50_000))
    refused(path, "not a media file|no media data|cannot be decoded|neither video nor audio")


def test_truncated_mp4_with_its_index_at_the_end(tmp_path):
    path = write_media(tmp_path / "a.mp4", Video(ramp(100), steady(100, 25)), Audio([(0, tone(4))]))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path, "cut short")


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.9])
def test_truncated_mp4_with_its_index_at_the_front(good, kept):
    good.write_bytes(good.read_bytes()[: int(good.stat().st_size * kept)])
    refused(good, r"cut short: holds data for \d\.\d+ s, but 0 to 4\.000 s were requested")


def test_a_window_that_a_truncated_file_still_holds_is_read(good):
    whole = read(good, start=0.0, end=1.0)
    good.write_bytes(good.read_bytes()[: int(good.stat().st_size * 0.6)])
    assert (read(good, start=0.0, end=1.0).frames == whole.frames).all()


@pytest.mark.parametrize("name", ["a.mkv", "a.webm"])
def test_truncated_matroska(tmp_path, name):
    codec = "libvpx" if name == "a.webm" else "libx264"
    pictures = Video(ramp(100), steady(100, 25), codec=codec)
    path = write_media(tmp_path / name, pictures, Audio([(0, tone(4))], codec="libopus"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path, r"cut short: holds data for \d\.\d+ s")


@pytest.mark.parametrize("length", [3_000, 10_000])
@pytest.mark.parametrize("place", [0.25, 0.5, 0.75])
def test_damage_in_the_middle_is_read_and_noted(good, length, place):
    data = bytearray(good.read_bytes())
    first = int(len(data) * place)
    data[first : first + length] = random.Random(1).randbytes(length)
    good.write_bytes(data)
    notes = read(good).notes
    assert any("could not be decoded" in note or "with errors" in note for note in notes), notes


def test_damage_to_most_of_the_file_is_refused(good):
    data = bytearray(good.read_bytes())
    start = data.index(b"mdat") + 4 + len(data) // 10
    data[start:] = random.Random(2).randbytes(len(data) - start)
    good.write_bytes(data)
    refused(good, "cannot be decoded|cut short")


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(max_bytes=1000), "bytes exceed the limit of 1000"),
        (Limits(max_seconds=3.0), "window of 4.0 s exceeds the limit of 3 s"),
        (Limits(max_pixels=128 * 96 - 1), "128x96 exceed the limit of 12287 pixels"),
        (Limits(max_streams=1), "2 streams exceed the limit of 1"),
    ],
)
def test_limits(good, limits, words):
    refused(good, words, limits=limits)


def growing(path, codec: str):
    """A video of a second of 64x48 pictures and a second of 640x480 ones; the header knows the first size only."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
        for second, (width, height) in enumerate(((64, 48), (640, 480))):
            encoder = av.CodecContext.create(codec, "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
            encoder.time_base, encoder.max_b_frames = Fraction(1, 25), 0
            packets = []
            for number in range(25):
                frame = av.VideoFrame.from_ndarray(grey(9 * number, width, height), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                packets += encoder.encode(frame)
            for packet in packets + encoder.encode(None):
                packet.stream, packet.time_base = stream, Fraction(1, 25)
                packet.pts = packet.dts = packet.pts + 25 * second
                container.mux(packet)
    return path


@pytest.mark.parametrize(
    ("name", "codec", "words"),
    [
        ("a.ts", "libx264", "640x480 exceed the limit of 10000 pixels"),
        ("a.webm", "libvpx", "its video cannot be decoded: only to 1.000 of 2.0"),
        ("a.webm", "libvpx-vp9", "its video cannot be decoded: only to 1.000 of 2.0"),
    ],
)
def test_pictures_that_grow_over_the_limit_are_never_decoded(tmp_path, monkeypatch, name, codec, words):
    path, widths = growing(tmp_path / name, codec), set()
    show = video_stream.FrameSampler._show
    monkeypatch.setattr(
        video_stream.FrameSampler, "_show", lambda self, frame: (widths.add(frame.width), show(self, frame))[1]
    )
    assert read(path).timeline.num_chunks == 4
    assert widths == {64, 640}
    widths.clear()
    refused(path, words, limits=Limits(max_pixels=10_000))
    assert widths == {64}
    assert read(path, limits=Limits(max_pixels=10_000), end=0.9).has_video


def test_a_short_window_of_a_file_over_the_length_limit_is_read(good):
    assert read(good, limits=Limits(max_seconds=3.0), start=1.0, end=2.0).timeline.num_chunks == 2


def test_awkward_names_are_names(good):
    for name in ("with space.mp4", "näme.mp4", "concat:a|b.mp4", "http:x.mp4", "100%.mp4", "a#b?c.mp4"):
        path = good.with_name(name)
        path.write_bytes(good.read_bytes())
        assert read(path).timeline.num_chunks == 8


def test_metadata_that_is_not_utf8_does_no_harm(good):
    data = good.read_bytes()
    assert b"Lavf" in data
    good.write_bytes(data.replace(b"Lavf", b"\xff\xfe\xe9v"))
    assert read(good).timeline.num_chunks == 8


def test_bad_settings_are_user_errors(good):
    with pytest.raises(UserError, match="image_size=0"):
        read_clip(good, GRID, image_size=0)


def test_errors_cross_process_boundaries(tmp_path):
    with pytest.raises(BadClip) as caught:
        read(tmp_path / "missing.mp4")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)

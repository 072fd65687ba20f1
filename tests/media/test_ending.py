"""Files that end where their format lets none end, without a duration to hold them against."""

import struct

import pytest
from media_making import Audio, Video, ramp, steady, tone, write_media

from mirasol.media.integrity import describe_early_end
from mirasol.media.reader import probe_media


def written(folder, name, codec, options=None):
    sound = Audio([(0, tone(4))], codec=codec, layout="stereo" if codec == "vorbis" else "mono")
    if codec == "vorbis":
        sound.pieces = [(0, tone(4, channels=2))]
    picture = [Video(ramp(50, 128, 96), steady(50, 12.5))] if name.endswith((".ts", ".m2ts")) else []
    return write_media(folder / name, *picture, sound, options=options)


KINDS = [
    ("a.ts", "aac", None),
    ("a.m2ts", "aac", {"mpegts_m2ts_mode": "1"}),
    ("a.ogg", "libopus", None),
    ("b.ogg", "vorbis", None),
    ("a.mp3", "libmp3lame", None),
    ("a.wav", "pcm_s16le", None),
]


@pytest.mark.parametrize(("name", "codec", "options"), KINDS)
def test_where_a_file_is_cut_is_told_and_whole_ones_are_whole(tmp_path, name, codec, options):
    path = written(tmp_path, name, codec, options)
    content = path.read_bytes()
    assert describe_early_end(path, probe_media(path).container) == ""
    for size in (int(len(content) * 0.6) // 2 * 2 + 1, int(len(content) * 0.8) // 4096 * 4096, len(content) - 500):
        path.write_bytes(content[:size])
        assert describe_early_end(path, probe_media(path).container)


def test_an_ogg_cut_between_its_pages_is_told_by_the_mark_that_is_missing(tmp_path):
    path = written(tmp_path, "a.ogg", "libopus")
    content = path.read_bytes()
    path.write_bytes(content[: content.rfind(b"OggS")])
    assert describe_early_end(path, "ogg") == "its last page is not marked as the last"


def test_a_transport_stream_cut_between_its_packets_cannot_be_told(tmp_path):
    path = written(tmp_path, "a.ts", "aac")
    path.write_bytes(path.read_bytes()[: 188 * 100])
    assert describe_early_end(path, "mpegts") == ""


@pytest.mark.parametrize("options", [{"write_xing": "0"}, {"id3v2_version": "0"}, {"write_id3v1": "1"}])
def test_mp3_with_and_without_its_headers(tmp_path, options):
    path = written(tmp_path, "a.mp3", "libmp3lame", options)
    assert describe_early_end(path, "mp3") == ""
    path.write_bytes(path.read_bytes()[:20_000])
    assert bool(describe_early_end(path, "mp3")) == ("write_xing" not in options)


def test_sizes_that_nobody_knew_when_they_were_written_say_nothing(tmp_path):
    path = written(tmp_path, "a.wav", "pcm_s16le")
    content = path.read_bytes()
    place = content.find(b"data") + 4
    for size in (0xFFFFFFFF, 0x7FFFF000):
        path.write_bytes(content[:place] + struct.pack("<I", size) + content[place + 4 :])
        assert describe_early_end(path, "wav") == ""


@pytest.mark.parametrize("container", ["mpegts", "ogg", "wav", "mp3"])
@pytest.mark.parametrize("content", [b"", b"\xff", b"OggS\0", b"RIFF1234WAVEdata", b"ID3\x04\x00\x00\x7f\x7f\x7f\x7f"])
def test_nothing_is_too_short_or_too_strange_to_be_looked_at(tmp_path, container, content):
    for padding in (b"", b"\xff" * 300, bytes(70_000)):
        (tmp_path / "a").write_bytes(content + padding)
        assert isinstance(describe_early_end(tmp_path / "a", container), str)

"""Files that were cut short are told from whole ones, by the rule by which the reader refuses them."""

import json
import random

import av
import pytest
from media_making import Audio, Video, ramp, steady, tone, write_media

from mirasol import BadClip, ChunkGrid, read_clip
from mirasol.media import integrity
from mirasol.media.integrity import find_truncated_end
from mirasol.media.reader import probe_media


def noisy(count: int):
    noise = random.Random(0)
    pictures = ramp(count, 128, 96)
    for picture in pictures:
        picture[::3, ::3] = noise.randrange(256)
    return pictures


def written(folder, name, *tracks):
    codecs = {"webm": ("libvpx", "libopus"), "avi": ("mpeg4", "mp3")}.get(name.rpartition(".")[2], ("libx264", "aac"))
    options = {"movflags": "faststart"} if name.endswith("mp4") else {}
    made = {"video": Video(noisy(50), steady(50, 12.5), codecs[0]), "audio": Audio([(0, tone(4))], codec=codecs[1]),
            "short video": Video(noisy(12), steady(12, 12.5), codecs[0]),
            "short audio": Audio([(0, tone(1))], codec=codecs[1])}  # fmt: skip
    return write_media(folder / name, *(made[track] for track in tracks), options=options)


NAMES = ("a.mp4", "a.mkv", "a.webm", "a.flv")
BOTH = ("video", "audio")


@pytest.mark.parametrize("tracks", [("short video", "audio"), ("video", "short audio")])
@pytest.mark.parametrize("name", [*NAMES, "a.ts"])
def test_a_whole_file_is_whole(tmp_path, name, tracks):
    assert find_truncated_end(written(tmp_path, name, *tracks)) is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kept", [0.4, 0.8])
def test_a_file_cut_short_holds_less_than_its_header_says(tmp_path, name, kept):
    path = written(tmp_path, name, *BOTH)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    held = find_truncated_end(path)
    with pytest.raises(BadClip, match="cut short: holds data for") as refused:
        read_clip(path, ChunkGrid(4, chunk_seconds=0.5), image_size=32, threads=1)
    assert f"{held:.3f} s" in str(refused.value), "what the reader says, too"
    assert abs(held - 4 * kept) < 1.5


def test_sound_alone_is_whole(tmp_path):
    assert find_truncated_end(written(tmp_path, "a.mkv", "audio")) is None


def test_a_file_whose_end_cannot_be_sought_is_read_through(tmp_path, monkeypatch):
    monkeypatch.setattr(integrity, "_is_found_near_end", lambda *_: False)
    assert find_truncated_end(written(tmp_path, "a.webm", *BOTH)) is None


def test_a_single_picture_is_whole(tmp_path):
    assert find_truncated_end(write_media(tmp_path / "a.mp4", Video(noisy(1), [0.0]))) is None


def test_nothing_is_decoded_and_little_is_read_of_a_whole_file(tmp_path, monkeypatch):
    path = write_media(tmp_path / "a.mp4", Video(noisy(100), steady(100, 5)))
    seen = []
    read_packets = integrity.read_packets
    monkeypatch.setattr(integrity, "read_packets", lambda *given: (seen.append(p) or p for p in read_packets(*given)))
    assert find_truncated_end(path) is None
    assert len(seen) < 40
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 100


def test_real_clips_are_whole_and_their_beginnings_are_not(real_data, tmp_path):
    clips = real_data / "clips"
    for entry in json.loads((clips / "manifest.json").read_text())["clips"]:
        assert find_truncated_end(clips / entry["file"]) is None, entry["file"]
    (tmp_path / "friday.mp4").write_bytes((clips / "friday.mp4").read_bytes()[:100_000])
    assert find_truncated_end(tmp_path / "friday.mp4") == pytest.approx(1.433, abs=0.01)
    assert probe_media(tmp_path / "friday.mp4").duration == pytest.approx(6.166, abs=0.01)

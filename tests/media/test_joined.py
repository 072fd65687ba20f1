"""Recordings appended to each other: whatever streams each has, all of them are read, on one rising clock."""

import contextlib
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from media_making import Audio, Video, number_of, ramp, steady, tone, write_media

from mirasol import BadClip, ChunkGrid, read_clip
from mirasol.media.integrity import inspect_media
from mirasol.media.joined import parts as joined_parts
from mirasol.media.joined.structure import find_sections
from mirasol.media.transcode import Reencoding, reencode_media

GRID = ChunkGrid(4, chunk_seconds=0.5)
SECONDS, RATE = (3, 2, 2), 25
HERTZ = (300, 600, 900)
OTHER_IDS = {"mpegts_start_pid": "0x200"}
CODECS = {"ts": ("libx264", "aac"), "vob": ("mpeg2video", "mp2"), "ogg": ("libvpx", "flac")}
OTHER_CODECS = {"ts": ("mpeg2video", "mp2"), "vob": ("mpeg1video", "ac3"), "ogg": ("libvpx", "libopus")}
# What each recording is like: "v" video, "a" sound, in the order of the streams; "i" other ids, "c" other codecs, "l" a
# larger picture and two channels.
CHANGES = ["va va va", "va vai va", "va vac va", "va av va", "va val va", "v va v", "a va a", "va v va", "va a va"]
IDS = {change: change.replace(" ", ",") for change in CHANGES}


def make_recording(folder: Path, kind: str, number: int, shape: str, start: float = 0.0) -> Path:
    """Recording `number`: pictures are numbered through all recordings, the sound is a tone of its own."""
    seconds, first = SECONDS[number], RATE * sum(SECONDS[:number])
    picture, sound = (OTHER_CODECS if "c" in shape else CODECS)[kind]
    count, channels = RATE * seconds, 2 if "l" in shape else 1
    size = (128, 96) if "l" in shape else (64, 48)
    video = Video(ramp(first + count, *size)[first:], steady(count, RATE, start), codec=picture, b_frames=0)
    video.b_frames = 2 if picture == "libx264" else 0
    video.tick = None if kind == "ts" and picture == "libx264" else Fraction(1, RATE)
    audio = Audio([(start, tone(seconds, hertz=HERTZ[number], channels=channels))], codec=sound)
    audio.layout = "stereo" if channels == 2 else "mono"
    tracks = [{"v": video, "a": audio}[letter] for letter in shape if letter in "va"]
    options = OTHER_IDS if "i" in shape and kind == "ts" else {}
    return write_media(folder / f"{number}.{kind}", *tracks, options=options)


def join(path: Path, *recordings: Path) -> Path:
    path.write_bytes(b"".join(recording.read_bytes() for recording in recordings))
    return path


def make_joined(folder: Path, kind: str, change: str) -> Path:
    shapes = change.split()
    recordings = [make_recording(folder, kind, number, shape) for number, shape in enumerate(shapes)]
    return join(folder / f"all.{kind}", *recordings)


def read(path, grid=GRID, **settings):
    return read_clip(path, grid, image_size=32, threads=1, **settings)


def has_note(clip, words: str) -> bool:
    return any(words in note for note in clip.notes)


def count_hertz(waveform) -> float:
    return int((waveform[1:] * waveform[:-1] < 0).sum()) / 2 / (len(waveform) / 16_000)


def check_content(clip, shapes: list[str]) -> None:
    """Every picture is its recording's of that time, and so is the sound."""
    assert clip.timeline.end == pytest.approx(sum(SECONDS), abs=0.3)
    assert has_note(clip, "time stamps start over at ")
    for time, picture in zip(clip.frame_times.tolist(), clip.frames, strict=True):
        assert number_of(picture) / RATE == pytest.approx(time, abs=0.25)
    for number, shape in enumerate(shapes):
        begin = sum(SECONDS[:number])
        chunks = slice(round(2 * begin) + 1, round(2 * (begin + SECONDS[number])) - 1)
        assert clip.audio_present[chunks].all() == ("a" in shape)
        assert clip.audio_present[chunks].any() == ("a" in shape)
        if "a" in shape:
            first = round((begin + 0.6 - clip.waveform_start) * 16_000)
            assert count_hertz(clip.waveform[first : first + 8_000]) == pytest.approx(HERTZ[number], rel=0.03)


def check_windows(path: Path, whole, windows) -> None:
    numbers = dict(zip(whole.frame_times.tolist(), map(number_of, whole.frames), strict=True))
    times = np.array(sorted(numbers))
    for start, end in windows:
        clip = read(path, start=start, end=end)
        wanted = np.concatenate(clip.timeline.frame_times)
        shown = times[np.maximum(np.searchsorted(times, wanted + 1e-6, side="right") - 1, 0)] if len(times) else []
        assert clip.frame_times.tolist() == list(shown)
        assert [number_of(picture) for picture in clip.frames] == [numbers[time] for time in shown]
        if clip.has_audio:
            first = round((clip.waveform_start - whole.waveform_start) * 16_000)
            heard = clip.waveform.numpy()[500:-500]
            lags = [whole.waveform.numpy()[first + 500 + lag :][: len(heard)] for lag in (-1, 0, 1)]
            assert max(np.corrcoef(heard[: len(expected)], expected)[0, 1] for expected in lags) > 0.98


@pytest.mark.parametrize("change", CHANGES, ids=IDS.get)
@pytest.mark.parametrize("kind", CODECS)
def test_all_recordings_are_read_and_windows_equal_the_slice(tmp_path, kind, change):
    if kind != "ts" and "i" in change:
        pytest.skip("FFmpeg writes the same ids into these whatever is asked")
    path = make_joined(tmp_path, kind, change)
    whole = read(path, ChunkGrid(8, chunk_seconds=0.5))
    shapes = change.split()
    if all("v" in shape for shape in shapes):
        check_content(whole, shapes)
    assert whole.timeline.end == pytest.approx(sum(SECONDS), abs=0.3)
    dense = read(path, ChunkGrid(700, num_chunks=1))
    check_windows(path, dense, [(0.2, 1.2), (2.6, 3.6), (4.5, 5.5), (5.7, 6.7)])
    changed = len({shape.replace("i", "") for shape in shapes}) > 1 and change not in ("va av va", "va val va")
    if changed and not (kind == "vob" and "a va" in change):
        assert has_note(whole, "other streams begin: "), whole.notes


@pytest.mark.parametrize("shape", ["v", "a", "va"])
@pytest.mark.parametrize("start", [0.5, 3.0, 3.4, 5.0, 100.0, 2**33 / 90_000 - 1.0])
def test_wherever_the_time_stamps_of_the_next_recording_begin(tmp_path, shape, start):
    """A pause of up to 10 s is one; all else begins where the recording before it ends."""
    recordings = [make_recording(tmp_path, "ts", 0, shape), make_recording(tmp_path, "ts", 1, shape + "i", start)]
    path = join(tmp_path / "all.ts", *recordings)
    whole = read(path, ChunkGrid(8, chunk_seconds=0.5))
    begins = start if 3.0 <= start < 13.0 else 3.0
    assert whole.timeline.end == pytest.approx(begins + SECONDS[1], abs=0.3)
    assert has_note(whole, "start over") == (begins != start)
    for time, picture in zip(whole.frame_times.tolist(), whole.frames, strict=True):
        number = number_of(picture)
        assert time == pytest.approx(number / RATE + (begins - 3.0) * (number >= 75), abs=0.25)
    check_windows(path, read(path, ChunkGrid(700, num_chunks=1)), [(begins + 0.3, begins + 1.3)])


def list_time_fields(content: bytes) -> list[tuple[int, bool]]:
    """Byte of every presentation time in a transport stream, and whether a decoding time follows."""
    found = []
    for place in range(0, len(content), 188):
        packet = content[place : place + 188]
        begin = 5 + packet[4] if packet[3] & 0x20 else 4
        if packet[1] & 0x40 and packet[begin : begin + 3] == b"\0\0\1" and packet[begin + 7] & 0x80:
            found.append((place + begin + 9, bool(packet[begin + 7] & 0x40)))
    return found


def add_to_time(content: bytearray, place: int, ticks: int) -> None:
    field = int.from_bytes(content[place : place + 5], "big")
    time = ((field >> 33 & 7) << 30 | (field >> 17 & 0x7FFF) << 15 | (field >> 1 & 0x7FFF)) + ticks & 2**33 - 1
    parts = (time >> 30) << 33 | (time >> 15 & 0x7FFF) << 17 | (time & 0x7FFF) << 1
    kept = field & ~(7 << 33 | 0x7FFF << 17 | 0x7FFF << 1)
    content[place : place + 5] = (kept | parts).to_bytes(5, "big")


@pytest.fixture(scope="module")
def two_recordings(tmp_path_factory):
    """Files of two recordings, by the streams they have, and what they show."""
    files = {}
    for shape in ("va", "v", "a"):
        folder = tmp_path_factory.mktemp("two")
        path = join(folder / "all.ts", *(make_recording(folder, "ts", number, shape) for number in (0, 1)))
        files[shape] = path, read(path, ChunkGrid(8, chunk_seconds=0.5))
    return files


def damage(path: Path, seed: str, damaged: Path) -> None:
    """Moves one time of a file: a presentation time, a decoding time, or both."""
    generator, content = random.Random(seed), bytearray(path.read_bytes())
    place, has_decoding_time = generator.choice(list_time_fields(content)[:-2])
    ticks = generator.choice((-1, 1)) << generator.randrange(17, 33)
    which = generator.choice(("both", "shown", "decoded")) if has_decoding_time else "shown"
    if which != "decoded":
        add_to_time(content, place, ticks)
    if which != "shown" and has_decoding_time:
        add_to_time(content, place + 5, ticks)
    damaged.write_bytes(content)


@pytest.mark.parametrize(
    ("shape", "seed"), [*(("va", k) for k in range(24)), *((s, k) for s in "va" for k in range(8))]
)
def test_one_damaged_time_is_no_joint(tmp_path, two_recordings, shape, seed):
    path, whole = two_recordings[shape]
    damaged = tmp_path / "damaged.ts"
    damage(path, f"{shape}{seed}", damaged)
    clip = read(damaged, ChunkGrid(8, chunk_seconds=0.5))
    assert clip.timeline.end == pytest.approx(whole.timeline.end, abs=0.15)
    # A frame more or less: how long the damaged one waited to be shown is a guess.
    wrong = [abs(number_of(one) - number_of(other)) > 1 for one, other in zip(clip.frames, whole.frames, strict=False)]
    assert sum(wrong) <= 4
    if "a" in shape:
        length = min(len(clip.waveform), len(whole.waveform))
        assert np.corrcoef(clip.waveform[:length], whole.waveform[:length])[0, 1] > 0.9
    assert clip.audio_present.tolist() == whole.audio_present.tolist()
    joints = [note for note in clip.notes if "start over" in note]
    assert len(joints) == 1
    assert joints[0].count(",") == 0, "one place"


def test_a_stream_that_begins_next_to_those_that_are_read_is_noted(tmp_path):
    video = Video(ramp(75), steady(75, RATE))
    sounds = [Audio([(0, tone(3, hertz=hertz))]) for hertz in (300, 900)]
    one = write_media(tmp_path / "one.ts", video, sounds[0])
    two = write_media(tmp_path / "two.ts", video, *sounds)
    path = join(tmp_path / "all.ts", one, two)
    clip = read(path)
    assert clip.timeline.end == pytest.approx(6.0, abs=0.2)
    [note] = [note for note in clip.notes if "stream begins" in note]
    assert note.startswith("at 3.0")
    assert note.endswith("another audio stream begins: it is not read")
    assert count_hertz(clip.waveform[60_000:80_000]) == pytest.approx(300, rel=0.03)
    info, _, _ = inspect_media(path)
    assert note in info.changes


def test_tables_that_change_while_the_streams_go_on_cut_nothing(tmp_path):
    """As in broadcasts: other sound comes and goes, what is read stays as it was."""
    video = Video(ramp(150), steady(150, RATE))
    whole = write_media(tmp_path / "a.ts", video, Audio([(0, tone(6))]))
    content = whole.read_bytes()
    more = write_media(tmp_path / "b.ts", video, *[Audio([(0, tone(6))])] * 2).read_bytes()
    tables = [more[place : place + 188] for place in range(0, len(more), 188) if more[place + 1] & 0x5F == 0x50]
    assert tables, "PID 0x1000 has the table of the program"
    begins = [place for place in range(0, len(content), 188) if content[place + 1 : place + 3] == b"\x50\x00"]
    changed = bytearray(content)
    for place in begins[len(begins) // 2 :]:
        changed[place : place + 188] = tables[0]
    (tmp_path / "c.ts").write_bytes(changed)
    assert len(find_sections(tmp_path / "c.ts", "mpegts")) == 2
    before, after = read(whole), read(tmp_path / "c.ts")
    assert before.frame_times.tolist() == after.frame_times.tolist()
    assert np.array_equal(before.frames, after.frames)
    assert np.array_equal(before.waveform, after.waveform)
    assert has_note(after, "another audio stream begins: it is not read")


@pytest.mark.parametrize("kind", CODECS)
def test_damage_at_the_joint(tmp_path, kind):
    """A recording that was cut anywhere before the next was appended, and flipped bits in what shows that it begins."""
    one, two = (make_recording(tmp_path, kind, number, "va") for number in (0, 1))
    content = one.read_bytes()
    path = tmp_path / f"all.{kind}"
    path.write_bytes(content[: len(content) - 1234] + two.read_bytes())
    clip = read(path)
    assert clip.timeline.end == pytest.approx(5.0, abs=0.6)
    assert max(map(number_of, clip.frames)) >= 120
    for offset in range(0, 400, 7):
        changed = bytearray(content + two.read_bytes())
        changed[len(content) + offset] ^= 0x10
        path.write_bytes(changed)
        with contextlib.suppress(BadClip):
            read(path, start=0.5, end=1.0)


def test_a_recording_that_cannot_be_read_is_noted(tmp_path):
    one, two = (make_recording(tmp_path, "ogg", number, "va") for number in (0, 1))
    head = two.read_bytes()[:58]  # the first page alone
    path = tmp_path / "all.ogg"
    path.write_bytes(one.read_bytes() + head)
    clip = read(path)
    assert clip.timeline.end == pytest.approx(3.0, abs=0.1)
    assert has_note(clip, f"what begins at byte {one.stat().st_size} is not read: ")


def test_more_parts_than_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(joined_parts, "MOST_PARTS", 2)
    clip = read(make_joined(tmp_path, "ogg", "a a a"))
    assert clip.timeline.end == pytest.approx(5.0, abs=0.1)
    assert has_note(clip, "is not read: a file is read as 2 parts at most")


def test_a_clean_file_is_one_section(tmp_path):
    for kind in CODECS:
        path = make_recording(tmp_path, kind, 0, "va")
        name = {"ts": "mpegts", "vob": "mpeg", "ogg": "ogg"}[kind]
        assert len(find_sections(path, name)) == 1


@pytest.mark.parametrize("kind", CODECS)
def test_sections_of_a_file_that_is_cut_or_damaged_anywhere_are_found(tmp_path, kind):
    """And end: fuzzing found an Ogg page without content that was looked at for ever."""
    content = make_joined(tmp_path, kind, "va va va").read_bytes()
    path, name = tmp_path / "a.bin", {"ts": "mpegts", "vob": "mpeg", "ogg": "ogg"}[kind]
    generator = random.Random(kind)
    for number in range(150):
        changed = bytearray(content)
        if number % 3 == 0:
            del changed[generator.randrange(len(content)) :]
        place = generator.choice((0, 26, generator.randrange(len(content))))
        changed[place : place + generator.choice((1, 30, 5000))] = b""
        place = generator.randrange(max(1, len(changed)))
        changed[place : place + 4] = bytes([generator.choice((0, 255))]) * 4
        path.write_bytes(changed)
        found = [section.begin for section in find_sections(path, name)]
        assert found == sorted(set(found))
    empty = content[:26] + b"\0" + content[:27] + b"OggS\0"
    path.write_bytes(content + empty)
    assert find_sections(path, name)[0].begin == 0


@pytest.mark.parametrize("size", [192, 204])
def test_transport_streams_of_longer_packets(tmp_path, size):
    """Cameras put a time before each packet, receivers a checksum after it."""
    content = make_joined(tmp_path, "ts", "va vaic va").read_bytes()
    packets = [content[place : place + 188] for place in range(0, len(content), 188)]
    before, after = (bytes(4), b"") if size == 192 else (b"", bytes(16))
    path = tmp_path / "long.m2ts"
    path.write_bytes(b"".join(before + packet + after for packet in packets))
    clip = read(path, ChunkGrid(8, chunk_seconds=0.5))
    check_content(clip, ["va"] * 3)
    assert has_note(clip, "other streams begin: mpeg2video 64x48 and mp2")


def test_reencoding_keeps_changing_streams_as_they_are(tmp_path):
    first, second = make_recording(tmp_path, "ts", 0, "va"), make_recording(tmp_path, "ts", 1, "vai", start=3.0)
    path = join(tmp_path / "all.ts", first, second)
    assert reencode_media(path, tmp_path / "a.mp4", Reencoding(32)) == "its streams change"

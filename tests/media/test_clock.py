"""Times: none at all, those that start over, and those that a header states wrongly."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from media_making import Audio, Video, number_of, ramp, steady, tone, write_media

from mirasol import ChunkGrid, read_clip
from mirasol.media.joined.clock import RisingClock, scan_packets
from mirasol.media.reader import probe_media
from mirasol.media.transcode import Reencoding, reencode_media

GRID = ChunkGrid(4, chunk_seconds=0.5)


def read(path, grid=GRID, **settings):
    return read_clip(path, grid, image_size=32, threads=1, **settings)


def has_note(clip, words: str) -> bool:
    return any(words in note for note in clip.notes)


def sweep(seconds: float, rate: int = 48_000, first: float = 100.0) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (first + 40 * time) * time)).astype(np.float32)[None]


# No presentation times


def timed_by_decoder(path) -> list[tuple[float, int]]:
    """Time and number of each frame as FFmpeg's best effort has them: by the packet that brought it out."""
    with av.open(str(path)) as container:
        container.flags &= ~0x1  # no invented times
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames = [frame for packet in container.demux(stream) for frame in stream.codec_context.decode(packet)]
        found, usual = [], 1 / float(stream.average_rate)
        for frame in frames:
            stamp = frame.dts if frame.pts is None else frame.pts
            time = found[-1][0] + usual if stamp is None else float(stamp * stream.time_base)
            small = frame.reformat(32, 24, "rgb24").to_ndarray().mean(axis=2)
            cells = small.reshape(3, 8, 4, 8).mean(axis=(1, 3)) > 128
            found.append((time, sum(int(cell) << k for k, cell in enumerate(cells.flatten()))))
    return found


@pytest.mark.parametrize(("codec", "b_frames"), [("libx264", 3), ("libx264", 1), ("mpeg4", 2)])
@pytest.mark.parametrize("window", [(None, None), (1.0, 2.5), (2.9, 3.9)])
def test_avi_with_b_frames_shows_every_frame_at_its_decoders_time(tmp_path, codec, b_frames, window):
    track = Video(ramp(100), steady(100, 25), codec=codec, b_frames=b_frames, tick=Fraction(1, 25))
    path = write_media(tmp_path / "a.avi", track, Audio([(0, tone(4))], codec="pcm_s16le"))
    clip = read(path, ChunkGrid(100, num_chunks=1), start=window[0], end=window[1])
    expected = timed_by_decoder(path)
    wanted = [time for chunk in clip.timeline.frame_times for time in chunk]
    shown = [max((f for f in expected if f[0] <= want + 1e-6), default=expected[0]) for want in wanted]
    assert [number_of(frame) for frame in clip.frames] == [number for _, number in shown]
    assert clip.frame_times.tolist() == pytest.approx([time for time, _ in shown], abs=0.0401)
    numbers = [number for _, number in expected]
    assert numbers == sorted(set(numbers)), "every frame, in order"
    assert not has_note(clip, "dropped")
    assert has_note(clip, "no presentation times") == any(f.pts is None for f in packets_of(path))


def packets_of(path):
    with av.open(str(path)) as container:
        container.flags &= ~0x1
        return [packet for packet in container.demux(container.streams.video[0]) if packet.size]


@pytest.mark.parametrize(("codec", "b_frames"), [("libx264", 3)])
def test_reencoding_keeps_a_file_without_presentation_times_as_it_is(tmp_path, codec, b_frames):
    track = Video(ramp(50), steady(50, 25), codec=codec, b_frames=b_frames, tick=Fraction(1, 25))
    path = write_media(tmp_path / "a.avi", track)
    assert "no presentation times" in reencode_media(path, tmp_path / "b.mp4", Reencoding(32))


@pytest.mark.parametrize("per_packet", [2, 3, 5])
@pytest.mark.parametrize("window", [(0.0, None), (1.0, 2.0)])
def test_packets_of_several_frames_of_which_one_has_a_time(tmp_path, per_packet, window):
    """As AMR in 3gp: the first frame of a packet has the packet's time, the others have none."""
    from test_channels import RATE, Packet, frame_of

    from mirasol.media.audio import WaveformBuilder

    size, wave = 960, sweep(3.0)
    frames = [frame_of(wave[:, k : k + size], "flt", "mono", k) for k in range(0, wave.shape[1], size)]
    packets = [Packet(frame) for frame in frames[::per_packet]]
    groups = [frames[k : k + per_packet] for k in range(0, len(frames), per_packet)]
    for group in groups:
        for frame in group[1:]:
            frame.pts = None
    start, end = window[0], window[1] or 3.0
    decoded = iter(groups)

    class Decoder:
        time_base = Fraction(1, RATE)

        def decode(self, packet):
            return [] if packet is None else next(decoded)

        @property
        def codec_context(self):
            return self

    builder = WaveformBuilder(Decoder(), start, end, RATE)
    for packet in packets:
        builder.feed(packet)
    builder.finish()
    heard, begins = builder.result()
    first = round(begins * RATE)
    assert begins == pytest.approx(start)
    assert len(heard) == round((end - start) * RATE)
    assert np.array_equal(heard, wave[0, first : first + len(heard)])
    assert (builder.counts.gaps, builder.counts.overlaps, builder.counts.jitters) == (0, 0, 0)


@pytest.mark.parametrize("name", ["amr_2_frames_per_packet.3gp", "amr_3_frames_per_packet.3gp"])
def test_reported_amr_files(faults, name):
    clip = read(faults / name)
    with av.open(str(faults / name)) as container:
        frames = list(container.decode(audio=0))
    decoded = np.concatenate([frame.to_ndarray()[0] for frame in frames])
    assert clip.timeline.end == pytest.approx(15.2)
    ours = clip.waveform.numpy()[: 2 * len(decoded) : 2]
    length = min(len(ours), len(decoded))
    assert np.corrcoef(ours[:length], decoded[:length])[0, 1] > 0.99
    assert not has_note(clip, "gaps")


@pytest.mark.parametrize("name", ["avi_h264_bframes.avi", "avi_xvid_bframes.avi"])
def test_reported_avi_files(faults, name):
    clip = read(faults / name)
    times = clip.frame_times.tolist()
    assert times == sorted(times)
    assert not has_note(clip, "dropped")


# Times that start over


def join(path, *parts):
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


@pytest.fixture(scope="module", params=["ts", "mpg"])
def joined_file(tmp_path_factory, request):
    """Three recordings of 4, 3 and 2 s, one after the other; frames are numbered through."""
    folder, kind = tmp_path_factory.mktemp("joined"), request.param
    parts, first = [], 0
    for number, seconds in enumerate((4, 3, 2)):
        count = 25 * seconds
        picture = Video(ramp(first + count)[first:], steady(count, 25), group=12, b_frames=2)
        if kind == "mpg":
            picture.codec, picture.tick = "mpeg2video", Fraction(1, 25)
        sound = Audio([(0, tone(seconds, hertz=300 * (number + 1)))], codec="aac" if kind == "ts" else "mp2")
        parts.append(write_media(folder / f"{number}.{kind}", picture, sound))
        first += count
    return join(folder / f"all.{kind}", *parts)


def test_joined_recordings_are_on_one_rising_clock(joined_file):
    clip = read(joined_file)
    assert clip.timeline.end == pytest.approx(9.0, abs=0.4)
    assert clip.audio_present.all()
    assert has_note(clip, "time stamps start over at ")
    note = next(note for note in clip.notes if "start over" in note)
    joints = [float(word.strip(",")) for word in note.split(" at ")[1].split(" s:")[0].split()]
    assert joints == pytest.approx([4.0, 7.0], abs=0.3)
    numbers = [number_of(frame) for frame in clip.frames]
    assert numbers == sorted(numbers)
    for time, number in zip(clip.frame_times.tolist(), numbers, strict=True):
        assert number / 25 == pytest.approx(time, abs=0.35), "of its recording's time, plus what came before"
    for start, hertz in ((1.0, 300), (5.2, 600), (7.8, 900)):
        heard = clip.waveform[round(start * 16_000) :][:8_000]
        crossings = int((heard[1:] * heard[:-1] < 0).sum())
        assert crossings == pytest.approx(hertz, rel=0.03)


@pytest.mark.parametrize("window", [(1.0, 2.0), (3.6, 4.6), (6.0, 8.0)])
def test_a_window_of_joined_recordings_equals_the_slice(joined_file, window):
    whole = read(joined_file, ChunkGrid(900, num_chunks=1))
    clip = read(joined_file, start=window[0], end=window[1])
    times = whole.frame_times.unique()
    wanted = [time for chunk in clip.timeline.frame_times for time in chunk]
    assert clip.frame_times.tolist() == [max(t for t in times.tolist() if t <= want + 1e-6) for want in wanted]
    first = round((clip.waveform_start - whole.waveform_start) * 16_000)
    expected = whole.waveform[first : first + len(clip.waveform)].numpy()
    assert np.corrcoef(expected[500:-500], clip.waveform.numpy()[500:-500])[0, 1] > 0.99


@pytest.mark.parametrize("codec", ["libopus", "flac", "vorbis"])
def test_chained_ogg_files(tmp_path, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"no {codec} in this build of PyAV: it would show chained {codec} files")
    pieces = [sweep(3.0), sweep(2.0, first=2000.0)]
    layout = "stereo" if codec == "vorbis" else "mono"
    pieces = [np.tile(piece, (2 if layout == "stereo" else 1, 1)) for piece in pieces]
    parts = [
        write_media(tmp_path / f"{number}.ogg", Audio([(0, piece)], codec=codec, layout=layout))
        for number, piece in enumerate(pieces)
    ]
    alone = [read(part).waveform.numpy() for part in parts]
    clip = read(join(tmp_path / "all.ogg", *parts))
    assert clip.timeline.end == pytest.approx(5.0, abs=0.1)
    assert has_note(clip, "time stamps start over at ")
    heard = clip.waveform.numpy()
    assert np.corrcoef(heard[1000:40_000], alone[0][1000:40_000])[0, 1] > 0.99
    best = max(
        np.corrcoef(heard[place : place + 16_000], alone[1][8_000:24_000])[0, 1] for place in range(54_000, 58_500, 1)
    )
    assert best > 0.99, "the second recording is all there"


def test_reencoding_keeps_joined_recordings_as_they_are(joined_file, tmp_path):
    assert "start over" in reencode_media(joined_file, tmp_path / "a.mp4", Reencoding(32))


class Stamped:
    def __init__(self, stream, time, decoded=None):
        self.stream_index, self.time_base, self.duration = stream, Fraction(1, 1000), 40
        self.pts = round(time * 1000)
        self.dts = self.pts if decoded is None else round(decoded * 1000)


def place(stamps) -> list[float]:
    """Times of (stream, second) packets on the rising clock."""
    packets = [Stamped(*stamp) for stamp in stamps]
    scan = scan_packets([(packet.stream_index, 0.001, packet, 0) for packet in packets], joinable=True)
    clock = RisingClock(scan.shifts, scan.repairs)
    for packet in packets:
        clock.place(packet.stream_index, packet)
    return [packet.pts / 1000 for packet in packets]


def recording(start: float, count: int) -> list[tuple[int, float]]:
    return [(stream, start + 0.04 * k) for k in range(count) for stream in (0, 1)]


@pytest.mark.parametrize("starts", [(0, 0), (50, 10), (10, 5000), (80_000, 1.4), (3, 3, 3), (0, 20, 0)])
def test_recordings_follow_each_other(starts):
    times = place([stamp for start in starts for stamp in recording(start, 50)])
    for stream in (0, 1):
        own = times[stream::2]
        assert np.diff(own) == pytest.approx(0.04, abs=1e-6)


def test_a_stream_that_pauses_is_not_moved():
    stamps = [(0, 0.04 * k) for k in range(1500)]
    still = [(1, 0.04 * k) for k in [*range(50), *range(1200, 1500)]]
    times = place(sorted([*stamps, *still], key=lambda stamp: stamp[1]))
    assert times == pytest.approx(sorted(stamp[1] for stamp in [*stamps, *still]))


@pytest.mark.parametrize("outlier", [0.0, 9.0, 40.0, 95_000.0])
def test_one_damaged_time_moves_nothing_else(outlier):
    stamps = recording(1.0, 100)
    damaged = [*stamps[:100], (stamps[100][0], outlier), *stamps[101:]]
    times = place(damaged)
    kept = [time for number, time in enumerate(times) if number != 100]
    assert kept == pytest.approx([time for number, (_, time) in enumerate(stamps) if number != 100])


def test_wrapped_times_of_a_transport_stream(tmp_path):
    """33 bits of 90 kHz last 26.5 hours; a recording may go over that."""
    near = 2**33 / 90_000 - 2.0
    track = Video(ramp(100), steady(100, 25, near))
    path = write_media(tmp_path / "a.ts", track, Audio([(near, tone(4))]))
    clip = read(path)
    assert clip.timeline.end == pytest.approx(4.0, abs=0.2)
    numbers = [number_of(frame) for frame in clip.frames]
    assert numbers == sorted(numbers)
    assert numbers[-1] > 90


def test_a_stream_that_begins_before_zero(tmp_path):
    """Some writers store the few milliseconds of encoder delay as times of 26.5 hours."""
    stamps = [(0, 0.04 * k) for k in range(50)]
    early = [(1, 95_443.66), *((1, 0.04 * k) for k in range(50))]
    times = place([*stamps, *early])
    assert times[50] == pytest.approx(-0.04)
    assert times[51:] == pytest.approx([0.04 * k for k in range(50)])


def test_reported_joined_files(faults):
    for name in ("discont.ts", "chained.opus"):
        clip = read(faults / name)
        assert clip.timeline.end == pytest.approx(10.2, abs=0.1)
        assert has_note(clip, "time stamps start over")
        assert clip.audio_present[:20].all()


def test_a_transport_stream_with_flipped_bits_ends_in_notes(faults):
    clip = read(faults / "fuzz_flips.ts")
    assert any("decoded" in note or "dropped" in note for note in clip.notes)


# Headers


def patch(path, name: bytes, change):
    """Rewrites what follows each `name` in the file's bytes."""
    data = bytearray(path.read_bytes())
    place, found = data.find(name), 0
    while place >= 0:
        change(data, place + len(name))
        found += 1
        place = data.find(name, place + 1)
    assert found
    path.write_bytes(data)


def shorten_mp4(path, seconds: float) -> None:
    def media_header(data, place):
        scale = struct.unpack_from(">I", data, place + 12)[0]
        struct.pack_into(">I", data, place + 16, round(seconds * scale))

    patch(path, b"mdhd", media_header)


def shorten_matroska(path, seconds: float) -> None:
    patch(path, b"\x44\x89\x88", lambda data, place: struct.pack_into(">d", data, place, seconds * 1000))


def shorten_flv(path, seconds: float) -> None:
    patch(path, b"duration\0", lambda data, place: struct.pack_into(">d", data, place, seconds))


def shorten_avi(path, seconds: float) -> None:
    def stream_header(data, place):
        if data[place + 4 : place + 8] in (b"vids", b"auds"):
            scale, rate = struct.unpack_from("<II", data, place + 24)
            struct.pack_into("<I", data, place + 36, round(seconds * rate / scale))

    patch(path, b"strh", stream_header)
    patch(path, b"avih", lambda data, place: struct.pack_into("<I", data, place + 20, round(seconds * 25)))


HEADERS = {"mp4": shorten_mp4, "mov": shorten_mp4, "mkv": shorten_matroska, "webm": shorten_matroska}
HEADERS |= {"flv": shorten_flv, "avi": shorten_avi}


def header_file(folder, kind: str, seconds: float):
    codecs = {"webm": ("libvpx", "libopus"), "avi": ("mpeg4", "pcm_s16le")}.get(kind, ("libx264", "aac"))
    picture = Video(ramp(250), steady(250, 25), codec=codecs[0], tick=Fraction(1, 25) if kind == "avi" else None)
    path = (
        write_media(folder / f"a.{kind}", picture, Audio([(0, tone(10, 44_100))], rate=44_100, codec=codecs[1]))
        if kind != "webm"
        else write_media(folder / f"a.{kind}", picture, Audio([(0, tone(10))], codec=codecs[1]))
    )
    HEADERS[kind](path, seconds)
    return path


@pytest.mark.parametrize("kind", HEADERS)
def test_a_file_longer_than_its_header_says_is_read_to_its_end(tmp_path, kind):
    path = header_file(tmp_path, kind, 2.0)
    with av.open(str(path)) as container:
        assert container.duration / av.time_base < 3
    clip = read(path)
    assert clip.timeline.end == pytest.approx(10.0, abs=0.1)
    assert number_of(clip.frames[-1]) >= 245
    assert has_note(clip, "the header says 2.0") or has_note(clip, "the header says 1.9")
    late = read(path, start=7.0, end=9.0)
    assert number_of(late.frames[0]) in (175, 176, 177, 178)
    assert late.audio_present.all()
    assert probe_media(path).duration == pytest.approx(10.0, abs=0.1)
    inside = read(path, start=0.5, end=1.5)
    assert not has_note(inside, "the header says"), "what the header promises is believed"


@pytest.mark.parametrize("kind", ["mp4", "mkv", "flv"])
def test_a_right_header_costs_no_second_reading(tmp_path, monkeypatch, kind):
    from mirasol.media.joined import parts

    path = header_file(tmp_path, kind, 10.0)
    monkeypatch.setattr(parts, "scan_packets", lambda *given: pytest.fail("all packets were read"))
    assert read(path).timeline.end == pytest.approx(10.0, abs=0.1)


def test_fragments_that_the_header_does_not_count(tmp_path):
    """As browsers record mp4: the header ends before the first fragment."""
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    path = write_media(tmp_path / "a.mp4", Video(ramp(250), steady(250, 25)), Audio([(0, tone(10))]), options=options)
    clip = read(path)
    assert clip.timeline.end == pytest.approx(10.0, abs=0.1)
    assert number_of(clip.frames[-1]) >= 245


@pytest.mark.parametrize(
    ("name", "seconds"), [("lie_short.mkv", 5.0), ("f5_mkv_short.mkv", 20.0), ("f5_mdhd30.mp4", 20.0)]
)
def test_reported_files_with_short_headers(faults, name, seconds):
    clip = read(faults / name)
    assert clip.timeline.end == pytest.approx(seconds, abs=0.1)
    assert has_note(clip, "the header says")

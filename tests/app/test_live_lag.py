"""Decoding that is slower than the source costs whole chunks, and no time; a slow network costs nothing."""

import contextlib
import itertools
import math
import time
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from live_making import FPS, Sender, serve_tcp

from mirasol.app.live import lag, receiver
from mirasol.app.live.chunks import DROPPED, LiveSettings
from mirasol.app.live.lag import DecodingLag
from mirasol.app.live.receiver import Connection
from mirasol.app.live.sampling import OpenFrameSampler
from mirasol.app.live.source import find_source
from mirasol.config.media import MediaConfig

MEDIA = MediaConfig()
CHUNK = MEDIA.chunk_seconds


def show(second: float) -> np.ndarray:
    return np.full((48, 64, 3), int(second * 50) % 250, np.uint8)


def play(seconds: np.ndarray) -> np.ndarray:
    return 0.4 * np.sin(2 * np.pi * 440 * seconds)


@pytest.fixture
def watch_slowly(monkeypatch):
    """Watches a source that goes on by itself, decoding a picture `slowness` times as long as it is shown."""

    def watch(source, slowness: float, most_waiting: int = 1):
        feed = OpenFrameSampler.feed

        def feed_slowly(sampler, packet) -> None:
            time.sleep(slowness / FPS)
            feed(sampler, packet)

        monkeypatch.setattr(OpenFrameSampler, "feed", feed_slowly)
        connection = Connection(source, LiveSettings(MEDIA, most_waiting=most_waiting, retries=0), None, None)
        connection.queue.most = 10**6  # the model is fast
        began, chunks, notes, progress, undecoded = time.monotonic(), [], [], None, 0
        connection.thread.start()
        while progress is None or progress.ended is None:
            progress = connection.poll(0.2)
            chunks += progress.chunks
            notes += progress.notes
            undecoded += progress.counts.undecoded
        assert connection.failure is None
        return chunks, notes, undecoded, began

    return watch


def check_pictures(chunks, later: float = 0.1) -> None:
    """Pictures are those of their time, and no older ones stand in for those that were left out."""
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    for chunk in chunks:
        assert bool(len(chunk.frames)) == chunk.has_video == (chunk.missing == "")
        times = chunk.frame_times
        assert np.all((chunk.start - later < times) & (times < chunk.end))
        levels = np.array([int(second * 50) % 250 for second in times])
        assert np.abs(chunk.frames[:, 0, 16, 16].astype(int) - levels).max(initial=0) <= 8


@pytest.fixture
def make_source(tmp_path):
    """A file that is played, or a camera that sends over TCP: 5 s, with a keyframe every `group` pictures."""

    def make(kind: str, group: int, **settings):
        def send(file, speed: float) -> None:
            sender = Sender(file, "mpegts", group=group, speed=speed, **settings)
            sender.send(0, 5, show, play)
            sender.close()

        if kind == "tcp":
            return find_source(servers.enter_context(serve_tcp(lambda file: send(file, 1.0))))
        path = tmp_path / "played.ts"
        with path.open("wb") as file:
            send(file, 0.0)
        return find_source(str(path))

    with contextlib.ExitStack() as servers:
        yield make


@pytest.mark.parametrize(("kind", "group", "sound"), [("file", 12, True), ("tcp", 12, True), ("tcp", 25, False)])
def test_slow_decoding_costs_whole_chunks_and_no_time(make_source, watch_slowly, kind, group, sound):
    chunks, notes, undecoded, began = watch_slowly(make_source(kind, group, sound=sound), slowness=3.0)
    assert len(chunks) == round(5 / CHUNK)
    check_pictures(chunks)
    left_out = [chunk for chunk in chunks if chunk.missing == DROPPED]
    assert 0 < len(left_out) == undecoded < len(chunks)
    assert sum("decoding is slower than the source" in note for note in notes) == 1
    assert not any("no video for" in note for note in notes)
    # 10 s behind without the rule: three times 5 s of decoding
    assert max(chunk.arrived - began - chunk.end for chunk in chunks) < 5.0


def test_decoding_that_keeps_up_loses_nothing_to_a_network_that_stalls(watch_slowly):
    def send(file) -> None:
        sender = Sender(file, "mpegts")
        for begin, end in ((0, 1), (1, 3), (3, 4)):
            sender.send(begin, end, show, play)
            time.sleep(end - begin + 0.5)
        sender.close()

    with serve_tcp(send) as address:
        chunks, notes, undecoded, _ = watch_slowly(find_source(address), slowness=0.5)
    assert undecoded == 0 and not any("slower" in note for note in notes)
    assert len(chunks) >= round(4 / CHUNK) and all(chunk.missing != DROPPED for chunk in chunks)


def make_packets(count: int, group: int):
    """Packets of a picture each, decoded in the order in which they are shown."""
    return [
        SimpleNamespace(pts=k, dts=k, duration=1, time_base=Fraction(1, FPS), is_keyframe=k % group == 0)
        for k in range(count)
    ]


@pytest.mark.parametrize("slowness", [0.2, 0.99, 1.1, 3.0, 20.0])
@pytest.mark.parametrize("group", [1, 10, 250])
def test_behind_by_no_more_than_most_and_a_chunk(monkeypatch, slowness, group):
    """Whatever decoding costs; what is decoded again after something was left out begins with a keyframe."""
    now, most = [0.0], 1.0
    monkeypatch.setattr(lag, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def arrive(packets):
        for packet in packets:
            now[0] = max(now[0], (packet.pts + 1) / FPS)  # the source sends each when it is over
            yield packet

    measured, decoded, worst, chunk, in_a_row = DecodingLag(most), [], 0.0, 5, 0
    for packet in measured.follow(arrive(make_packets(1000, group))):
        worst = max(worst, now[0] - (packet.pts + 1) / FPS)
        decoded.append(not measured.leaves_out(packet, in_a_row >= chunk))
        in_a_row = in_a_row + 1 if decoded[-1] else 0
        now[0] += slowness / FPS if decoded[-1] else 0.0
    assert worst <= most + (chunk + 1) * slowness / FPS + 2 * lag.WAIT_SECONDS
    assert all(decoded) == (slowness < 1)
    for number, (before, after) in enumerate(itertools.pairwise(decoded), 1):
        assert before or not after or number % group == 0
    assert min(len(list(run)) for was, run in itertools.groupby(decoded[:-chunk]) if was) >= chunk


def test_where_nothing_is_dropped_everything_is_decoded(monkeypatch):
    measured = DecodingLag(math.inf)
    for packet in measured.follow(make_packets(50, 10)):
        measured.behind = 1e6
        assert not measured.leaves_out(packet, True)


def test_a_joined_file_plays_as_long_as_it_is(tmp_path, monkeypatch):
    """Each part is due when it is in the whole, not as long after the last part's end."""
    path = tmp_path / "joined.ogg"
    parts = []
    for number in range(3):
        part = tmp_path / f"{number}.ogg"
        with part.open("wb") as file:
            sender = Sender(file, "ogg", picture=False, audio_codec="libopus")
            sender.send(0, 1, None, play)
            sender.close()
        parts.append(part.read_bytes())
    path.write_bytes(b"".join(parts))
    now = [0.0]

    def wait(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(receiver, "time", SimpleNamespace(monotonic=lambda: now[0]))
    connection = Connection(find_source(str(path)), LiveSettings(MEDIA, drop=False), None, None)
    connection._closing = SimpleNamespace(wait=wait, is_set=lambda: False, set=lambda: None)
    connection.queue.most = 100
    connection._run()
    assert connection.failure is None and len(connection.poll(0).chunks) == round(3 / CHUNK)
    assert 2.5 < now[0] < 3.5

"""Sources of every kind send while they are read: over TCP, UDP, HTTP and HLS, from a camera; and they misbehave."""

import io
import itertools
import os
import shutil
import signal
import socket
import subprocess
import threading
import time

import numpy as np
import pytest
from live_making import FPS, Sender, SocketFile, find_free_port, join, serve_http, serve_tcp

from mirasol.app.live.chunks import DROPPED, LiveSettings
from mirasol.app.live.reader import LiveReader, describe_counts
from mirasol.app.live.receiver import Connection
from mirasol.app.live.source import LiveSource, find_source
from mirasol.config.media import MediaConfig
from mirasol.errors import BadClip

MEDIA = MediaConfig()
ONCE = LiveSettings(MEDIA, drop=False, retries=0)
FRAME = 1 / FPS


def level(second: float) -> int:
    return int(second * 50) % 250


def show(second: float) -> np.ndarray:
    return np.full((48, 64, 3), level(second), np.uint8)


def show_large(second: float) -> np.ndarray:
    return np.full((96, 128, 3), level(second), np.uint8)


def play(seconds: np.ndarray) -> np.ndarray:
    return 0.4 * np.sin(2 * np.pi * 440 * seconds)


def talk(*parts, **settings):
    """A connection on which pictures and sound of [begin, end) seconds are sent, part after part."""

    def run(file) -> None:
        sender = Sender(file, **settings)
        for begin, end in parts:
            sender.send(begin, end, show, play)
        sender.close()

    return run


def check_content(chunks, begin: float = 0.0) -> None:
    """Chunks follow each other, and pictures are those of their time, which began at `begin` by the source's clock."""
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    for before, after in itertools.pairwise(chunks):
        assert before.end == pytest.approx(after.start)
        assert after.source_start - before.source_start == pytest.approx(before.end - before.start)
    seen = [chunk for chunk in chunks if chunk.has_video]
    expected = np.array([level(second + begin) for second in join(seen, "frame_times")])
    assert np.abs(join(seen, "frames")[:, 0, 16, 16].astype(int) - expected).max() <= 8


def test_tcp_with_time_stamps_that_begin_anywhere(read_all):
    with serve_tcp(talk((0, 2), offset=95_000.25)) as address:
        chunks, _ = read_all(find_source(address), ONCE)
    assert len(chunks) == 4 and all(chunk.has_video and chunk.has_audio for chunk in chunks)
    assert chunks[0].source_start == pytest.approx(95_000.25, abs=0.05)
    check_content(chunks)


def test_udp(read_all):
    port = find_free_port()

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
            connection.connect(("127.0.0.1", port))
            sender = Sender(SocketFile(connection, datagram=1316), speed=2)
            sender.send(0, 6, show, play)
            sender.close()

    thread = threading.Thread(target=send)
    thread.start()
    chunks, _ = read_all(find_source(f"udp://127.0.0.1:{port}"), LiveSettings(MEDIA, drop=False, stall=1.0))
    thread.join()
    assert len(chunks) >= 5 and sum(chunk.has_video and chunk.has_audio for chunk in chunks) >= len(chunks) - 2
    begin = chunks[0].source_start
    check_content(chunks, begin)


def test_http_and_hls(tmp_path, read_all):
    for name, format in (("clip.ts", "mpegts"), ("index.m3u8", "hls")):
        sender = Sender(str(tmp_path / name), format, group=10)
        sender.send(0, 3, show, play)
        sender.close()
    with serve_http(tmp_path) as address:
        for name in ("clip.ts", "index.m3u8"):
            chunks, connection = read_all(find_source(f"{address}/{name}"), ONCE)
            assert connection.ended == "" and len(chunks) == 6
            assert all(chunk.has_video and chunk.has_audio for chunk in chunks)
            check_content(chunks)


RTSP_SERVER = """
import sys
import gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
if not all(Gst.ElementFactory.find(name) for name in ("x264enc", "alawenc", "rtph264pay", "rtppcmapay")):
    sys.exit("elements of GStreamer are missing")
server = GstRtspServer.RTSPServer(service="0", address="127.0.0.1")
factory = GstRtspServer.RTSPMediaFactory()
factory.set_launch("( videotestsrc is-live=true ! video/x-raw,width=64,height=48,framerate=25/1 "
    "! x264enc tune=zerolatency speed-preset=ultrafast key-int-max=12 ! rtph264pay name=pay0 pt=96 "
    "audiotestsrc is-live=true ! audio/x-raw,rate=8000,channels=1 ! alawenc ! rtppcmapay name=pay1 pt=8 )")
server.get_mount_points().add_factory("/main", factory)
server.attach(None)
print(server.get_bound_port(), flush=True)
GLib.MainLoop().run()
"""


@pytest.mark.slow
def test_rtsp(read_all):
    """With GStreamer's server, where the system's Python has it (gir1.2-gst-rtsp-server-1.0)."""
    python = shutil.which("python3", path="/usr/bin")
    if python is None:
        pytest.skip("no /usr/bin/python3 for GStreamer's RTSP server")
    with subprocess.Popen([python, "-c", RTSP_SERVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        port = server.stdout.readline().decode().strip()
        if not port:
            pytest.skip("GStreamer's RTSP server is not there: " + server.stderr.read().decode()[-200:])
        source = find_source(f"rtsp://127.0.0.1:{port}/main")
        connection, chunks = Connection(source, ONCE, None, None), []
        connection.thread.start()
        while len(chunks) < 6 and connection.ended is None:
            chunks += connection.poll(1.0).chunks
        server.kill()
        connection.close()
        connection.thread.join()
    assert [chunk.number for chunk in chunks[:6]] == list(range(6))
    assert sum(chunk.has_video and chunk.has_audio for chunk in chunks) >= 4


@pytest.mark.parametrize("kind", ["hls", "concat"])
def test_a_playlist_from_elsewhere_opens_no_file_of_this_machine(tmp_path, read_all, kind):
    folder = tmp_path / "served"
    folder.mkdir()
    sender = Sender(str(tmp_path / "secret.ts"))
    sender.send(0, 2, show, play)
    sender.close()
    secret = tmp_path / "secret.ts"
    playlists = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2.0,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile '{secret}'\n",
    }
    (folder / "list").write_text(playlists[kind])
    with serve_http(folder) as address, pytest.raises(BadClip):
        read_all(find_source(f"{address}/list"), ONCE)


def test_a_camera(read_all):
    """FFmpeg's device for test pictures and tones stands in for one."""
    graph = (
        "testsrc=size=64x48:rate=25,realtime=speed=4[out0];sine=frequency=440:sample_rate=16000,arealtime=speed=4[out1]"
    )
    connection = Connection(LiveSource("camera", graph, "lavfi"), LiveSettings(MEDIA, drop=False), None, None)
    connection.thread.start()
    chunks = []
    while len(chunks) < 4 and connection.ended is None:
        chunks += connection.poll(1.0).chunks
    connection.close()
    connection.thread.join()
    assert [chunk.number for chunk in chunks[:4]] == [0, 1, 2, 3]
    assert all(chunk.has_video and chunk.has_audio for chunk in chunks[:4])


def test_flash_and_click_come_together(read_all):
    """Within one frame and 5 ms, over TCP."""
    events = [0.52, 1.24, 2.08]

    def flash(second: float) -> np.ndarray:
        return np.full((48, 64, 3), 235 if any(0 <= second - event < FRAME / 2 for event in events) else 16, np.uint8)

    def click(seconds: np.ndarray) -> np.ndarray:
        return sum((np.abs(seconds - event) < 0.001) * 0.9 for event in events)

    def run(file) -> None:
        sender = Sender(file, "matroska", speed=4, offset=30.0)  # which states the delay of AAC's encoder
        sender.send(0, 3, flash, click)
        sender.close()

    media = MediaConfig(frames_per_chunk=25, chunk_seconds=0.5)
    with serve_tcp(run) as address:
        chunks, _ = read_all(find_source(address), LiveSettings(media, drop=False, retries=0))
    bright = join(chunks, "frames")[:, 0, 16, 16] > 128
    flashes = sorted({round(float(time), 3) for time in join(chunks, "frame_times")[bright]})
    heard = []
    for chunk in chunks:
        seconds = chunk.waveform_start + np.arange(len(chunk.waveform)) / media.sample_rate
        own = np.abs(chunk.waveform) * ((seconds >= chunk.start) & (seconds < chunk.end))
        if own.max() > 0.2:
            heard.append(float(seconds[own.argmax()]))
    assert len(flashes) == len(heard) == len(events)
    for flash_time, click_time, event in zip(flashes, heard, events, strict=True):
        assert abs(flash_time - event) <= FRAME
        assert abs(click_time - event) <= 0.005


def test_streams_that_lack_sound_or_pictures(read_all):
    for settings, has in (({"sound": False}, (True, False)), ({"picture": False, "rate": 8_000}, (False, True))):
        with serve_tcp(talk((0, 2), **settings)) as address:
            chunks, _ = read_all(find_source(address), ONCE)
        assert [(chunk.has_video, chunk.has_audio) for chunk in chunks] == [has] * 4


@pytest.mark.parametrize("jump", [500.0, -60.0, -1.2])
def test_a_clock_that_jumps_is_one_that_rises(read_all, jump):
    def run(file) -> None:
        for begin, offset in ((0, 70.0), (2, 70.0 + jump)):  # no muxer goes backwards: the broadcaster starts again
            sender = Sender(file, offset=offset)
            sender.send(begin, begin + 2, show, play)
            sender.close()

    with serve_tcp(run) as address:
        chunks, connection = read_all(find_source(address), ONCE)
    assert connection.clock.jumps >= 1 and any("clock jumps" in note for note in connection.notes)
    assert len(chunks) == 8 and sum(chunk.has_video and chunk.has_audio for chunk in chunks) >= 7
    check_content(chunks)


def test_a_stall_is_a_gap_of_its_own_length(read_all):
    def run(file) -> None:
        sender = Sender(file)
        sender.send(0, 3, show, play)  # more than is read to learn what the streams are
        time.sleep(1.6)
        sender.send(4.5, 6, show, play)
        sender.close()

    with serve_tcp(run) as address:
        chunks, connection = read_all(find_source(address), ONCE)
    assert [chunk.number for chunk in chunks] == list(range(12))
    assert [chunk.has_audio for chunk in chunks[7:]] == [False] * 2 + [True] * 3
    assert not any(chunk.has_video for chunk in chunks[7:9])
    assert 1.0 < connection.clock.gap_seconds < 2.0


def test_pictures_begin_with_the_first_that_can_be_decoded_alone(read_all):
    """Whoever joins a broadcast does so between two keyframes."""
    whole = io.BytesIO()
    sender = Sender(whole, group=25)
    sender.send(0, 4, show, play)
    sender.close()
    content = whole.getvalue()
    joined = content[188 * (len(content) // 188 // 8) :]  # half a second later

    with serve_tcp(lambda file: file.write(joined)) as address:
        chunks, connection = read_all(find_source(address), ONCE)
    assert connection.before_keyframe > 0
    begin = chunks[0].source_start
    assert (0.2 < begin < 1.0 and not chunks[0].has_video) or chunks[0].frame_times.min() >= 1.0 - begin - FRAME
    check_content(chunks, begin)


def test_pictures_and_sound_change_their_kind(read_all):
    """An encoder that is set up anew: larger pictures, another sample rate."""

    def run(file) -> None:
        first = Sender(file)
        first.send(0, 2, show, play)
        first.close()
        second = Sender(file, size=(128, 96), rate=32_000)
        second.send(2, 4, show_large, play)
        second.close()

    with serve_tcp(run) as address:
        chunks, connection = read_all(find_source(address), ONCE)
    assert len(chunks) == 8 and all(chunk.has_video for chunk in chunks)
    assert any("128x96 follow those of 64x48" in note for note in connection.notes)
    assert connection.assembler.audio.counts.changes == 1 and chunks[-1].has_audio
    check_content(chunks)


def test_a_model_that_is_too_slow_costs_whole_chunks_and_no_time(read_all):
    """Nobody takes chunks until all have come: all but the newest have lost their content, none its place."""
    with serve_tcp(talk((0, 4))) as address:
        connection = Connection(find_source(address), LiveSettings(MEDIA, most_waiting=2), None, None)
        connection.thread.start()
        connection.thread.join()
    progress = connection.poll(1.0)
    assert [chunk.number for chunk in progress.chunks] == list(range(8))
    assert [chunk.missing for chunk in progress.chunks] == [DROPPED] * 6 + [""] * 2
    assert not any(len(chunk.frames) or len(chunk.waveform) for chunk in progress.chunks[:6])
    assert progress.counts.dropped == 6


def test_a_source_that_breaks_off_is_found_again(here):
    """Twice: it goes on by its own clock, then begins again at zero."""

    def go_on(file) -> None:
        time.sleep(0.2)
        talk((2.5, 4))(file)

    settings = LiveSettings(MEDIA, drop=False, retries=1, first_retry=0.05)
    talks = (talk((0, 2)), go_on, talk((0, 1)))
    with serve_tcp(*talks) as address, LiveReader(find_source(address), settings) as reader:
        chunks = list(reader)
    assert reader.counts.connections == 3 and "not there again" in reader.ended
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    assert sum("trying again" in note for note in reader.notes) >= 2
    times = [chunk.start for chunk in chunks]
    assert times == sorted(times) and 8 <= len(chunks) <= 14
    assert reader.counts.jumps == 1 and chunks[-1].has_video


def test_one_that_is_not_there_is_tried_and_refused(here):
    port = find_free_port(socket.SOCK_STREAM)
    source, settings = find_source(f"tcp://127.0.0.1:{port}"), LiveSettings(MEDIA, retries=2, first_retry=0.01)
    with LiveReader(source, settings) as reader, pytest.raises(BadClip, match=r"refused.*\(3 tries\)"):
        list(reader)


def test_a_decoder_that_dies_costs_a_gap():
    def run(file) -> None:
        talk((0, 4), speed=2)(file)

    settings = LiveSettings(MEDIA, drop=False, retries=1, first_retry=0.05)
    with serve_tcp(run, run) as address, LiveReader(find_source(address), settings) as reader:
        chunks = list(reader.poll(60.0))
        os.kill(reader._decoder.pid, signal.SIGKILL)
        chunks += list(reader)
    assert reader.counts.crashes == 1 and reader.counts.connections == 2
    assert [chunk.number for chunk in chunks] == list(range(len(chunks))) and chunks[-1].has_video
    assert any("crashes of the decoder" in line for line in describe_counts(reader.counts))


def test_garbage_is_one_line(read_all):
    with serve_tcp(lambda file: file.write(bytes(range(256)) * 400)) as address, pytest.raises(BadClip):
        read_all(find_source(address), ONCE)

"""Servers on this machine that send media while it is made, as cameras and broadcasters do: TCP, UDP, HTTP and HLS."""

import functools
import http.server
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATE = 48_000
FPS = 25


def make_pictures(count: int, level: Callable[[float], int], width: int = 64, height: int = 48):
    """Grey pictures at 25 a second whose level is a function of their second."""
    return [np.full((height, width, 3), level(k / FPS), np.uint8) for k in range(count)]


class Sender:
    """Muxes pictures and sound into something with `write`, in real time or at once.

    speed: 1 is real time, 0 as fast as it goes
    """

    def __init__(self, file, format: str = "mpegts", *, sound: bool = True, picture: bool = True, speed: float = 0.0,
                 size: tuple[int, int] = (64, 48), offset: float = 0.0, rate: int = RATE, group: int = 12,
                 video_codec: str = "libx264", audio_codec: str = "aac"):  # fmt: skip
        self.container = av.open(file, "w", format=format, container_options={"flush_packets": "1"})
        self.speed, self.offset, self.rate = speed, offset, rate
        self.video = self.audio = None
        self.began = time.monotonic()
        if picture:
            fast = {"preset": "ultrafast", "tune": "zerolatency"} if video_codec == "libx264" else {}
            if video_codec.startswith("libvpx"):
                fast = {"deadline": "realtime", "cpu-used": "8"}
            self.video = self.container.add_stream(video_codec, rate=FPS, options=fast)
            self.video.width, self.video.height = size
            self.video.pix_fmt = "yuv420p"
            self.video.codec_context.gop_size = group
            self.video.time_base = self.video.codec_context.time_base = Fraction(1, 1000)
        if sound:
            self.audio = self.container.add_stream(audio_codec, rate=rate)
            self.audio.layout = "mono"
            self.audio.codec_context.time_base = Fraction(1, rate)
            self.audio.codec_context.open(strict=False)
        self.container.start_encoding()

    def send(self, begin: float, end: float, picture: Callable[[float], np.ndarray] | None = None,
             sound: Callable[[np.ndarray], np.ndarray] | None = None) -> None:  # fmt: skip
        """Pictures and sound of [begin, end) seconds, interleaved by time, each when it is due."""
        things = []
        if self.video is not None and picture is not None:
            things += [(k / FPS, "video", None) for k in range(round(begin * FPS), round(end * FPS))]
        if self.audio is not None and sound is not None:
            size = self.audio.codec_context.frame_size or 1024
            first, stop = round(begin * self.rate / size), round(end * self.rate / size)
            things += [(k * size / self.rate, "audio", k * size) for k in range(first, stop)]
        for second, kind, sample in sorted(things, key=lambda thing: thing[0]):
            if self.speed:
                time.sleep(max(0.0, self.began + second / self.speed - time.monotonic()))
            self._send_one(second, kind, sample, picture, sound)

    def _send_one(self, second, kind, sample, picture, sound) -> None:
        if kind == "video":
            frame = av.VideoFrame.from_ndarray(picture(second), format="rgb24")
            frame.pts, frame.time_base = round((second + self.offset) * 1000), Fraction(1, 1000)
            stream = self.video
        else:
            size = self.audio.codec_context.frame_size or 1024
            values = sound((sample + np.arange(size)) / self.rate).astype(np.float32)[None]
            kind = self.audio.codec_context.format.name
            if kind == "fltp":
                frame = av.AudioFrame.from_ndarray(values, "fltp", "mono")
            elif kind == "flt":
                frame = av.AudioFrame.from_ndarray(values, "flt", "mono")
            else:
                frame = av.AudioFrame.from_ndarray((values * 32767).astype(np.int16), kind, "mono")
            frame.sample_rate = self.rate
            frame.pts, frame.time_base = sample + round(self.offset * self.rate), Fraction(1, self.rate)
            stream = self.audio
        for packet in stream.encode(frame):
            self.container.mux(packet)

    def close(self) -> None:
        with suppress(OSError, av.error.FFmpegError):
            for stream in (self.video, self.audio):
                if stream is not None:
                    for packet in stream.encode(None):
                        self.container.mux(packet)
            self.container.close()


class SocketFile:
    """A socket as a file that is written only."""

    def __init__(self, connection: socket.socket, datagram: int = 0):
        self.connection, self.datagram, self.held = connection, datagram, b""

    def write(self, content: bytes) -> int:
        content = bytes(content)
        if not self.datagram:
            self.connection.sendall(content)
            return len(content)
        self.held += content
        while len(self.held) >= self.datagram:
            with suppress(ConnectionRefusedError):
                self.connection.send(self.held[: self.datagram])
            self.held = self.held[self.datagram :]
        return len(content)


@contextmanager
def serve_tcp(*talks: Callable[[SocketFile], None]):
    """A server whose nth connection gets the nth talk, and whose later ones are refused; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def run() -> None:
            for number, talk in enumerate(talks, 1):
                connection, _ = server.accept()
                if number == len(talks):
                    server.close()
                with connection, suppress(OSError, av.error.FFmpegError):
                    talk(SocketFile(connection))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"tcp://127.0.0.1:{port}"


@contextmanager
def serve_http(folder: Path):
    """A web server of a folder; gives its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def find_free_port(kind: int = socket.SOCK_DGRAM) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join(chunks: Iterable, name: str) -> np.ndarray:
    """One of the arrays of all chunks."""
    return np.concatenate([getattr(chunk, name) for chunk in chunks])

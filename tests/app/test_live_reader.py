"""A live source gives the chunks that the offline reader gives of the same media, whatever carries it."""

import io
import os
import threading

import numpy as np
import pytest
import torch
from live_making import Sender, join, serve_tcp

from mirasol.app.live.chunks import LiveSettings
from mirasol.app.live.features import compute_chunk_tensors
from mirasol.app.live.reader import LiveReader
from mirasol.app.live.source import LiveSource, find_source
from mirasol.config.media import MediaConfig
from mirasol.media.feature_extractor import MirasolFeatureExtractor

MEDIA = MediaConfig()


def show(second: float) -> np.ndarray:
    return np.full((48, 64, 3), int(second * 60) % 256, np.uint8)


def play(seconds: np.ndarray) -> np.ndarray:
    return 0.4 * np.sin(2 * np.pi * (300 + 100 * np.floor(seconds)) * seconds)


def mux(format: str, **settings) -> bytes:
    file = io.BytesIO()
    sender = Sender(file, format, **settings)
    sender.send(0, 3, show, play)
    sender.close()
    return file.getvalue()


@pytest.mark.parametrize(
    ("format", "settings"), [("webm", {"video_codec": "libvpx", "audio_codec": "libopus"}), ("mpegts", {"offset": 7.3})]
)
def test_appended_bytes_are_the_file(tmp_path, format, settings):
    content = mux(format, **settings)
    file = tmp_path / f"clip.{format}"
    file.write_bytes(content)
    extractor = MirasolFeatureExtractor(**MEDIA.to_dict())
    whole = extractor.tensors(extractor.read(file))
    with LiveReader(LiveSource("bytes", ""), LiveSettings(MEDIA)) as reader:

        def send() -> None:
            for first in range(0, len(content), 3001):
                reader.append(content[first : first + 3001])
            reader.end()

        thread = threading.Thread(target=send)
        thread.start()
        chunks = list(reader)
        thread.join()
    assert reader.ended == ""
    assert [chunk.number for chunk in chunks] == list(range(6))
    rows = [compute_chunk_tensors(extractor, chunk) for chunk in chunks]
    whole["audio"][-1, -1] = rows[-1]["audio"][0, -1] = 0  # where the stream ends is not known before
    for name, values in whole.items():
        torch.testing.assert_close(torch.cat([row[name] for row in rows]), values, atol=1e-3, rtol=0)


def test_bytes_go_into_no_other_file_when_the_stream_ends_meanwhile(monkeypatch):
    """Another thread ends the stream just before a write, and something else is opened, perhaps by the same number."""
    reader = LiveReader(LiveSource("bytes", ""), LiveSettings(MEDIA))
    write, opened, ended = os.write, [], []

    def write_late(descriptor: int, content: bytes) -> int:
        if not ended:
            ended.append(threading.Thread(target=reader.close))
            ended[0].start()
            ended[0].join(0.2)
            opened.extend(os.pipe() for _ in range(4))
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", write_late)
    reader.append(b"x" * 30_000)
    ended[0].join()
    with pytest.raises(BrokenPipeError):
        reader.append(b"x")
    for read_end, write_end in opened:
        os.close(write_end)
        assert os.read(read_end, 9) == b""
        os.close(read_end)


def test_bytes_wait_for_a_reader_until_the_stream_ends():
    reader = LiveReader(LiveSource("bytes", ""), LiveSettings(MEDIA))
    failed = []

    def append() -> None:
        with pytest.raises(BrokenPipeError) as error:
            reader.append(b"x" * 10**6)  # more than a pipe holds, and nobody reads
        failed.append(error.value)

    thread = threading.Thread(target=append)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    reader.close()
    thread.join(30)
    assert failed


def test_a_stream_over_tcp_comes_while_it_is_sent():
    def talk(file) -> None:
        sender = Sender(file, speed=4)
        sender.send(0, 3, show, play)
        sender.close()

    with serve_tcp(talk) as address, LiveReader(find_source(address), LiveSettings(MEDIA, retries=0)) as reader:
        chunks = list(reader)
    assert [chunk.number for chunk in chunks] == list(range(6))
    assert all(chunk.has_video and chunk.has_audio for chunk in chunks)
    assert "closed" in reader.ended
    levels = join(chunks, "frames")[:, 0, 16, 16].astype(float)
    assert np.abs(levels - join(chunks, "frame_times") * 60).max() < 6

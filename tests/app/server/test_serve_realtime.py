"""Realtime sessions: what is sent is seen as a file with it would be, and questions are answered at any moment."""

import base64
import io
import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from serving import serve, wait_until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from mirasol.app.live.features import compute_chunk_tensors
from mirasol.app.server.realtime.arrays import ArrayChunks
from mirasol.app.server.realtime.stream import SessionStream
from mirasol.app.server.refusals import Refusal
from mirasol.app.server.settings import Caps, ServerSettings
from mirasol.config.media import MediaConfig
from mirasol.errors import UserError
from mirasol.evaluation.answer import answer_encoded, encode_clips
from mirasol.media.feature_extractor import MirasolFeatureExtractor

QUESTION = "which shape is seen last?"


class Client:
    """A session's other side."""

    def __init__(self, served, query: str = "", **options):
        self.context = connect(f"ws://127.0.0.1:{served.port}/v1/realtime{query}", max_size=2**24, **options)

    def __enter__(self):
        self.socket = self.context.__enter__()
        return self

    def __exit__(self, *error):
        self.context.__exit__(*error)

    def send(self, kind: str, **fields) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def receive(self, *kinds: str) -> dict:
        """The next event of one of these kinds; errors are not skipped."""
        while True:
            event = json.loads(self.socket.recv(timeout=60))
            if event["type"] in (*kinds, "error"):
                return event


def encode64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def read_clip(answerer, path) -> dict:
    extractor = answerer.processor.feature_extractor
    return extractor.tensors(extractor.read(path))


def test_a_recording_is_answered_while_it_comes_and_at_its_end(served, clips, tmp_path):
    """The bytes of a file in pieces, as a browser records them: half of it first, then the rest."""
    content = make_webm(clips[0], tmp_path / "clip.webm")
    expected = answer_alone_about(served.answerer, tmp_path / "clip.webm")
    with Client(served) as client:
        assert client.receive("session.created")["session"]["chunk_seconds"] == 0.5
        client.send("question.ask", id="early", question=QUESTION)
        assert client.receive()["error"]["code"] == "no_media"
        half = len(content) // 2
        for first in range(0, half, 1000):
            client.socket.send(content[first : min(first + 1000, half)])
        assert client.receive("chunk.encoded")["chunk"] == 0
        client.send("question.ask", id="first", question=QUESTION)
        done = client.receive("answer.done")
        assert done["id"] == "first" and done["chunks"] >= 1 and done["reason"] == "stop"
        client.send("media.append", media=encode64(content[half:]))
        client.send("media.end")
        assert client.receive("media.ended")["reason"] == ""
        client.send("question.ask", id="last", question=QUESTION, max_tokens=9)
        text, event = "", client.receive("answer.delta", "answer.done")
        while event["type"] == "answer.delta":
            text, event = text + event["text"], client.receive("answer.delta", "answer.done")
        assert event["answer"] == text == expected.text
        assert event["probability"] == pytest.approx(expected.probability, abs=0.05)
        client.send("question.ask", question=QUESTION, candidates=["square", "cross", "circle"])
        assert client.receive("scores.done")["scores"][0]["candidate"] == text
        client.send("session.close")
        assert client.receive("session.closed")["chunks"] == event["chunks"] >= 9
    wait_until(lambda: served.service.sessions == 0)


@pytest.mark.parametrize("drop", [True, False])
def test_while_the_model_is_behind_chunks_are_dropped_or_wait(served, clips, tmp_path, drop):
    """The model stands still until the whole recording has been sent."""
    content = make_webm(clips[0], tmp_path / "clip.webm")
    whole = len(read_clip(served.answerer, tmp_path / "clip.webm")["video"])
    goes_on = threading.Event()
    served.answerer.run(goes_on.wait, 60)
    with Client(served, f"?drop={'true' if drop else 'false'}") as client:
        try:
            assert client.receive("session.created")["session"]["drop"] is drop
            for first in range(0, len(content), 5000):
                client.socket.send(content[first : first + 5000])
            client.send("media.end")
            time.sleep(1)  # in which the decoder goes on; how far it comes decides how many are dropped
        finally:
            goes_on.set()
        events = [client.receive("chunk.encoded") for _ in range(whole)]
        assert client.receive("media.ended")["reason"] == ""
    missing = [event["missing"] for event in events]
    assert [event["chunk"] for event in events] == list(range(whole))
    assert all(event["video"] or event["missing"] for event in events)
    assert not any(missing) or drop
    assert missing.count("dropped") <= max(0, whole - 4)


@pytest.mark.slow
def test_who_sends_more_than_is_read_keeps_the_session(served):
    """The model stands still for longer than any ping waits, while the client has filled all that lies between them."""
    goes_on, count = threading.Event(), 30
    served.answerer.run(goes_on.wait, 120)
    pixels = encode64(bytes(1000 * 700 * 3))  # 84 MB altogether
    with Client(served, ping_timeout=None) as client:

        def send() -> None:
            for number in range(count):
                client.send("frames.append", time=number / 4, width=1000, height=700, pixels=pixels)
            client.send("media.end")

        sender = threading.Thread(target=send)
        sender.start()
        time.sleep(50)
        assert sender.is_alive()
        goes_on.set()
        events = [client.receive("chunk.encoded", "media.ended")]
        while events[-1]["type"] == "chunk.encoded":
            events.append(client.receive("chunk.encoded", "media.ended"))
        sender.join()
    *chunks, ended = events
    assert ended["type"] == "media.ended" and ended["reason"] == ""
    assert [event["chunk"] for event in chunks] == list(range(int((count - 1) / 4 / 0.5)))
    assert all(event["video"] for event in chunks)


@pytest.mark.parametrize("drop", [True, False])
def test_the_reader_is_told_to_drop(answerer, drop):
    stream = SessionStream(answerer, Caps(), 3, lambda event: None, drop)
    stream.append(b"nothing that FFmpeg knows")
    assert stream.reader.settings.drop is drop
    stream.close()


def test_a_session_may_end_while_its_first_bytes_come(answerer, monkeypatch):
    """Closing waits for a thread that has been made and is about to be started, and afterwards none is."""
    begun, start = threading.Event(), threading.Thread.start

    def start_late(thread: threading.Thread) -> None:
        if thread.name == "session":
            begun.set()
            closing.join(0.2)
        start(thread)

    stream = SessionStream(answerer, Caps(), 3, lambda event: None)
    monkeypatch.setattr(threading.Thread, "start", start_late)
    failed: list[BaseException] = []

    def close() -> None:
        begun.wait(60)
        try:
            stream.close()
        except BaseException as error:
            failed.append(error)

    closing = threading.Thread(target=close)
    start(closing)
    stream.append(b"nothing that FFmpeg knows")
    closing.join(60)
    assert not failed and not any(thread.name == "session" for thread in threading.enumerate())
    with pytest.raises(Refusal):
        stream.append(b"more")


def test_an_unknown_way_to_drop_is_refused(served):
    with pytest.raises(InvalidStatus) as refused, Client(served, "?drop=perhaps"):
        pass
    assert refused.value.response.status_code == 400
    assert json.loads(refused.value.response.body)["error"]["param"] == "drop"


def make_webm(clip, target) -> bytes:
    """The clip as a browser would record it."""
    import av

    file = io.BytesIO()
    with av.open(str(clip)) as source, av.open(file, "w", "webm") as made:
        video, audio = made.add_stream("libvpx", rate=25), made.add_stream("libopus", rate=48000, layout="mono")
        seen, heard = source.streams.video[0], source.streams.audio[0]
        video.options = {"deadline": "realtime", "cpu-used": "8"}
        video.width, video.height, video.pix_fmt, video.bit_rate = seen.width, seen.height, "yuv420p", 2_000_000
        frames = sorted(source.decode(seen, heard), key=lambda frame: frame.time)
        for frame in frames:
            track = audio if isinstance(frame, av.AudioFrame) else video
            made.mux(track.encode(frame))
        for track in (video, audio):
            made.mux(track.encode(None))
    target.write_bytes(file.getvalue())
    return file.getvalue()


def answer_alone_about(answerer, path):
    def answer():
        encoded = encode_clips(answerer.model, answerer.processor, [read_clip(answerer, path)])
        return answer_encoded(answerer.model, answerer.processor, encoded, QUESTION)

    return answerer.run(answer).result(60)


@pytest.mark.parametrize("seconds", [0.5, 0.37, 1 / 3, 0.2525, 0.9999])
@pytest.mark.parametrize(("fps", "rate"), [(10.0, 16_000), (23.976, 22_050), (50.0, 8_000), (7.0, 48_000)])
def test_frames_and_samples_make_the_chunks_of_a_clip(seconds, fps, rate):
    """Against the processor's own clip of the same arrays; sent in pieces that fit nothing."""
    draw = np.random.default_rng(4)
    frames = draw.integers(0, 256, (round(2.2 * fps), 24, 32, 3), np.uint8)
    samples = (draw.normal(size=round(len(frames) / fps * rate)) * 3000).astype(np.int16)
    media = MediaConfig(chunk_seconds=seconds)
    extractor = MirasolFeatureExtractor(**media.to_dict())
    clip = extractor.make_clip({"video": frames, "fps": fps, "audio": (samples, rate)})
    whole = extractor.tensors(clip)
    chunks = ArrayChunks(media, media.chunk_seconds)
    found, piece = [], rate // 10 + 37
    for number, frame in enumerate(frames):
        chunks.append_frame(frame, number / fps)
        while len(samples) and chunks._sound_end <= number / fps:
            chunks.append_sound(samples[:piece], rate, None)
            samples = samples[piece:]
        found += chunks.take()
    if len(samples):
        chunks.append_sound(samples, rate, None)
    assert 0 < len(found) <= clip.timeline.num_chunks  # the last one may still change
    chunks.end()
    found += chunks.take()
    rows = [compute_chunk_tensors(extractor, chunk) for chunk in found]
    assert [chunk.number for chunk in found] == list(range(clip.timeline.num_chunks))
    assert torch.equal(torch.cat([row["video"] for row in rows]), whole["video"])
    # Where an edge lies between two samples, the whole clip's chunk may begin one sample later.
    between = any(abs(edge * media.sample_rate % 1.0 - 0.5) < 0.49 for edge in clip.timeline.edges)
    heard = torch.cat([row["audio"] for row in rows])
    torch.testing.assert_close(heard, whole["audio"], atol=0.05 if between else 1e-3, rtol=0)


def test_one_that_is_silent_or_blind_does_not_wait_for_the_other():
    media = MediaConfig()
    only_sound = ArrayChunks(media, 0.5)
    only_sound.append_sound(np.ones(8000 * 2, np.int16), 8000, 1.0)
    heard = [(chunk.has_video, chunk.has_audio) for chunk in only_sound.take()]
    assert heard[:3] == [(False, False), (False, False), (False, True)]
    behind = ArrayChunks(media, 0.5)
    behind.append_sound(np.ones(800, np.int16), 16_000, 0.0)
    for number in range(60):
        behind.append_frame(np.zeros((8, 8, 3), np.uint8), number / 10)
    assert sum(chunk.has_video for chunk in behind.take()) >= 6
    with pytest.raises(UserError, match="ascend"):
        behind.append_frame(np.zeros((8, 8, 3), np.uint8), 1.0)
    with pytest.raises(UserError, match="at most 60"):
        behind.append_frame(np.zeros((8, 8, 3), np.uint8), 1e9)
    with pytest.raises(UserError, match="8000"):
        only_sound.append_sound(np.ones(10, np.int16), 16_000, None)


def test_raw_media_is_answered(served):
    with Client(served, "?window=3") as client:
        assert client.receive("session.created")["session"]["window"] == 3
        red = np.zeros((12, 16, 3), np.uint8)
        red[..., 0] = 255
        for number in range(41):
            client.send("frames.append", time=number / 10, width=16, height=12, pixels=encode64(red.tobytes()))
        states = [client.receive("chunk.encoded") for _ in range(8)]
        assert [event["chunk"] for event in states] == list(range(8))
        assert states[3]["state_bytes"] == states[7]["state_bytes"] > 0  # a window keeps it bounded
        client.send("question.ask", id="a", question="what colour is the circle?")
        assert client.receive("answer.done")["chunks"] == 8
        client.socket.send(b"bytes of a recording")
        assert client.receive()["error"]["code"] == "mixed_media"


MISTAKES = {
    "not JSON": "{",
    "not an object": "3",
    "no type": "{}",
    "unknown type": '{"type": "dance"}',
    "no base64": '{"type": "media.append", "media": "$"}',
    "no pixels": '{"type": "frames.append", "time": 1, "width": 9, "height": 9, "pixels": ""}',
    "odd samples": '{"type": "audio.append", "audio": "AAAA"}',
    "no question": '{"type": "question.ask"}',
    "nested": "[" * 100_000,
    "id": '{"type": "question.ask", "id": 3, "question": "what?"}',
}


def test_mistakes_are_told_and_end_nothing(served):
    with Client(served) as client:
        for message in MISTAKES.values():
            client.socket.send(message)
            error = client.receive("answer.done")["error"]
            assert error["message"] and "\n" not in error["message"]
        client.send("session.close")
        assert client.receive("session.closed")["chunks"] == 0


def test_media_that_cannot_be_read_is_told(served):
    with Client(served) as client:
        client.socket.send(b"nothing that FFmpeg knows" * 1000)
        client.send("media.end")
        assert client.receive("media.ended")["reason"]
    wait_until(lambda: served.service.sessions == 0)
    assert not any(thread.name == "session" for thread in threading.enumerate())


def test_sessions_are_capped(answerer):
    caps = Caps(max_sessions=1, max_session_bytes=5000, max_session_idle=1.0)
    with serve(ServerSettings(caps=caps), answerer) as served:
        with Client(served) as client:
            client.receive("session.created")
            with pytest.raises(InvalidStatus) as refused, Client(served):
                pass
            assert refused.value.response.status_code == 429
            client.socket.send(b"x" * 6000)
            assert "5000 bytes" in client.receive()["error"]["message"]
            with pytest.raises(ConnectionClosed):
                client.receive("chunk.encoded")
        wait_until(lambda: served.service.sessions == 0)
        with Client(served) as client:  # one that says nothing
            client.receive("session.created")
            assert client.receive()["error"]["code"] == "timeout"
        wait_until(lambda: served.service.sessions == 0)
        with pytest.raises(InvalidStatus) as refused, Client(served, "?window=0"):
            pass
        assert refused.value.response.status_code == 400
        with pytest.raises(InvalidStatus) as refused, Client(served, origin="http://evil.example"):
            pass
        assert refused.value.response.status_code == 400
        wait_until(lambda: served.service.sessions == 0)
        served.service.settings = replace(served.service.settings, caps=replace(caps, max_session_state=10))
        with Client(served) as client:
            for number in range(12):
                pixels = encode64(bytes(12))
                client.send("frames.append", time=number / 10, width=2, height=2, pixels=pixels)
            assert "smaller window" in client.receive()["error"]["message"]

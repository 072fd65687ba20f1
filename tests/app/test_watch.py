"""`mirasol watch`: what it prints and records, how it ends, and every error in one line."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from live_making import Sender, find_free_port, serve_tcp

from mirasol.app.live.reader import LiveReader
from mirasol.app.live.sitting import Sitting
from mirasol.app.live.source import LiveSource, find_source
from mirasol.app.live.watcher import Watcher
from mirasol.checkpoint import load_checkpoint
from mirasol.cli.main import main
from mirasol.errors import UserError


def show(second: float) -> np.ndarray:
    return np.full((48, 64, 3), int(second * 50) % 250, np.uint8)


def play(seconds: np.ndarray) -> np.ndarray:
    return 0.4 * np.sin(2 * np.pi * 440 * seconds)


def mux(seconds: float = 3.0, format: str = "mpegts") -> bytes:
    file = io.BytesIO()
    sender = Sender(file, format)
    sender.send(0, seconds, show, play)
    sender.close()
    return file.getvalue()


def run(capsys, *arguments) -> tuple[str, str]:
    capsys.readouterr()
    main(["watch", *map(str, arguments), "--max-new-tokens", "3"])
    return capsys.readouterr()


def test_answers_notes_summary_and_record(capsys, here, untrained, tmp_path):
    clip, record = tmp_path / "clip.ts", tmp_path / "events.jsonl"
    clip.write_bytes(mux())
    out, err = run(
        capsys, untrained, clip, "what?", "where?", "--fast", "--record", record, "--every", 1, "--window", 2
    )
    events = [json.loads(line) for line in record.read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "start" and kinds[-1] == "end" and kinds.count("chunk") == 6
    answers = [event for event in events if event["event"] == "answer"]
    assert [answer["time"] for answer in answers if answer["question"] == "what?"] == [0.5, 1.5, 2.5, 3.0]
    changed = [answer for answer in answers if answer["changed"]]
    assert len(out.splitlines()) == len(changed) >= 2
    for line, answer in zip(out.splitlines(), changed, strict=True):
        assert re.match(r"0:0\d\.\d  (what|where)\?  ", line) and answer["question"] in line and "after" in line
    assert "watched 3.0 s in 6 chunks, asked 4 times" in err
    assert events[-1]["counts"]["dropped"] == 0 and events[-1]["state_bytes"] > 0
    with pytest.raises(SystemExit):
        run(capsys, untrained, clip, "what?", "--fast", "--record", record)
    assert "already exists" in capsys.readouterr().err


def test_standard_input_and_json(capsys, here, untrained, monkeypatch):
    content, (read_end, write_end) = mux(), os.pipe()

    def feed() -> None:
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(content)

    thread = threading.Thread(target=feed)
    thread.start()
    with os.fdopen(read_end) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        out, _ = run(capsys, untrained, "-", "what?", "--json", "--candidates", "yes|no")
    thread.join()
    lines = [json.loads(line) for line in out.splitlines()]
    assert {line["event"] for line in lines} == {"answer", "end"} and lines[-1]["counts"]["chunks"] == 6
    assert all(line["answer"] in ("yes", "no") for line in lines[:-1])


def test_ctrl_c_is_a_good_end(capsys, here, untrained, tmp_path, monkeypatch):
    clip = tmp_path / "clip.ts"
    clip.write_bytes(mux())
    seen = []
    see = Sitting._see

    def interrupt(sitting, chunk) -> None:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(chunk)
        see(sitting, chunk)

    monkeypatch.setattr(Sitting, "_see", interrupt)
    _, err = run(capsys, untrained, clip, "what?", "--fast")
    assert "stopped by Ctrl-C: watched 1.0 s in" in err


@pytest.mark.slow
def test_ctrl_c_ends_the_program_and_its_decoder(untrained):
    def talk(file) -> None:
        sender = Sender(file, speed=1)
        sender.send(0, 60, show, play)

    with serve_tcp(talk) as address:
        command = [sys.executable, "-m", "mirasol.cli", "watch", str(untrained), address, "what?"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert "what" not in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped by Ctrl-C" in err and "Traceback" not in err


def test_a_chunk_that_was_lost_is_one_without_picture_and_sound(untrained):
    """It costs no encoding, and the model sees it at its place."""
    loaded = load_checkpoint(untrained)
    encoder, media = loaded.model.chunk_encoder, loaded.model.config
    video, audio = torch.randn(1, *media.video.chunk_shape), torch.randn(1, *media.audio.chunk_shape)
    absent = torch.zeros(1, dtype=torch.bool)
    streams = []
    for lost in ((None, None), (video, audio, absent, absent)):
        stream = loaded.model.stream()
        stream.append(video, audio)
        stream.append(*lost)
        stream.append(video, audio)
        streams.append(stream.encoder_outputs.last_hidden_state)
    torch.testing.assert_close(*streams)
    calls = []
    hook = encoder.register_forward_hook(lambda *_: calls.append(1))
    loaded.model.stream().append(None, None)
    hook.remove()
    assert not calls


def test_memory_is_bounded_by_the_window(untrained, read_all, tmp_path):
    from mirasol.app.live.chunks import LiveSettings

    loaded = load_checkpoint(untrained)
    clip = tmp_path / "clip.ts"
    clip.write_bytes(mux(4.0))
    media = loaded.processor.feature_extractor.media
    chunks, _ = read_all(LiveSource("file", str(clip)), LiveSettings(media, fast=True))
    watcher, sizes = Watcher(loaded, ["what?"], None, window=3), []
    for chunk in [*chunks, *(chunk.drop() for chunk in chunks)]:
        watcher.append(chunk)
        sizes.append(watcher.state_bytes)
    assert max(sizes[3:]) <= sizes[3]


ERRORS = {
    "no such file": (["missing.mp4", "what?"], "missing.mp4: no such file"),
    "a folder": ([".", "what?"], "not a file"),
    "no camera": (["/dev/video77", "what?"], "/dev/video77: no such device"),
    "another device": (["/dev/null", "what?"], "not a camera"),
    "no scheme": (["gopher://there/it", "what?"], "gopher://"),
    "a file as an address": (["file:///etc/passwd", "what?"], "file://"),
    "no host": (["rtsp://", "what?"], "names no host"),
    "no source": (["", "what?"], "is empty"),
    "no question": (["clip.ts"], "no question"),
    "empty question": (["clip.ts", "what?", " "], "question 2 is empty"),
    "a question twice": (["clip.ts", "what?", "what?"], "question 2 is asked already"),
    "every": (["clip.ts", "what?", "--every", "0"], "--every 0"),
    "window": (["clip.ts", "what?", "--window", "0"], "--window 0"),
    "retries": (["clip.ts", "what?", "--retries", "-1"], "--retries -1"),
    "fast": (["udp://127.0.0.1:9", "what?", "--fast"], "--fast"),
    "record": (["clip.ts", "what?", "--record", "no/such/folder.jsonl"], "cannot be written"),
    "candidates": (["clip.ts", "what?", "--candidates", "one"], "at least two"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(capsys, here, untrained, tmp_path, monkeypatch, name):
    arguments, words = ERRORS[name]
    (tmp_path / "clip.ts").write_bytes(b"G" * 4)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        run(capsys, untrained, *arguments)
    err = capsys.readouterr().err
    assert raised.value.code == 2 and words in err and err.count("\n") == 1 and "Traceback" not in err


def test_a_source_that_is_not_there_is_refused_after_its_tries(capsys, here, untrained):
    with pytest.raises(SystemExit) as raised:
        run(capsys, untrained, f"tcp://127.0.0.1:{find_free_port()}", "what?", "--retries", 0)
    assert raised.value.code == 2 and "(one try)" in capsys.readouterr().err


def test_a_protocol_that_the_wheels_lack_is_tried_once(capsys, here, untrained):
    with pytest.raises(SystemExit) as raised:
        run(capsys, untrained, f"srt://127.0.0.1:{find_free_port()}", "what?")
    err = capsys.readouterr().err
    assert raised.value.code == 2 and "built without srt" in err and "trying again" not in err


def test_passwords_are_not_shown():
    source = find_source("rtsp://me:secret@camera.local/main")
    assert "secret" not in str(source) and source.address.count("secret") == 1
    with pytest.raises(UserError) as raised:
        find_source("gopher://me:secret@there/it")
    assert "secret" not in str(raised.value)


def test_bytes_after_the_end_are_refused(here):
    from mirasol.app.live.chunks import LiveSettings
    from mirasol.config.media import MediaConfig

    reader = LiveReader(LiveSource("bytes", ""), LiveSettings(MediaConfig()))
    reader.end()
    with pytest.raises(BrokenPipeError):
        reader.append(b"more")
    reader.close()

"""A long recording through a realtime session, played fast: `python benchmarks/realtime.py`.

`mirasol serve` in a process of its own gets a WebM recording of 4,096 chunks in pieces, as fast as it reads them, and
is asked a question at the end. Recorded at each eighth of it: chunks a second, the session's state, and the resident
memory of the server and of the processes that decode for it. Memory that grew with the recording would show here.
Needs the extra `serve`. Writes benchmarks/results/realtime.json and realtime.md.
"""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

from _measure import ROOT, calibrate, describe_surroundings, format_markdown_table, make_parser, write_results
from serve import Server, serve

RATE, SAMPLES, SIDE = 10, 16_000, 64  # frames a second, samples a second, pixels
PIECE = 16_384  # bytes that are sent at a time


def make_recording(seconds: float) -> bytes:
    """WebM with sound, as a browser would record it: a square that wanders and changes its colour, and a tone."""
    import av
    import numpy as np

    file = io.BytesIO()
    with av.open(file, "w", "webm") as made:
        video, audio = made.add_stream("libvpx", rate=RATE), made.add_stream("libopus", rate=48_000, layout="mono")
        video.options = {"deadline": "realtime", "cpu-used": "8"}
        video.width, video.height, video.pix_fmt, video.bit_rate = SIDE, SIDE, "yuv420p", 100_000
        times = np.arange(SAMPLES) / SAMPLES
        for second in range(round(seconds)):
            for number in range(RATE):
                place = second * RATE + number
                picture = np.full((SIDE, SIDE, 3), 20, np.uint8)
                left, top = 3 * place % (SIDE - 16), 5 * place // 7 % (SIDE - 16)
                picture[top : top + 16, left : left + 16] = [(40, 80, 220), (220, 40, 40), (40, 200, 80)][second % 3]
                frame = av.VideoFrame.from_ndarray(picture, "rgb24")
                frame.pts, frame.time_base = place, Fraction(1, RATE)
                made.mux(video.encode(frame))
            tone = (8000 * np.sin(2 * np.pi * (300 + 100 * (second % 5)) * times)).astype(np.int16)
            heard = av.AudioFrame.from_ndarray(tone[None], "s16", "mono")
            heard.rate, heard.pts, heard.time_base = SAMPLES, second * SAMPLES, Fraction(1, SAMPLES)
            made.mux(audio.encode(heard))
        for track in (video, audio):
            made.mux(track.encode(None))
    return file.getvalue()


def find_children(process: int) -> list[int]:
    """All processes below one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        if parent == process:
            found += [int(path.parent.name), *find_children(int(path.parent.name))]
    return found


def measure_bytes(processes: list[int]) -> int:
    """Resident memory of processes, shared pages counted for each."""
    pages = 0
    for process in processes:
        try:
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
        except OSError:
            continue
    return pages * os.sysconf("SC_PAGE_SIZE")


def stream(server: Server, content: bytes, chunks: int, window: int) -> dict[str, Any]:
    """Sends the recording, and asks at its end."""
    from websockets.sync.client import connect

    rows: list[dict[str, Any]] = []
    address = f"ws://127.0.0.1:{server.port}/v1/realtime?window={window}"
    with connect(address, max_size=2**24, ping_timeout=None) as session:

        def send() -> None:
            for first in range(0, len(content), PIECE):
                session.send(content[first : first + PIECE])
            session.send(json.dumps({"type": "media.end"}))

        sender = threading.Thread(target=send)
        sender.start()
        began, seen, missing = time.perf_counter(), 0, 0
        while (event := json.loads(session.recv(timeout=600)))["type"] != "media.ended":
            if event["type"] == "error":
                sys.exit(f"the session failed: {event}")
            if event["type"] != "chunk.encoded":
                continue
            seen, missing = seen + 1, missing + bool(event["missing"])
            if seen % max(1, chunks // 8) == 0:
                now = time.perf_counter()
                rows.append({"chunks": seen, "ms_a_chunk": 1000 * (now - began) / max(1, chunks // 8),
                             "state_bytes": event["state_bytes"], "server_bytes": measure_bytes([server.process.pid]),
                             "decoder_bytes": measure_bytes(find_children(server.process.pid))})  # fmt: skip
                began = time.perf_counter()
        sender.join()
        session.send(json.dumps({"type": "question.ask", "question": "what colour is the square?"}))
        while (event := json.loads(session.recv(timeout=600)))["type"] not in ("answer.done", "error"):
            pass
    if event["type"] == "error":
        sys.exit(f"the question failed: {event}")
    asked = {key: event[key] for key in ("answer", "chunks", "first_token_seconds")}
    return {"rows": rows, "encoded": seen, "without_media": missing, "asked": asked}


def describe(data: dict[str, Any]) -> str:
    """The results as Markdown."""
    surroundings, mebi = data["surroundings"], 2**20
    columns = ["chunks so far", "ms a chunk", "state", "server", "decoding processes"]
    rows = [
        [row["chunks"], f"{row['ms_a_chunk']:.1f}", f"{row['state_bytes'] / mebi:.2f} MiB",
         f"{row['server_bytes'] / mebi:.1f} MiB", f"{row['decoder_bytes'] / mebi:.1f} MiB"]
        for row in data["rows"]
    ]  # fmt: skip
    asked = data["asked"]
    return (
        "# A long recording through a realtime session\n\n"
        f"`python benchmarks/realtime.py`, checkpoint {data['checkpoint']}, window of {data['window']} chunks, "
        f"{surroundings['cpu']}, {data['gflops']:.0f} GFLOP/s of one thread, load {data['load']:.1f} at the start, "
        f"commit {surroundings['commit']}, torch {surroundings['torch']}.\n\n{format_markdown_table(columns, rows)}\n"
        f"{data['encoded']} chunks encoded, {data['without_media']} of them without picture and sound. A question at "
        f"the end: {asked['chunks']} chunks, first token after {1000 * asked['first_token_seconds']:.0f} ms.\n"
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = make_parser("realtime", __doc__)
    parser.add_argument("--checkpoint", default="tiny", help="what is served")
    parser.add_argument("--chunks", type=int, default=4096, help="chunks of the recording")
    parser.add_argument("--window", type=int, default=64, help="chunks that each layer looks back over")
    options = parser.parse_args(arguments)
    chunks = 32 if options.quick else options.chunks
    sys.path.insert(0, str(ROOT / "src"))
    from mirasol.checkpoint import load_checkpoint

    seconds = load_checkpoint(options.checkpoint).model.config.chunking.chunk_seconds
    data = {"surroundings": describe_surroundings(), "checkpoint": options.checkpoint, "window": options.window}
    data |= {"load": os.getloadavg()[0], "gflops": calibrate(), "seconds": seconds * chunks}
    content = make_recording(seconds * chunks)
    with serve(options.checkpoint, []) as server:
        data |= stream(server, content, chunks, options.window)
    text = describe(data)
    write_results(options.out, data, text)
    print(text)


if __name__ == "__main__":
    main()

"""Speed of a server: `python benchmarks/serve.py`.

`mirasol serve` in a process of its own answers the same questions about the same uploaded clips, streamed, to 1, 8 and
32 clients that each ask one after the other. One client is the loop that batching is compared with. Recorded: requests
a second, seconds to the first piece of an answer (p50, p95), and whether every answer is the one of the loop. With
`--requests 10000` also the server's memory, open files and threads over all of them. The clients run in this process:
they share the machine. Needs the extra `serve`. Writes benchmarks/results/serve.json and serve.md.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _measure import ROOT, calibrate, describe_surroundings, format_markdown_table, make_parser, write_results

CLIENTS = (1, 8, 32)
QUESTIONS = (
    "what colour is the circle?",
    "which shape is seen last?",
    "what plays?",
    "which sound is heard first?",
    "how many shapes are seen?",
    "is a bell heard?",
)


@dataclass
class Asked:
    """A question that was answered. seconds: to the first piece, and altogether."""

    number: int
    answer: str
    first: float
    seconds: float


class Server:
    """`mirasol serve` in a process of its own."""

    def __init__(self, checkpoint: str, options: list[str]):
        command = [sys.executable, "-m", "mirasol.cli", "serve", checkpoint, "--port", "0", "--name", "model", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.port = int(re.search(r":(\d+)/v1", self.process.stderr.readline())[1])
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        for line in self.process.stderr:
            if '"event": "request"' not in line:
                sys.stderr.write(line)

    def connect(self) -> http.client.HTTPConnection:
        """A new connection, which stays open."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)

    def measure(self) -> dict[str, int]:
        """Resident bytes, open files and threads now."""
        proc = Path(f"/proc/{self.process.pid}")
        resident = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return {
            "bytes": resident,
            "files": len(list((proc / "fd").iterdir())),
            "threads": len(list((proc / "task").iterdir())),
        }

    def processor_seconds(self) -> float:
        """Processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> int:
        """Ends it as a service manager does."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def serve(checkpoint: str, options: list[str]) -> Iterator[Server]:
    """A server until the context ends."""
    server = Server(checkpoint, options)
    try:
        yield server
    finally:
        server.stop()


def make_clips(folder: Path, count: int) -> list[Path]:
    """Rendered clips of several lengths."""
    from mirasol.synthetic.synthesize import synthesize

    synthesize(folder, seed=7, train=0, validation=0, test=count)
    return sorted((folder / "clips" / "test").iterdir())


def upload(server: Server, clip: Path) -> str:
    """The id of an uploaded file."""
    edge = "-----edge"
    head = f'--{edge}\r\ncontent-disposition: form-data; name="file"; filename="clip.mp4"\r\n'
    head += "content-type: video/mp4\r\n\r\n"
    body = head.encode() + clip.read_bytes() + f"\r\n--{edge}--\r\n".encode()
    connection = server.connect()
    connection.request("POST", "/v1/files", body, {"content-type": f"multipart/form-data; boundary={edge}"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer["id"]


def make_bodies(files: list[str], count: int) -> list[bytes]:
    """The bodies of that many requests, the same for each number of files."""
    draw = random.Random(3)
    bodies = []
    for _ in range(count):
        content = [
            {"type": "file", "file": {"file_id": draw.choice(files)}},
            {"type": "text", "text": draw.choice(QUESTIONS)},
        ]
        bodies.append(json.dumps({"stream": True, "messages": [{"role": "user", "content": content}]}).encode())
    return bodies


def ask(connection: http.client.HTTPConnection, number: int, body: bytes) -> Asked:
    """Asks one question and reads its stream."""
    began, first, answer = time.perf_counter(), None, ""
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {response.read()[:500]}")
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        first = time.perf_counter() - began if first is None else first
        for choice in json.loads(line[6:])["choices"]:
            answer += choice["delta"].get("content") or ""
    return Asked(number, answer, first, time.perf_counter() - began)


def run_clients(server: Server, bodies: list[bytes], clients: int) -> tuple[list[Asked], float]:
    """All questions, asked by that many clients at a time, and the seconds that they took."""
    left, found, lock = iter(enumerate(bodies)), [], threading.Lock()

    def work() -> None:
        connection = server.connect()
        while True:
            with lock:
                task = next(left, None)
            if task is None:
                break
            found.append(ask(connection, *task))
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(found) < len(bodies):
        sys.exit(f"{len(bodies) - len(found)} of {len(bodies)} requests failed")
    return sorted(found, key=lambda asked: asked.number), time.perf_counter() - began


def measure_clients(server: Server, bodies: list[bytes], clients: int, expected: list[str] | None) -> dict[str, Any]:
    """One row of the results."""
    before = server.processor_seconds()
    asked, seconds = run_clients(server, bodies, clients)
    firsts = sorted(each.first for each in asked)
    answers = [each.answer for each in asked]
    return {
        "clients": clients,
        "requests": len(asked),
        "requests_per_second": len(asked) / seconds,
        "server_processor_ms": 1000 * (server.processor_seconds() - before) / len(asked),
        "first_p50_ms": 1000 * statistics.median(firsts),
        "first_p95_ms": 1000 * firsts[int(0.95 * (len(firsts) - 1))],
        "different_answers": 0 if expected is None else sum(a != b for a, b in zip(answers, expected, strict=True)),
        "answers": answers,
    }


def measure_all(checkpoint: str, requests: int, clips: int) -> dict[str, Any]:
    """The loop, then more clients; at the end all requests once more for the memory."""
    rows, memory = [], []
    with tempfile.TemporaryDirectory() as folder, serve(checkpoint, ["--max-connections", "500"]) as server:
        files = [upload(server, clip) for clip in make_clips(Path(folder) / "clips", clips)]
        bodies = make_bodies(files, min(requests, 400))
        run_clients(server, bodies[:20], 4)  # warm
        for clients in CLIENTS:
            rows.append(measure_clients(server, bodies, clients, rows[0]["answers"] if rows else None))
        memory.append({"requests": len(bodies) * len(CLIENTS), **server.measure()})
        asked = 0
        while asked < requests:
            run_clients(server, bodies, 16)
            asked += len(bodies)
            memory.append({"requests": memory[0]["requests"] + asked, **server.measure()})
    for row in rows:
        row["times_the_loop"] = row["requests_per_second"] / rows[0]["requests_per_second"]
        row["distinct_answers"] = len(set(row.pop("answers")))
    return {"rows": rows, "memory": memory}


def describe(data: dict[str, Any]) -> str:
    """The results as Markdown."""
    surroundings = data["surroundings"]
    columns = [
        "clients",
        "requests/s",
        "times the loop",
        "first piece p50",
        "p95",
        "server's processor",
        "other answers",
    ]
    rows = [
        [
            row["clients"],
            f"{row['requests_per_second']:.1f}",
            f"{row['times_the_loop']:.2f}",
            f"{row['first_p50_ms']:.0f} ms",
            f"{row['first_p95_ms']:.0f} ms",
            f"{row['server_processor_ms']:.1f} ms a request",
            row["different_answers"],
        ]
        for row in data["rows"]
    ]
    first, last = data["memory"][0], data["memory"][-1]
    return (
        "# A server's speed\n\n"
        f"`python benchmarks/serve.py`, checkpoint {data['checkpoint']}, {surroundings['cpu']}, "
        f"{data['gflops']:.0f} GFLOP/s of one thread, load {data['load']:.1f} at the start ({data['remark']}), commit "
        f"{surroundings['commit']}, torch {surroundings['torch']}.\n\n{format_markdown_table(columns, rows)}\n"
        f"Memory after {first['requests']} and {last['requests']} requests: {first['bytes'] / 2**20:.1f} and "
        f"{last['bytes'] / 2**20:.1f} MiB; open files {first['files']} and {last['files']}, threads {first['threads']} "
        f"and {last['threads']}.\n"
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = make_parser("serve", __doc__)
    parser.add_argument("--checkpoint", default="tiny", help="what is served")
    parser.add_argument("--requests", type=int, default=400, help="requests of the memory's measurement")
    parser.add_argument("--clips", type=int, default=12, help="clips that are asked about")
    options = parser.parse_args(arguments)
    requests, clips = (40, 2) if options.quick else (options.requests, options.clips)
    sys.path.insert(0, str(ROOT / "src"))
    load = os.getloadavg()[0]
    cores = os.cpu_count() or 1
    remark = "others were at work" if load > 1 else f"{cores} cores, nobody else at work"
    data = {"surroundings": describe_surroundings(), "checkpoint": options.checkpoint, "load": load, "remark": remark}
    data["gflops"] = calibrate()
    data |= measure_all(options.checkpoint, requests, clips)
    text = describe(data)
    write_results(options.out, data, text)
    print(text)


if __name__ == "__main__":
    main()

"""What the benchmarks share: processor time, quartiles, a calibration, bytes kept for backward, and the results' file.

Imports torch and the standard library only, so that a bare machine can run the benchmarks that use it.
"""

import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def surroundings() -> dict[str, Any]:
    """Hardware, commit and versions."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    changed = " with changes" if git("status", "--porcelain", "src") else ""
    return {
        "cpu": f"{names[0] if names else platform.processor()} x {len(names) or os.cpu_count()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "commit": (git("rev-parse", "HEAD") or "none") + changed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
    }


def calibrate(size: int = 1024, repeats: int = 7) -> float:
    """GFLOP per processor second of a square float32 matmul, the best of all repeats: the machine's own speed now."""
    left, right = torch.ones(size, size), torch.ones(size, size)
    left @ right
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        left @ right
        times.append(time.process_time() - begin)
    return 2 * size**3 / min(times) / 1e9


def quartiles(values: list[float]) -> dict[str, float]:
    """Lower quartile, median and upper quartile; of a single value three times itself."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"low": low, "median": middle, "high": high}


def saved_bytes(forward: Callable[[], torch.Tensor], parameters: list[torch.Tensor]) -> int:
    """Bytes that autograd keeps for backward: every storage once, the parameters themselves left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The result holds the graph, and so every storage, until all are counted: none is freed and counted anew.
        loss = forward()
    total = sum(storages.values())
    del loss
    return total


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns, computed in a forked child, so that its memory is its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(write, json.dumps(work()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"a measurement of memory ended with status {status}")
    return json.loads(answer)


def peak_mib(work: Callable[[], Any]) -> float:
    """MiB by which `work`, in a process of its own, raises the peak of resident memory."""

    def grown() -> float:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

    return in_child(grown)


def run_json(script: str, arguments: list[str]) -> Any:
    """The JSON that a process of its own prints as its last line; its progress and errors go to ours.

    Raises:
        SystemExit: the process failed.
    """
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def rounded(value: Any, digits: int = 4) -> Any:
    """The same data with floats cut to so many significant digits."""
    if isinstance(value, dict):
        return {key: rounded(each, digits) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each, digits) for each in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def table(columns: list[str], rows: list[list[Any]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


def write_results(out: Path, data: dict[str, Any], text: str) -> None:
    """`out` as JSON and, beside it, the same as a readable table (.md)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rounded(data), indent=1) + "\n")
    out.with_suffix(".md").write_text(text)
    print(f"written to {out}")

"""What the benchmarks share: arguments, processor time, quartiles, a calibration, saved activations, result files.

Importing it needs the standard library only, and running it torch and transformers: a benchmark parses its arguments
before anything heavy is imported, and runs on a machine that has nothing else installed.
"""

from __future__ import annotations

import argparse
import contextlib
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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has: `--quick` and `--out`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest run that shows whether everything works")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="file of the results")
    return parser


def find_device() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def describe_surroundings() -> dict[str, Any]:
    """Hardware, commit and versions."""
    import torch
    import transformers

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
    import torch

    left, right = torch.ones(size, size), torch.ones(size, size)
    left @ right
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        left @ right
        times.append(time.process_time() - begin)
    return 2 * size**3 / min(times) / 1e9


def measure_processor_seconds(pids: list[int]) -> float:
    """Processor seconds so far of this process and of the living threads of those with the given ids."""
    nanoseconds = 0
    for pid in pids:
        for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            nanoseconds += int(file.read_text().split()[0])
    return time.process_time() + nanoseconds / 1e9


def find_descendants(pids: list[int]) -> list[int]:
    """These processes and all that they started: loading workers have decoder processes."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    found, new = [], list(pids)
    while new:
        found += new
        new = [pid for pid, parent in parents.items() if parent in new]
    return found


def compute_quartiles(values: list[float]) -> dict[str, float]:
    """Lower quartile, median and upper quartile; a single value is all three."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"low": low, "median": middle, "high": high}


def count_saved_bytes(forward: Callable[[], torch.Tensor], parameters: list[torch.Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass: every storage once, without the parameters."""
    import torch

    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The result keeps the graph alive, and so every storage, until all are counted: no address is used twice.
        loss = forward()
    total = sum(storages.values())
    del loss
    return total


def run_in_child(work: Callable[[], Any]) -> Any:
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


def measure_peak_mib(work: Callable[[], Any]) -> float:
    """MiB by which `work`, in its own process, raises the peak of resident memory."""

    def measure_growth() -> float:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

    return run_in_child(measure_growth)


def run_json(script: str, arguments: list[str]) -> Any:
    """The JSON that a script prints as its last line, run in its own process; its stderr goes to ours.

    Raises:
        SystemExit: the process failed.
    """
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def round_floats(value: Any, digits: int = 4) -> Any:
    """The same data with floats rounded to that many significant digits."""
    if isinstance(value, dict):
        return {key: round_floats(each, digits) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [round_floats(each, digits) for each in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def format_markdown_table(columns: list[str], rows: list[list[Any]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


def write_results(out: Path, data: dict[str, Any], text: str) -> None:
    """Writes `out` as JSON and, next to it, the same as a readable table (.md)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(round_floats(data), indent=1) + "\n")
    out.with_suffix(".md").write_text(text)
    print(f"written to {out}")

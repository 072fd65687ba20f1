"""What decoding in a process of its own costs: `python benchmarks/isolation.py [--real FOLDER]`.

Processor seconds to read a clip and compute its spectrogram, which is what a loading worker does for each clip of
`reading.py`: with the decoding in the decoder process, both processes together, and with it in the process that reads.
The two alternate clip by clip, so that both meet the same machine. The cost is the ratio of the sums of a block of
clips, minus one; quartiles over blocks.

`--memory CLIPS` reads so many clips of the tiny model through one decoder process instead and reports the memory of
both processes on the way. Writes benchmarks/results/isolation.json and .md, or isolation_memory.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _measure import (
    calibrate,
    compute_quartiles,
    describe_surroundings,
    find_descendants,
    format_markdown_table,
    make_parser,
    measure_processor_seconds,
    write_results,
)

GOAL = 0.05
BLOCKS = 8


def format_report(results: dict[str, Any], facts: dict[str, Any]) -> str:
    rows = [
        [name, row["pairs"], f"{1000 * row['in_process']:.1f}", f"{1000 * row['isolated']:.1f}"]
        + [f"{100 * row['cost'][part]:+.1f} %" for part in ("low", "median", "high")]
        for name, row in results.items()
    ]
    columns = [
        "clips",
        "pairs",
        "ms in the reading process",
        "ms in a decoder process",
        "lower quartile",
        "cost",
        "upper",
    ]
    return (
        f"# Decoding in a process of its own\n\n{format_markdown_table(columns, rows)}\n"
        f"Goal: a cost of at most {100 * GOAL:g} %.\n\n{json.dumps(facts)}\n"
    )


def run_here(limits: object, file: object, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """`run_isolated` without another process."""
    return function(*args, **kwargs)


def compare(root: Path, media: list[str], settings: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Processor seconds a clip, isolated and in this process, and the quartiles of the cost."""
    from mirasol.media.feature_extractor import MirasolFeatureExtractor
    from mirasol.media.isolation import decoders as isolation

    extractor = MirasolFeatureExtractor(**settings)
    run_isolated = isolation.run_isolated

    def read(file: Path, run: Callable[..., Any]) -> float:
        isolation.run_isolated = run
        begin = measure_processor_seconds(decoders)
        extractor.tensors(extractor.read(file))
        return measure_processor_seconds(decoders) - begin

    decoders: list[int] = []
    for run in (run_isolated, run_here):
        for name in media:
            read(root / name, run)
    decoders = find_descendants([os.getpid()])[1:]
    blocks = []
    for _ in range(BLOCKS):
        sums = {"isolated": 0.0, "in_process": 0.0}
        for number in range(rounds):
            kinds = [("isolated", run_isolated), ("in_process", run_here)]
            for name in media:
                for kind, run in kinds[:: 1 if number % 2 else -1]:
                    sums[kind] += read(root / name, run)
        blocks.append(sums)
        print(f"  {sums['isolated'] / sums['in_process'] - 1:+.1%}", flush=True)
    isolation.run_isolated = run_isolated
    count = len(media) * rounds
    means = {kind: sum(block[kind] for block in blocks) / BLOCKS / count for kind in ("isolated", "in_process")}
    cost = compute_quartiles([block["isolated"] / block["in_process"] - 1 for block in blocks])
    return {**means, "pairs": BLOCKS * count, "cost": cost}


def measure_memory(root: Path, media: list[str], clips: int) -> list[dict[str, float]]:
    """MiB of this process and of its decoder, after every tenth of `clips` readings."""
    from _reading_measure import TINY

    from mirasol.media.feature_extractor import MirasolFeatureExtractor

    extractor, rows = MirasolFeatureExtractor(**TINY), []
    for number in range(clips):
        extractor.read(root / media[number % len(media)])
        if (number + 1) % (clips // 10) == 0:
            here, *decoders = find_descendants([os.getpid()])
            resident = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) / 256 for pid in (here, *decoders)]
            rows.append({"clips": number + 1, "reader": resident[0], "decoder": sum(resident[1:])})
            print(rows[-1], flush=True)
    return rows


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("isolation", __doc__)
    parser.add_argument("--real", type=Path, default=os.environ.get("MIRASOL_REAL_DATA"), help="folder of real clips")
    parser.add_argument("--memory", type=int, metavar="CLIPS", help="read so many clips and report memory instead")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)

    import torch
    from _reading_measure import list_kinds, render_small_clips

    torch.set_num_threads(1)
    facts: dict[str, Any] = {"gflops_before": calibrate()}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        small = render_small_clips(root)
        if options.memory:
            rows = measure_memory(root, small, options.memory)
            facts["surroundings"] = describe_surroundings()
            text = format_markdown_table(list(rows[0]), [[f"{value:.1f}" for value in row.values()] for row in rows])
            out = options.out.with_name("isolation_memory.json")
            write_results(out, {**facts, "rows": rows}, f"# Memory, MiB\n\n{text}\n{json.dumps(facts)}\n")
            return
        results = {}
        real = None if options.quick else options.real
        for name, (where, media, settings, rounds) in list_kinds(root, small, real, options.quick).items():
            print(name, flush=True)
            results[name] = compare(where, media, settings, 1 if options.quick else max(1, rounds // 6))
    facts |= {"surroundings": describe_surroundings(), "gflops_after": calibrate()}
    write_results(options.out, {"goal": GOAL, **facts, "results": results}, format_report(results, facts))


if __name__ == "__main__":
    main()

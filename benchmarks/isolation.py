"""What decoding in processes of their own costs: `python benchmarks/isolation.py [--real FOLDER]`.

Processor seconds a clip of the loader with two workers, decoder processes included, as `reading.py` measures them, and
the same with the decoding in the workers themselves. The two alternate; the cost is the median of the ratios of pairs
that follow each other, minus one. `--memory CLIPS` reads so many clips of the tiny model through one decoder process
instead and reports the memory of both processes on the way.

Writes benchmarks/results/isolation.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _measure import (
    calibrate,
    compute_quartiles,
    describe_surroundings,
    format_markdown_table,
    make_parser,
    write_results,
)

GOAL = 0.05


def format_report(results: dict[str, Any], facts: dict[str, Any]) -> str:
    rows = [
        [name, f"{1000 * row['in_process']:.1f}", f"{1000 * row['isolated']:.1f}"]
        + [f"{100 * row['cost'][part]:+.1f} %" for part in ("low", "median", "high")]
        for name, row in results.items()
    ]
    columns = ["clips", "ms of a core in the workers", "in decoder processes", "lower quartile", "cost", "upper"]
    return (
        f"# Decoding in processes of their own\n\n{format_markdown_table(columns, rows)}\n"
        f"Goal: a cost of at most {100 * GOAL:g} %.\n\n{json.dumps(facts)}\n"
    )


def compare(root: Path, media: list[str], settings: dict[str, Any], rounds: int, repeats: int) -> dict[str, Any]:
    """Processor seconds a clip, isolated and in process, and the quartiles of the cost."""
    from _in_process import InProcessCache
    from _reading_measure import PER_STEP, WORKERS, make_batches, make_recipe, time_loader

    from mirasol.data.example import Example
    from mirasol.data.loader import StepBatches
    from mirasol.data.sampler import BatchPlan
    from mirasol.media.feature_extractor import MirasolFeatureExtractor

    clips = len(media) * rounds
    examples = [Example(f"{n}", name, None, None, "?", "!", video=f"{n}") for n, name in enumerate(media)]
    plan = BatchPlan(make_recipe(root, clips + (2 * WORKERS + 1) * PER_STEP, PER_STEP), examples)
    isolated = make_batches(root, plan, settings)
    here = StepBatches(plan, InProcessCache(None, root, settings), MirasolFeatureExtractor(**settings))
    pairs = []
    for number in range(repeats):
        kinds = [("isolated", isolated), ("in_process", here)]
        row = {name: time_loader(batches, clips // PER_STEP) / PER_STEP for name, batches in kinds[:: (-1) ** number]}
        pairs.append(row)
        print(f"  {row['isolated'] / row['in_process'] - 1:+.1%}", flush=True)
    medians = {name: statistics.median(pair[name] for pair in pairs) for name in ("isolated", "in_process")}
    return {**medians, "cost": compute_quartiles([pair["isolated"] / pair["in_process"] - 1 for pair in pairs])}


def measure_memory(root: Path, media: list[str], clips: int) -> list[dict[str, float]]:
    """MiB of this process and of its decoder, after every tenth of `clips` readings."""
    from _reading_measure import TINY, find_descendants

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
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", type=int, metavar="CLIPS", help="read so many clips and report memory instead")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.quick:
        options.repeats, options.real = 1, None

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
        for name, (where, media, settings, rounds) in list_kinds(root, small, options.real, options.quick).items():
            print(name, flush=True)
            results[name] = compare(where, media, settings, rounds, options.repeats)
    facts |= {"surroundings": describe_surroundings(), "gflops_after": calibrate()}
    write_results(options.out, {"goal": GOAL, **facts, "results": results}, format_report(results, facts))


if __name__ == "__main__":
    main()

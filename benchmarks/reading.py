"""How fast clips reach the training: `python benchmarks/reading.py [--real FOLDER] [--examples 10000000]`.

- **Throughput.** The loader with two workers that decode ahead, without a cache, and bare PyAV, in clips per processor
  second, which is clips per second and core. Ours is everything: video, audio, log-mel, the batch and its way to the
  main process, once the workers have started. Bare decodes the video and resizes exactly the frames that ours keeps;
  `with sound` also decodes and resamples the sound, as ours has to. The two alternate; figures are medians.
- **Latency.** Seconds from making the loader to its first batch: at the first step, and at a step ten million clips
  into a run on ten million examples (simulated: an index with as many rows, which name the rendered clips), in this
  process and with a worker, which has to start first. The index is opened from its files, as workers do.

Clips are rendered here (`decode.render`), or are the real ones in FOLDER (clips/ with manifest.json). Writes
benchmarks/results/reading.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _measure import calibrate, describe_surroundings, format_markdown_table, make_parser, write_results

GOAL, RESUME_GOAL = 0.9, 1.0


def format_report(results: dict[str, Any], latency: dict[str, float], facts: dict[str, Any]) -> str:
    rows = [[name, *(f"{row[key]:.3g}" for key in list(row)[2:])] for name, row in results.items()]
    columns = ["clips", "ours /s/core", "bare", "bare with sound", "ratio", "ratio with sound"]
    lines = [[name, f"{value:.4g}"] for name, value in latency.items()]
    conditions = json.dumps(facts["surroundings"])
    throughput, seconds = format_markdown_table(columns, rows), format_markdown_table(["latency", "value"], lines)
    return (
        f"# Reading clips\n\n{throughput}\nGoal: a ratio of {GOAL}.\n\n{seconds}\n"
        f"Goal: resume in under {RESUME_GOAL:g} s.\n\n{conditions}\n"
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("reading", __doc__)
    parser.add_argument("--real", type=Path, default=os.environ.get("MIRASOL_REAL_DATA"), help="folder of real clips")
    parser.add_argument("--examples", type=int, default=10_000_000, help="rows of the simulated index")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.quick:
        options.repeats, options.examples, options.real = 1, 1000, None

    import torch
    from _reading_measure import measure_latencies, measure_throughputs, render_small_clips

    torch.set_num_threads(1)
    facts: dict[str, Any] = {"gflops_before": calibrate()}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        small = render_small_clips(root)
        latency = measure_latencies(root, small, options.examples, 1 if options.quick else None)
        results = {}
        for name, row in measure_throughputs(root, small, options.real, options.repeats, options.quick):
            results[name] = row
            print(f"{name}: {row['clips_per_core_second']:.2f} clips/s/core, {row['ratio']:.2f} of bare, "
                  f"{row['ratio_with_sound']:.2f} of bare with sound (goal {GOAL})")  # fmt: skip
    facts |= {"surroundings": describe_surroundings(), "gflops_after": calibrate()}
    data = {"goal": GOAL, "resume_goal_seconds": RESUME_GOAL, **facts, "throughput": results, "latency": latency}
    write_results(options.out, data, format_report(results, latency, facts))


if __name__ == "__main__":
    main()

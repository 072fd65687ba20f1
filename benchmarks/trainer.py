"""What the trainer costs on top of its steps: `python benchmarks/trainer.py`.

The preset `tiny` trains on rendered shapes and sounds, decoded in advance, with one loading process. Three figures:

- data wait: the share of a step's time spent waiting for its clips
- overhead: processor seconds of the main thread for a step of the trainer, compared with a bare loop (forward,
  backward, clipping, a fused AdamW update) over the same model and the same tensors; the two alternate, pair by pair
- saving: by how much the wall time of the steps at an asynchronous save exceeds that of the others

Writes benchmarks/results/trainer.json and .md.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _measure import (
    calibrate,
    compute_quartiles,
    describe_surroundings,
    format_markdown_table,
    make_parser,
    write_results,
)

if TYPE_CHECKING:
    from mirasol.config.recipe import Recipe

GOALS = {"data_wait": 0.03, "overhead": 0.03, "saving": 0.05}
WARM_UP = 5


def make_recipe(data: Path, output: Path, steps: int, save_every: int, clips: int, workers: int) -> Recipe:
    """A run of steps and saves only, with a line of metrics every ten steps."""
    from mirasol.config.recipe_io import recipe_from_dict

    return recipe_from_dict({
        "seed": 0, "output": str(output), "data": {"root": str(data), "cache": str(data.parent / "cache")},
        "stages": {"questions": {"steps": steps, "clips_per_step": clips, "questions_per_clip": 12}},
        "device": "cpu", "threads": 1, "workers": workers, "log_every": 10, "samples": 0, "validation_clips": 1,
        "validate_every": 10**6, "checkpoint_every": save_every,
    })  # fmt: skip


def train_and_time(recipe: Recipe) -> dict[str, Any]:
    """Trains; returns each step's wall time and main-thread processor time, and the share of time spent waiting."""
    from mirasol.console import make_console
    from mirasol.training import trainer
    from mirasol.training.logging import read_metrics

    wall: list[float] = []
    thread: list[float] = []
    after_step = trainer.after_step

    def timed(run: Any, done: int, *arguments: Any) -> None:
        if done < recipe.total_steps:  # the last step validates
            after_step(run, done, *arguments)
            wall.append(time.perf_counter())
            thread.append(time.thread_time())
        else:
            after_step(run, done, *arguments)

    trainer.after_step = timed
    try:
        trainer.train(recipe, console=make_console())
    finally:
        trainer.after_step = after_step
    lines = [line for line in read_metrics(Path(recipe.output) / "metrics.jsonl") if line["kind"] == "train"]
    waits = [line["data_wait"] for line in lines if line["step"] > 10]
    return {"wall": _differences(wall), "thread": _differences(thread), "data_wait": statistics.median(waits)}


def _differences(ends: list[float]) -> list[float]:
    return [end - begin for begin, end in itertools.pairwise(ends)]


def time_bare_loop(recipe: Recipe) -> list[float]:
    """Processor seconds of each step of a loop that only trains, over the trainer's model and tensors."""
    import torch

    from mirasol import MirasolForConditionalGeneration, MirasolProcessor
    from mirasol.data.clip_cache import ClipCache
    from mirasol.data.loader import StepBatches
    from mirasol.data.sampler import BatchPlan
    from mirasol.data.splits import read_data

    checkpoint = Path(recipe.output) / "checkpoint"
    model = MirasolForConditionalGeneration.from_pretrained(checkpoint).train()
    processor = MirasolProcessor.from_pretrained(checkpoint)
    examples, _ = read_data(recipe.data, "train")
    settings = model.config.media_settings()
    cache = ClipCache(Path(recipe.data.cache), Path(recipe.data.root), settings)
    steps = StepBatches(BatchPlan(recipe, examples), cache, processor.feature_extractor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    seconds = []
    for step in range(recipe.total_steps):
        batch, media = steps[step]
        tensors = {**media, **processor.encode_text(batch.prompts, batch.targets)}
        began = time.thread_time()
        optimizer.zero_grad(set_to_none=True)
        model(**tensors).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.thread_time() - began)
    return seconds


def compare_saving_steps(seconds: list[float], save_every: int) -> dict[str, float]:
    """Wall seconds of the steps that a save affects, the one before and the one after it, over those of all others."""
    saves, others = [], []
    for place, each in enumerate(seconds):
        done = place + 2  # `seconds[0]` is the second step
        if place < WARM_UP:
            continue
        (saves if done % save_every in (0, 1) else others).append(each)
    usual = statistics.median(others)
    return {
        "usual_seconds": usual,
        "at_a_save_seconds": statistics.median(saves),
        "cost": statistics.median(saves) / usual - 1,
    }


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All figures."""
    import torch

    from mirasol.synthetic.synthesize import synthesize

    torch.set_num_threads(1)
    data = work / "data"
    synthesize(data, seed=0, train=options.clips * 8, validation=4, test=1)
    pairs = []
    for number in range(options.pairs + 1):
        recipe = make_recipe(data, work / f"run{number}", options.steps, 10**6, options.clips, options.workers)
        ours = train_and_time(recipe)
        bare = time_bare_loop(recipe)
        if number:  # the first decodes and warms up
            ours_seconds, bare_seconds = (statistics.median(each[WARM_UP:]) for each in (ours["thread"], bare))
            pairs.append({"trainer": ours_seconds, "bare": bare_seconds, "ratio": ours_seconds / bare_seconds,
                          "data_wait": ours["data_wait"]})  # fmt: skip
    recipe = make_recipe(data, work / "saves", options.steps, options.save_every, options.clips, options.workers)
    saves = compare_saving_steps(train_and_time(recipe)["wall"], options.save_every)
    figures = {
        "data_wait": statistics.median(pair["data_wait"] for pair in pairs),
        "overhead": statistics.median(pair["ratio"] for pair in pairs) - 1,
        "saving": saves["cost"],
    }
    return {
        "figures": figures,
        "goals": GOALS,
        "pairs": pairs,
        "ratio": compute_quartiles([p["ratio"] for p in pairs]),
        "saves": saves,
    }


def format_report(data: dict[str, Any]) -> str:
    around, settings = data["surroundings"], data["settings"]
    text = f"# The trainer on top of its steps\n\n{around['cpu']}, one thread, torch {around['torch']}, commit "
    text += f"{around['commit']}, {around['date']}; `tiny`, {settings['clips']} clips a step, {settings['workers']} "
    text += f"loading process(es), {settings['steps']} steps a run, {settings['pairs']} pairs, a save every "
    text += f"{settings['save_every']} steps. A matrix product ran at {data['calibration'][0]:.0f} GFLOP/s before and "
    text += f"{data['calibration'][1]:.0f} after.\n\n"
    names = {"data_wait": "share of time waiting for data", "overhead": "trainer over a bare loop, processor time",
             "saving": "a step at an asynchronous save, wall time"}  # fmt: skip
    rows = [[names[name], f"< {data['goals'][name]:.0%}", f"{value:+.1%}"] for name, value in data["figures"].items()]
    return text + format_markdown_table(["", "goal", "measured"], rows)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("trainer", __doc__)
    parser.add_argument("--steps", type=int, default=60, help="steps of each run")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of a run and a bare loop, after one that warms up")
    parser.add_argument("--clips", type=int, default=16, help="clips of a step")
    parser.add_argument("--workers", type=int, default=1, help="loading processes")
    parser.add_argument("--save-every", type=int, default=10, help="steps between saves")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.quick:
        options.steps, options.pairs, options.clips, options.save_every = 12, 1, 2, 4
    before = calibrate()
    with tempfile.TemporaryDirectory(prefix="mirasol-trainer-") as work:
        found = measure(options, Path(work))
    settings = {name: getattr(options, name) for name in ("steps", "pairs", "clips", "workers", "save_every")}
    data = {"surroundings": describe_surroundings() | {"threads": 1}, "settings": settings,
            "calibration": [before, calibrate()], **found}  # fmt: skip
    print({name: f"{value:+.1%}" for name, value in data["figures"].items()})
    write_results(options.out, data, format_report(data))


if __name__ == "__main__":
    sys.exit(main())

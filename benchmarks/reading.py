"""How fast clips reach the training: `python benchmarks/reading.py [--real FOLDER] [--examples 10000000]`.

- **Throughput.** The loader with two workers that decode ahead, without a cache, against bare PyAV, in clips per
  processor second, which is clips per second and core. Ours is all of it: video, audio, log-mel, the batch and its way
  to the main process, once the workers have started. Bare decodes the video and resizes the very frames ours keeps;
  `with sound` also decodes the sound and resamples it, as ours has to. In turn, so that both meet the same machine;
  medians.
- **Latency.** Seconds from the loader's making to its first batch: at the first step, and at a step ten million clips
  into a run on ten million examples (simulated: an index of as many rows that name the rendered clips), in this process
  and with a worker, which first has to start. The index is opened from its files, as workers do.

Clips are rendered here (`decode.render`), or are the real ones below FOLDER (clips/ with manifest.json). Writes
benchmarks/results/reading.json and .md.
"""

import argparse
import json
import multiprocessing
import os
import pickle
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from _measure import calibrate, surroundings, table, write_results
from decode import LARGE_MODEL, bare, render
from torch.utils.data import DataLoader

from mirasol.config.model import MirasolConfig
from mirasol.config.recipe import Recipe
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.data.clip_cache import ClipCache
from mirasol.data.example import Example
from mirasol.data.example_table import Arrays, ExampleTable
from mirasol.data.loader import StepBatches, make_loader
from mirasol.data.sampler import BatchPlan
from mirasol.data.transport import give_back
from mirasol.errors import BadClip
from mirasol.media.feature_extractor import MirasolFeatureExtractor

GOAL, RESUME_GOAL = 0.9, 1.0
WORKERS, PER_STEP = 2, 4
# name: width, height, frames per second, seconds of the rendered clips; settings that differ from the large model's
RENDERED = {
    "640x360, 25 fps, 20 s; 128 frames of 224": ((640, 360, 25, 20), {"image_size": 224}),
    "1280x720, 30 fps, 10 s; 128 frames of 224": ((1280, 720, 30, 10), {"image_size": 224}),
}
TINY = MirasolConfig.preset("tiny").media_settings()


def make_recipe(root: Path, clips: int, per_step: int) -> Recipe:
    """A recipe that walks through `clips` clips of `root`, decoded ahead."""
    return recipe_from_dict(
        {
            "seed": 0,
            "output": str(root / "run"),
            "data": {"root": str(root), "decode": "ahead"},
            "stages": {"all": {"steps": clips // per_step, "clips_per_step": per_step, "questions_per_clip": 1}},
        }
    )


def batches_of(root: Path, plan: BatchPlan, settings: dict[str, Any]) -> StepBatches:
    return StepBatches(plan, ClipCache(None, root, settings), MirasolFeatureExtractor(**settings))


def processor_seconds(pids: list[int]) -> float:
    """Of this process and of these."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def through_loader(batches: StepBatches, steps: int) -> float:
    """Processor seconds a batch, over `steps` batches that come when workers have started and filled their queues.

    (The items as they reach this process: what makes pixels numbers runs where the model does, often on a GPU. Then
    their memory goes back to the workers.)
    """
    ahead = 2 * WORKERS + 1
    items = DataLoader.__iter__(make_loader(batches, range(ahead + steps), WORKERS, prefetch=2))
    give_back(*next(items)[1:])
    pids = [child.pid for child in multiprocessing.active_children()]
    before, now = 0.0, processor_seconds(pids)
    while now - before > 0.03:
        time.sleep(1.5)
        before, now = now, processor_seconds(pids)
    for _ in range(ahead + steps - 1):
        give_back(*next(items)[1:])
    return (processor_seconds(pids) - now) / steps


def bare_sound(path: Path, rate: int) -> int:
    """Decodes the sound, mono at `rate` Hz; returns the samples."""
    count, resampler = 0, av.AudioResampler("fltp", "mono", rate)
    with av.open(str(path)) as container:
        stream = container.streams.best("audio")  # as ours: a file may hold several
        if stream is None:
            return 0
        for frame in container.decode(stream):
            count += sum(part.samples for part in resampler.resample(frame))
    return count


def throughput(root: Path, media: list[str], settings: dict[str, Any], rounds: int, repeats: int) -> dict[str, Any]:
    """Clips per processor second of the loader and of bare PyAV, over each of `media` `rounds` times."""
    extractor = MirasolFeatureExtractor(**settings)
    kept = {}
    for name in media:
        kept[name] = {round(float(t), 6) for t in extractor.read(root / name).frame_times.unique()}
    clips = len(media) * rounds
    assert clips % PER_STEP == 0
    # Each clip as many times as every other: as many examples as clips, and one epoch of them.
    examples = [Example(f"{n}", media[n % len(media)], None, None, "?", "!", video=f"{n}") for n in range(len(media))]
    plan = BatchPlan(make_recipe(root, clips + (2 * WORKERS + 1) * PER_STEP, PER_STEP), examples)
    batches = batches_of(root, plan, settings)
    seconds: dict[str, list[float]] = {"ours": [], "bare": [], "bare with sound": []}
    for _ in range(repeats):
        seconds["ours"].append(through_loader(batches, clips // PER_STEP) / PER_STEP)
        begin = time.process_time()
        for name in media:
            count = bare(root / name, kept[name], extractor.image_size)
            assert count == len(kept[name]), f"{name}: bare resized {count} of {len(kept[name])} frames"
        video = (time.process_time() - begin) / len(media)
        begin = time.process_time()
        for name in media:
            bare_sound(root / name, extractor.sample_rate)
        seconds["bare"].append(video)
        seconds["bare with sound"].append(video + (time.process_time() - begin) / len(media))
    ours, video, both = (statistics.median(seconds[name]) for name in ("ours", "bare", "bare with sound"))
    return {
        "files": len(media),
        "frames_kept": round(statistics.mean(map(len, kept.values())), 1),
        "clips_per_core_second": 1 / ours,
        "bare_clips_per_core_second": 1 / video,
        "bare_with_sound_clips_per_core_second": 1 / both,
        "ratio": video / ours,
        "ratio_with_sound": both / ours,
    }


def simulated(examples: list[Example], count: int) -> ExampleTable:
    """`examples` again and again, as `count` examples of as many clips."""
    one = ExampleTable.of(examples)
    rounds = -(-count // len(one))
    arrays = {name: np.tile(array, rounds) for name, array in one.arrays.items()}
    lengths = np.diff(one.arrays["ends"], prepend=0)
    arrays["ends"] = np.cumsum(np.tile(lengths, rounds))
    arrays["clip"] = np.arange(rounds * len(one), dtype=np.int32)
    return ExampleTable(Arrays(arrays), one.types, ())


def latencies(root: Path, media: list[str], count: int) -> dict[str, float]:
    """Seconds to the first batch of 16 clips of the tiny model, at the start and `count` clips into the run."""
    index = simulated([Example(name, name, None, None, "what?", "this") for name in media], count)
    begin = time.perf_counter()
    plan = BatchPlan(make_recipe(root, count + 16 * 100, 16), index)
    result = {"examples": len(index), "index_bytes_per_example": index.nbytes / len(index)}
    result["plan_seconds"] = time.perf_counter() - begin
    handle = pickle.dumps(plan.stored(root / "index"))
    del plan, index
    result["handle_bytes"] = len(handle)
    for name, sample in (("first", 0), ("resume", count)):
        for workers in (0, 1):
            times = []
            for _ in range(5 if workers == 0 else 3):
                begin = time.perf_counter()
                batches = batches_of(root, pickle.loads(handle), TINY)
                step = sample // 16
                next(iter(make_loader(batches, range(step, step + 1), workers, prefetch=2)))
                times.append(time.perf_counter() - begin)
            result[f"{name}_batch_seconds_workers_{workers}"] = statistics.median(times)
    return result


def usable(root: Path, settings: dict[str, Any]) -> list[str]:
    """The real clips that the extractor takes and that show a picture."""
    extractor, names = MirasolFeatureExtractor(**settings), []
    for path in sorted((root / "clips").iterdir()):
        if path.suffix in (".mp4", ".webm", ".mkv"):
            try:
                clip = extractor.read(path)
            except BadClip:
                continue
            if clip.has_video and clip.timeline.end < 120:
                names.append(f"clips/{path.name}")
    return names[: len(names) // PER_STEP * PER_STEP]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, default=os.environ.get("MIRASOL_REAL_DATA"), help="folder of real clips")
    parser.add_argument("--examples", type=int, default=10_000_000, help="rows of the simulated index")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "reading.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts: dict[str, Any] = {"gflops_before": calibrate()}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        small = [f"small-{number}.mp4" for number in range(4)]
        for medium in small:
            render(root / medium, 160, 120, 15, 5)
        latency = latencies(root, small, arguments.examples)
        results = throughputs(root, small, arguments.real, arguments.repeats)
    facts |= {"surroundings": surroundings(), "gflops_after": calibrate()}
    write_results(
        arguments.out,
        {"goal": GOAL, "resume_goal_seconds": RESUME_GOAL, **facts, "throughput": results, "latency": latency},
        as_text(results, latency, facts),
    )


def throughputs(root: Path, small: list[str], real: Path | None, repeats: int) -> dict[str, Any]:
    """`throughput` of all kinds of clips, by name; those that have to be are rendered into `root`."""
    kinds: dict[str, tuple[Path, list[str], dict[str, Any], int]] = {}
    for name, (shape, settings) in RENDERED.items():
        media = [f"{shape[1]}-{number}.mp4" for number in range(2)]
        for medium in media:
            render(root / medium, *shape)
        kinds[name] = (root, media, {**LARGE_MODEL, **settings}, 12)
    kinds["160x120, 15 fps, 5 s; tiny"] = (root, small, TINY, 60)
    if real:
        settings = {**LARGE_MODEL, "image_size": 224}
        media = usable(real, settings)
        kinds[f"{len(media)} real clips; 128 frames of 224"] = (real, media, settings, 2)
    results = {}
    for name, (folder, media, settings, rounds) in kinds.items():
        results[name] = throughput(folder, media, settings, rounds, repeats)
        report(name, results[name])
    return results


def report(name: str, row: dict[str, Any]) -> None:
    print(f"{name}: {row['clips_per_core_second']:.2f} clips/s/core, {row['ratio']:.2f} of bare, "
          f"{row['ratio_with_sound']:.2f} of bare with sound (goal {GOAL})")  # fmt: skip


def as_text(results: dict[str, Any], latency: dict[str, float], facts: dict[str, Any]) -> str:
    rows = [[name, *(f"{row[key]:.3g}" for key in list(row)[2:])] for name, row in results.items()]
    columns = ["clips", "ours /s/core", "bare", "bare with sound", "ratio", "ratio with sound"]
    lines = [[name, f"{value:.4g}"] for name, value in latency.items()]
    conditions = json.dumps(facts["surroundings"])
    return (
        f"# Reading clips\n\n{table(columns, rows)}\nGoal: a ratio of {GOAL}.\n\n{table(['latency', 'value'], lines)}\n"
        f"Goal: resume in under {RESUME_GOAL:g} s.\n\n{conditions}\n"
    )


if __name__ == "__main__":
    main()

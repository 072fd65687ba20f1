"""How fast the loader delivers clips, and bare PyAV on the same files; `reading.py` says what is measured."""

import multiprocessing
import pickle
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from _measure import find_descendants, measure_processor_seconds
from decode import LARGE_MODEL, decode_bare, render
from torch.utils.data import DataLoader

from mirasol.config.model import MirasolConfig
from mirasol.config.recipe import Recipe
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.data.clip_cache import ClipCache
from mirasol.data.example import Example
from mirasol.data.example_table import Arrays, ExampleTable
from mirasol.data.frame_memory import release_frames
from mirasol.data.loader import StepBatches, make_loader
from mirasol.data.sampler import BatchPlan
from mirasol.errors import BadClip
from mirasol.media.feature_extractor import MirasolFeatureExtractor

WORKERS, PER_STEP = 2, 4
# name: width, height, frames per second and seconds of the rendered clips; settings other than the large model's
RENDERED = {
    "640x360, 25 fps, 20 s; 128 frames of 224": ((640, 360, 25, 20), {"image_size": 224}),
    "1280x720, 30 fps, 10 s; 128 frames of 224": ((1280, 720, 30, 10), {"image_size": 224}),
}
TINY = MirasolConfig.preset("tiny").media_settings()


def make_recipe(root: Path, clips: int, per_step: int) -> Recipe:
    """A recipe that goes through `clips` clips of `root`, decoded ahead."""
    stage = {"steps": clips // per_step, "clips_per_step": per_step, "questions_per_clip": 1}
    data = {"root": str(root), "decode": "ahead"}
    return recipe_from_dict({"seed": 0, "output": str(root / "run"), "data": data, "stages": {"all": stage}})


def make_batches(root: Path, plan: BatchPlan, settings: dict[str, Any]) -> StepBatches:
    return StepBatches(plan, ClipCache(None, root, settings), MirasolFeatureExtractor(**settings))


def time_loader(batches: StepBatches, steps: int) -> float:
    """Processor seconds a batch, over `steps` batches, after the workers have started and filled their queues.

    Batches count as they reach this process: pixels become floats where the model runs, often on a GPU. Their memory
    then goes back to the workers.
    """
    ahead = 2 * WORKERS + 1
    items = DataLoader.__iter__(make_loader(batches, range(ahead + steps), WORKERS, prefetch=2))
    release_frames(next(items)[1]["video"])
    pids = find_descendants([child.pid for child in multiprocessing.active_children()])
    before, now = 0.0, measure_processor_seconds(pids)
    while now - before > 0.03:
        time.sleep(1.5)
        before, now = now, measure_processor_seconds(pids)
    for _ in range(ahead + steps - 1):
        release_frames(next(items)[1]["video"])
    return (measure_processor_seconds(pids) - now) / steps


def decode_bare_sound(path: Path, rate: int) -> int:
    """Decodes the sound, mono at `rate` Hz; returns the number of samples."""
    count, resampler = 0, av.AudioResampler("fltp", "mono", rate)
    with av.open(str(path)) as container:
        stream = container.streams.best("audio")  # like ours: a file may have several streams
        if stream is None:
            return 0
        for frame in container.decode(stream):
            count += sum(part.samples for part in resampler.resample(frame))
    return count


def measure_throughput(
    root: Path, media: list[str], settings: dict[str, Any], rounds: int, repeats: int
) -> dict[str, Any]:
    """Clips per processor second of the loader and of bare PyAV, over each of `media` `rounds` times."""
    extractor = MirasolFeatureExtractor(**settings)
    kept = {}
    for name in media:
        kept[name] = {round(float(t), 6) for t in extractor.read(root / name).frame_times.unique()}
    clips = len(media) * rounds
    assert clips % PER_STEP == 0
    # As many examples as clips, so that every clip is drawn equally often.
    examples = [Example(f"{n}", media[n % len(media)], None, None, "?", "!", video=f"{n}") for n in range(len(media))]
    plan = BatchPlan(make_recipe(root, clips + (2 * WORKERS + 1) * PER_STEP, PER_STEP), examples)
    batches = make_batches(root, plan, settings)
    seconds: dict[str, list[float]] = {"ours": [], "bare": [], "bare with sound": []}
    for _ in range(repeats):
        seconds["ours"].append(time_loader(batches, clips // PER_STEP) / PER_STEP)
        begin = time.process_time()
        for name in media:
            count = decode_bare(root / name, kept[name], extractor.image_size)
            assert count == len(kept[name]), f"{name}: bare resized {count} of {len(kept[name])} frames"
        video = (time.process_time() - begin) / len(media)
        begin = time.process_time()
        for name in media:
            decode_bare_sound(root / name, extractor.sample_rate)
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


def repeat_examples(examples: list[Example], count: int) -> ExampleTable:
    """`examples` repeated to `count` examples, each of its own clip."""
    one = ExampleTable.of(examples)
    rounds = -(-count // len(one))
    arrays = {name: np.tile(array, rounds) for name, array in one.arrays.items()}
    lengths = np.diff(one.arrays["ends"], prepend=0)
    arrays["ends"] = np.cumsum(np.tile(lengths, rounds))
    arrays["clip"] = np.arange(rounds * len(one), dtype=np.int32)
    return ExampleTable(Arrays(arrays), one.types, ())


def measure_latencies(root: Path, media: list[str], count: int, repeats: int | None = None) -> dict[str, float]:
    """Seconds to the first batch of 16 clips of the tiny model, at the start and `count` clips into the run.

    Medians of `repeats`, by default of 5 without a worker and of 3 with one.
    """
    index = repeat_examples([Example(name, name, None, None, "what?", "this") for name in media], count)
    begin = time.perf_counter()
    plan = BatchPlan(make_recipe(root, count + 16 * 100, 16), index)
    result = {"examples": len(index), "index_bytes_per_example": index.nbytes / len(index)}
    result["plan_seconds"] = time.perf_counter() - begin
    handle = pickle.dumps(plan.store(root / "index"))
    del plan, index
    result["handle_bytes"] = len(handle)
    for name, sample in (("first", 0), ("resume", count)):
        for workers in (0, 1):
            times = []
            for _ in range(repeats or (5 if workers == 0 else 3)):
                begin = time.perf_counter()
                batches = make_batches(root, pickle.loads(handle), TINY)
                step = sample // 16
                next(iter(make_loader(batches, range(step, step + 1), workers, prefetch=2)))
                times.append(time.perf_counter() - begin)
            result[f"{name}_batch_seconds_workers_{workers}"] = statistics.median(times)
    return result


def find_usable_clips(root: Path, settings: dict[str, Any]) -> list[str]:
    """The real clips that the extractor accepts and that have video."""
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


def render_small_clips(root: Path) -> list[str]:
    """Renders four clips for the tiny model; returns their names."""
    names = [f"small-{number}.mp4" for number in range(4)]
    for name in names:
        render(root / name, 160, 120, 15, 5)
    return names


def list_kinds(
    root: Path, small: list[str], real: Path | None, quick: bool = False
) -> dict[str, tuple[Path, list[str], dict[str, Any], int]]:
    """Folder, media, settings and rounds of each kind of clips: large ones rendered into `root`, small ones, real ones.

    quick: only the small ones
    """
    kinds: dict[str, tuple[Path, list[str], dict[str, Any], int]] = {}
    for name, (shape, settings) in ({} if quick else RENDERED).items():
        media = [f"{shape[1]}-{number}.mp4" for number in range(2)]
        for medium in media:
            render(root / medium, *shape)
        kinds[name] = (root, media, {**LARGE_MODEL, **settings}, 12)
    kinds["160x120, 15 fps, 5 s; tiny"] = (root, small, TINY, 2 if quick else 60)
    if real:
        settings = {**LARGE_MODEL, "image_size": 224}
        media = find_usable_clips(real, settings)
        kinds[f"{len(media)} real clips; 128 frames of 224"] = (real, media, settings, 2)
    return kinds


def measure_throughputs(
    root: Path, small: list[str], real: Path | None, repeats: int, quick: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the throughput of each of `list_kinds`."""
    for name, (folder, media, settings, rounds) in list_kinds(root, small, real, quick).items():
        yield name, measure_throughput(folder, media, settings, rounds, repeats)

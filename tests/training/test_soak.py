"""Hours of reading in minutes: 20,000 clips decoded ahead, and the memory of the loader and its workers stays flat."""

import json
import multiprocessing
import statistics
import sys
from pathlib import Path

import pytest

from mirasol.config.model import MirasolConfig
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.data.clip_cache import ClipCache
from mirasol.data.example import Example
from mirasol.data.loader import StepBatches, make_loader
from mirasol.data.sampler import BatchPlan
from mirasol.media.feature_extractor import MirasolFeatureExtractor

CLIPS, CLIPS_PER_STEP, WORKERS = 20_000, 20, 2
SAMPLES_EVERY = 25  # steps


def own_mebibytes(pid: int | str) -> float:
    """Memory that is the process's alone: what it shares (library code, mapped files) cannot leak."""
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith(("Private_Dirty", "Private_Clean"))) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_flat_over_20000_clips(data_root, examples, tmp_path):
    media = list(dict.fromkeys(example.media for example in examples))
    # As many different examples as clips, so that whatever is remembered for each of them would show.
    many = [Example(f"{n}", media[n % len(media)], n * 1e-9, 2.0 + n * 1e-9, "what?", "this") for n in range(CLIPS)]
    recipe = recipe_from_dict(
        {
            "seed": 0,
            "output": str(tmp_path / "run"),
            "data": {"root": str(data_root), "decode": "ahead"},
            "stages": {
                "all": {
                    "steps": CLIPS // CLIPS_PER_STEP,
                    "clips_per_step": CLIPS_PER_STEP,
                    "questions_per_clip": 1,
                    "span": "segment",
                }
            },
        }
    )
    settings = MirasolConfig.preset("tiny").media_settings()
    plan = BatchPlan(recipe, many).store(tmp_path / "examples")
    batches = StepBatches(plan, ClipCache(None, data_root, settings), MirasolFeatureExtractor(**settings))
    curves: dict[str, list[float]] = {}
    workers: list[int] = []
    for done, (batch, tensors) in enumerate(make_loader(batches, range(recipe.total_steps), WORKERS, prefetch=2), 1):
        assert tensors["video_mask"].any(dim=1).all(), batch.step
        workers = workers or sorted(child.pid for child in multiprocessing.active_children())
        if done % SAMPLES_EVERY == 0:
            for name, pid in {"main": "self", **{f"worker {n}": pid for n, pid in enumerate(workers)}}.items():
                curves.setdefault(name, []).append(own_mebibytes(pid))
    (tmp_path / "mebibytes.json").write_text(json.dumps(curves))  # kept by pytest for a while, to look at
    assert len(curves) == WORKERS + 1
    for name, curve in curves.items():
        quarter = len(curve) // 4
        # The first quarter fills pools and caches of the libraries.
        early, late = statistics.median(curve[quarter : 2 * quarter]), statistics.median(curve[-quarter:])
        assert late < early + 4, f"{name} grew from {early:.1f} to {late:.1f} MiB"

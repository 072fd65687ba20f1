"""How a run is watched: its speed, losses that are not finite, and features that collapse."""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from mirasol import MirasolOutput
from mirasol.config.recipe import Recipe
from mirasol.data.sampler import Batch
from mirasol.errors import UserError

# Ids named in the message; the run's folder lists all samples.
NAMED_SAMPLES = 8


class Clock:
    """Seconds of training, and since the last lap: clips per second, the share of time spent waiting for data, and the
    number of bad clips that were replaced.

    Validation and checkpoints count towards the seconds, not towards the rates.
    """

    def __init__(self, seconds_before: float):
        self.before, self.began = seconds_before, time.monotonic()
        self.lap_began, self.clips, self.replaced, self.waited, self.pause = self.began, 0, 0, 0.0, 0.0

    def seconds(self) -> float:
        """Training time in all, with the earlier parts of a resumed run."""
        return self.before + time.monotonic() - self.began

    def count_clips(self, clips: int) -> None:
        """Adds clips that a step trained on."""
        self.clips += clips

    def count_replaced(self, clips: int) -> None:
        """Adds bad clips that were replaced."""
        self.replaced += clips

    @contextlib.contextmanager
    def count_waiting(self) -> Iterator[None]:
        """Counts the time in this context as waiting for data."""
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    @contextlib.contextmanager
    def exclude_time(self) -> Iterator[None]:
        """Leaves the time in this context out of the rates."""
        began = time.monotonic()
        yield
        self.pause += time.monotonic() - began

    def start_lap(self) -> dict[str, float]:
        """The numbers since the last lap; starts a new one."""
        elapsed = max(time.monotonic() - self.lap_began - self.pause, 1e-9)
        numbers = {
            "clips_per_second": self.clips / elapsed,
            "data_wait": self.waited / elapsed,
            "replaced_clips": self.replaced,
            "seconds": self.seconds(),
        }
        self.lap_began, self.clips, self.replaced, self.waited, self.pause = time.monotonic(), 0, 0, 0.0, 0.0
        return numbers


class NonFiniteLoss(UserError):
    """A loss or gradient norm is NaN or infinite: the run stopped before it reached the weights.

    facts: the step (from 1), its values as text (JSON has no NaN), and its samples as plain data
    """

    def __init__(self, name: str, batch: Batch, values: Mapping[str, object]):
        samples = list(_list_samples(batch))
        ids = list(dict.fromkeys(str(sample["id"]) for sample in samples))
        more = f" and {len(ids) - NAMED_SAMPLES} more" if len(ids) > NAMED_SAMPLES else ""
        super().__init__(
            f"step {batch.step + 1}: {name}={values[name]}, stopped before the optimizer step; "
            f"samples: {', '.join(ids[:NAMED_SAMPLES])}{more}, listed in bad_step.json"
        )
        as_text = {key: str(value) for key, value in values.items()}
        self.facts = {"step": batch.step + 1, "values": as_text, "samples": samples}


def _list_samples(batch: Batch) -> Iterator[dict[str, object]]:
    for clip, row in zip(batch.clips, batch.examples, strict=True):
        for example in row:
            yield {"id": example.id, "media": clip.media, "start": clip.start, "end": clip.end,
                   "prompt": example.prompt, "target": example.target}  # fmt: skip


def check_finite(global_batch: Callable[[], Batch], values: Mapping[str, object]) -> None:
    """Raises NonFiniteLoss if one of a step's values is not finite. `global_batch` gives the rows of all processes."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise NonFiniteLoss(name, global_batch(), values)


@torch.no_grad()
def feature_spread(output: MirasolOutput, chunk_mask: Bool[Tensor, "clip chunk"]) -> dict[str, float]:
    """How different the features x of different clips are, so that a collapse shows: the mean cosine between pooled x
    of different clips (1 if they collapsed) and their standard deviation over clips (0 if they collapsed)."""
    mask = chunk_mask[:, :, None].to(torch.float32)
    per_chunk = output.combined.float().mean(dim=2)
    pooled: Float[Tensor, "clip width"] = (per_chunk * mask).sum(1) / mask.sum(1)
    if len(pooled) < 2:
        return {"x_cosine": 1.0, "x_std": 0.0}
    cosines = F.normalize(pooled, dim=-1) @ F.normalize(pooled, dim=-1).T
    count = len(pooled)
    between = (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))
    return {"x_cosine": float(between), "x_std": float(pooled.std(dim=0).mean())}


def describe_rows(recipe: Recipe, stage: str, rows: Batch) -> dict[str, float]:
    """Clips of each data set of a mixture in a step, and in a stage of epochs which it is and the rows that do not
    count."""
    counts = Counter(rows.data_sets)
    values: dict[str, float] = {f"clips_of_{name}": counts[name] for name in recipe.data.mixture or ()}
    if recipe.stages[stage].epochs is not None:
        values |= {"epoch": rows.epochs[0] + 1, "uncounted_rows": len(rows.uncounted_rows)}
    return values

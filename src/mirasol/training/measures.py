"""What a step is watched by: losses that are no numbers, and how far clips lie apart in x."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from mirasol import MirasolOutput
from mirasol.data.sampler import Batch
from mirasol.errors import UserError

# Ids named in the message; all of them are written to the run's folder.
NAMED_SAMPLES = 8


class NonFiniteLoss(UserError):
    """A loss or gradient norm that is no number: the run stopped before it reached the weights.

    facts: the step (counted from 1), its values, and its samples as plain data
    """

    def __init__(self, name: str, batch: Batch, values: Mapping[str, Any]):
        samples = list(_samples(batch))
        ids = list(dict.fromkeys(sample["id"] for sample in samples))
        more = f" and {len(ids) - NAMED_SAMPLES} more" if len(ids) > NAMED_SAMPLES else ""
        super().__init__(
            f"step {batch.step + 1}: {name}={values[name]}, stopped before the optimizer step; "
            f"samples: {', '.join(ids[:NAMED_SAMPLES])}{more}, listed in bad_step.json"
        )
        # As text, since JSON has no word for what is no number.
        told = {key: str(value) for key, value in values.items()}
        self.facts = {"step": batch.step + 1, "values": told, "samples": samples}


def _samples(batch: Batch) -> Iterator[dict[str, Any]]:
    for clip, row in zip(batch.clips, batch.examples, strict=True):
        for example in row:
            yield {"id": example.id, "media": clip.media, "start": clip.start, "end": clip.end,
                   "prompt": example.prompt, "target": example.target}  # fmt: skip


def check_finite(whole: Callable[[], Batch], values: Mapping[str, Any]) -> None:
    """Raises NonFiniteLoss where one of the step's values is not finite. `whole` gives the batch of all processes."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise NonFiniteLoss(name, whole(), values)


@torch.no_grad()
def spread(output: MirasolOutput, chunk_mask: Bool[Tensor, "clip chunk"]) -> dict[str, float]:
    """How far clips lie apart in x, to notice features that are the same for all: the mean cosine between pooled x of
    different clips (1: they collapsed), and the standard deviation over clips (0: they collapsed)."""
    mask = chunk_mask[:, :, None].to(torch.float32)
    per_chunk = output.combined.float().mean(dim=2)
    pooled: Float[Tensor, "clip width"] = (per_chunk * mask).sum(1) / mask.sum(1)
    if len(pooled) < 2:
        return {"x_cosine": 1.0, "x_std": 0.0}
    cosines = F.normalize(pooled, dim=-1) @ F.normalize(pooled, dim=-1).T
    count = len(pooled)
    between = (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))
    return {"x_cosine": float(between), "x_std": float(pooled.std(dim=0).mean())}

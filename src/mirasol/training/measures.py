"""What a step is watched by: losses that are no numbers, and how far clips lie apart in x."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from mirasol import MirasolOutput
from mirasol.errors import UserError
from mirasol.training.batches import Batch


class NonFiniteLoss(UserError):
    """A loss or gradient norm that is no number: the run stopped before it reached the weights."""


def check_finite(step: int, batch: Batch, values: Mapping[str, Any]) -> None:
    """Raises NonFiniteLoss with the step (counted from 1) and the ids of all its samples."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            ids = ", ".join(dict.fromkeys(example.id for row in batch.examples for example in row))
            raise NonFiniteLoss(f"step {step + 1}: {name}={value}, stopped before the optimizer step; samples: {ids}")


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

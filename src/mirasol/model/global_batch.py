"""What a part of a batch must know of the whole, so that the losses of all parts add up to the loss of the whole."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from mirasol.config.model import MirasolConfig
from mirasol.config.parts import IGNORED_LABEL
from mirasol.model.losses import meaningful


@dataclass(frozen=True)
class GlobalBatch:
    """The batch of one optimizer step that is cut over microbatches and processes. With it, a loss is this part's share
    of the batch's loss: the shares of all parts add up to it.

    totals: over what each loss of the batch is a mean: weight of target tokens ("text"), chunks that count ("latent",
        "video", "audio"), "images"
    chunks: length of the longest clip of the step on any process
    add: the sum of every process's tensor, without gradient
    gather: the rows of every process, with gradient, by rank
    first: place of this process's first row among those
    """

    totals: dict[str, float]
    chunks: int
    add: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]
    first: int


def text_total(labels: Int[Tensor, "row token"], row_weights: Float[Tensor, " row"] | None) -> float:
    """Target tokens of some rows, each with the weight of its row."""
    targets = (labels[:, 1:] != IGNORED_LABEL).sum(dim=1).double()
    return float(targets.sum() if row_weights is None else (targets * row_weights.double()).sum())


def chunk_totals(
    config: MirasolConfig,
    chunk_mask: Bool[Tensor, "clip chunk"],
    video_mask: Bool[Tensor, "clip chunk"],
    audio_mask: Bool[Tensor, "clip chunk"],
) -> dict[str, float]:
    """How many chunks of a microbatch count in each loss, given the masks of all its clips on all processes."""
    counted = chunk_mask[:, 1:]
    if config.latent.target == "centred":
        counted = meaningful(counted, video_mask[:, 1:], audio_mask[:, 1:])
    first = 1 if config.reconstruction.step == "next" else 0
    return {
        "latent": float(counted.sum()),
        "video": float((video_mask & chunk_mask)[:, first:].sum()),
        "audio": float((audio_mask & chunk_mask)[:, first:].sum()),
    }

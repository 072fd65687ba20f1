"""Mixup of the clips of a batch (Zhang et al., 2018), for a model that answers in words."""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mirasol.data.sampler import Batch

MODALITIES = ("video", "audio")


def find_partner(row: int, clips: int) -> int:
    """The row of a step's batch that a row is mixed with: its neighbour, for the order is one of chance already."""
    return (row + 1) % clips


def add_partners(rows: Sequence[int], clips: int) -> list[int]:
    """These rows of a step's batch, and after them the partners that are not among them."""
    return list(dict.fromkeys([*rows, *(find_partner(row, clips) for row in rows)]))


def draw_own_share(alpha: float, seed: int) -> float:
    """How much of a mix is the clip's own, by its seed: the larger of x and 1 - x with x from Beta(alpha, alpha).

    The distribution is the same on both sides, so taking the larger one leaves the mixes what they are; only which of
    the two lends the other its length and its modalities is settled by it.
    """
    share = random.Random(f"{seed} mixup").betavariate(alpha, alpha)
    return max(share, 1 - share)


def mix_clips(
    batch: Batch, media: dict[str, Tensor], rows: Sequence[int], loaded: Sequence[int], clips: int, shares: list[float]
) -> tuple[Batch, dict[str, Tensor]]:
    """Each of the `rows` of a step's batch of `clips` clips mixed with its partner; `batch` and `media` hold the rows
    `loaded`, in that order, `shares` is what `draw_own_share` gives for each of `rows`.

    Pixels and log-mel values are mixed in the units the model takes. A clip keeps its own length and its own
    modalities: a chunk that its partner does not have, or has without the modality, stays as it is. Where the two
    have nothing at the same time, nothing can be mixed, and the share becomes 1.

    The batch then has the partners' examples too (`Batch.partners`), for the text loss is the share times the loss of
    the own answers plus the rest times that of the partner's (`Batch.row_weights`).
    """
    others = [loaded.index(find_partner(row, clips)) for row in rows]
    result, is_mixed = {}, torch.zeros(len(rows), dtype=torch.bool)
    for name in MODALITIES:
        there = media[f"{name}_mask"]
        both = torch.stack([there[own] & there[other] for own, other in enumerate(others)])
        is_mixed |= both.any(dim=1)
        result[name] = _interpolate(media[name], others, shares, both)
    media = {name: value[: len(rows)] for name, value in media.items()} | result
    shares = [share if mixed else 1.0 for share, mixed in zip(shares, is_mixed.tolist(), strict=True)]
    partners = tuple(batch.examples[other] for other in others)
    counted = tuple(batch.counted[own] + batch.counted[other] for own, other in enumerate(others) if batch.counted)
    batch = batch.select_rows(range(len(rows)))
    batch = replace(batch, partners=partners, shares=tuple(shares), counted=counted)
    longest = int(media["chunk_mask"].sum(dim=1).max())
    return batch, {name: value[:, :longest] for name, value in media.items()}


def _interpolate(
    values: Float[Tensor, "loaded chunk ..."], others: list[int], shares: list[float], both: Bool[Tensor, "row chunk"]
) -> Float[Tensor, "row chunk ..."]:
    """The first rows of `values`, each mixed with another in the chunks that both have; chunk by chunk straight into
    the result, for a batch may be hundreds of megabytes."""
    result = torch.empty_like(values[: len(others)])
    for own, (other, share) in enumerate(zip(others, shares, strict=True)):
        for chunk, is_shared in enumerate(both[own].tolist()):
            if is_shared:
                torch.lerp(values[other, chunk], values[own, chunk], share, out=result[own, chunk])
            else:
                result[own, chunk] = values[own, chunk]
    return result

"""The losses, each a mean over what it applies to and exactly zero where it applies to nothing.

The paper names three: causal latent, video reconstruction and text (Table 1b of its supplement, "Causal", "Video",
"Text"), and takes a fourth, MaMMUT's contrastive loss, over with the pretrained text decoder (section 4, "Model
Pretraining"). It gives no formulas; the readings below are fields of the config (docs/model.md, Open points).

A batch may be cut over microbatches and processes. Given the totals of the complete batch (`BatchTotals`), each loss is
its part's share of the batch's loss: the shares of all parts add up to it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mirasol.config.model import MirasolConfig
from mirasol.config.parts import IGNORED_LABEL
from mirasol.model.kernels import call_and_recompute, disable_autocast

# 256 MiB of logits in fp32: 262 tokens of a vocabulary of 256,000.
LOGITS_AT_ONCE = 2**26


@dataclass(frozen=True)
class BatchTotals:
    """What the losses of a batch are means over, when it is cut over microbatches and processes.

    text: target tokens, each with the weight of its row. latent, video, audio: chunks that count. images: images.
    chunks: length of the longest clip on any process.
    """

    text: float = 0.0
    latent: float = 0.0
    video: float = 0.0
    audio: float = 0.0
    images: float = 0.0
    chunks: int = 0


@runtime_checkable
class Peers(Protocol):
    """The processes that share a batch. Two losses compare a clip with those of other processes: the latent loss with
    a centred target, and the contrastive loss."""

    rank: int

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all processes, without gradient."""

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes by rank, with gradient; each process has as many."""


class NoPeers:
    """One process on its own."""

    rank = 0

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, rows: Tensor) -> Tensor:
        return rows


def sum_text_weights(labels: Int[Tensor, "row token"], row_weights: Float[Tensor, " row"] | None) -> float:
    """The number of target tokens, each weighted by its row: this part's share of `BatchTotals.text`."""
    targets = (labels[:, 1:] != IGNORED_LABEL).sum(dim=1).double()
    return float(targets.sum() if row_weights is None else (targets * row_weights.double()).sum())


def count_loss_chunks(
    config: MirasolConfig,
    chunk_mask: Bool[Tensor, "clip chunk"],
    video_mask: Bool[Tensor, "clip chunk"],
    audio_mask: Bool[Tensor, "clip chunk"],
) -> dict[str, float]:
    """How many chunks count in the losses `latent`, `video` and `audio`, given the masks of all clips of a microbatch
    on all processes."""
    counted = chunk_mask[:, 1:]
    if config.latent.target == "centred":
        counted = find_meaningful(counted, video_mask[:, 1:], audio_mask[:, 1:])
    first = 1 if config.reconstruction.step == "next" else 0
    return {
        "latent": float(counted.sum()),
        "video": float((video_mask & chunk_mask)[:, first:].sum()),
        "audio": float((audio_mask & chunk_mask)[:, first:].sum()),
    }


def masked_mean(
    values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], total: float | None = None
) -> Float[Tensor, ""]:
    """Mean of the values under the mask; 0 when the mask is empty, so that one chunk alone stays finite. With `total`,
    the sum's share in a mean over that many values."""
    count = mask.sum().clamp(min=1) if total is None else max(total, 1.0)
    return (values * mask).sum() / count


def split_by_modalities(
    mask: Bool[Tensor, "batch chunk"], video_mask: Bool[Tensor, "batch chunk"], audio_mask: Bool[Tensor, "batch chunk"]
) -> list[Bool[Tensor, "batch chunk"]]:
    """The mask split by which modalities a chunk has: both, video, audio, neither."""
    return [
        mask & (video_mask == has_video) & (audio_mask == has_audio)
        for has_video in (True, False)
        for has_audio in (True, False)
    ]


def find_meaningful(
    mask: Bool[Tensor, "batch chunk"], video_mask: Bool[Tensor, "batch chunk"], audio_mask: Bool[Tensor, "batch chunk"]
) -> Bool[Tensor, "batch chunk"]:
    """Which targets still mean something after `centre_targets`."""
    is_meaningful = mask & (mask.sum(dim=1, keepdim=True) > 1)
    for alike in split_by_modalities(mask, video_mask, audio_mask):
        is_meaningful = is_meaningful | (alike & (alike.sum(dim=0) > 1))
    return is_meaningful


def centre_targets(
    target: Float[Tensor, "batch chunk m width"],
    mask: Bool[Tensor, "batch chunk"],
    video_mask: Bool[Tensor, "batch chunk"],
    audio_mask: Bool[Tensor, "batch chunk"],
    peers: Peers | None = None,
    chunks: int = 0,
) -> tuple[Float[Tensor, "batch chunk m width"], Bool[Tensor, "batch chunk"]]:
    """Targets minus the mean of their companions, and which of them still mean something.

    The companions of a target are the clips with a real chunk at the same time and the same modalities. Without any (a
    batch of one clip) they are the other targets of its own clip; a target without those means nothing. What all
    companions share (the code of the chunk, "no sound") can be predicted without any knowledge of the clip.

    peers: the processes that share the batch; its longest clip has `chunks` targets.
    """
    target = target.masked_fill(~mask[:, :, None, None], 0.0)
    of_clip = mask.sum(dim=1, keepdim=True).expand_as(mask)
    mean = (target.sum(dim=1, keepdim=True) / of_clip[:, :1, None, None].clamp(min=1)).expand_as(target)
    is_meaningful = mask & (of_clip > 1)
    # One combination of modalities at a time: comparing all clips with all clips would not fit a large batch.
    patterns = split_by_modalities(mask, video_mask, audio_mask)
    totals = [target.masked_fill(~alike[:, :, None, None], 0.0).sum(dim=0) for alike in patterns]
    counts = [alike.sum(dim=0) for alike in patterns]
    if peers is not None:
        missing = chunks - mask.shape[1]
        totals = list(peers.sum(F.pad(torch.stack(totals), (0, 0, 0, 0, 0, missing)))[:, : mask.shape[1]])
        counts = list(peers.sum(F.pad(torch.stack(counts), (0, missing)))[:, : mask.shape[1]])
    for alike, total, companions in zip(patterns, totals, counts, strict=True):
        has_companion = alike & (companions > 1)
        mean = torch.where(has_companion[:, :, None, None], total / companions[:, None, None].clamp(min=1), mean)
        is_meaningful = is_meaningful | has_companion
    return target - mean, is_meaningful


def latent_loss(
    predicted: Float[Tensor, "batch chunk m width"],
    x: Float[Tensor, "batch chunk m width"],
    chunk_mask: Bool[Tensor, "batch chunk"],
    video_mask: Bool[Tensor, "batch chunk"],
    audio_mask: Bool[Tensor, "batch chunk"],
    distance: str,
    target: str,
    total: float | None = None,
    peers: Peers | None = None,
    chunks: int = 1,
) -> Float[Tensor, ""]:
    """Distance between what h_t predicts and the detached x_{t+1}, over pairs of real chunks.

    The paper says no more than that the next chunk's features are predicted. `target` is x_{t+1} itself (`plain`) or
    minus its mean over the batch (`centred`). Features that are the same for every clip satisfy the plain reading: on
    chunks of independent noise its loss falls to a sixth although nothing can be predicted. A centred target has
    nothing in common between clips, so such features gain nothing. The price: the value depends on which clips share a
    microbatch over all processes (`peers`, whose longest clip has `chunks` chunks).
    """
    # h_t against x_{t+1}, so that T chunks give T - 1 pairs. The target is detached: otherwise both sides would move.
    predicted, wanted, mask = predicted[:, :-1].float(), x[:, 1:].detach().float(), chunk_mask[:, 1:]
    if target == "centred":
        wanted, mask = centre_targets(wanted, mask, video_mask[:, 1:], audio_mask[:, 1:], peers, chunks - 1)
    if distance == "cosine":
        # With a smaller epsilon the rounding error that is left of equal features would count as a direction.
        each = 1 - F.cosine_similarity(predicted, wanted, dim=-1, eps=1e-4)
    else:
        each = (predicted - wanted).square().mean(dim=-1)
    return masked_mean(each.mean(dim=-1), mask, total)


def reconstruction_loss(
    predicted: Float[Tensor, "batch chunk patch value"],
    target: Float[Tensor, "batch chunk patch value"],
    mask: Bool[Tensor, "batch chunk"],
    distance: str,
    step: str,
    total: float | None = None,
) -> Float[Tensor, ""]:
    """Distance of predicted patches, of video or of the spectrogram, to those of the next or the same chunk.

    The paper reconstructs the next chunk's video; distance, size and step of the target are open. mask: the chunks
    that have the modality. `cosine` compares patch by patch and ignores each patch's contrast; a patch of zeros is at
    distance 1 from everything.
    """
    # The first chunk of a clip has no prediction, the last prediction no target.
    if step == "next":
        predicted, target, mask = predicted[:, :-1], target[:, 1:], mask[:, 1:]
    predicted, target = predicted.float(), target.float()
    if distance == "cosine":
        each = 1 - F.cosine_similarity(predicted, target, dim=-1)
    else:
        each = (predicted - target).square().mean(dim=-1)
    return masked_mean(each.mean(dim=-1), mask, total)


def contrastive_loss(
    images: Float[Tensor, "image width"],
    texts: Float[Tensor, "text width"],
    temperature: Float[Tensor, ""],
    bias: Float[Tensor, "1"] | None,
    gamma: float,
    first: int = 0,
    total: float | None = None,
) -> Float[Tensor, ""]:
    """Sigmoid focal loss over all pairs of normalised features, summed over the texts and averaged over the images.

    A pair's probability is p = sigmoid(image · text / temperature + bias), or 1 - p for a pair that does not belong
    together, and its loss -(1 - p)^gamma log p (MaMMUT; focal loss without alpha). Image i belongs to text `first` + i,
    so that a process can compare its own images with the texts gathered from all. The mean of the processes' losses is
    the batch's loss; with `total`, the number of images in the batch, the sum is. The sum over pairs is the same from
    image to text and from text to image, so it is taken once.
    """
    # Autocast would round the cosines to bf16, and the temperature would magnify the error.
    with disable_autocast(images):
        logits = images.float() @ texts.float().T / temperature.float()
    if bias is not None:
        logits = logits + bias
    text = torch.arange(texts.shape[0], device=texts.device)
    belongs = text[None, :] == first + torch.arange(images.shape[0], device=images.device)[:, None]
    # log p of a pair is logsigmoid of its logit, and of the negated logit where the pair does not belong together.
    signed = torch.where(belongs, logits, -logits)
    # (1 - p)^gamma through the logarithm: a power of zero has no finite gradient.
    focus = (gamma * F.logsigmoid(-signed)).exp()
    return -(focus * F.logsigmoid(signed)).sum() / (images.shape[0] if total is None else total)


def sum_cross_entropy(
    hidden: Float[Tensor, "target width"],
    labels: Int[Tensor, " target"],
    weights: Float[Tensor, " target"] | None,
    to_logits: Callable[[Tensor], Tensor],
    smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Sum of the tokens' weighted cross-entropies. Label smoothing spreads `smoothing` of each target's weight evenly
    over the vocabulary."""
    # Logits in float32: a softmax over 256,000 pieces in bf16 would lose the tail.
    logits = to_logits(hidden).float()
    if weights is None:
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    return (weights * F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)).sum()


def text_loss(
    hidden: Float[Tensor, "target width"],
    labels: Int[Tensor, " target"],
    to_logits: Callable[[Tensor], Tensor],
    vocabulary: int,
    at_once: int = LOGITS_AT_ONCE,
    weights: Float[Tensor, " target"] | None = None,
    smoothing: float = 0.0,
    total: float | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the target tokens (0 without any), weighted by `weights`; `to_logits` maps hidden states to
    [target, vocabulary]. With `total`, the share in the mean over a weight of `total`.

    No more than `at_once` logits exist at a time (or those of one token): more tokens are taken slice by slice, and the
    backward pass computes the logits of each slice again.
    """
    rows = max(1, at_once // vocabulary)
    # If all weights are zero so is the sum: the smallest number prevents a division by zero.
    if total is not None:
        total = max(total, torch.finfo(torch.float32).tiny)
    elif weights is None:
        total = max(len(labels), 1)
    else:
        total = weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    if len(labels) <= rows:
        return sum_cross_entropy(hidden, labels, weights, to_logits, smoothing) / total
    slice_weights = weights.split(rows) if weights is not None else [None] * math.ceil(len(labels) / rows)
    slices = zip(hidden.split(rows), labels.split(rows), slice_weights, strict=True)
    each = [call_and_recompute(sum_cross_entropy, *part, to_logits, smoothing) for part in slices]
    return torch.stack(each).sum() / total

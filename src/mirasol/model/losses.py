"""The losses, each a mean over what it applies to and exactly zero where it applies to nothing."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# 256 MiB of logits in fp32: 262 tokens of a vocabulary of 256,000.
LOGITS_AT_ONCE = 2**26


def masked_mean(
    values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], total: float | None = None
) -> Float[Tensor, ""]:
    """Mean of the values under the mask; 0 when the mask is empty, so that T = 1 stays finite. Of a part of a batch,
    the share in the mean over `total` values."""
    count = mask.sum().clamp(min=1) if total is None else max(total, 1.0)
    return (values * mask).sum() / count


def by_pattern(
    mask: Bool[Tensor, "batch chunk"], video_mask: Bool[Tensor, "batch chunk"], audio_mask: Bool[Tensor, "batch chunk"]
) -> list[Bool[Tensor, "batch chunk"]]:
    """The mask parted by which modalities a chunk has: both, video, audio, none."""
    return [
        mask & (video_mask == has_video) & (audio_mask == has_audio)
        for has_video in (True, False)
        for has_audio in (True, False)
    ]


def meaningful(
    mask: Bool[Tensor, "batch chunk"], video_mask: Bool[Tensor, "batch chunk"], audio_mask: Bool[Tensor, "batch chunk"]
) -> Bool[Tensor, "batch chunk"]:
    """Which targets have a meaning once they are `centred`."""
    with_meaning = mask & (mask.sum(dim=1, keepdim=True) > 1)
    for alike in by_pattern(mask, video_mask, audio_mask):
        with_meaning = with_meaning | (alike & (alike.sum(dim=0) > 1))
    return with_meaning


def centred(
    target: Float[Tensor, "batch chunk m width"],
    mask: Bool[Tensor, "batch chunk"],
    video_mask: Bool[Tensor, "batch chunk"],
    audio_mask: Bool[Tensor, "batch chunk"],
    add: Callable[[Tensor], Tensor] | None = None,
    chunks: int = 0,
) -> tuple[Float[Tensor, "batch chunk m width"], Bool[Tensor, "batch chunk"]]:
    """Targets without what they share with their companions, and which of them have a meaning then.

    A target's companions are the clips with a real chunk at the same time and the same modalities; without any (a
    batch of one clip) they are the other targets of its own clip, and a target without those either has no meaning.
    What all companions share (the code of the chunk, "no sound") can be predicted without having seen the clip.

    `add` sums over the processes that share the batch, whose longest clip has `chunks` targets.
    """
    target = target.masked_fill(~mask[:, :, None, None], 0.0)
    of_clip = mask.sum(dim=1, keepdim=True).expand_as(mask)
    mean = (target.sum(dim=1, keepdim=True) / of_clip[:, :1, None, None].clamp(min=1)).expand_as(target)
    with_meaning = mask & (of_clip > 1)
    # One modality pattern after the other, for a product of all clips with all clips would not fit a large batch.
    patterns = by_pattern(mask, video_mask, audio_mask)
    totals = [target.masked_fill(~alike[:, :, None, None], 0.0).sum(dim=0) for alike in patterns]
    counts = [alike.sum(dim=0) for alike in patterns]
    if add is not None:
        longer = chunks - mask.shape[1]
        totals = list(add(F.pad(torch.stack(totals), (0, 0, 0, 0, 0, longer)))[:, : mask.shape[1]])
        counts = list(add(F.pad(torch.stack(counts), (0, longer)))[:, : mask.shape[1]])
    for alike, total, companions in zip(patterns, totals, counts, strict=True):
        has_companion = alike & (companions > 1)
        mean = torch.where(has_companion[:, :, None, None], total / companions[:, None, None].clamp(min=1), mean)
        with_meaning = with_meaning | has_companion
    return target - mean, with_meaning


def latent_loss(
    predicted: Float[Tensor, "batch chunk m width"],
    x: Float[Tensor, "batch chunk m width"],
    chunk_mask: Bool[Tensor, "batch chunk"],
    video_mask: Bool[Tensor, "batch chunk"],
    audio_mask: Bool[Tensor, "batch chunk"],
    distance: str,
    target: str,
    total: float | None = None,
    add: Callable[[Tensor], Tensor] | None = None,
    chunks: int = 1,
) -> Float[Tensor, ""]:
    """Distance between what h_t predicts and the detached x_{t+1}, over pairs of real chunks.

    `target` is x_{t+1} as it is (`plain`) or `centred` over the batch. The paper says no more than that features are
    predicted. The plain reading is met by features that are the same for every clip: on chunks of independent noise
    it falls to a sixth while nothing can be predicted. What is the same for every clip is gone from a centred target,
    so there is nothing to be won by it. The price: the value depends on which clips meet in a microbatch over all
    processes (`add` sums over them; their longest clip has `chunks` chunks).
    """
    predicted, wanted, mask = predicted[:, :-1].float(), x[:, 1:].detach().float(), chunk_mask[:, 1:]
    if target == "centred":
        wanted, mask = centred(wanted, mask, video_mask[:, 1:], audio_mask[:, 1:], add, chunks - 1)
    if distance == "cosine":
        # The epsilon keeps the rounding left over of equal features from passing for a direction.
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

    `mask` says which chunks have what is reconstructed; their targets alone count. `cosine` is taken patch by patch
    and so leaves each patch's contrast open; a patch of zeros is at distance 1 from everything.
    """
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

    A pair's probability is p = sigmoid(image · text / temperature + bias), or one minus that for a pair that does not
    belong together, and its loss -(1 - p)^gamma log p (MaMMUT; focal loss without alpha). Image i belongs to text
    `first` + i: so each process of a run can hold its own images against the texts gathered from all of them. The mean
    of their losses is the loss of the whole batch, or, with `total` images in the batch, the sum. The sum over pairs is
    the same from image to text and from text to image, so it is taken once.
    """
    # Autocast would round the cosines to bf16, and the temperature magnify that.
    with torch.autocast(images.device.type, enabled=False):
        logits = images.float() @ texts.float().T / temperature.float()
    if bias is not None:
        logits = logits + bias
    text = torch.arange(texts.shape[0], device=texts.device)
    belongs = text[None, :] == first + torch.arange(images.shape[0], device=images.device)[:, None]
    signed = torch.where(belongs, logits, -logits)
    # 1 - p as the exponential of its logarithm: a power of zero would have no finite gradient.
    focus = (gamma * F.logsigmoid(-signed)).exp()
    return -(focus * F.logsigmoid(signed)).sum() / (images.shape[0] if total is None else total)


def summed_cross_entropy(
    hidden: Float[Tensor, "target width"],
    labels: Int[Tensor, " target"],
    weights: Float[Tensor, " target"] | None,
    to_logits: Callable[[Tensor], Tensor],
    smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Sum of the tokens' cross-entropies, each times its weight; a smoothed target has `smoothing` of its weight spread
    evenly over the vocabulary."""
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
    """Mean cross-entropy of the target tokens (0 without any), of which `to_logits` makes [target, vocabulary]; with
    `weights` of the tokens, their weighted mean. Of a part of a batch, the share in the mean over a weight of `total`.

    No more than `at_once` logits exist at a time, unless one token has more: beyond that the tokens are taken slice by
    slice, and the backward pass computes the logits of each slice again.
    """
    rows = max(1, at_once // vocabulary)
    # The smallest number keeps weights that are all zero, and so a sum of zero, from being divided by zero.
    if total is not None:
        total = max(total, torch.finfo(torch.float32).tiny)
    elif weights is None:
        total = max(len(labels), 1)
    else:
        total = weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    if len(labels) <= rows:
        return summed_cross_entropy(hidden, labels, weights, to_logits, smoothing) / total
    weights_of_slices = weights.split(rows) if weights is not None else [None] * math.ceil(len(labels) / rows)
    slices = zip(hidden.split(rows), labels.split(rows), weights_of_slices, strict=True)
    each = [checkpoint(summed_cross_entropy, *part, to_logits, smoothing, use_reentrant=False) for part in slices]
    return torch.stack(each).sum() / total

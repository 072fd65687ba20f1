"""The losses, each a mean over what it applies to and exactly zero where it applies to nothing."""

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


def masked_mean(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean of the values under the mask; 0 when the mask is empty, so that T = 1 stays finite."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def latent_loss(
    predicted: Float[Tensor, "batch chunk m width"],
    x: Float[Tensor, "batch chunk m width"],
    chunk_mask: Bool[Tensor, "batch chunk"],
    distance: str,
) -> Float[Tensor, ""]:
    """Distance between what h_t predicts and the detached x_{t+1}, over pairs of real chunks."""
    predicted, target = predicted[:, :-1].float(), x[:, 1:].detach().float()
    if distance == "cosine":
        each = 1 - F.cosine_similarity(predicted, target, dim=-1)
    else:
        each = (predicted - target).square().mean(dim=-1)
    return masked_mean(each.mean(dim=-1), chunk_mask[:, 1:])


def reconstruction_loss(
    predicted: Float[Tensor, "batch chunk patch value"],
    target: Float[Tensor, "batch chunk patch value"],
    mask: Bool[Tensor, "batch chunk"],
    distance: str,
    step: str,
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
    return masked_mean(each.mean(dim=-1), mask)


def text_loss(logits: Float[Tensor, "target vocabulary"], labels: Int[Tensor, " target"]) -> Float[Tensor, ""]:
    """Cross-entropy of the target tokens (0 without any)."""
    return F.cross_entropy(logits.float(), labels, reduction="sum") / max(len(labels), 1)

"""Log-likelihoods of candidate answers on the same latents, without generating."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from mirasol.errors import UserError
from mirasol.model.outputs import MirasolCandidateScores, MirasolEncoderOutput
from mirasol.model.text import TextDecoder

# A row's candidates go through the decoder in one sequence of at most this many tokens (or one candidate), since its
# attention is a square of them; and this many logits exist at a time: 64 MiB in fp32.
_TOKENS_AT_ONCE = 512
_LOGITS_AT_ONCE = 2**24


def score_candidates(
    text: TextDecoder,
    encoder_outputs: MirasolEncoderOutput,
    prompt_ids: Tensor,
    prompt_mask: Tensor | None,
    candidate_ids: Tensor,
    candidate_mask: Tensor,
    eos: int,
) -> MirasolCandidateScores:
    """See `MirasolForConditionalGeneration.score`. Each prompt is run once: its keys and values serve all candidates,
    which follow it in one sequence and do not attend to each other. Those of cross-attention are computed once per
    clip."""
    prompt_mask = torch.ones_like(prompt_ids) if prompt_mask is None else prompt_mask
    _check_arguments(encoder_outputs, prompt_ids, prompt_mask, candidate_ids, candidate_mask, eos)
    latents, latent_mask = encoder_outputs.last_hidden_state, encoder_outputs.latent_mask
    # One cache for all candidates: what follows the prompt is cropped away again.
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    length, width = prompt_ids.shape[1], candidate_ids.shape[2]
    hidden, _ = text(prompt_ids, prompt_mask, latents, latent_mask, cache)
    # The last real token of each prompt, whichever side the padding is on, predicts a candidate's first token.
    place = torch.arange(length, device=prompt_ids.device)
    last = (place * prompt_mask.bool()).argmax(dim=1)
    after_prompt = hidden[torch.arange(len(hidden), device=last.device), last]

    parts = []
    at_once = max(1, _TOKENS_AT_ONCE // width)
    for ids, real in zip(candidate_ids.split(at_once, dim=1), candidate_mask.split(at_once, dim=1), strict=True):
        likelihood = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        likelihood[..., 0] = compute_token_log_likelihood(text, after_prompt, ids[..., 0])
        if width > 1:
            visible = make_candidate_mask(prompt_mask.bool(), real)
            hidden, _ = text(ids.flatten(1), visible, latents, latent_mask, cache, longest=length + width)
            cache.self_attention_cache.crop(-visible.shape[2])  # the next candidates follow the prompt, not these
            target = real[..., 1:]
            before = hidden.unflatten(1, ids.shape[1:])[..., :-1, :][target]
            found = compute_token_log_likelihood(text, before, ids[..., 1:][target][:, None])
            likelihood[..., 1:][target] = found[:, 0]
        parts.append(likelihood.masked_fill(~real, 0.0).sum(-1))

    tokens = candidate_mask.sum(-1)
    total = torch.cat(parts, dim=1).masked_fill(tokens == 0, float("-inf"))
    return MirasolCandidateScores(total / tokens.clamp(min=1), total, tokens)


def make_candidate_mask(
    prompt: Bool[Tensor, "row prompt"], candidates: Bool[Tensor, "row candidate target"]
) -> Bool[Tensor, "row 1 query key"]:
    """Which keys (prompt, then all candidates) the candidates' tokens attend to: the prompt, and earlier tokens of
    their own candidate."""
    _, count, width = candidates.shape
    candidate = torch.arange(count * width, device=prompt.device) // width
    own = candidate[:, None] == candidate[None]
    earlier = own.tril()[None] & candidates.flatten(1)[:, None, :]
    return torch.cat([prompt[:, None, :].expand(-1, count * width, -1), earlier], dim=2)[:, None]


def compute_token_log_likelihood(
    text: TextDecoder, hidden: Float[Tensor, "place width"], ids: Int[Tensor, "place choice"]
) -> Float[Tensor, "place choice"]:
    """Log-probability of each of several next tokens, a few places at a time: each has logits over the vocabulary."""
    at_once = max(1, _LOGITS_AT_ONCE // len(text.output_weight))
    found = [
        text.logits(some).float().log_softmax(-1).gather(-1, chosen)
        for some, chosen in zip(hidden.split(at_once), ids.split(at_once), strict=True)
    ]
    return torch.cat(found)


def _check_arguments(
    encoder_outputs: MirasolEncoderOutput,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    candidate_ids: Tensor,
    candidate_mask: Tensor,
    eos: int,
) -> None:
    rows, clips = len(prompt_ids), len(encoder_outputs.last_hidden_state)
    if rows % clips:
        raise UserError(f"{rows} prompts for {clips} clips: give every clip as many prompts")
    if prompt_mask.shape != prompt_ids.shape or not prompt_mask.any(dim=1).all():
        raise UserError(f"prompts of shape {tuple(prompt_ids.shape)}: each needs a token, and a mask of the same shape")
    if candidate_ids.shape != candidate_mask.shape or len(candidate_ids) != rows:
        raise UserError(
            f"candidates {tuple(candidate_ids.shape)}, their mask {tuple(candidate_mask.shape)} and {rows} prompts do "
            "not fit: give [row, candidate, token] of both, a row per prompt"
        )
    if candidate_mask.shape[2] == 0 or not candidate_mask.flatten(1).any(dim=1).all():
        raise UserError("a row has no candidate: give every prompt at least one")
    if (candidate_mask[..., 1:] & ~candidate_mask[..., :-1]).any():
        raise UserError("candidate_mask has a gap: candidates are padded at the right")
    alone = candidate_mask.any(-1) & (candidate_ids[..., 0] == eos)
    if alone.any():
        row, candidate = alone.nonzero()[0].tolist()
        raise UserError(f"candidate {candidate} of row {row} is empty: give it a token before its <eos>")

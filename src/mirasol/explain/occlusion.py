"""What really mattered: the answer's log-likelihood with a chunk's picture or sound taken away.

Attention says where a model looks, not what follows from it. Here each chunk in turn loses its picture or its sound, as
if the file had none there, and the same answer is scored again. Every chunk is encoded on its own before the Combiner,
so that the encoder, the larger part of the model, runs once for all of them.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mirasol.model.masks import mark_latents
from mirasol.model.mirasol import MirasolNetwork
from mirasol.model.outputs import MirasolEncoderOutput

# Chunks of all clips of one pass together: what bounds the memory, whatever the clip's length.
CHUNKS_AT_ONCE = 64


@dataclass(frozen=True)
class Occlusion:
    """Log-likelihoods of one answer, natural logarithms, its <eos> included.

    complete: with everything
    without_picture, without_sound: without that of one chunk; NaN where the chunk has none
    without_pictures, without_sounds: without those of all chunks; NaN where the clip has none
    passes: how often Combiner, latent model and text decoder were run on the clip; the encoder ran once
    seconds: that it took
    """

    complete: float
    without_picture: Float[np.ndarray, " chunk"]
    without_sound: Float[np.ndarray, " chunk"]
    without_pictures: float
    without_sounds: float
    passes: int
    seconds: float

    @property
    def losses(self) -> Float[np.ndarray, "modality chunk"]:
        """By how much the log-likelihood falls without the picture (row 0) or the sound (row 1) of each chunk, nats;
        negative where the answer gets likelier; NaN where there is none."""
        return self.complete - np.stack([self.without_picture, self.without_sound])


def occlude_chunks(
    model: MirasolNetwork,
    features: tuple[Float[Tensor, "1 chunk video_token width"], Float[Tensor, "1 chunk audio_token width"]],
    video_present: Bool[Tensor, " chunk"],
    audio_present: Bool[Tensor, " chunk"],
    ids: Int[Tensor, "1 token"],
    answer_tokens: int,
    clips_at_once: int | None = None,
) -> Occlusion:
    """Scores the answer with each chunk's picture and sound taken away.

    features: of the clip, as the chunk encoder gives them
    ids: prompt and answer; the last `answer_tokens` are scored
    clips_at_once: how many variants of the clip share a pass; by default as many as have `CHUNKS_AT_ONCE` chunks
    """
    began = time.perf_counter()
    present = torch.stack([video_present, audio_present]).cpu()
    variants = list_variants(present)
    at_once = clips_at_once or max(1, CHUNKS_AT_ONCE // present.shape[1])
    scores = torch.cat([
        score_variants(model, features, torch.stack(variants[first : first + at_once]), ids, answer_tokens)
        for first in range(0, len(variants), at_once)
    ]).tolist()  # fmt: skip
    complete, *rest = scores
    single = np.full(present.shape, np.nan)
    for place, (modality, chunk) in enumerate(present.nonzero().tolist()):
        single[modality, chunk] = rest[place]
    all_of_one = iter(rest[int(present.sum()) :])
    totals = [next(all_of_one) if row.any() else float("nan") for row in present]
    return Occlusion(complete, *single, *totals, passes=len(variants), seconds=time.perf_counter() - began)


def list_variants(present: Bool[Tensor, "modality chunk"]) -> list[Bool[Tensor, "modality chunk"]]:
    """What is present in each variant of a clip: all of it; all but one picture or sound, for each there is; and for
    each modality that there is, all but that one."""
    variants = [present]
    for modality, chunk in present.nonzero().tolist():
        variants.append(present.clone())
        variants[-1][modality, chunk] = False
    for modality, row in enumerate(present):
        if row.any():
            variants.append(present.clone())
            variants[-1][modality] = False
    return variants


def score_variants(
    model: MirasolNetwork,
    features: tuple[Tensor, Tensor],
    present: Bool[Tensor, "variant modality chunk"],
    ids: Int[Tensor, "1 token"],
    answer_tokens: int,
) -> Float[Tensor, " variant"]:
    """Log-likelihood of the answer in each variant, all in one pass."""
    encoder = model.chunk_encoder
    present = present.to(ids.device)
    # As `ChunkEncoder.forward` does with masks, without encoding what is the same in all variants again.
    given = [
        torch.where(present[:, modality, :, None, None], own, missing.to(own))
        for modality, (own, missing) in enumerate(
            zip(features, (encoder.missing_video, encoder.missing_audio), strict=True)
        )
    ]
    x = model.combiner(*given)
    h = model.latent(x)
    every_chunk = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
    encoded = MirasolEncoderOutput(h.flatten(1, 2), mark_latents(every_chunk, h.shape[2], model.config.text.window), x)
    rows = ids[:, :-1].expand(len(present), -1)  # the last token predicts nothing that is scored
    logits = model(encoder_outputs=encoded, decoder_input_ids=rows).logits[:, -answer_tokens:].float()
    targets = ids[:, -answer_tokens:].expand(len(present), -1)
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0].sum(dim=1)

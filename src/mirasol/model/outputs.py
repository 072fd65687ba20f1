"""What the time-aligned side and the scoring of candidates give."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class MirasolEncoderOutput(ModelOutput):
    """The time-aligned side of a batch of clips. Only batched tensors live here: generation expands them all.

    last_hidden_state: latents h of all chunks in one row, [clip, chunk · m, width]
    latent_mask: which of them belong to real chunks, [clip, chunk · m]
    combined: the Combiner's x, [clip, chunk, m, width]
    """

    last_hidden_state: Tensor | None = None
    latent_mask: Tensor | None = None
    combined: Tensor | None = None

    @property
    def latents(self) -> Float[Tensor, "clip chunk m width"]:
        """h by chunk."""
        return self.last_hidden_state.view(self.combined.shape)


@dataclass
class MirasolCandidateScores(ModelOutput):
    """How likely a model finds each candidate, natural logarithms; absent candidates have -inf and 0 tokens.

    per_token: mean over the candidate's tokens, <eos> included: fair to candidates of unequal length,
        [row, candidate]
    total: their sum, the log-probability of the whole candidate, [row, candidate]
    tokens: how many they are, [row, candidate]
    """

    per_token: Tensor | None = None
    total: Tensor | None = None
    tokens: Tensor | None = None

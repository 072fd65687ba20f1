"""The model's named outputs: of the time-aligned side, of a pass, of images and texts, of candidates."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import EncoderDecoderCache
from transformers.utils import ModelOutput


@dataclass
class MirasolEncoderOutput(ModelOutput):
    """The time-aligned side of a batch of clips. All fields are batched tensors, because generation repeats them all.

    last_hidden_state: latents h of all chunks as one sequence, [clip, chunk · m, width]
    latent_mask: True for latents of real chunks, [clip, chunk · m]
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

    per_token: mean over the candidate's tokens, <eos> included, which compares candidates of unequal length,
        [row, candidate]
    total: their sum, the log-probability of the whole candidate, [row, candidate]
    tokens: number of tokens, [row, candidate]
    """

    per_token: Tensor | None = None
    total: Tensor | None = None
    tokens: Tensor | None = None


@dataclass
class MirasolLosses(ModelOutput):
    """The losses of a pass and the predictions that they needed, as in `MirasolOutput`."""

    loss: Tensor | None = None
    text_loss: Tensor | None = None
    latent_loss: Tensor | None = None
    video_loss: Tensor | None = None
    audio_loss: Tensor | None = None
    reconstruction: Tensor | None = None
    audio_reconstruction: Tensor | None = None


@dataclass
class MirasolOutput(ModelOutput):
    """The output of `forward`. `loss` is the weighted sum of the others, which are unweighted.

    logits: [row, token, vocabulary]; None in training with labels, where only those of target tokens are computed
    reconstruction: [clip, chunk, frame, 3, image_size, image_size]; entry t is the prediction of chunk t + 1 (of chunk
        t with `reconstruction.step: same`), in normalised units (`MirasolFeatureExtractor.pixels` gives pixels)
    audio_reconstruction: [clip, chunk, mel frame, mel], the same of the log-mel spectrogram
    decoder_attentions, cross_attentions: on request the weights of the text decoder's self-attention, one [row, head,
        token, key] per layer, and of its cross-attention, one [row, head, token, chunk · m] per layer that has it
    decoder_hidden_states: on request its embedded tokens and each layer's output, the last one after the final norm
    """

    loss: Tensor | None = None
    text_loss: Tensor | None = None
    latent_loss: Tensor | None = None
    video_loss: Tensor | None = None
    audio_loss: Tensor | None = None
    logits: Tensor | None = None
    latents: Tensor | None = None
    combined: Tensor | None = None
    reconstruction: Tensor | None = None
    audio_reconstruction: Tensor | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    past_key_values: EncoderDecoderCache | None = None
    encoder_last_hidden_state: Tensor | None = None


@dataclass
class MirasolImageTextOutput(ModelOutput):
    """The output of `image_text`. `loss` is the weighted sum of the two others, which are unweighted.

    image_features, text_features: normalised, [image, width]
    temperature: what their cosines are divided by
    logits: [image, token, vocabulary]; None in training with labels
    """

    loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    text_loss: Tensor | None = None
    image_features: Tensor | None = None
    text_features: Tensor | None = None
    temperature: Tensor | None = None
    logits: Tensor | None = None

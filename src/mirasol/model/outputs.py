"""What goes into and comes out of the model: its named outputs, and the checks of its arguments."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import EncoderDecoderCache
from transformers.utils import ModelOutput

from mirasol.config.model import MirasolConfig
from mirasol.errors import UserError

# transformers' name for the keys and values of earlier tokens, in what `generate` passes and expects.
CACHE = "cache" if hasattr(ModelOutput, "past_key_values") else "past_key_values"  # since 5.24, where that is an alias


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
class MirasolChunkFeatures(ModelOutput):
    """What the model takes of a batch of clips in place of video and audio, each chunk on its own: its features before
    the Combiner, and the patches to reconstruct. Of a modality that a chunk lacks they mean nothing.

    video, audio: features, [clip, chunk, token, width]
    video_target, audio_target: patches, [clip, chunk, patch, value]; audio_target is None where none are reconstructed
    """

    video: Tensor | None = None
    audio: Tensor | None = None
    video_target: Tensor | None = None
    audio_target: Tensor | None = None


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
    past_key_values or cache: keys and values of the tokens so far; see `CACHE`
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
    if CACHE == "cache":
        cache: EncoderDecoderCache | None = None
    else:
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


class Requested(NamedTuple):
    """What a caller of `forward` wants returned in addition to the logits."""

    attentions: bool
    hidden_states: bool
    as_dict: bool


def check_rows(rows: int, clips: int, name: str) -> None:
    """Raises UserError unless every clip has the same number of text rows, which messages call `name`."""
    if rows % clips:
        raise UserError(f"{rows} {name} for {clips} clips: give every clip as many prompts")


def to_boolean_mask(attention_mask: Tensor | None) -> Tensor | None:
    """A text's attention mask as the text decoder takes it: transformers also makes additive 4D masks (static caches),
    with zeros where a token attends to a key."""
    if attention_mask is None or attention_mask.ndim != 4 or attention_mask.dtype == torch.bool:
        return attention_mask
    return attention_mask == 0


def check_media_type(name: str, media: Tensor) -> None:
    """Raises UserError for integers: pixels that are not normalised."""
    if not media.is_floating_point():
        raise UserError(f"{name} of {media.dtype}: give the normalised numbers that MirasolProcessor gives")


def check_media(
    video: Float[Tensor, "clip chunk frame 3 height width_px"],
    audio: Float[Tensor, "clip chunk mel_frame mel"],
    config: MirasolConfig,
) -> None:
    """Checks the media of a batch of clips. Raises UserError for integers, or chunks of another shape than the
    config's."""
    shapes = {"video": config.video.chunk_shape, "audio": config.audio.chunk_shape}
    for (name, shape), chunks in zip(shapes.items(), (video, audio), strict=True):
        if tuple(chunks.shape[2:]) != shape:
            expected = ", ".join(map(str, shape))
            raise UserError(f"{name} of shape {tuple(chunks.shape)}: this model takes [clip, chunk, {expected}]")
        check_media_type(name, chunks)


def check_padding(chunk_mask: Bool[Tensor, "clip chunk"]) -> None:
    """Raises UserError for padding before a real chunk, which no causal mask would hide from later chunks."""
    if chunk_mask.is_meta or torch.compiler.is_compiling():
        return  # there are no values to check
    gap = chunk_mask[:, 1:] & ~chunk_mask[:, :-1]
    if gap.any():
        clip, chunk = gap.nonzero()[0].tolist()
        raise UserError(
            f"chunk_mask of clip {clip} has padding before chunk {chunk + 1}: padding chunks come last; for a chunk "
            "without video or audio use video_mask and audio_mask"
        )


def find_missing(media: Mapping[str, Tensor | None]) -> str:
    """The names of the media that are None, separated by commas."""
    return ", ".join(name for name, value in media.items() if value is None)


def check_arguments(
    media: Mapping[str, Tensor | None],
    features: MirasolChunkFeatures | None,
    encoder_outputs: MirasolEncoderOutput | None,
    ids: Int[Tensor, "row token"] | None,
    embedded: Float[Tensor, "row token width"] | None,
    labels: Int[Tensor, "row token"] | None,
    row_weights: Float[Tensor, " given"] | None,
) -> None:
    """Checks the arguments of `forward` against each other. Raises UserError as `forward` does."""
    in_place = () if features is None else ("video", "audio")
    missing = find_missing({name: value for name, value in media.items() if name not in in_place})
    if labels is not None and missing:
        raise UserError(
            f"labels were given without {missing}: the losses need all that MirasolProcessor gives, "
            "not encoder_outputs alone"
        )
    if encoder_outputs is None and missing:
        raise UserError(f"{missing} missing: give all that MirasolProcessor gives, or encoder_outputs")
    if row_weights is not None and labels is None:
        raise UserError("row_weights were given without labels: they weight the rows of the text loss")
    if row_weights is not None and len(row_weights) != len(labels):
        raise UserError(f"{len(row_weights)} row_weights for {len(labels)} text rows: give one for each row")
    if (ids is None) == (embedded is None):
        raise UserError("give exactly one of decoder_input_ids and decoder_inputs_embeds")
    rows = len(ids if embedded is None else embedded)
    clips = len(media["chunk_mask"] if encoder_outputs is None else encoder_outputs.last_hidden_state)
    check_rows(rows, clips, "text rows")

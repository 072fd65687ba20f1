"""The whole model: reads like the paper's figure."""

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from mirasol.config.model import MirasolConfig
from mirasol.config.parts import IGNORED_LABEL
from mirasol.errors import UserError
from mirasol.model.combiner import make_combiner
from mirasol.model.contrastive import ContrastiveSpace
from mirasol.model.encoder import ChunkEncoder
from mirasol.model.global_batch import GlobalBatch
from mirasol.model.hf import MirasolPreTrainedModel
from mirasol.model.latent import CausalLatentModel
from mirasol.model.losses import latent_loss, reconstruction_loss, text_loss
from mirasol.model.outputs import MirasolCandidateScores, MirasolEncoderOutput, MirasolImageTextOutput, MirasolOutput
from mirasol.model.reconstruction import Reconstruction
from mirasol.model.resolution import set_image_size
from mirasol.model.scoring import score_candidates
from mirasol.model.sizes import count_parameters
from mirasol.model.streaming import MirasolStream
from mirasol.model.text import TextDecoder


def check_chunks(name: str, chunks: Float[Tensor, "clip chunk ..."], shape: tuple[int, ...]) -> None:
    """Refuses media whose chunks are not of the shape that a model takes."""
    if tuple(chunks.shape[2:]) != shape:
        expected = ", ".join(map(str, shape))
        raise UserError(f"{name} of shape {tuple(chunks.shape)}: this model takes [clip, chunk, {expected}]")


def check_labels(labels: Tensor | None, row_weights: Tensor | None, media: Mapping[str, Tensor | None]) -> None:
    """Refuses labels without all the media that the losses compare with, and row weights that weigh nothing."""
    missing = [name for name, value in media.items() if value is None]
    if labels is not None and missing:
        raise UserError(
            f"labels were given without {', '.join(missing)}: the losses need all that MirasolProcessor gives, "
            "not encoder_outputs alone"
        )
    if row_weights is None:
        return
    if labels is None:
        raise UserError("row_weights were given without labels: they weigh the rows of the text loss")
    if len(row_weights) != len(labels):
        raise UserError(f"{len(row_weights)} row_weights for {len(labels)} text rows: give one for each row")


def check_padding(chunk_mask: Bool[Tensor, "clip chunk"]) -> None:
    """Refuses padding that does not come last: no causal mask would hide it from the chunks after it."""
    if chunk_mask.is_meta or torch.compiler.is_compiling():
        return  # no values to look at
    gap = chunk_mask[:, 1:] & ~chunk_mask[:, :-1]
    if gap.any():
        clip, chunk = gap.nonzero()[0].tolist()
        raise UserError(
            f"chunk_mask of clip {clip} has padding before chunk {chunk + 1}: padding chunks come last; for a chunk "
            "without video or audio use video_mask and audio_mask"
        )


class MirasolForConditionalGeneration(MirasolPreTrainedModel, GenerationMixin):
    """Mirasol3B: chunks of video and audio in, text out.

    Raises:
        UserError: text rows that are no multiple of the clips.
    """

    def __init__(self, config: MirasolConfig):
        super().__init__(config)
        self.chunk_encoder = ChunkEncoder(config)
        self.combiner = make_combiner(config)
        self.latent = CausalLatentModel(config)
        self.reconstruction = Reconstruction(config)
        self.text = TextDecoder(config)
        self.contrastive = ContrastiveSpace(config) if config.contrastive else None
        self.post_init()

    @classmethod
    def from_parts(
        cls,
        preset: str | MirasolConfig,
        *,
        image: str | PathLike | None = None,
        openmammut: str | PathLike | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        inflate_tubes: bool = False,
        resolution: int | None = None,
        allow_pickle: bool = False,
        seed: int = 0,
    ) -> "tuple[MirasolForConditionalGeneration, Any]":
        """A model that begins with other people's weights, and the `StartingReport` of what became of every tensor;
        arguments and errors are those of `mirasol.pretrained.assemble.assemble`."""
        # Reading files is not this room's work; the name is here because users look for it beside from_pretrained.
        from mirasol.pretrained.assemble import assemble

        return assemble(
            preset, image=image, openmammut=openmammut, tokenizer=tokenizer, inflate_tubes=inflate_tubes,
            resolution=resolution, allow_pickle=allow_pickle, seed=seed,
        )  # fmt: skip

    def set_image_size(self, image_size: int) -> None:
        """Makes this model take frames of `image_size` pixels; see `mirasol.model.resolution.set_image_size`."""
        set_image_size(self, image_size)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.text.embedding

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        self.text.embedding = embedding

    def get_output_embeddings(self) -> nn.Linear | None:
        """The output embedding where it is parted from the input's (`text.tied: false`)."""
        return self.text.output

    def set_output_embeddings(self, embedding: nn.Linear) -> None:
        self.text.output = embedding

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.chunk_encoder

    def num_params(self) -> dict[str, int]:
        """Parameters by component (vit, tubes, audio, ..., vocabulary); tied weights count once."""
        return count_parameters(self.named_parameters())

    def encode(
        self,
        video: Float[Tensor, "clip chunk frame 3 height width_px"],
        audio: Float[Tensor, "clip chunk mel_frame mel"],
        chunk_mask: Bool[Tensor, "clip chunk"],
        video_mask: Bool[Tensor, "clip chunk"],
        audio_mask: Bool[Tensor, "clip chunk"],
    ) -> MirasolEncoderOutput:
        """The time-aligned side: chunks → features → x → h. Padding chunks come last in a clip (`chunk_mask`).

        Raises:
            UserError: chunks of another shape than the config's, or padding before a real chunk.
        """
        check_padding(chunk_mask)
        check_chunks("video", video, self.config.video.chunk_shape)
        check_chunks("audio", audio, self.config.audio.chunk_shape)
        seen, heard = self.chunk_encoder(video, audio, video_mask & chunk_mask, audio_mask & chunk_mask)
        x = self.combiner(seen, heard)
        h = self.latent(x)
        latent_mask = chunk_mask[:, :, None].expand(h.shape[:3])
        return MirasolEncoderOutput(h.flatten(1, 2), latent_mask.flatten(1), x)

    def _encode_given(self, media: dict[str, Tensor | None]) -> MirasolEncoderOutput:
        """`encode` of its arguments by name, of which none may be missing."""
        missing = [name for name, value in media.items() if value is None]
        if missing:
            raise UserError(f"{', '.join(missing)} missing: give all that MirasolProcessor gives, or encoder_outputs")
        return self.encode(**media)

    def forward(
        self,
        video: Float[Tensor, "clip chunk frame 3 height width_px"] | None = None,
        audio: Float[Tensor, "clip chunk mel_frame mel"] | None = None,
        chunk_mask: Bool[Tensor, "clip chunk"] | None = None,
        video_mask: Bool[Tensor, "clip chunk"] | None = None,
        audio_mask: Bool[Tensor, "clip chunk"] | None = None,
        decoder_input_ids: Int[Tensor, "row token"] | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Int[Tensor, "row token"] | None = None,
        encoder_outputs: MirasolEncoderOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        decoder_inputs_embeds: Float[Tensor, "row token width"] | None = None,
        row_weights: Float[Tensor, " given"] | None = None,
        whole: GlobalBatch | None = None,
    ) -> MirasolOutput | tuple:
        """One pass. Text rows are the clips' questions in order: Q consecutive rows for each clip; they come as ids, or
        embedded as by `get_input_embeddings`.

        With `labels` (-100 everywhere but on target tokens) the three losses are computed, each for itself;
        `row_weights` then says how much the tokens of each row count in the text loss (mixed clips have rows of both).
        `whole` is the batch that the clips are a part of: the losses are then their shares of that batch's.

        Raises:
            UserError: text rows that are no multiple of the clips, labels without the media they are about, row weights
                without labels or not one for each row, or text given both as ids and embedded, or not at all.
        """
        media = {"video": video, "audio": audio, "chunk_mask": chunk_mask, "video_mask": video_mask,
                 "audio_mask": audio_mask}  # fmt: skip
        check_labels(labels, row_weights, media)
        if encoder_outputs is None:
            encoder_outputs = self._encode_given(media)
        h, x = encoder_outputs.latents, encoder_outputs.combined
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise UserError("give exactly one of decoder_input_ids and decoder_inputs_embeds")
        rows = len(decoder_input_ids if decoder_inputs_embeds is None else decoder_inputs_embeds)
        if rows % len(h):
            raise UserError(f"{rows} text rows for {len(h)} clips: give every clip as many prompts")

        cache = past_key_values  # an empty cache is falsy: ask for None
        if use_cache and cache is None:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        settings = self.config
        with_weights = settings.output_attentions if output_attentions is None else output_attentions
        with_hidden_states = settings.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden, layers = self.text(
            decoder_input_ids, decoder_attention_mask, encoder_outputs.last_hidden_state, encoder_outputs.latent_mask,
            cache, with_weights, embedded=decoder_inputs_embeds, with_hidden_states=with_hidden_states,
        )  # fmt: skip
        output = MirasolOutput(
            latents=h,
            combined=x,
            past_key_values=cache,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            decoder_attentions=layers.attentions or None,
            cross_attentions=layers.cross_attentions or None,
            decoder_hidden_states=layers.hidden_states or None,
        )
        if labels is None or not self.training:
            output.logits = self.text.logits(hidden)
        if labels is not None:
            self._add_losses(output, hidden, labels, row_weights, whole, **media)
        return_dict = settings.return_dict if return_dict is None else return_dict
        output = replace(output)  # anew, for its values stand in the order in which they were set: the loss comes first
        return output if return_dict else output.to_tuple()

    def image_text(
        self,
        images: Float[Tensor, "image 3 height width_px"],
        decoder_input_ids: Int[Tensor, "row token"],
        decoder_attention_mask: Int[Tensor, "row token"] | Bool[Tensor, "row token"] | None = None,
        labels: Int[Tensor, "row token"] | None = None,
        whole: GlobalBatch | None = None,
    ) -> MirasolImageTextOutput:
        """MaMMUT's two passes of the text decoder over images and a text for each, in the units of one video frame.

        Contrastive: the text read in both directions, without cross-attention, against the image. Generative, with
        `labels`: the text written token by token, with cross-attention to the image's features at the Combiner's
        width; the Combiner and the latent model have no part in it. With `whole`, the batch that these images are a
        part of, they meet the texts of all processes, and the losses are their shares of that batch's.

        Raises:
            UserError: a config without `contrastive` or without 2D patches, or another number of texts than of images.
        """
        if self.contrastive is None:
            raise UserError("contrastive=None: image_text needs a model made with contrastive={'width': ...}")
        if len(decoder_input_ids) != len(images):
            raise UserError(f"{len(decoder_input_ids)} texts for {len(images)} images: give every image one text")
        if decoder_attention_mask is None:
            decoder_attention_mask = torch.ones_like(decoder_input_ids)
        seen = self.chunk_encoder.image(images)
        is_real = decoder_attention_mask.bool()
        output = MirasolImageTextOutput(
            image_features=self.contrastive.image(seen),
            text_features=self.contrastive.text(self.text.read(decoder_input_ids, is_real), is_real),
            temperature=self.contrastive.temperature,
        )
        texts, place = output.text_features, {}
        if whole is not None:
            texts, place = whole.gather(texts), {"first": whole.first, "total": whole.totals["images"]}
        output.contrastive_loss = self.contrastive.loss(output.image_features, texts, **place)
        output.loss = self.config.loss_weights.contrastive * output.contrastive_loss
        if labels is not None:
            latents = self.chunk_encoder.project_image(seen)
            latent_mask = torch.ones(latents.shape[:2], dtype=torch.bool, device=latents.device)
            hidden, _ = self.text(decoder_input_ids, decoder_attention_mask, latents, latent_mask)
            if not self.training:
                output.logits = self.text.logits(hidden)
            output.text_loss = self._text_loss(hidden, labels, None, whole)
            output.loss = output.loss + self.config.loss_weights.text * output.text_loss
        return output

    def _text_loss(
        self,
        hidden: Float[Tensor, "row token width"],
        labels: Int[Tensor, "row token"],
        row_weights: Float[Tensor, " row"] | None = None,
        whole: GlobalBatch | None = None,
    ) -> Float[Tensor, ""]:
        """Each token is predicted from what the decoder gave for the one before; only targets meet the vocabulary."""
        is_target = labels[:, 1:] != IGNORED_LABEL
        targets = hidden[:, :-1][is_target], labels[:, 1:][is_target]
        weights = None if row_weights is None else row_weights[:, None].expand(is_target.shape)[is_target]
        smoothing = self.config.text.label_smoothing if self.training else 0.0
        return text_loss(
            *targets, self.text.logits, self.config.vocab_size, weights=weights, smoothing=smoothing,
            total=None if whole is None else whole.totals["text"],
        )  # fmt: skip

    def _add_losses(
        self,
        output: MirasolOutput,
        hidden: Float[Tensor, "row token width"],
        labels: Int[Tensor, "row token"],
        row_weights: Float[Tensor, " row"] | None,
        whole: GlobalBatch | None,
        video: Float[Tensor, "clip chunk frame 3 height width_px"],
        audio: Float[Tensor, "clip chunk mel_frame mel"],
        chunk_mask: Bool[Tensor, "clip chunk"],
        video_mask: Bool[Tensor, "clip chunk"],
        audio_mask: Bool[Tensor, "clip chunk"],
    ) -> None:
        """Writes each loss, the predictions it needed and the weighted sum into the output.

        `hidden` is the text decoder's output; what it looked at, x and h, stands in `output` already.
        """
        h, x = output.latents, output.combined
        output.text_loss = self._text_loss(hidden, labels, row_weights, whole)
        settings, weights = self.config.latent, self.config.loss_weights
        across = () if whole is None else (whole.totals["latent"], whole.add, whole.chunks)
        output.latent_loss = latent_loss(
            self.latent.predict_next(h), x, chunk_mask, video_mask, audio_mask, settings.distance, settings.target,
            *across,
        )  # fmt: skip
        output.loss = weights.text * output.text_loss + weights.latent * output.latent_loss
        self._add_reconstruction_losses(output, whole, video, audio, video_mask & chunk_mask, audio_mask & chunk_mask)

    def _add_reconstruction_losses(
        self,
        output: MirasolOutput,
        whole: GlobalBatch | None,
        video: Float[Tensor, "clip chunk frame 3 height width_px"],
        audio: Float[Tensor, "clip chunk mel_frame mel"],
        has_video: Bool[Tensor, "clip chunk"],
        has_audio: Bool[Tensor, "clip chunk"],
    ) -> None:
        settings, weights, model = self.config.reconstruction, self.config.loss_weights, self.reconstruction
        kind, totals = (settings.distance, settings.step), {} if whole is None else whole.totals
        patches, mel_patches = model(output.latents)
        # Masked before the loss: a NaN times zero would still be NaN.
        target = model.video_target(video.masked_fill(~has_video[:, :, None, None, None, None], 0.0))
        output.reconstruction = model.video(patches)
        output.video_loss = reconstruction_loss(patches, target, has_video, *kind, totals.get("video"))
        output.loss = output.loss + weights.video * output.video_loss
        if mel_patches is not None:
            target = model.audio_target(audio.masked_fill(~has_audio[:, :, None, None], 0.0))
            output.audio_reconstruction = model.audio(mel_patches)
            output.audio_loss = reconstruction_loss(mel_patches, target, has_audio, *kind, totals.get("audio"))
            output.loss = output.loss + weights.audio * output.audio_loss

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs) -> Tensor | ModelOutput:
        """Answers as token ids, prompt included; takes what `MirasolProcessor` gives, or `encoder_outputs` of
        `encode` in place of the media. Several prompts per clip share its latents."""
        media = {name: kwargs.pop(name, None) for name in ("video", "audio", "chunk_mask", "video_mask", "audio_mask")}
        media["video"] = inputs if inputs is not None else media["video"]
        for helper in ("assistant_model", "prompt_lookup_num_tokens"):
            if kwargs.get(helper) is not None:
                raise UserError(f"{helper} is not supported: leave it out, decoding takes one token at a time")
        encoded = kwargs.pop("encoder_outputs", None) or self._encode_given(media)
        if kwargs.get("decoder_input_ids") is None:
            raise UserError("generate needs decoder_input_ids: prompts as MirasolProcessor gives them")
        rows, clips = len(kwargs["decoder_input_ids"]), len(encoded.last_hidden_state)
        if rows % clips:
            raise UserError(f"{rows} prompts for {clips} clips: give every clip as many prompts")
        if rows != clips:
            encoded = MirasolEncoderOutput(**{k: v.repeat_interleave(rows // clips, 0) for k, v in encoded.items()})
        return super().generate(encoder_outputs=encoded, **kwargs)

    def stream(self, batch: int = 1, window: int | None = None) -> MirasolStream:
        """Clips that come in chunk by chunk: see `MirasolStream`.

        Raises:
            UserError: the model is in training mode, or `batch` or `window` is below 1.
        """
        return MirasolStream(self, batch, window)

    @torch.no_grad()
    def score(
        self,
        encoder_outputs: MirasolEncoderOutput,
        decoder_input_ids: Tensor,
        decoder_attention_mask: Tensor | None,
        candidate_ids: Tensor,
        candidate_mask: Tensor,
    ) -> MirasolCandidateScores:
        """Log-likelihood of every candidate answer to a prompt, its <eos> included: nothing is generated. Takes
        `encode`'s or a stream's output, and what `MirasolProcessor.candidates` gives:

        decoder_input_ids, decoder_attention_mask: Q prompts for each clip in order, int [row, token]
        candidate_ids, candidate_mask: int and bool [row, candidate, target], padded at the right

        Raises:
            UserError: rows that are no multiple of the clips, shapes that do not fit, a row without any candidate or
                candidate without a token before its <eos>.
        """
        return score_candidates(
            self.text, encoder_outputs, decoder_input_ids, decoder_attention_mask, candidate_ids, candidate_mask,
            self.config.eos_token_id,
        )  # fmt: skip

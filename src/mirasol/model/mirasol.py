"""The model: chunks of video and audio in, text out. `forward` reads like the paper's figure."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, EncoderDecoderCache

from mirasol.config.components import count_parameters
from mirasol.config.model import MirasolConfig
from mirasol.config.parts import IGNORED_LABEL
from mirasol.errors import UserError
from mirasol.model.combiner import make_combiner
from mirasol.model.contrastive import ContrastiveSpace
from mirasol.model.encoder import ChunkEncoder
from mirasol.model.latent import make_latent_model
from mirasol.model.losses import (
    BatchTotals,
    NoPeers,
    Peers,
    contrastive_loss,
    latent_loss,
    reconstruction_loss,
    text_loss,
)
from mirasol.model.masks import mark_latents
from mirasol.model.outputs import (
    CACHE,
    MirasolCandidateScores,
    MirasolChunkFeatures,
    MirasolEncoderOutput,
    MirasolImageTextOutput,
    MirasolLosses,
    MirasolOutput,
    Requested,
    check_arguments,
    check_media,
    check_media_type,
    check_padding,
    to_boolean_mask,
)
from mirasol.model.reconstruction import Reconstruction
from mirasol.model.scoring import score_candidates
from mirasol.model.streaming import MirasolStream
from mirasol.model.text import TextDecoder
from mirasol.model.token_turing import process_stack
from mirasol.model.transformer import set_dropout_rates


class MirasolNetwork:
    """Mirasol3B: an autoregressive model over chunks of video and audio, and one over text that attends to it.

    All of its mathematics, for a class that is a `torch.nn.Module` too: `MirasolForConditionalGeneration`, the model of
    transformers, or `MirasolAnswerer`, which imports none of its modelling.

    peers: the processes that share a batch whose totals `forward` is given; set by distributed training
    """

    def make_parts(self, config: MirasolConfig) -> None:
        """Makes the modules that the network consists of."""
        self.chunk_encoder = ChunkEncoder(config)
        self.combiner = make_combiner(config)
        self.latent = make_latent_model(config)
        self.reconstruction = Reconstruction(config)
        self.text = TextDecoder(config)
        self.contrastive = ContrastiveSpace(config) if config.contrastive else None
        self.peers: Peers = NoPeers()

    def compute_features(
        self,
        video: Float[Tensor, "clip chunk frame 3 height width_px"],
        audio: Float[Tensor, "clip chunk mel_frame mel"],
        video_mask: Bool[Tensor, "clip chunk"],
        audio_mask: Bool[Tensor, "clip chunk"],
    ) -> MirasolChunkFeatures:
        """What `forward` takes as `features`, in place of video and audio: all that the model computes of a chunk
        before the Combiner. It changes only with the weights of the chunk encoder, so frozen ones need it once.

        Raises:
            UserError: integers, or chunks of another shape than the config's.
        """
        check_media(video, audio, self.config)
        features = self.chunk_encoder.encode_chunks(video, audio, video_mask, audio_mask)
        return MirasolChunkFeatures(*features, *self._make_targets(video, audio, video_mask, audio_mask))

    def encode(
        self,
        video: Float[Tensor, "clip chunk frame 3 height width_px"] | None,
        audio: Float[Tensor, "clip chunk mel_frame mel"] | None,
        chunk_mask: Bool[Tensor, "clip chunk"],
        video_mask: Bool[Tensor, "clip chunk"],
        audio_mask: Bool[Tensor, "clip chunk"],
        features: MirasolChunkFeatures | None = None,
    ) -> MirasolEncoderOutput:
        """The time-aligned side: chunks → features → x → h. Padding chunks come last in a clip (`chunk_mask`).

        features: of `compute_features`, in place of video and audio

        Raises:
            UserError: integers, chunks of another shape than the config's, or padding before a real chunk.
        """
        check_padding(chunk_mask)
        masks = video_mask & chunk_mask, audio_mask & chunk_mask
        if features is None:
            check_media(video, audio, self.config)
            chunks = self.chunk_encoder(video, audio, *masks)
        else:
            chunks = self.chunk_encoder.fill_missing(features.video, features.audio, *masks)
        # C: f_1..f_t → x_t, m features per chunk (supplement, section 3 and Figure 1).
        x = self.combiner(*chunks)
        # "Causal latent model" (section 4): h_t depends on x_1..x_t.
        h = self.latent(x)
        # The text decoder attends to the m latents of every real chunk: 16 x 32 = 512 in the paper.
        latent_mask = mark_latents(chunk_mask, h.shape[2], self.config.text.window)
        return MirasolEncoderOutput(h.flatten(1, 2), latent_mask, x)

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
        batch_totals: BatchTotals | None = None,
        prompt_input_ids: Int[Tensor, "row prompt"] | None = None,
        prompt_attention_mask: Int[Tensor, "row prompt"] | None = None,
        features: MirasolChunkFeatures | None = None,
        cache: EncoderDecoderCache | None = None,
    ) -> MirasolOutput | tuple:
        """One pass over clips and text rows, Q consecutive rows for each clip, as ids or embedded.

        labels: -100 everywhere but on target tokens; with them the losses are computed. row_weights: the weight of each
        row's tokens in the text loss (mixed clips have rows of both). batch_totals: of the batch that these clips are a
        part of; each loss is then its share of that batch's. prompt_input_ids, prompt_attention_mask: read by
        `generate` alone, for trainers that give both the same batch. features: of `compute_features`, in place of video
        and audio. cache: `past_key_values` by the name that transformers gives it since 5.24.

        Raises:
            UserError: text rows that are not a multiple of the clips, labels without the media they are about, row
                weights without labels or not one for each row, text given both as ids and embedded, or not at all, or
                two caches.
        """
        media = {"video": video, "audio": audio, "chunk_mask": chunk_mask, "video_mask": video_mask,
                 "audio_mask": audio_mask}  # fmt: skip
        text = {"ids": decoder_input_ids, "embedded": decoder_inputs_embeds}
        check_arguments(media, features, encoder_outputs, **text, labels=labels, row_weights=row_weights)
        requested = self.read_requests(output_attentions, output_hidden_states, return_dict)
        cache = self.make_cache(past_key_values, cache, use_cache)

        # Time-aligned: video and audio, chunk by chunk, to latents h.
        encoded = self.encode(**media, features=features) if encoder_outputs is None else encoder_outputs
        h, x = encoded.latents, encoded.combined
        # Contextual: the text decoder cross-attends to all h.
        hidden, layers = self.text(
            **text, attention_mask=to_boolean_mask(decoder_attention_mask), latents=encoded.last_hidden_state,
            latent_mask=encoded.latent_mask, cache=cache, with_weights=requested.attentions,
            with_hidden_states=requested.hidden_states,
        )  # fmt: skip
        skips_logits = labels is not None and self.training  # only target tokens need any, and the text loss has those
        logits = None if skips_logits else self.text.logits(hidden)
        losses = MirasolLosses()
        if labels is not None:
            losses = self.compute_losses(h, x, hidden, labels, row_weights, batch_totals, features, **media)

        output = MirasolOutput(
            **losses,
            logits=logits,
            latents=h,
            combined=x,
            decoder_attentions=layers.attentions or None,
            cross_attentions=layers.cross_attentions or None,
            decoder_hidden_states=layers.hidden_states or None,
            **{CACHE: cache},
            encoder_last_hidden_state=encoded.last_hidden_state,
        )
        return output if requested.as_dict else output.to_tuple()

    def compute_losses(
        self,
        h: Float[Tensor, "clip chunk m width"],
        x: Float[Tensor, "clip chunk m width"],
        hidden: Float[Tensor, "row token text_width"],
        labels: Int[Tensor, "row token"],
        row_weights: Float[Tensor, " row"] | None,
        batch_totals: BatchTotals | None,
        features: MirasolChunkFeatures | None,
        video: Float[Tensor, "clip chunk frame 3 height width_px"] | None,
        audio: Float[Tensor, "clip chunk mel_frame mel"] | None,
        chunk_mask: Bool[Tensor, "clip chunk"],
        video_mask: Bool[Tensor, "clip chunk"],
        audio_mask: Bool[Tensor, "clip chunk"],
    ) -> MirasolLosses:
        """Text, causal latent and reconstruction losses, their weighted sum (supplement, Table 1b), and predictions.

        h, x: latents and combined features. hidden: the text decoder's output. batch_totals, features: as in `forward`.
        """
        settings, weights, model = self.config.latent, self.config.loss_weights, self.reconstruction
        totals = {} if batch_totals is None else dataclasses.asdict(batch_totals)
        across = {} if batch_totals is None else {"peers": self.peers, "chunks": batch_totals.chunks}
        losses = MirasolLosses(text_loss=self._compute_text_loss(hidden, labels, row_weights, batch_totals))
        # "All losses are given equal weight during pretraining"; fine-tuning has the text's "10-fold" (section 4).
        losses.loss = weights.text * losses.text_loss
        predicted = self.latent.predict_next(h)
        if predicted is not None:
            losses.latent_loss = latent_loss(
                predicted, x, chunk_mask, video_mask, audio_mask,
                settings.distance, settings.target, totals.get("latent"), **across,
            )  # fmt: skip
            losses.loss = losses.loss + weights.latent * losses.latent_loss

        has_video, has_audio = video_mask & chunk_mask, audio_mask & chunk_mask
        reading = (self.config.reconstruction.distance, self.config.reconstruction.step)
        patches, mel_patches = model(h)
        if features is None:
            target, mel_target = self._make_targets(video, audio, has_video, has_audio)
        else:
            target, mel_target = features.video_target, features.audio_target
        losses.reconstruction = model.video(patches)
        losses.video_loss = reconstruction_loss(patches, target, has_video, *reading, totals.get("video"))
        losses.loss = losses.loss + weights.video * losses.video_loss
        if mel_patches is not None:
            losses.audio_reconstruction = model.audio(mel_patches)
            losses.audio_loss = reconstruction_loss(mel_patches, mel_target, has_audio, *reading, totals.get("audio"))
            losses.loss = losses.loss + weights.audio * losses.audio_loss
        return losses

    def _make_targets(
        self,
        video: Float[Tensor, "clip chunk frame 3 height width_px"],
        audio: Float[Tensor, "clip chunk mel_frame mel"],
        has_video: Bool[Tensor, "clip chunk"],
        has_audio: Bool[Tensor, "clip chunk"],
    ) -> tuple[Float[Tensor, "clip chunk patch value"], Float[Tensor, "clip chunk mel_patch mel_value"] | None]:
        """The patches that are to be reconstructed of every chunk, of its video and perhaps of its spectrogram."""
        # Masked before the loss: a NaN times zero would still be NaN.
        target = self.reconstruction.video_target(video.masked_fill(~has_video[:, :, None, None, None, None], 0.0))
        if not self.config.reconstruction.audio:
            return target, None
        return target, self.reconstruction.audio_target(audio.masked_fill(~has_audio[:, :, None, None], 0.0))

    def _compute_text_loss(
        self,
        hidden: Float[Tensor, "row token width"],
        labels: Int[Tensor, "row token"],
        row_weights: Float[Tensor, " row"] | None = None,
        batch_totals: BatchTotals | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of each target token, predicted from the token before; no other token has logits."""
        is_target = labels[:, 1:] != IGNORED_LABEL
        targets = hidden[:, :-1][is_target], labels[:, 1:][is_target]
        weights = None if row_weights is None else row_weights[:, None].expand(is_target.shape)[is_target]
        # "Label smoothing of 0.2" is a matter of fine-tuning (section 4): evaluation compares plain losses.
        smoothing = self.config.text.label_smoothing if self.training else 0.0
        total = None if batch_totals is None else batch_totals.text
        return text_loss(
            *targets, self.text.logits, self.config.vocab_size, weights=weights, smoothing=smoothing, total=total
        )

    def image_text(
        self,
        images: Float[Tensor, "image 3 height width_px"],
        decoder_input_ids: Int[Tensor, "row token"],
        decoder_attention_mask: Int[Tensor, "row token"] | Bool[Tensor, "row token"] | None = None,
        labels: Int[Tensor, "row token"] | None = None,
        batch_totals: BatchTotals | None = None,
    ) -> MirasolImageTextOutput:
        """MaMMUT's two passes of the text decoder over images, in the units of one video frame, and a text for each
        (supplement, section 4, "Model Pretraining").

        Contrastive: the text, read without a causal mask and without cross-attention, against the image. Generative,
        with `labels`: the text, with cross-attention to the image's features at the Combiner's width; Combiner and
        latent model are not used. With `batch_totals`, those of the batch that these images are a part of, they are
        compared with the texts of all `peers`, and the losses are their shares of that batch's.

        Raises:
            UserError: a config without `contrastive` or without 2D patches, or another number of texts than of images.
        """
        if self.contrastive is None:
            raise UserError("contrastive=None: image_text needs a model made with contrastive={'width': ...}")
        if len(decoder_input_ids) != len(images):
            raise UserError(f"{len(decoder_input_ids)} texts for {len(images)} images: give every image one text")
        check_media_type("images", images)
        if decoder_attention_mask is None:
            decoder_attention_mask = torch.ones_like(decoder_input_ids)
        features = self.chunk_encoder.image(images)
        is_real = decoder_attention_mask.bool()
        hidden, _ = self.text(decoder_input_ids, is_real, None, None)
        found = self.contrastive(features, hidden, is_real)
        output = MirasolImageTextOutput(
            image_features=found.images, text_features=found.texts, temperature=found.temperature
        )
        texts, first, total = found.texts, 0, None
        if batch_totals is not None:
            texts, first, total = self.peers.gather(texts), self.peers.rank * len(images), batch_totals.images
        output.contrastive_loss = contrastive_loss(
            found.images, texts, found.temperature, found.bias, self.config.contrastive.gamma, first, total
        )
        output.loss = self.config.loss_weights.contrastive * output.contrastive_loss
        if labels is not None:
            latents = self.chunk_encoder.project_image(features)
            latent_mask = torch.ones(latents.shape[:2], dtype=torch.bool, device=latents.device)
            hidden, _ = self.text(decoder_input_ids, decoder_attention_mask, latents, latent_mask)
            if not self.training:
                output.logits = self.text.logits(hidden)
            output.text_loss = self._compute_text_loss(hidden, labels, None, batch_totals)
            output.loss = output.loss + self.config.loss_weights.text * output.text_loss
        return output

    def stream(self, batch: int = 1, window: int | None = None) -> MirasolStream:
        """Starts clips that arrive chunk by chunk: see `MirasolStream`.

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
        """Log-likelihood of every candidate answer to a prompt, its <eos> included; nothing is generated. Takes the
        output of `encode` or of a stream, and what `MirasolProcessor.candidates` gives:

        decoder_input_ids, decoder_attention_mask: Q prompts for each clip in order, int [row, token]
        candidate_ids, candidate_mask: int and bool [row, candidate, target], padded at the right

        Raises:
            UserError: rows that are not a multiple of the clips, shapes that do not fit, a row without any candidate or
                candidate without a token before its <eos>.
        """
        return score_candidates(
            self.text, encoder_outputs, decoder_input_ids, decoder_attention_mask, candidate_ids, candidate_mask,
            self.config.eos_token_id,
        )  # fmt: skip

    def set_image_size(self, image_size: int) -> None:
        """Changes the model to frames of `image_size` pixels: learned positions of the 2D patches, and of the video
        tokens in the Combiner (with `concat`, in the latent model, whose m follows), are interpolated (bicubic); all
        other weights are unchanged. Optimizer state of the interpolated tables is no longer valid.

        Raises:
            UserError: tubes that do not fit such frames, or a Combiner that does not fit so many tokens.
        """
        old = self.config.video
        self.config.set_image_size(image_size)
        new = self.config.video
        with torch.no_grad():
            self.chunk_encoder.tubes.resize(new)
            self.combiner.resize(self.config, old, new)
            self.latent.resize(self.config, old, new)

    def apply_dropout_rates(self) -> None:
        """Sets the rates of every dropout and layer drop to those in `config`, which may have changed since the model
        was built."""
        config, encoder = self.config, self.chunk_encoder
        combiner = process_stack(config) if config.combiner.kind == "ttm" else config.combiner.stack
        for part, stack in (
            (encoder.vit, config.vit),
            (encoder.audio_adapter, config.audio.adapter),
            (self.combiner, combiner),
            (self.latent, config.latent.stack),
            (self.reconstruction, config.reconstruction.stack),
            (self.text, config.text.stack),
        ):
            set_dropout_rates(part, stack)

    def num_params(self) -> dict[str, int]:
        """Parameters by component (vit, tubes, audio, ..., vocabulary); tied weights count once."""
        return count_parameters(self.named_parameters())

    def read_requests(self, attentions: bool | None, hidden_states: bool | None, return_dict: bool | None) -> Requested:
        """The caller's choices, with the config's in place of None."""
        config = self.config
        return Requested(
            config.output_attentions if attentions is None else attentions,
            config.output_hidden_states if hidden_states is None else hidden_states,
            config.return_dict if return_dict is None else return_dict,
        )

    def make_cache(
        self, given: EncoderDecoderCache | None, renamed: EncoderDecoderCache | None, use_cache: bool | None
    ) -> EncoderDecoderCache | None:
        """The caller's cache by either of its names, or a new one where the caller wants one. (An empty one is falsy.)
        Raises UserError for two of them."""
        if given is not None and renamed is not None and given is not renamed:
            raise UserError("past_key_values and cache are two names for one thing: give one of them")
        cache = given if renamed is None else renamed
        if use_cache and cache is None:
            return EncoderDecoderCache(DynamicCache(), DynamicCache())
        return cache


class SkipInitialisation(TorchFunctionMode):
    """Leaves out `torch.nn.init`. On the meta device there are no values to draw, and torch 2.13 imports its compiler
    to draw none."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


class MirasolAnswerer(MirasolNetwork, nn.Module):
    """The network by itself, to answer with: it is imported in half the time of transformers' model."""

    def __init__(self, config: MirasolConfig):
        super().__init__()
        self.config = config
        self.make_parts(config)

    @classmethod
    def without_values(cls, config: MirasolConfig) -> "MirasolAnswerer":
        """The network on the meta device."""
        with torch.device("meta"), SkipInitialisation():
            return cls(config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.text.embedding.weight.device

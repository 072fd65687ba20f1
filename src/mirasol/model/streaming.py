"""Streaming: a clip arrives chunk by chunk, each chunk is encoded once, and questions can be asked at any time."""

import torch
from torch import Tensor, nn

from mirasol.errors import UserError
from mirasol.model.cache import ChunkBuffer, find_narrowest
from mirasol.model.outputs import MirasolEncoderOutput, check_media_type


class MirasolStream:
    """Encodes `batch` clips one chunk at a time, with a model in evaluation mode and without gradients.

    After every chunk `encoder_outputs` equals the output of `encode` for the chunks so far. With a `window` it equals
    the last `window` chunks of `encode`'s output for a config whose `combiner.window` and `latent.window` are at most
    `window`: each layer attends to that many chunks, so that n layers still reach n times as far back.

    With `text.window` in the config only the latents of that many last chunks are kept, for no others are asked.

    The state grows with every chunk unless there is a window (`state_bytes`). The Token Turing Machine's never grows,
    but the latent model's does.

    Raises:
        UserError: the model is in training mode, or `batch` or `window` is below 1.
    """

    def __init__(self, model: nn.Module, batch: int = 1, window: int | None = None):
        for name, value in (("batch", batch), ("window", window)):
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        self.model, self.batch, self.window = model, batch, window
        self._check_mode()
        self.combiner_state = model.combiner.begin(batch, window)
        self.latent_state = model.latent.begin(window)
        kept = find_narrowest(window, model.config.text.window)  # nobody asks about the latents of other chunks
        self._h, self._x = ChunkBuffer(kept), ChunkBuffer(kept)

    @property
    def chunks(self) -> int:
        """Number of chunks appended so far, those outside the window included."""
        return self._h.chunks

    @property
    def state_bytes(self) -> dict[str, int]:
        """Bytes of state by part: the Combiner's cache, the latent model's, and the latents that questions attend to.
        Buffers that grow are up to twice as large as their contents."""
        return {
            "combiner": self.combiner_state.nbytes,
            "latent": self.latent_state.nbytes,
            "latents": self._h.nbytes + self._x.nbytes,
        }

    @torch.no_grad()
    def append(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        video_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
    ) -> None:
        """Encodes one more chunk of every clip, in the units of `MirasolProcessor`. A chunk may have neither modality.

        video: [batch, frame, 3, height, width]; audio: [batch, spectrogram frame, mel]; None when no clip has it
        video_mask, audio_mask: bool [batch], False where a clip lacks it

        Raises:
            UserError: the model is in training mode, or shapes that are not those of a chunk.
        """
        self._check_mode()
        config, encoder = self.model.config, self.model.chunk_encoder
        # The chunk encoder has no past; the Combiner and the latent model keep theirs in their states.
        if video is None and audio is None:  # nothing to encode, so that a stream which has lost chunks catches up
            video_features, audio_features = encoder.missing(self.batch, config.video.tokens, config.audio.tokens)
        else:
            video, video_mask = self._prepare("video", video, video_mask, config.video.chunk_shape)
            audio, audio_mask = self._prepare("audio", audio, audio_mask, config.audio.chunk_shape)
            video_features, audio_features = encoder(video, audio, video_mask, audio_mask)
        x = self.model.combiner(video_features, audio_features, self.combiner_state)
        self._h.append(self.model.latent(x, self.latent_state)[:, 0])
        self._x.append(x[:, 0])

    @property
    def encoder_outputs(self) -> MirasolEncoderOutput:
        """The chunks so far, or those in the window, for `generate`, `forward` and `score`.

        Raises:
            UserError: before the first chunk.
        """
        if not self.chunks:
            raise UserError("the stream is empty: append a chunk before asking")
        # Oldest first, as `encode` gives them; a ring buffer is not in order.
        h, x = self._h.in_order(), self._x.in_order()
        latent_mask = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        return MirasolEncoderOutput(h, latent_mask, x.unflatten(1, (self._x.kept, -1)))

    def _check_mode(self) -> None:
        if self.model.training:
            raise UserError("a model in training mode cannot stream, because of dropout and masking: call model.eval()")

    def _prepare(
        self, name: str, chunk: Tensor | None, mask: Tensor | None, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """One modality with a chunk axis of length 1, and its mask."""
        expected = (self.batch, *shape)
        if chunk is None:
            chunk = torch.zeros(expected, dtype=self.model.dtype, device=self.model.device)
            mask = torch.zeros(self.batch, dtype=torch.bool)
        check_media_type(name, chunk)
        if chunk.shape != expected:
            raise UserError(f"{name} of shape {tuple(chunk.shape)}: one chunk of this stream is {expected}")
        mask = torch.ones(self.batch, dtype=torch.bool) if mask is None else mask
        if mask.shape != expected[:1]:
            raise UserError(f"{name}_mask of shape {tuple(mask.shape)}: one chunk of this stream has {expected[:1]}")
        return chunk[:, None], mask[:, None].to(chunk.device)

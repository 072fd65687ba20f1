"""A clip that comes in chunk by chunk: each chunk is encoded once, and questions can be asked at any moment."""

import torch
from torch import Tensor, nn

from mirasol.errors import UserError
from mirasol.model.cache import ChunkBuffer
from mirasol.model.outputs import MirasolEncoderOutput


class MirasolStream:
    """`batch` clips of a model in evaluation mode, one chunk each at a time. No gradients.

    After every chunk `encoder_outputs` is what `encode` gives for the chunks so far. With a `window` it is the last
    `window` chunks of what `encode` gives when `combiner.window` and `latent.window` of the config are at most
    `window`: each layer sees that many chunks, so that a network of n layers still knows of n times as many.

    What is kept grows with every chunk unless there is a window; that of the Token Turing Machine never grows, but
    the latent model's does. `state_bytes` tells.

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
        self._h, self._x = ChunkBuffer(window), ChunkBuffer(window)

    @property
    def chunks(self) -> int:
        """How many chunks came in, those outside the window included."""
        return self._h.chunks

    @property
    def state_bytes(self) -> dict[str, int]:
        """Bytes kept by part: the Combiner's past, the latent model's, and the latents that questions are asked of.
        Rooms that grow are up to twice as large as what they hold."""
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
        """Takes in one chunk of every clip, in the units that `MirasolProcessor` gives. A chunk with neither modality
        is a chunk too.

        video: [batch, frame, 3, height, width]; audio: [batch, spectrogram frame, mel]; None when no clip has it
        video_mask, audio_mask: bool [batch], False where a clip lacks it

        Raises:
            UserError: the model is in training mode, or shapes that are not those of a chunk.
        """
        self._check_mode()
        settings = self.model.config
        video, video_mask = self._chunk("video", video, video_mask, settings.video.chunk_shape)
        audio, audio_mask = self._chunk("audio", audio, audio_mask, settings.audio.chunk_shape)
        seen, heard = self.model.chunk_encoder(video, audio, video_mask, audio_mask)
        x = self.model.combiner.step(seen, heard, self.combiner_state)
        self._h.append(self.model.latent.step(x, self.latent_state)[:, 0])
        self._x.append(x[:, 0])

    @property
    def encoder_outputs(self) -> MirasolEncoderOutput:
        """The chunks so far, or those in the window, for `generate`, `forward` and `score`.

        Raises:
            UserError: before the first chunk.
        """
        if not self.chunks:
            raise UserError("nothing was streamed yet: append a chunk before asking")
        h, x = self._h.in_order(), self._x.in_order()
        there = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        return MirasolEncoderOutput(h, there, x.unflatten(1, (self._x.kept, -1)))

    def _check_mode(self) -> None:
        if self.model.training:
            raise UserError("a model in training mode cannot stream, for dropout and masking differ: call model.eval()")

    def _chunk(
        self, name: str, chunk: Tensor | None, mask: Tensor | None, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """One modality with an axis of one chunk, and its mask."""
        expected = (self.batch, *shape)
        if chunk is None:
            chunk = torch.zeros(expected, dtype=self.model.dtype, device=self.model.device)
            mask = torch.zeros(self.batch, dtype=torch.bool)
        if chunk.shape != expected:
            raise UserError(f"{name} of shape {tuple(chunk.shape)}: one chunk of this stream is {expected}")
        mask = torch.ones(self.batch, dtype=torch.bool) if mask is None else mask
        if mask.shape != expected[:1]:
            raise UserError(f"{name}_mask of shape {tuple(mask.shape)}: one chunk of this stream has {expected[:1]}")
        return chunk[:, None], mask[:, None].to(chunk.device)

"""Reconstruction of a chunk's video, and as an option of its spectrogram, from the latents up to a chunk.

The paper's "video reconstruction model" (supplement, section 4, "Model Details") is a Transformer of the Combiner's
size. Of the target the supplement says nothing: its size and frames, the distance, and whether h_t gives chunk t + 1 or
t are fields of `reconstruction`.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mirasol.config.model import MirasolConfig
from mirasol.model.transformer import Stack


class Reconstruction(nn.Module):
    """A Transformer over h_t and one learned query per patch; the queries' outputs are the patches of chunk t + 1, or
    of chunk t with `step: same`.

    The paper reconstructs video alone. With `reconstruction.audio` the same Transformer has queries for the patches of
    the log-mel spectrogram too.
    """

    def __init__(self, config: MirasolConfig):
        super().__init__()
        settings, audio = config.reconstruction, config.audio
        width = settings.stack.width
        self.patch, self.grid = settings.patch, settings.grid(config.video.frames_per_chunk)
        # The queries' learned vectors are also their positions.
        self.queries = nn.Parameter(torch.empty(self.grid[0] * self.grid[1] * self.grid[2], width))
        self.stack = Stack(settings.stack)
        self.pixels = nn.Linear(width, 3 * self.patch[0] * self.patch[1] * self.patch[2])
        self.mel_patch = audio.patch
        self.mel_grid = audio.spectrogram_frames // audio.patch[0], audio.num_mel_bins // audio.patch[1]
        self.audio_queries = self.mels = None
        if settings.audio:
            self.audio_queries = nn.Parameter(torch.empty(audio.tokens, width))
            self.mels = nn.Linear(width, audio.patch[0] * audio.patch[1])

    def forward(
        self, h: Float[Tensor, "batch chunk m width"]
    ) -> tuple[Float[Tensor, "batch chunk patch value"], Float[Tensor, "batch chunk mel_patch mel_value"] | None]:
        """Patches of the video and, with `reconstruction.audio`, of the spectrogram."""
        count = len(self.queries)
        queries = self.queries if self.audio_queries is None else torch.cat([self.queries, self.audio_queries])
        # Each chunk is reconstructed from its own h, which depends on all earlier chunks: [clip · chunk, token].
        tokens = torch.cat([h.flatten(0, 1), queries.to(h).expand(len(h) * h.shape[1], -1, -1)], dim=1)
        outputs = self.stack(tokens, last=len(queries)).unflatten(0, h.shape[:2])
        if self.mels is None:
            return self.pixels(outputs), None
        return self.pixels(outputs[:, :, :count]), self.mels(outputs[:, :, count:])

    def video(
        self, patches: Float[Tensor, "batch chunk patch value"]
    ) -> Float[Tensor, "batch chunk frame 3 height width_px"]:
        """Frames assembled from video patches."""
        (t, y, x), (pt, py, px) = self.grid, self.patch
        pixels = patches.unflatten(-1, (pt, 3, py, px)).unflatten(2, (t, y, x)).permute(0, 1, 2, 5, 6, 3, 7, 4, 8)
        return pixels.reshape(*patches.shape[:2], t * pt, 3, y * py, x * px)

    def audio(self, patches: Float[Tensor, "batch chunk patch value"]) -> Float[Tensor, "batch chunk mel_frame mel"]:
        """The log-mel spectrogram assembled from audio patches."""
        mel = patches.unflatten(-1, self.mel_patch).unflatten(2, self.mel_grid).transpose(3, 4)
        return mel.flatten(4, 5).flatten(2, 3)

    def video_target(
        self, video: Float[Tensor, "batch chunk frame 3 height width_px"]
    ) -> Float[Tensor, "batch chunk patch value"]:
        """Patches of the video, averaged to the frames and the image size of the reconstruction."""
        (t, y, x), (pt, py, px) = self.grid, self.patch
        # Fewer frames first, then fewer pixels: averaging commutes, and so there is less to interpolate.
        if video.shape[2] != t * pt:
            video = video.unflatten(2, (t * pt, -1)).mean(dim=3)
        if video.shape[-2:] != (y * py, x * px):
            small = F.interpolate(video.flatten(0, 2), size=(y * py, x * px), mode="area")
            video = small.unflatten(0, video.shape[:3])
        # [batch, chunk, patch, (frame, colour, row, column)], the order of `pixels`' outputs.
        cells = video.unflatten(5, (x, px)).unflatten(4, (y, py)).unflatten(2, (t, pt))
        return cells.permute(0, 1, 2, 5, 7, 3, 4, 6, 8).flatten(5).flatten(2, 4)

    def audio_target(
        self, audio: Float[Tensor, "batch chunk mel_frame mel"]
    ) -> Float[Tensor, "batch chunk patch value"]:
        """Patches of the log-mel spectrogram, in the order of the chunk encoder's."""
        (t, f), (pt, pf) = self.mel_grid, self.mel_patch
        return audio.unflatten(3, (f, pf)).unflatten(2, (t, pt)).transpose(3, 4).flatten(4).flatten(2, 3)

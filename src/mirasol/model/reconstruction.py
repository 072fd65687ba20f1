"""Reconstruction of the next chunk's video from the latents of the chunks so far."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mirasol.config import MirasolConfig
from mirasol.model.transformer import Stack


class VideoReconstruction(nn.Module):
    """h_t and one learned query per patch go through a Transformer; the queries' outputs are chunk t+1's pixels."""

    def __init__(self, config: MirasolConfig):
        super().__init__()
        self.size, self.patch = (
            config.reconstruction.image_size,
            config.reconstruction.patch,
        )
        frames, side = config.video.frames_per_chunk, self.size
        self.grid = (
            frames // self.patch[0],
            side // self.patch[1],
            side // self.patch[2],
        )
        width = config.reconstruction.stack.width
        self.queries = nn.Parameter(torch.empty(self.grid[0] * self.grid[1] * self.grid[2], width))
        self.stack = Stack(config.reconstruction.stack)
        self.pixels = nn.Linear(width, 3 * self.patch[0] * self.patch[1] * self.patch[2])

    def forward(self, h: Float[Tensor, "batch chunk m width"]) -> Float[Tensor, "batch chunk frame 3 side side"]:
        batch, chunks, m, _ = h.shape
        count = self.queries.shape[0]
        queries = self.queries.to(h).expand(batch * chunks, -1, -1)
        wanted = torch.arange(m, m + count, device=h.device)
        pixels = self.pixels(self.stack(torch.cat([h.flatten(0, 1), queries], dim=1), queries=wanted))
        t, y, x = self.grid
        pt, py, px = self.patch
        pixels = pixels.view(batch, chunks, t, y, x, pt, 3, py, px).permute(0, 1, 2, 5, 6, 3, 7, 4, 8)
        return pixels.reshape(batch, chunks, t * pt, 3, y * py, x * px)

    def target(
        self, video: Float[Tensor, "batch chunk frame 3 height width_px"]
    ) -> Float[Tensor, "batch chunk frame 3 side side"]:
        """The video at the reconstruction's size (area-averaged)."""
        if video.shape[-1] == self.size:
            return video
        small = F.interpolate(video.flatten(0, 2), size=(self.size, self.size), mode="area")
        return small.unflatten(0, video.shape[:3])

"""Video tubes and audio patches: from pixels and spectrograms to tokens, and the tokens' positions.

The paper's video input is "convolutional tubes" of 1.5M parameters (supplement, section 4, "Model Details"), after
TubeViT (arXiv 2212.03229). TubeViT's own set of tubes does not fit chunks of 8 frames; the presets' set is the reading
that has the 1.5M parameters.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mirasol.config.parts import AudioConfig, TubeConfig, VideoConfig
from mirasol.errors import UserError
from mirasol.model.transformer import sinusoid


def tube_centres(tube: TubeConfig, video: VideoConfig, device: torch.device | None = None) -> Float[Tensor, "token 3"]:
    """Centre (t, y, x) of every tube of one kind, in frames and pixels, in the order of its convolution's outputs."""
    # A centre lies between two pixels where the kernel is even, hence the half steps.
    axes = [
        offset + stride * torch.arange(count, dtype=torch.float32, device=device) + (kernel - 1) / 2
        for count, kernel, stride, offset in zip(
            tube.grid(video.frames_per_chunk, video.image_size),
            tube.kernel,
            tube.stride,
            tube.offset,
            strict=True,
        )
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def centre_code(centres: Float[Tensor, "token 3"], width: int) -> Float[Tensor, "token width"]:
    """TubeViT's fixed position code: width // 6 frequencies for sin and cos of each of t, y, x, then zeros."""
    # Widths of the paper's ViTs, 1280 and 1024, do not divide by 6.
    code = sinusoid(centres, 2 * (width // 6)).flatten(-2)
    return F.pad(code, (0, width - code.shape[-1]))


def resize_grid(
    table: Float[Tensor, "patch width"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "new_patch width"]:
    """Learned positions on a grid of (rows, columns), interpolated (bicubic) onto another; unchanged on the same."""
    if old == new:
        return table
    grid = table.T.unflatten(1, old)[None]
    return F.interpolate(grid, new, mode="bicubic", align_corners=False)[0].flatten(1).T


def resize_token_table(
    table: Float[Tensor, "token width"], old: VideoConfig, new: VideoConfig
) -> Float[Tensor, "new_token width"]:
    """A table over all video tokens of a chunk, every kind of tube interpolated on its own, frame by frame."""
    tables, start = [], 0
    for before, after in zip(old.tubes, new.tubes, strict=True):
        old_grid = before.grid(old.frames_per_chunk, old.image_size)
        new_grid = after.grid(new.frames_per_chunk, new.image_size)
        for _ in range(old_grid[0]):
            end = start + math.prod(old_grid[1:])
            tables.append(resize_grid(table[start:end], old_grid[1:], new_grid[1:]))
            start = end
    return torch.cat(tables)


def resize_chunk_table(
    table: Float[Tensor, "token width"], old: VideoConfig, new: VideoConfig
) -> Float[Tensor, "new_token width"]:
    """A table over all tokens of a chunk, video first: the rows of audio are unchanged."""
    return torch.cat([resize_token_table(table[: old.tokens], old, new), table[old.tokens :]])


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Gives a module a new parameter in place of one of the same name, frozen if that was."""
    trained = getattr(module, name).requires_grad
    setattr(module, name, nn.Parameter(value.detach().contiguous(), requires_grad=trained))


class VideoTubes(nn.Module):
    """Sparse video tubes (TubeViT): every kind of tube is a 3D convolution; a token's position is its centre's code.

    With `learned_positions` the 2D patches have those, and the fixed code is added through a learned gate (MaMMUT).
    """

    def __init__(self, video: VideoConfig, width: int):
        super().__init__()
        self.video, self.width = video, width
        self.projections = nn.ModuleList(nn.Conv3d(3, width, tube.kernel, tube.stride) for tube in video.tubes)
        self.learned_position = self.position_gate = None
        if video.learned_positions:
            tube = next(tube for tube in video.tubes if tube.flat)
            _, rows, columns = tube.grid(video.frames_per_chunk, video.image_size)
            self.learned_position = nn.Parameter(torch.empty(rows * columns, width))
            self.position_gate = nn.Parameter(torch.empty(1))

    def positions(self) -> Float[Tensor, "token width"]:
        """Positions of all video tokens of a chunk, in their order."""
        return torch.cat([self.tube_positions(tube) for tube in self.video.tubes])

    def tube_positions(self, tube: TubeConfig) -> Float[Tensor, "token width"]:
        """Positions of one kind of tube: the fixed code, or learned ones (the same for every frame) + gate · code."""
        code = centre_code(tube_centres(tube, self.video), self.width)
        if self.learned_position is None:
            return code
        # MaMMUT's gate starts at zero, so that pretrained positions are unchanged when training begins.
        code = code.to(self.learned_position)
        if not tube.flat:
            return code
        return self.learned_position.repeat(len(code) // len(self.learned_position), 1) + self.position_gate * code

    def resize(self, video: VideoConfig) -> None:
        """Adapts to frames of another `image_size`: the learned positions are interpolated onto the new grid."""
        if self.learned_position is not None:
            tubes = [next(tube for tube in config.tubes if tube.flat) for config in (self.video, video)]
            old, new = (
                tube.grid(config.frames_per_chunk, config.image_size)[1:]
                for tube, config in zip(tubes, (self.video, video), strict=True)
            )
            replace_parameter(self, "learned_position", resize_grid(self.learned_position, old, new))
        self.video = video

    def forward(
        self, video: Float[Tensor, "batch frame 3 height width_px"] | Float[Tensor, "batch 3 height width_px"]
    ) -> Float[Tensor, "batch token width"]:
        """Tokens of chunks, or of single frames (`image`)."""
        if video.ndim == 4:
            return self.image(video)
        # Convolutions take channels before time: [batch, 3, frame, height, width].
        volume = video.transpose(1, 2)
        tokens = []
        for tube, projection in zip(self.video.tubes, self.projections, strict=True):
            # The offset moves the first tube away from the corner; there is no padding at the other end.
            t, y, x = tube.offset
            tokens.append(projection(volume[:, :, t:, y:, x:]).flatten(2).transpose(1, 2))
        tokens = torch.cat(tokens, dim=1)
        return tokens + self.positions().to(tokens)

    def image(self, images: Float[Tensor, "image 3 height width_px"]) -> Float[Tensor, "image patch width"]:
        """Tokens of single frames, from the 2D patches alone (tubes of one frame).

        They have the positions of a video's first frame, so that an image is a clip of one frame.

        Raises:
            UserError: no tube of one frame, or images of another size than `image_size`.
        """
        flat = [(tube, layer) for tube, layer in zip(self.video.tubes, self.projections, strict=True) if tube.flat]
        if not flat:
            kernels = ", ".join(str(tube.kernel) for tube in self.video.tubes)
            raise UserError(f"video.tubes={kernels}: images need a tube whose kernel is 1 frame long, add one")
        image_size = self.video.image_size
        if images.shape[2:] != (image_size, image_size):
            found = f"{images.shape[2]} x {images.shape[3]}"
            raise UserError(f"images of {found} pixels: this model takes video.image_size={image_size}")
        tokens = []
        for tube, projection in flat:
            _, y, x = tube.offset
            patches = projection(images[:, :, None, y:, x:]).flatten(2).transpose(1, 2)
            tokens.append(patches + self.tube_positions(tube)[: patches.shape[1]].to(patches))
        return torch.cat(tokens, dim=1)


class AudioPatches(nn.Module):
    """Patches of a chunk's log-mel spectrogram, with learned positions (patches of 16 x 16 in the paper's sizes, after
    Audiovisual Masked Autoencoders, the supplement's reference 5)."""

    def __init__(self, audio: AudioConfig, width: int):
        super().__init__()
        self.patch = audio.patch
        self.projection = nn.Linear(audio.patch[0] * audio.patch[1], width)
        self.position = nn.Parameter(torch.empty(audio.tokens, width))

    def forward(self, audio: Float[Tensor, "batch mel_frame mel"]) -> Float[Tensor, "batch token width"]:
        # Patches in rows of time, mel bands running fastest: [batch, patch, mel_frame · mel].
        frames, mels = self.patch
        patches = audio.unflatten(2, (-1, mels)).unflatten(1, (-1, frames)).transpose(2, 3).flatten(3).flatten(1, 2)
        return self.projection(patches) + self.position

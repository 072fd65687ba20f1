"""Video tubes and audio patches: what turns pixels and spectrograms into tokens, and the tokens' positions."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mirasol.config.parts import AudioConfig, TubeConfig, VideoConfig
from mirasol.errors import UserError
from mirasol.model.transformer import sinusoid


def tube_centres(tube: TubeConfig, video: VideoConfig, device: torch.device | None = None) -> Float[Tensor, "token 3"]:
    """Centre (t, y, x) of every tube of one kind, in frames and pixels, in the order its convolution gives."""
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
    """TubeViT's fixed code: width // 6 frequencies for sin and cos of each of t, y, x; the remainder is zero."""
    code = sinusoid(centres, 2 * (width // 6)).flatten(-2)
    return F.pad(code, (0, width - code.shape[-1]))


class VideoTubes(nn.Module):
    """Sparse video tubes (TubeViT): every kind of tube is a 3D convolution; tokens carry their centre's code.

    With learned positions the 2D patches carry those, and the fixed code through a gate (MaMMUT).
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
        """Positions of one kind of tube: the fixed code, or learned ones, the same for every frame, and gate · code."""
        code = centre_code(tube_centres(tube, self.video), self.width)
        if self.learned_position is None:
            return code
        code = code.to(self.learned_position)
        if not tube.flat:
            return code
        return self.learned_position.repeat(len(code) // len(self.learned_position), 1) + self.position_gate * code

    def forward(self, video: Float[Tensor, "batch frame 3 height width_px"]) -> Float[Tensor, "batch token width"]:
        volume = video.transpose(1, 2)
        tokens = []
        for tube, projection in zip(self.video.tubes, self.projections, strict=True):
            t, y, x = tube.offset
            tokens.append(projection(volume[:, :, t:, y:, x:]).flatten(2).transpose(1, 2))
        tokens = torch.cat(tokens, dim=1)
        return tokens + self.positions().to(tokens)

    def image(self, images: Float[Tensor, "image 3 height width_px"]) -> Float[Tensor, "image patch width"]:
        """Tokens of single frames, which only the 2D patches (tubes of one frame) can read.

        A patch has the position code that the first such patch has in a video, so an image is a clip of one frame.

        Raises:
            UserError: no tube of one frame, or images of another size than `image_size`.
        """
        flat = [(tube, layer) for tube, layer in zip(self.video.tubes, self.projections, strict=True) if tube.flat]
        if not flat:
            kernels = ", ".join(str(tube.kernel) for tube in self.video.tubes)
            raise UserError(f"video.tubes={kernels}: images need a tube whose kernel is 1 frame long, add one")
        side = self.video.image_size
        if images.shape[2:] != (side, side):
            raise UserError(f"images of {images.shape[2]} x {images.shape[3]} pixels: video.image_size={side} is read")
        tokens = []
        for tube, projection in flat:
            _, y, x = tube.offset
            patches = projection(images[:, :, None, y:, x:]).flatten(2).transpose(1, 2)
            tokens.append(patches + self.tube_positions(tube)[: patches.shape[1]].to(patches))
        return torch.cat(tokens, dim=1)


class AudioPatches(nn.Module):
    """Patches of a chunk's log-mel spectrogram, with learned positions."""

    def __init__(self, audio: AudioConfig, width: int):
        super().__init__()
        self.patch = audio.patch
        self.projection = nn.Linear(audio.patch[0] * audio.patch[1], width)
        self.position = nn.Parameter(torch.empty(audio.tokens, width))

    def forward(self, audio: Float[Tensor, "batch mel_frame mel"]) -> Float[Tensor, "batch token width"]:
        frames, mels = self.patch
        patches = audio.unflatten(2, (-1, mels)).unflatten(1, (-1, frames)).transpose(2, 3).flatten(3).flatten(1, 2)
        return self.projection(patches) + self.position

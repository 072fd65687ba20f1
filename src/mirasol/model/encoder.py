"""The chunk encoder: one ViT shared by video and audio turns each chunk into features."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mirasol.config.model import MirasolConfig
from mirasol.config.parts import ViTConfig
from mirasol.errors import UserError
from mirasol.model.transformer import Stack
from mirasol.model.tubes import AudioPatches, VideoTubes


class ViT(Stack):
    """The shared ViT: a stack with, if asked for, a class token (dropped from the features) and a norm of its input."""

    def __init__(self, vit: ViTConfig):
        super().__init__(vit)
        self.input_norm = nn.LayerNorm(vit.width, vit.norm_eps) if vit.input_norm else nn.Identity()
        self.class_token = nn.Parameter(torch.empty(vit.width)) if vit.class_token else None
        if not vit.final_norm:
            self.norm = nn.Identity()

    def forward(self, tokens: Float[Tensor, "batch token width"]) -> Float[Tensor, "batch token width"]:
        if self.class_token is None:
            return super().forward(self.input_norm(tokens))
        first = self.class_token.to(tokens).expand(tokens.shape[0], 1, -1)
        return super().forward(self.input_norm(torch.cat([first, tokens], dim=1)))[:, 1:]


class ChunkEncoder(nn.Module):
    """Tubes and patches → shared ViT (per chunk and modality) → audio adapter → features at the Combiner's width.

    With audio's own backbone (`audio.backbone`) the adapter reads the audio patches in place of the ViT.

    A chunk that lacks a modality gets learned "missing" features in its place, whatever the tensor holds there.
    """

    def __init__(self, config: MirasolConfig):
        super().__init__()
        width, combined = config.vit.width, config.combiner.stack.width
        self.tubes = VideoTubes(config.video, width)
        shared, adapter = config.audio.shared_projection, config.audio.adapter
        self.separate = config.audio.backbone == "separate"
        self.patches = AudioPatches(config.audio, adapter.width if self.separate else width)
        self.vit = ViT(config.vit)
        self.shared_output = nn.Linear(width, combined) if shared else nn.Identity()
        separate_input = adapter.width != width and not shared and not self.separate
        self.adapter_input = nn.Linear(width, adapter.width) if separate_input else nn.Identity()
        self.audio_adapter = Stack(adapter)
        self.video_output = nn.Identity() if shared else nn.Linear(width, combined)
        self.audio_output = nn.Identity() if shared else nn.Linear(adapter.width, combined)
        self.missing_video = nn.Parameter(torch.empty(combined))
        self.missing_audio = nn.Parameter(torch.empty(combined))

    def numbers(self, name: str, media: Tensor) -> Tensor:
        """Media in the precision of the weights; UserError for whole numbers, which nobody has normalised."""
        if not media.is_floating_point():
            raise UserError(f"{name} of {media.dtype}: give the normalised numbers that MirasolProcessor gives")
        return media.to(self.missing_video.dtype)

    def forward(
        self,
        video: Float[Tensor, "batch chunk frame 3 height width_px"],
        audio: Float[Tensor, "batch chunk mel_frame mel"],
        video_mask: Bool[Tensor, "batch chunk"],
        audio_mask: Bool[Tensor, "batch chunk"],
    ) -> tuple[
        Float[Tensor, "batch chunk video_token width"],
        Float[Tensor, "batch chunk audio_token width"],
    ]:
        """Video and audio features of every chunk."""
        # In the weights' precision; what a missing modality's tensor holds must not matter, not even when it is NaN.
        video, audio = self.numbers("video", video), self.numbers("audio", audio)
        video = video.masked_fill(~video_mask[:, :, None, None, None, None], 0.0).flatten(0, 1)
        audio = audio.masked_fill(~audio_mask[:, :, None, None], 0.0).flatten(0, 1)
        seen = self.shared_output(self.vit(self.tubes(video)))
        heard = self.patches(audio)
        if not self.separate:
            heard = self.shared_output(self.vit(heard))
        seen = self.video_output(seen)
        heard = self.audio_output(self.audio_adapter(self.adapter_input(heard)))
        seen = seen.unflatten(0, video_mask.shape)
        heard = heard.unflatten(0, audio_mask.shape)
        return (
            torch.where(video_mask[:, :, None, None], seen, self.missing_video.to(seen)),
            torch.where(audio_mask[:, :, None, None], heard, self.missing_audio.to(heard)),
        )

    def image(
        self, images: Float[Tensor, "image 3 height width_px"], project: bool = False
    ) -> Float[Tensor, "image patch width"]:
        """Features of single images, each a clip of one frame: its 2D patches → shared ViT (MaMMUT's image side).

        They are what the ViT gives, at its width; `project` takes them on to the Combiner's width as video is taken.

        Raises:
            UserError: the config has no 2D patches, or images of another size than `video.image_size`.
        """
        seen = self.vit(self.tubes.image(self.numbers("images", images)))
        return self.project_image(seen) if project else seen

    def project_image(self, seen: Float[Tensor, "image patch vit_width"]) -> Float[Tensor, "image patch width"]:
        """Features that `image` gave, at the Combiner's width."""
        return self.video_output(self.shared_output(seen))

"""The chunk encoder: one ViT shared by video and audio turns each chunk into features."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mirasol.config import MirasolConfig
from mirasol.model.transformer import Stack
from mirasol.model.tubes import AudioPatches, VideoTubes


class ChunkEncoder(nn.Module):
    """Tubes and patches → shared ViT (per chunk and modality) → audio adapter → features at the Combiner's width.

    A chunk that lacks a modality gets learned "missing" features in its place, whatever the tensor holds there.
    """

    def __init__(self, config: MirasolConfig):
        super().__init__()
        width, combined = config.vit.width, config.combiner.stack.width
        self.tubes = VideoTubes(config.video, width)
        self.patches = AudioPatches(config.audio, width)
        self.vit = Stack(config.vit)
        shared, adapter = config.audio.shared_projection, config.audio.adapter
        self.shared_output = nn.Linear(width, combined) if shared else nn.Identity()
        separate_input = adapter.width != width and not shared
        self.adapter_input = nn.Linear(width, adapter.width) if separate_input else nn.Identity()
        self.audio_adapter = Stack(adapter)
        self.video_output = nn.Identity() if shared else nn.Linear(width, combined)
        self.audio_output = nn.Identity() if shared else nn.Linear(adapter.width, combined)
        self.missing_video = nn.Parameter(torch.empty(combined))
        self.missing_audio = nn.Parameter(torch.empty(combined))

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
        # What a missing modality's tensor holds must not matter, not even when it is NaN.
        video = video.masked_fill(~video_mask[:, :, None, None, None, None], 0.0).flatten(0, 1)
        audio = audio.masked_fill(~audio_mask[:, :, None, None], 0.0).flatten(0, 1)
        seen = self.shared_output(self.vit(self.tubes(video)))
        heard = self.shared_output(self.vit(self.patches(audio)))
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
        seen = self.vit(self.tubes.image(images))
        return self.video_output(self.shared_output(seen)) if project else seen

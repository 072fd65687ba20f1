"""The chunk encoder: one ViT, shared by video and audio, maps each chunk to features.

The supplement (section 4) has a "video chunk processor" after ViT-Huge, and "the audio backbone is also reusing the
same pre-trained image backbone", with about 100M weights of audio's own. Two readings: the modalities first meet in the
Combiner, not in the ViT, and audio's own weights are an adapter after the shared ViT (`audio.backbone`).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mirasol.config.model import MirasolConfig
from mirasol.config.parts import ViTConfig
from mirasol.model.transformer import Stack
from mirasol.model.tubes import AudioPatches, VideoTubes


class ViT(Stack):
    """The shared ViT: a stack with, as options, a class token (dropped from the features) and a norm of its input."""

    def __init__(self, vit: ViTConfig):
        super().__init__(vit)
        self.input_norm = nn.LayerNorm(vit.width, vit.norm_eps) if vit.input_norm else nn.Identity()
        self.class_token = nn.Parameter(torch.empty(vit.width)) if vit.class_token else None
        if not vit.final_norm:
            self.norm = nn.Identity()

    def forward(self, tokens: Float[Tensor, "batch token width"]) -> Float[Tensor, "batch token width"]:
        if self.class_token is None:
            return super().forward(self.input_norm(tokens))
        class_token = self.class_token.to(tokens).expand(tokens.shape[0], 1, -1)
        # Pretrained weights were trained with a class token among the tokens; it is not one of the chunk's features.
        return super().forward(self.input_norm(torch.cat([class_token, tokens], dim=1)))[:, 1:]


class ChunkEncoder(nn.Module):
    """Tubes and patches → shared ViT (per chunk and modality) → audio adapter → features at the Combiner's width.

    With `audio.backbone: separate` the adapter encodes the audio patches on its own and the ViT sees no audio.

    A chunk that lacks a modality gets learned "missing" features in its place, whatever its tensor contains.
    """

    def __init__(self, config: MirasolConfig):
        super().__init__()
        width, combined = config.vit.width, config.combiner.stack.width
        self.tubes = VideoTubes(config.video, width)
        shared, adapter = config.audio.shared_projection, config.audio.adapter
        self.separate = config.audio.backbone == "separate"
        self.patches = AudioPatches(config.audio, adapter.width if self.separate else width)
        self.vit = ViT(config.vit)
        # From the ViT's width to the Combiner's: one linear for both modalities, or one for each after the adapter.
        self.shared_output = nn.Linear(width, combined) if shared else nn.Identity()
        separate_input = adapter.width != width and not shared and not self.separate
        self.adapter_input = nn.Linear(width, adapter.width) if separate_input else nn.Identity()
        self.audio_adapter = Stack(adapter)
        self.video_output = nn.Identity() if shared else nn.Linear(width, combined)
        self.audio_output = nn.Identity() if shared else nn.Linear(adapter.width, combined)
        # One vector for all tokens of a missing modality; their positions are added in the Combiner.
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
        features = self.encode_chunks(video, audio, video_mask, audio_mask)
        return self.fill_missing(*features, video_mask, audio_mask)

    def encode_chunks(
        self,
        video: Float[Tensor, "batch chunk frame 3 height width_px"],
        audio: Float[Tensor, "batch chunk mel_frame mel"],
        video_mask: Bool[Tensor, "batch chunk"],
        audio_mask: Bool[Tensor, "batch chunk"],
    ) -> tuple[
        Float[Tensor, "batch chunk video_token width"],
        Float[Tensor, "batch chunk audio_token width"],
    ]:
        """Video and audio features of every chunk that has them; those of the others mean nothing."""
        # In the precision of the weights. What the tensor of a missing modality contains must not matter, NaN included.
        video, audio = video.to(self.missing_video.dtype), audio.to(self.missing_video.dtype)
        video = video.masked_fill(~video_mask[:, :, None, None, None, None], 0.0).flatten(0, 1)
        audio = audio.masked_fill(~audio_mask[:, :, None, None], 0.0).flatten(0, 1)
        # Each chunk is encoded on its own, so that chunks are a second batch axis for the ViT: [clip · chunk, token].
        video_features = self.shared_output(self.vit(self.tubes(video)))
        audio_features = self.patches(audio)
        # "The audio backbone is also reusing the same pre-trained image backbone" (section 4).
        if not self.separate:
            audio_features = self.shared_output(self.vit(audio_features))
        video_features = self.video_output(video_features)
        audio_features = self.audio_output(self.audio_adapter(self.adapter_input(audio_features)))
        # Back to [clip, chunk, token, width].
        return video_features.unflatten(0, video_mask.shape), audio_features.unflatten(0, audio_mask.shape)

    def fill_missing(
        self,
        video_features: Float[Tensor, "batch chunk video_token width"],
        audio_features: Float[Tensor, "batch chunk audio_token width"],
        video_mask: Bool[Tensor, "batch chunk"],
        audio_mask: Bool[Tensor, "batch chunk"],
    ) -> tuple[
        Float[Tensor, "batch chunk video_token width"],
        Float[Tensor, "batch chunk audio_token width"],
    ]:
        """The features with the learned ones in the place of each modality that a chunk lacks."""
        return (
            torch.where(video_mask[:, :, None, None], video_features, self.missing_video.to(video_features)),
            torch.where(audio_mask[:, :, None, None], audio_features, self.missing_audio.to(audio_features)),
        )

    def missing(
        self, batch: int, video_tokens: int, audio_tokens: int
    ) -> tuple[Float[Tensor, "batch 1 video_token width"], Float[Tensor, "batch 1 audio_token width"]]:
        """The features of a chunk without video and sound, as `forward` gives them, without its work."""
        return (
            self.missing_video.expand(batch, 1, video_tokens, -1),
            self.missing_audio.expand(batch, 1, audio_tokens, -1),
        )

    def image(
        self, images: Float[Tensor, "image 3 height width_px"], project: bool = False
    ) -> Float[Tensor, "image patch width"]:
        """Features of single images, each a clip of one frame: its 2D patches → shared ViT (MaMMUT's image side).

        They have the ViT's width, or with `project` the Combiner's, as the features of video.

        Raises:
            UserError: the config has no 2D patches, or images of another size than `video.image_size`.
        """
        features = self.vit(self.tubes(images.to(self.missing_video.dtype)))
        return self.project_image(features) if project else features

    def project_image(self, features: Float[Tensor, "image patch vit_width"]) -> Float[Tensor, "image patch width"]:
        """Image features at the Combiner's width."""
        return self.video_output(self.shared_output(features))

"""The Combiner: features of all chunks up to t become m features of chunk t."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mirasol.config import MirasolConfig
from mirasol.model.transformer import Stack, block_causal_mask, sinusoid


def order_tokens(
    video: Float[Tensor, "batch chunk video_token width"],
    audio: Float[Tensor, "batch chunk audio_token width"],
    order: str,
    m: int,
) -> Float[Tensor, "batch chunk token width"]:
    """One sequence per chunk. The order decides what the last m tokens are: `both_last` puts m/2 of each there."""
    if order == "audio_last":
        return torch.cat([video, audio], dim=2)
    if order == "video_last":
        return torch.cat([audio, video], dim=2)
    # When one modality has fewer than m/2 tokens the other fills up the rest.
    last_audio = max(min(m // 2, audio.shape[2]), m - video.shape[2])
    last_video = m - last_audio
    video_rest, video_last = video.tensor_split([video.shape[2] - last_video], dim=2)
    audio_rest, audio_last = audio.tensor_split([audio.shape[2] - last_audio], dim=2)
    return torch.cat([video_rest, audio_rest, video_last, audio_last], dim=2)


class TransformerCombiner(nn.Module):
    """The paper's main Combiner: a block-causal Transformer over the features of all chunks; x_t is the last m
    outputs of chunk t (SUPP, section 3)."""

    def __init__(self, config: MirasolConfig):
        super().__init__()
        self.m, self.order = config.combiner.m, config.combiner.token_order
        self.stack = Stack(config.combiner.stack)
        tokens = config.video.tokens + config.audio.tokens
        self.token_position = nn.Parameter(torch.empty(tokens, config.combiner.stack.width))

    def positions(self, chunks: int) -> Float[Tensor, "chunk token width"]:
        """A learned code of the token within its chunk plus a fixed code of the chunk."""
        width = self.token_position.shape[-1]
        chunk = sinusoid(torch.arange(chunks, device=self.token_position.device), width)
        return self.token_position + chunk[:, None].to(self.token_position)

    def forward(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
    ) -> Float[Tensor, "batch chunk m width"]:
        features = order_tokens(video, audio, self.order, self.m)
        _, chunks, tokens, _ = features.shape
        features = (features + self.positions(chunks)).flatten(1, 2)
        mask = block_causal_mask(chunks, tokens, features.device)
        last = torch.arange(chunks * tokens, device=features.device).view(chunks, tokens)[:, -self.m :].flatten()
        return self.stack(features, mask, queries=last).unflatten(1, (chunks, self.m))

"""The Combiners: features of all chunks up to t become m features of chunk t. All have one signature."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from mirasol.config import MirasolConfig
from mirasol.model.masks import BlockCausal, ResamplerMask
from mirasol.model.token_turing import TokenTuringCombiner
from mirasol.model.transformer import Attention, FeedForward, Stack, form_of_mask, sinusoid
from mirasol.parts import StackConfig


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


class AttentionCombiner(nn.Module):
    """What the Combiners made of attention share: their sizes and the codes of their tokens."""

    def __init__(self, config: MirasolConfig):
        super().__init__()
        self.m, self.scope = config.combiner.m, config.combiner.scope
        tokens = config.video.tokens + config.audio.tokens
        self.token_position = nn.Parameter(torch.empty(tokens, config.combiner.stack.width))

    def chunk_code(self, chunks: int) -> Float[Tensor, "chunk 1 width"]:
        """A fixed code of the chunk."""
        code = sinusoid(torch.arange(chunks, device=self.token_position.device), self.token_position.shape[-1])
        return code[:, None].to(self.token_position)

    def positions(self, chunks: int) -> Float[Tensor, "chunk token width"]:
        """A learned code of the token within its chunk plus a fixed code of the chunk."""
        return self.token_position + self.chunk_code(chunks)


def last_outputs(
    stack: Stack, tokens: Float[Tensor, "batch chunk token width"], m: int, scope: str
) -> Float[Tensor, "batch chunk m width"]:
    """The last m outputs of each chunk; its tokens see each other and, in the scope `past`, all earlier chunks."""
    _, chunks, count, _ = tokens.shape
    if scope == "chunk":
        return stack(tokens.flatten(0, 1), last=m).unflatten(0, tokens.shape[:2])
    return stack(tokens.flatten(1, 2), BlockCausal(chunks, count, count), last=m).unflatten(1, (chunks, m))


class TransformerCombiner(AttentionCombiner):
    """The paper's main Combiner: a block-causal Transformer over the features of all chunks; x_t is the last m
    outputs of chunk t (SUPP, section 3)."""

    def __init__(self, config: MirasolConfig):
        super().__init__(config)
        self.order = config.combiner.token_order
        self.stack = Stack(config.combiner.stack)

    def forward(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
    ) -> Float[Tensor, "batch chunk m width"]:
        features = order_tokens(video, audio, self.order, self.m)
        return last_outputs(self.stack, features + self.positions(features.shape[1]), self.m, self.scope)


class ClsCombiner(AttentionCombiner):
    """The same Transformer with m learned tokens after each chunk's features; x_t is the outputs of these."""

    def __init__(self, config: MirasolConfig):
        super().__init__(config)
        self.cls = nn.Parameter(torch.empty(self.m, config.combiner.stack.width))
        self.stack = Stack(config.combiner.stack)

    def forward(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
    ) -> Float[Tensor, "batch chunk m width"]:
        batch, chunks = video.shape[:2]
        features = torch.cat([video, audio], dim=2) + self.positions(chunks)
        cls = (self.cls + self.chunk_code(chunks)).to(features).expand(batch, -1, -1, -1)
        return last_outputs(self.stack, torch.cat([features, cls], dim=2), self.m, self.scope)


class PerceiverBlock(nn.Module):
    """Latents look at features and at themselves, each normed for itself; then a feed-forward."""

    def __init__(self, stack: StackConfig):
        super().__init__()
        self.feature_norm = nn.LayerNorm(stack.width)
        self.latent_norm = nn.LayerNorm(stack.width)
        self.attention = Attention(stack)
        self.feed_forward_norm = nn.LayerNorm(stack.width)
        self.feed_forward = FeedForward(stack)
        self.dropout = nn.Dropout(stack.dropout)

    def forward(
        self,
        latents: Float[Tensor, "batch latent width"],
        features: Float[Tensor, "batch feature width"],
        mask: Bool[Tensor, "latent key"] | BlockMask | None,
    ) -> Float[Tensor, "batch latent width"]:
        normed = self.latent_norm(latents)
        context = torch.cat([self.feature_norm(features), normed], dim=1)
        mixed, _ = self.attention(normed, self.attention.keys_values(context), mask)
        latents = latents + self.dropout(mixed)
        return latents + self.dropout(self.feed_forward(self.feed_forward_norm(latents)))


class PerceiverCombiner(AttentionCombiner):
    """Perceiver resampling: m learned latents of chunk t look at the features of the chunks up to t and at each other;
    the features stay what they are, layer after layer."""

    def __init__(self, config: MirasolConfig):
        super().__init__(config)
        stack = config.combiner.stack
        self.latents = nn.Parameter(torch.empty(self.m, stack.width))
        self.blocks = nn.ModuleList(PerceiverBlock(stack) for _ in range(stack.depth))
        self.norm = nn.LayerNorm(stack.width)

    def forward(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
    ) -> Float[Tensor, "batch chunk m width"]:
        batch, chunks = video.shape[:2]
        features = torch.cat([video, audio], dim=2) + self.positions(chunks)
        latents = (self.latents + self.chunk_code(chunks)).to(features).expand(batch, -1, -1, -1)
        mask, axes = (
            (None, (0, 1)) if self.scope == "chunk" else (ResamplerMask(chunks, self.m, features.shape[2]), (1, 2))
        )
        features, x = features.flatten(*axes), latents.flatten(*axes)
        visible = form_of_mask(mask, self.blocks[0].attention.implementation, x.device)
        for block in self.blocks:
            x = block(x, features, visible)
        return self.norm(x).view(latents.shape)


class ConcatCombiner(nn.Module):
    """No Combiner at all (the baseline of the paper's Table 5a): every feature of chunk t is kept as it is."""

    def __init__(self, config: MirasolConfig):
        super().__init__()

    def forward(
        self,
        video: Float[Tensor, "batch chunk video_token width"],
        audio: Float[Tensor, "batch chunk audio_token width"],
    ) -> Float[Tensor, "batch chunk m width"]:
        return torch.cat([video, audio], dim=2)


COMBINERS: dict[str, type[nn.Module]] = {
    "transformer": TransformerCombiner,
    "cls": ClsCombiner,
    "perceiver": PerceiverCombiner,
    "ttm": TokenTuringCombiner,
    "concat": ConcatCombiner,
}


def make_combiner(config: MirasolConfig) -> nn.Module:
    """The Combiner of `config.combiner.kind`: (video features, audio features) → x [batch, chunk, m, width]."""
    return COMBINERS[config.combiner.kind](config)

"""The causal latent model: an autoregressive Transformer over the chunks' combined features."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mirasol.config import MirasolConfig
from mirasol.model.masks import BlockCausal
from mirasol.model.transformer import Stack, sinusoid


class CausalLatentModel(nn.Module):
    """x → h under a block-causal mask; h_t predicts x_{t+1}. While training a share of x is hidden."""

    def __init__(self, config: MirasolConfig):
        super().__init__()
        width = config.latent.stack.width
        self.mask_ratio = config.latent.mask_ratio
        self.stack = Stack(config.latent.stack)
        self.token_position = nn.Parameter(torch.empty(config.combiner.m, width))
        self.hidden_latent = nn.Parameter(torch.empty(width))
        self.next_latent = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "batch chunk m width"]) -> Float[Tensor, "batch chunk m width"]:
        _, chunks, m, width = x.shape
        if self.training and self.mask_ratio > 0:
            hidden = torch.rand(x.shape[:3], device=x.device) < self.mask_ratio
            x = torch.where(hidden[..., None], self.hidden_latent.to(x), x)
        chunk = sinusoid(torch.arange(chunks, device=x.device), width)
        x = (x + self.token_position + chunk[:, None].to(x)).flatten(1, 2)
        return self.stack(x, BlockCausal(chunks, m, m)).unflatten(1, (chunks, m))

    def predict_next(self, h: Float[Tensor, "batch chunk m width"]) -> Float[Tensor, "batch chunk m width"]:
        """What h_t says x_{t+1} will be."""
        return self.next_latent(h)

"""The contrastive pass of MaMMUT (arXiv 2303.16839): images and texts as points of one space.

The paper initialises its image and text backbones from a MaMMUT model, "trained jointly with contrastive and text
generative objectives" (supplement, section 4, "Model Pretraining").
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from mirasol.config.model import MirasolConfig


class ImageTextFeatures(NamedTuple):
    """Normalised features of images and texts, [row, width], the temperature and the bias (None without one)."""

    images: Tensor
    texts: Tensor
    temperature: Tensor
    bias: Tensor | None


class ContrastiveSpace(nn.Module):
    """Linear projections of mean-pooled features, L2-normalised, and the learned temperature of their similarities.

    The temperature is learned in log space, as a vector of one because sharded training takes no scalar parameters.
    """

    def __init__(self, config: MirasolConfig):
        super().__init__()
        settings = config.contrastive
        self.settings = settings
        # Without biases, as in CLIP.
        self.image_projection = nn.Linear(config.vit.width, settings.width, bias=False)
        self.text_projection = nn.Linear(config.text.stack.width, settings.width, bias=False)
        self.log_temperature = nn.Parameter(torch.empty(1))
        self.bias = None if settings.bias is None else nn.Parameter(torch.empty(1))

    def reset(self) -> None:
        """Sets the initial temperature and bias; the projections are initialised like all linears."""
        nn.init.constant_(self.log_temperature, math.log(self.settings.temperature))
        if self.bias is not None:
            nn.init.constant_(self.bias, self.settings.bias)

    @property
    def temperature(self) -> Float[Tensor, ""]:
        # In float32: cosines are divided by it, which magnifies its rounding.
        return self.log_temperature.float().exp()[0]

    def image(self, features: Float[Tensor, "image patch vit_width"]) -> Float[Tensor, "image width"]:
        """Normalised projections of the mean of each image's patch features."""
        return F.normalize(self.image_projection(features.mean(dim=1)), dim=-1)

    def text(
        self, hidden: Float[Tensor, "row token text_width"], is_real: Bool[Tensor, "row token"]
    ) -> Float[Tensor, "row width"]:
        """Normalised projections of the mean of each text's hidden states over its real tokens."""
        # Padding is left out of the mean, unlike in openMaMMUT, so that it changes nothing.
        total = hidden.masked_fill(~is_real[..., None], 0.0).sum(dim=1)
        return F.normalize(self.text_projection(total / is_real.sum(dim=1, keepdim=True).clamp(min=1)), dim=-1)

    def forward(
        self,
        features: Float[Tensor, "image patch vit_width"],
        hidden: Float[Tensor, "row token text_width"],
        is_real: Bool[Tensor, "row token"],
    ) -> ImageTextFeatures:
        """Both sides in the space, and what their similarities are measured with."""
        return ImageTextFeatures(self.image(features), self.text(hidden, is_real), self.temperature, self.bias)

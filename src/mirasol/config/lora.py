"""LoRA (Hu et al., 2022): low-rank adapters that train in place of a component's own weights."""

import math
from dataclasses import dataclass

from mirasol.config.checks import suggest_nearest_name
from mirasol.config.components import COMPONENTS
from mirasol.errors import UserError

# Their weights are tables and convolutions, which have no adapters here.
WITHOUT_ADAPTERS = ("tubes", "vocabulary")


@dataclass(frozen=True)
class LoraRecipe:
    """Adapters on every linear layer of some components, whose own weights are frozen (pip install 'mirasol[peft]').

    targets: names of components; a stage trains their adapters where it would train the components
    rank: of the two matrices A and B of an adapter
    alpha: the adapter's output is multiplied by alpha / rank
    dropout: rate of dropout before A
    """

    targets: list[str]
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self):
        known = [*(name for name in COMPONENTS if name not in WITHOUT_ADAPTERS), "contrastive"]
        if not self.targets:
            raise UserError(f"lora.targets=[] adapts nothing: name components: {', '.join(known)}")
        for name in self.targets:
            if name in WITHOUT_ADAPTERS:
                raise UserError(f"lora.targets: {name} has no linear layers to adapt: name it in trains instead")
            if name not in known:
                raise UserError(f"lora.targets: unknown component {name!r}{suggest_nearest_name(name, known)}")
        if len(set(self.targets)) < len(self.targets):
            raise UserError(f"lora.targets={self.targets}: a component appears twice")
        if self.rank < 1:
            raise UserError(f"lora.rank={self.rank} must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"lora.alpha={self.alpha} must be positive and finite")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout={self.dropout} must be in [0, 1)")

"""Adapters of the peft library in a model in training, and how they are merged into its weights at the end."""

from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor, nn

from mirasol.config.components import find_component
from mirasol.config.lora import LoraRecipe
from mirasol.config.model import MirasolConfig
from mirasol.config.recipe import Recipe
from mirasol.data.randomness import hash64
from mirasol.errors import UserError
from mirasol.model.hf import MirasolForConditionalGeneration

ADAPTER = "default"  # peft's name of a model's only adapter
BASE = ".base_layer."  # what peft puts into the names of a layer's own weights


def import_peft() -> ModuleType:
    """The peft library. Raises UserError, saying how to install it, where it is absent or cannot be imported."""
    try:
        import peft
        import peft.tuners.lora
    except ImportError as error:
        raise UserError(f"lora needs the package peft ({error}): pip install 'mirasol[peft]'") from error
    return peft


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name


def get_plain_name(name: str) -> str:
    """A parameter's name in the model without adapters."""
    return name.replace(BASE, ".")


def add_adapters(model: MirasolForConditionalGeneration, recipe: Recipe) -> None:
    """Puts the recipe's adapters into the model, in place, drawn with the recipe's seed. Without `lora` does nothing.

    Raises UserError without peft, and for a component of which the model has no linear layers.
    """
    settings = recipe.lora
    if settings is None:
        return
    peft = import_peft()
    layers = list_target_layers(model, settings)
    given = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=layers, bias="none"
    )
    torch.manual_seed(hash64(recipe.seed, "lora") >> 1)
    with next(model.parameters()).device:
        peft.inject_adapter_in_model(given, model, adapter_name=ADAPTER)
    for layer in _list_adapted_layers(model).values():
        # A stage sets the rate of every nn.Dropout to its own.
        layer.lora_dropout[ADAPTER] = AdapterDropout(settings.dropout)


class AdapterDropout(nn.Module):
    """Dropout at a rate that stages do not change."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.rate, self.training)


def list_target_layers(model: nn.Module, settings: LoraRecipe) -> list[str]:
    """Names of the linear layers of the components to adapt. Raises UserError for a component that has none."""
    layers: dict[str, list[str]] = {target: [] for target in settings.targets}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            component = "contrastive" if name.startswith("contrastive.") else find_component(name)
            layers.get(component, []).append(name)
    for target, own in layers.items():
        if not own:
            raise UserError(f"lora.targets: this model has no linear layers of {target!r}: leave it out")
    return [name for own in layers.values() for name in own]


def _list_adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    kind = import_peft().tuners.lora.LoraLayer
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


@torch.no_grad()
def merge_adapters(config: MirasolConfig, recipe: Recipe, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the model without adapters that computes the same: each adapted layer's own plus its adapter's.

    weights: all of the model with adapters, as its state dict names them; they are not changed. Without `lora` they are
    returned as they are.
    """
    if recipe.lora is None:
        return dict(weights)
    with torch.device("meta"):
        model = MirasolForConditionalGeneration(config)
    add_adapters(model, recipe)
    model.load_state_dict(dict(weights), assign=True)
    merged = {get_plain_name(name): value for name, value in weights.items() if not is_adapter(name)}
    for name, layer in _list_adapted_layers(model).items():
        change = layer.get_delta_weight(ADAPTER)
        merged[f"{name}.weight"] = (merged[f"{name}.weight"].float() + change.float()).to(layer.base_layer.weight.dtype)
    return merged

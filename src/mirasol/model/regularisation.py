"""Dropout and layer drop of a model that is there already: what its config says reaches its modules."""

from collections.abc import Iterator

from torch import nn

from mirasol.config.model import MirasolConfig
from mirasol.config.parts import StackConfig
from mirasol.model.token_turing import process_stack
from mirasol.model.transformer import Attention, LayerDrop


def stack_configs(config: MirasolConfig) -> dict[str, StackConfig]:
    """Every Transformer stack of the config by its path."""
    return {
        "vit": config.vit,
        "audio.adapter": config.audio.adapter,
        "combiner.stack": config.combiner.stack,
        "latent.stack": config.latent.stack,
        "reconstruction.stack": config.reconstruction.stack,
        "text.stack": config.text.stack,
    }


def _stacks(model: nn.Module) -> Iterator[tuple[StackConfig, nn.Module]]:
    """What each stack's modules are made after, and the module that holds them all."""
    config, encoder = model.config, model.chunk_encoder
    combiner = process_stack(config) if config.combiner.kind == "ttm" else config.combiner.stack
    yield config.vit, encoder.vit
    yield config.audio.adapter, encoder.audio_adapter
    yield combiner, model.combiner
    yield config.latent.stack, model.latent
    yield config.reconstruction.stack, model.reconstruction
    yield config.text.stack, model.text


def regularise(model: nn.Module) -> None:
    """Has every module drop at the rates that `model.config` names now."""
    for stack, part in _stacks(model):
        for module in part.modules():
            if isinstance(module, nn.Dropout):
                module.p = stack.dropout
            elif isinstance(module, Attention):
                module.dropout = stack.attention_rate
            elif isinstance(module, LayerDrop):
                module.rate = stack.layer_drop

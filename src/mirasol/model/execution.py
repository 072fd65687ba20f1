"""How the layers run: with activations computed again in the backward pass, or compiled. What they compute stays."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache

from mirasol.errors import UserError
from mirasol.model.combiner import PerceiverBlock
from mirasol.model.text import TextBlock
from mirasol.model.transformer import Block, FeedForward

LAYERS = (Block, PerceiverBlock, TextBlock)

# What the backward pass computes again: nothing, a feed-forward's hidden layer, or a whole layer.
RECOMPUTE: dict[str, tuple[type[nn.Module], ...]] = {"none": (), "hidden": (FeedForward,), "block": LAYERS}


class Recomputed:
    """Stands in for the `forward` of a module: in training its activations are dropped and computed again."""

    def __init__(self, module: nn.Module, checkpoint: Callable):
        self.module, self.checkpoint = module, checkpoint

    def __call__(self, *args: Any, **named: Any) -> Any:
        forward = partial(type(self.module).forward, self.module, **named)
        # Computed twice, a layer would write to its cache twice.
        cached = any(isinstance(value, Cache) for value in (*args, *named.values()))
        return forward(*args) if cached or not self.module.training else self.checkpoint(forward, *args)


def recompute(model: nn.Module, what: str, checkpoint: Callable, every: int = 1) -> None:
    """Has every `every`-th layer of the kind that `what` names computed again, and no other.

    Raises:
        UserError: `what` is none of `RECOMPUTE`.
    """
    if what not in RECOMPUTE:
        raise UserError(f"recompute={what!r}: choose one of {', '.join(RECOMPUTE)}")
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), Recomputed):
            # The flag is what transformers looks at to say whether a model is checkpointed.
            del module.forward, module.gradient_checkpointing
    wanted = [module for module in model.modules() if isinstance(module, RECOMPUTE[what])]
    for module in wanted[::every]:
        module.forward, module.gradient_checkpointing = Recomputed(module, checkpoint), True


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """Every Transformer layer of the model: what is compiled, and what a sharded run should keep in one piece."""
    return (module for module in model.modules() if isinstance(module, LAYERS))


def compile_layers(model: nn.Module, backend: str) -> None:
    """Compiles each layer in place, without graph breaks; names in the state dict stay."""
    # To the compiler the layers of all stacks are one function with as many variants as there are shapes, widths and
    # places in a cache: more than the eight it allows.
    torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
    for layer in layers(model):
        layer.compile(fullgraph=True, backend=backend)

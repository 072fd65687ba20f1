"""Attention weights of a pass of the model, taken by hooks: the pass itself is unchanged, whatever kernels it chose.

A hook sees what an attention layer was given, and computes the weights from it once more: by definition, in float32,
averaged over heads, a block of queries at a time, so that no more than one block has all its heads in memory.
"""

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mirasol.model.transformer import Attention

# Weights of one block of queries: 64 MiB in float32.
LARGEST_BLOCK = 2**24

_FORWARD = inspect.signature(Attention.forward)


def list_attention(part: nn.Module) -> list[Attention]:
    """The attention layers of a part of the model, in their order."""
    return [module for module in part.modules() if isinstance(module, Attention)]


@contextlib.contextmanager
def record_attention(layers: Iterable[Attention]) -> Iterator[list[Float[Tensor, "batch query key"]]]:
    """Inside the context every call of a layer adds its weights to the list: the mean over heads, float32, rows of sum
    1 with zeros where a key is masked.

    Layers whose implementation is flex attention compute with `sdpa` meanwhile, which gets the mask as a matrix.
    """
    recorded: list[Tensor] = []
    layers = list(layers)

    def record(layer: Attention, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        blocks = compute_weights(layer, *args, **kwargs)
        recorded.append(torch.cat([block.mean(dim=1) for block in blocks], dim=1))

    before = {layer: layer.__dict__.get("implementation") for layer in layers}
    hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        for layer in layers:
            if layer.implementation == "flex_attention":
                layer.implementation = "sdpa"
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()
        for layer, implementation in before.items():
            if implementation is None:
                layer.__dict__.pop("implementation", None)
            else:
                layer.implementation = implementation


def compute_weights(
    layer: Attention, *args: Any, **kwargs: Any
) -> Iterator[Float[Tensor, "batch head query_block key"]]:
    """The attention weights of a call of `layer` with these arguments, a block of queries after the other, float32."""
    given = _FORWARD.bind(layer, *args, **kwargs)
    given.apply_defaults()
    call = given.arguments
    if call["keys_values"] is None:
        queries, (keys, _) = layer.project(call["x"], call["norm"], call["context"], call["kernels"])
    else:
        queries, (keys, _) = layer.split(layer.query(call["x"])), call["keys_values"]
    keys, mask = keys.float(), call["mask"]
    rows = max(1, LARGEST_BLOCK // (queries.shape[0] * queries.shape[1] * keys.shape[2]))
    for first in range(0, queries.shape[2], rows):
        block = queries[:, :, first : first + rows].float()
        yield _attend(block, keys, _take_rows(mask, first, rows))


def _take_rows(mask: Bool[Tensor, "..."] | None, first: int, rows: int) -> Bool[Tensor, "..."] | None:
    """The mask of a block of queries; one that is the same for all queries has a single row."""
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., first : first + rows, :]


def _attend(
    queries: Float[Tensor, "batch head query width"],
    keys: Float[Tensor, "batch head key width"],
    mask: Bool[Tensor, "..."] | None,
) -> Float[Tensor, "batch head query key"]:
    scores = queries @ keys.mT / queries.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1)

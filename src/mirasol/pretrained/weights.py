"""Pretrained weights of another model: the config fields they need, and a plan from their tensors to ours."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mirasol.config.model import MirasolConfig
from mirasol.errors import UserError


@dataclass(frozen=True)
class Copy:
    """One tensor of the model made from tensors of the source.

    `partial`: the source has only the first rows of the target; the others stay at random.
    """

    target: str
    sources: tuple[str, ...]
    make: Callable[..., Tensor] = lambda tensor: tensor
    note: str = ""
    partial: bool = False


@dataclass(frozen=True)
class Fill:
    """One tensor of the model set to a number, because the source has nothing there."""

    target: str
    value: float
    note: str


@dataclass
class PretrainedWeights:
    """Pretrained weights of another model, as read from its files.

    name: the file or folder, for messages. tensors: by their names in the source. parts: fields of the config that the
    weights need, as nested mappings. plan: the steps for a config that has those fields. reasons: by prefix of their
    names, why tensors are not used. remarks: assumptions about what the source does not state.
    """

    name: str
    tensors: dict[str, Tensor]
    parts: dict[str, Any] = field(default_factory=dict)
    plan: Callable[[MirasolConfig], Iterable[Copy | Fill]] = lambda config: ()
    reasons: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises UserError if the source lacks it."""
        if name not in self.tensors:
            raise UserError(f"{self.name}: lacks the tensor {name}: the checkpoint is incomplete or of another class")
        return tuple(self.tensors[name].shape)

    def check_width(self, name: str, width: int, target: str) -> None:
        """Raises UserError, with both shapes, for a tensor whose first axis is not `width`, the model's own."""
        shape = self.shape(name)
        if shape[0] != width:
            raise make_shape_error(self.name, name, shape, target, (width, *shape[1:]))

    def make_tensor(self, copy: Copy) -> Tensor:
        """The target's value in float32. Raises UserError if the source lacks a tensor that it is made of."""
        for name in copy.sources:
            self.shape(name)
        return copy.make(*(self.tensors[name].float() for name in copy.sources))

    def find_unused(self, steps: Iterable[Copy | Fill]) -> dict[str, str]:
        """Every tensor that no step reads, with the reason."""
        used = {name for step in steps if isinstance(step, Copy) for name in step.sources}
        unknown = "unknown to this version of mirasol"
        return {
            name: next((why for prefix, why in self.reasons.items() if name.startswith(prefix)), unknown)
            for name in self.tensors
            if name not in used
        }


def make_shape_error(source: str, names: str, shape: Iterable[int], target: str, wanted: Iterable[int]) -> UserError:
    """The error for a tensor whose shape is not its target's."""
    return UserError(
        f"{source}: {names} has shape {list(shape)}, but {target} takes {list(wanted)}: "
        f"choose a preset, or fields of one, of the source's size"
    )


@dataclass(frozen=True)
class BlockNames:
    """How a source names the weights of a Transformer block: modules, or one fused tensor for query, key and value
    (then `query` is empty). `qkv_bias`: whether those three have biases."""

    attention_norm: str
    query: str
    key: str
    value: str
    output: str
    feed_forward_norm: str
    hidden: str
    feed_forward_output: str
    qkv_bias: bool = True


OPEN_CLIP_BLOCK = BlockNames("ln_1", "", "", "", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def copy_weight_and_bias(target: str, name: str) -> Iterable[Copy]:
    """Copies weight and bias of a norm or a linear."""
    for kind in ("weight", "bias"):
        yield Copy(f"{target}.{kind}", (f"{name}.{kind}",))


def fill_bias(target: str) -> Fill:
    """Fills the bias of a layer that has none in the source with zeros."""
    return Fill(f"{target}.bias", 0.0, "the source has no bias here")


def copy_attention(target: str, name: str, names: BlockNames) -> Iterable[Copy | Fill]:
    """Copies query, fused key and value, and output. `torch.nn.MultiheadAttention` fuses the first three."""
    for kind in ("weight", "bias"):
        if kind == "bias" and not names.qkv_bias:
            yield from (fill_bias(f"{target}.query"), fill_bias(f"{target}.key_value"))
        elif names.query:
            yield Copy(f"{target}.query.{kind}", (f"{name}.{names.query}.{kind}",))
            both = f"{name}.{names.key}.{kind}", f"{name}.{names.value}.{kind}"
            yield Copy(f"{target}.key_value.{kind}", both, lambda key, value: torch.cat([key, value]), "concatenated")
        else:
            fused = (f"{name}.attn.in_proj_{kind}",)
            yield Copy(f"{target}.query.{kind}", fused, lambda qkv: qkv.chunk(3)[0], "first third")
            yield Copy(f"{target}.key_value.{kind}", fused, lambda qkv: torch.cat(qkv.chunk(3)[1:]), "other two thirds")
    yield from copy_weight_and_bias(f"{target}.output", f"{name}.{names.output}")


def copy_block(target: str, name: str, names: BlockNames, prefix: str = "") -> Iterable[Copy | Fill]:
    """Copies all weights of a block; `prefix` is "cross_" for the cross-attention half of a text block."""
    yield from copy_weight_and_bias(f"{target}.{prefix}attention_norm", f"{name}.{names.attention_norm}")
    yield from copy_attention(f"{target}.{prefix}attention", name, names)
    yield from copy_weight_and_bias(f"{target}.{prefix}feed_forward_norm", f"{name}.{names.feed_forward_norm}")
    yield from copy_weight_and_bias(f"{target}.{prefix}feed_forward.hidden", f"{name}.{names.hidden}")
    yield from copy_weight_and_bias(f"{target}.{prefix}feed_forward.output", f"{name}.{names.feed_forward_output}")

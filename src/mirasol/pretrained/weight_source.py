"""What one source of starting weights gives: config fields it needs, and a plan from its tensors to the model's."""

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
class Source:
    """Starting weights as they were read.

    name: what messages call it, a file or folder. tensors: by their names there. parts: fields of the config that the
    weights need, as nested mappings. plan: the steps for a config that has those fields. reasons: why tensors whose
    names begin so are not used. remarks: what was assumed because the source does not say.
    """

    name: str
    tensors: dict[str, Tensor]
    parts: dict[str, Any] = field(default_factory=dict)
    plan: Callable[[MirasolConfig], Iterable[Copy | Fill]] = lambda config: ()
    reasons: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; UserError if the source lacks it."""
        if name not in self.tensors:
            raise UserError(f"{self.name}: lacks the tensor {name}: the checkpoint is incomplete or of another class")
        return tuple(self.tensors[name].shape)

    def check_width(self, name: str, width: int, target: str) -> None:
        """Refuses a tensor whose first axis is not `width`, the model's own; both shapes are named."""
        shape = self.shape(name)
        if shape[0] != width:
            raise misfit(self.name, name, shape, target, (width, *shape[1:]))

    def made(self, copy: Copy) -> Tensor:
        """The target's value in float32; UserError if the source lacks what it is made of."""
        for name in copy.sources:
            self.shape(name)
        return copy.make(*(self.tensors[name].float() for name in copy.sources))

    def unused(self, steps: Iterable[Copy | Fill]) -> dict[str, str]:
        """Every tensor that no step reads, with the reason."""
        used = {name for step in steps if isinstance(step, Copy) for name in step.sources}
        unknown = "unknown to this version of mirasol"
        return {
            name: next((why for prefix, why in self.reasons.items() if name.startswith(prefix)), unknown)
            for name in self.tensors
            if name not in used
        }


def misfit(source: str, names: str, shape: Iterable[int], target: str, wanted: Iterable[int]) -> UserError:
    """The error for a tensor that does not fit where it belongs."""
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


def plain(target: str, name: str) -> Iterable[Copy]:
    """Weight and bias of a norm or a linear."""
    for kind in ("weight", "bias"):
        yield Copy(f"{target}.{kind}", (f"{name}.{kind}",))


def no_bias(target: str) -> Fill:
    """The bias of a layer that has none in the source."""
    return Fill(f"{target}.bias", 0.0, "the source has no bias here")


def attention(target: str, name: str, names: BlockNames) -> Iterable[Copy | Fill]:
    """Query, fused key and value, and output; `torch.nn.MultiheadAttention` keeps the first three in one tensor."""
    for kind in ("weight", "bias"):
        if kind == "bias" and not names.qkv_bias:
            yield from (no_bias(f"{target}.query"), no_bias(f"{target}.key_value"))
        elif names.query:
            yield Copy(f"{target}.query.{kind}", (f"{name}.{names.query}.{kind}",))
            both = f"{name}.{names.key}.{kind}", f"{name}.{names.value}.{kind}"
            yield Copy(f"{target}.key_value.{kind}", both, lambda key, value: torch.cat([key, value]), "joined")
        else:
            fused = (f"{name}.attn.in_proj_{kind}",)
            yield Copy(f"{target}.query.{kind}", fused, lambda qkv: qkv.chunk(3)[0], "first third")
            yield Copy(f"{target}.key_value.{kind}", fused, lambda qkv: torch.cat(qkv.chunk(3)[1:]), "other two thirds")
    yield from plain(f"{target}.output", f"{name}.{names.output}")


def block(target: str, name: str, names: BlockNames, prefix: str = "") -> Iterable[Copy | Fill]:
    """All weights of a block; `prefix` is "cross_" for the cross-attention half of a text block."""
    yield from plain(f"{target}.{prefix}attention_norm", f"{name}.{names.attention_norm}")
    yield from attention(f"{target}.{prefix}attention", name, names)
    yield from plain(f"{target}.{prefix}feed_forward_norm", f"{name}.{names.feed_forward_norm}")
    yield from plain(f"{target}.{prefix}feed_forward.hidden", f"{name}.{names.hidden}")
    yield from plain(f"{target}.{prefix}feed_forward.output", f"{name}.{names.feed_forward_output}")

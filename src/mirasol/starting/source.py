"""What one source of starting weights gives: config fields it needs, and a plan from its tensors to the model's."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mirasol.config import MirasolConfig
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
    """How a source names the weights of a Transformer block: modules, or one fused tensor for query, key and value."""

    attention_norm: str
    query: str
    key: str
    value: str
    output: str
    feed_forward_norm: str
    hidden: str
    feed_forward_output: str


OPEN_CLIP_BLOCK = BlockNames("ln_1", "", "", "", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def plain(source: Source, target: str, name: str) -> Iterable[Copy | Fill]:
    """Weight and bias of a norm, a linear or a convolution; a bias the source does not have is zero."""
    yield Copy(f"{target}.weight", (f"{name}.weight",))
    yield bias(source, target, f"{name}.bias")


def bias(source: Source, target: str, *names: str) -> Copy | Fill:
    """A bias joined from several of the source, or zero where it has none."""
    if not any(name in source.tensors for name in names):
        return Fill(f"{target}.bias", 0.0, "the source has no bias here")
    return Copy(f"{target}.bias", names, lambda *parts: torch.cat(parts), "joined" if len(names) > 1 else "")


def attention(source: Source, target: str, name: str, names: BlockNames) -> Iterable[Copy | Fill]:
    """Query, fused key and value, and output; `torch.nn.MultiheadAttention` keeps the first three in one tensor."""
    if names.query:
        yield from plain(source, f"{target}.query", f"{name}.{names.query}")
        both = [f"{name}.{names.key}", f"{name}.{names.value}"]
        weights = tuple(f"{module}.weight" for module in both)
        yield Copy(f"{target}.key_value.weight", weights, lambda key, value: torch.cat([key, value]), "joined")
        yield bias(source, f"{target}.key_value", *(f"{module}.bias" for module in both))
    else:
        for kind in ("weight", "bias"):
            fused = (f"{name}.attn.in_proj_{kind}",)
            yield Copy(f"{target}.query.{kind}", fused, lambda qkv: qkv.chunk(3)[0], "first third")
            yield Copy(f"{target}.key_value.{kind}", fused, lambda qkv: torch.cat(qkv.chunk(3)[1:]), "other two thirds")
    yield from plain(source, f"{target}.output", f"{name}.{names.output}")


def block(source: Source, target: str, name: str, names: BlockNames, prefix: str = "") -> Iterable[Copy | Fill]:
    """All weights of a block; `prefix` is "cross_" for the cross-attention half of a text block."""
    yield from plain(source, f"{target}.{prefix}attention_norm", f"{name}.{names.attention_norm}")
    yield from attention(source, f"{target}.{prefix}attention", name, names)
    yield from plain(source, f"{target}.{prefix}feed_forward_norm", f"{name}.{names.feed_forward_norm}")
    yield from plain(source, f"{target}.{prefix}feed_forward.hidden", f"{name}.{names.hidden}")
    yield from plain(source, f"{target}.{prefix}feed_forward.output", f"{name}.{names.feed_forward_output}")

"""Builds a model from a preset and pretrained weights of other models."""

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mirasol.config.checks import merge_mappings
from mirasol.config.model import PARTS, MirasolConfig
from mirasol.errors import UserError
from mirasol.hub import MODEL, OPEN_CLIP, find_on_hub, name_commit
from mirasol.model.hf import MirasolForConditionalGeneration
from mirasol.pretrained.image import read_image_source
from mirasol.pretrained.openmammut import find_special_ids, read_openmammut_source
from mirasol.pretrained.report import PretrainedReport
from mirasol.pretrained.weights import Copy, Fill, PretrainedWeights, make_shape_error

SPECIALS = ("pad_token", "bos_token", "eos_token", "sep_token")


def assemble(
    preset: str | MirasolConfig,
    *,
    image: str | PathLike | None = None,
    openmammut: str | PathLike | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    inflate_tubes: bool = False,
    image_size: int | None = None,
    allow_pickle: bool = False,
    seed: int = 0,
) -> tuple[MirasolForConditionalGeneration, PretrainedReport]:
    """Builds a model initialised from pretrained weights, and a report on every tensor.

    `mirasol.MirasolForConditionalGeneration.from_parts` is this function.

    preset: a preset's name or a config; fields that the sources need are adapted, and listed in the report. image:
    folder, or name on the hub, of a CLIP, SigLIP or ViT checkpoint. openmammut: state dict of an openMaMMUT model, or
    its name on the hub; its image side is used too unless `image` is given. tokenizer: of the text decoder; special
    tokens it lacks are added to it. inflate_tubes: make the other tubes from the 2D patches' kernel. image_size: side
    of the square frames, pixels. seed: of the weights that no source has.

    Raises:
        UserError: nothing to load, a source that cannot be read, a tensor that does not fit (named, with both shapes),
            a tokenizer of another vocabulary than the text decoder's.
    """
    if image is None and openmammut is None:
        raise UserError("nothing to start from: give an image model (--image) or an openMaMMUT one (--openmammut)")
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size={image_size} must be at least 1 pixel")
    config = MirasolConfig.preset(preset) if isinstance(preset, str) else preset
    sources, ids, names = [], {}, {}
    if image is not None:
        folder, names["image"] = locate_source(image, MODEL)
        sources.append(read_image_source(folder, config, image_size, inflate_tubes, allow_pickle))
    if openmammut is not None:
        file, names["openmammut"] = locate_source(openmammut, OPEN_CLIP)
        source = read_openmammut_source(file, config, image_size, inflate_tubes, image is None, allow_pickle)
        sources.append(source)
        ids = find_special_ids(source)
        source.parts["text"]["vocab_size"] += 1
    if tokenizer is not None:
        text, ids = _fit_tokenizer(tokenizer, sources[-1] if openmammut is not None else None)
        (sources[-1] if openmammut is not None else sources[0]).parts.setdefault("text", {}).update(text)
    fitted = adapt_config(config, [source.parts for source in sources], ids)
    values, fills, report = plan_tensors(config, fitted, sources)
    report.sources = names
    return _build_model(fitted, values, fills, seed), report


def locate_source(name: str | PathLike, files: tuple[str, ...]) -> tuple[Path, str]:
    """Where the files of a local path or of a repository of the hub are, and its name with the commit. Raises UserError
    as `mirasol.hub.find_on_hub`."""
    folder = find_on_hub(str(name), files)
    return (Path(name), str(name)) if folder is None else (folder, name_commit(str(name), files))


def _build_model(
    config: MirasolConfig, values: Mapping[str, Tensor], fills: Mapping[str, float], seed: int
) -> MirasolForConditionalGeneration:
    """A model with these tensors and numbers, initialised at random elsewhere."""
    torch.manual_seed(seed)
    model = MirasolForConditionalGeneration(config).eval()
    with torch.no_grad():
        state = model.state_dict()
        for name, value in values.items():
            state[name][: len(value)].copy_(value)
        for name, value in fills.items():
            state[name].fill_(value)
    return model


def _fit_tokenizer(
    tokenizer: PreTrainedTokenizerBase, decoder: PretrainedWeights | None
) -> tuple[dict[str, Any], dict[str, int]]:
    """The text fields and special ids of a tokenizer; special tokens it lacks are appended to its vocabulary."""
    if decoder is not None:
        rows = decoder.shape("text.token_embedding.weight")[0]
        if len(tokenizer) != rows:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens, but {decoder.name} was trained with {rows}: "
                f"give the tokenizer it was trained with (CLIP's)"
            )
    missing = {name: f"<{name.removesuffix('_token')}>" for name in SPECIALS if getattr(tokenizer, name) is None}
    tokenizer.add_special_tokens(missing)
    return {"vocab_size": len(tokenizer)}, {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in SPECIALS}


def adapt_config(config: MirasolConfig, changes: list[Mapping[str, Any]], ids: Mapping[str, int]) -> MirasolConfig:
    """The config with nested `changes` to its parts and other ids of special tokens, checked again."""
    values = {name: dataclasses.asdict(getattr(config, name)) for name in PARTS if getattr(config, name) is not None}
    for parts in changes:
        values = merge_mappings(values, parts)
    if values["combiner"]["kind"] == "concat":
        del values["combiner"]["m"]  # follows the size of frames
    for name in SPECIALS:
        values[f"{name}_id"] = getattr(config, f"{name}_id")
    return MirasolConfig(**(values | dict(ids)))


def plan_tensors(
    preset: MirasolConfig, config: MirasolConfig, sources: list[PretrainedWeights]
) -> tuple[dict[str, Tensor], dict[str, float], PretrainedReport]:
    """The initial value of every tensor of a model of `config`: tensors, numbers to fill with, and the report.

    Raises:
        UserError: a tensor that is missing or does not fit. All are checked before a model is built, which is slow.
    """
    with torch.device("meta"):
        state = MirasolForConditionalGeneration(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    report = PretrainedReport(config_changes=_find_differences(preset, config))
    values, fills = {}, {}
    for source in sources:
        steps = list(source.plan(config))
        for step in steps:
            if isinstance(step, Copy):
                values[step.target] = _make_checked(source, step, shapes[step.target])
                more = {}
                if len(values[step.target]) < shapes[step.target][0]:
                    more["untrained_from"] = len(values[step.target])  # the first row that the source does not have
                described = _describe_step(step, shapes, source=list(step.sources), file=source.name, **more)
                report.loaded.append(described)
            else:
                fills[step.target] = step.value
                report.filled.append(_describe_step(step, shapes, value=step.value))
        for name, why in source.find_unused(steps).items():
            report.unused.append({"source": name, "file": source.name, "reason": why})
        report.remarks += source.remarks
    report.random = [
        {"target": name, "shape": list(shape)}
        for name, shape in shapes.items()
        if name not in values and name not in fills
    ]
    return values, fills, report


def _make_checked(source: PretrainedWeights, copy: Copy, wanted: tuple[int, ...]) -> Tensor:
    """The value of a tensor. Raises UserError with both shapes where it does not fit."""
    value = source.make_tensor(copy)
    rows_fit = len(value) <= wanted[0] if copy.partial else len(value) == wanted[0]
    if tuple(value.shape[1:]) != wanted[1:] or not rows_fit:
        raise make_shape_error(source.name, " + ".join(copy.sources), value.shape, copy.target, wanted)
    return value


def _describe_step(step: Copy | Fill, shapes: Mapping[str, tuple[int, ...]], **more: Any) -> dict[str, Any]:
    return {"target": step.target, "shape": list(shapes[step.target]), **more, "note": step.note}


def _find_differences(old: MirasolConfig, new: MirasolConfig) -> dict[str, list[Any]]:
    """Fields that differ, as [old, new] by dotted path."""
    before, after = _flatten(old.to_dict()), _flatten(new.to_dict())
    return {name: [before.get(name), value] for name, value in after.items() if before.get(name) != value}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat

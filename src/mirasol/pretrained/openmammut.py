"""Image side, text decoder and cross-attention from a LAION openMaMMUT checkpoint (names of its open_clip state dict).

docs/starting-weights.md lists the sources of these facts.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mirasol.config.model import MirasolConfig
from mirasol.errors import UserError
from mirasol.pretrained.files import read_file, read_json
from mirasol.pretrained.image import CLIP_MEAN, CLIP_STD, VIT
from mirasol.pretrained.patches import check_depth, make_video_fields, plan_patches, plan_positions
from mirasol.pretrained.weights import OPEN_CLIP_BLOCK, Copy, Fill, PretrainedWeights, copy_block, copy_weight_and_bias

NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
CONFIG = "open_clip_config.json"
HEAD_WIDTH = 64  # of all released openMaMMUT models, image and text side
_REASONS = {
    "visual.ln_post": "norms the pooled features, after the ones that the text decoder attends to",
    "visual.proj": "projects pooled, normed features for the source's contrastive loss; "
    "here both sides have projections of their own, and pooled features are not normed",
    "logit_": "scales the source's contrastive loss, a softmax; here the loss is a sigmoid with its own temperature",
    "map_viz2txt_kv": "projects the source's image features to its text decoder's width; the latents here differ",
}


def read_openmammut_source(
    path: Path, config: MirasolConfig, image_size: int | None, inflate: bool, image: bool, allow_pickle: bool
) -> PretrainedWeights:
    """Reads a state dict and plans a model's text decoder and, with `image`, its image side.

    `path` is the weight file or its folder; open_clip_config.json next to it is read if it exists.

    Raises:
        UserError: no such file, not an openMaMMUT state dict, incomplete, of another ViT, or with parts that have no
            counterpart here (layer scale, layers without a feed-forward, attentional pooling).
    """
    file = _find_weight_file(path)
    source = PretrainedWeights(str(file), read_file(file, allow_pickle))
    for name in ("text.token_embedding.weight", "text.text_projection", "map_viz2txt_kv"):
        if name not in source.tensors:
            raise UserError(f"{file}: not an openMaMMUT state dict: it has no {name}")
    for name in source.tensors:
        if ".ls_1." in name or ".attn_pool" in name:
            raise UserError(f"{file}: {name} has no counterpart here (layer scale, attentional pooling)")
    settings = _read_settings(file, source)
    layers, crosses = _count_layers(source, "text.resblocks"), _count_layers(source, "text.cross_attn")
    source.parts = {"text": _make_text_fields(source, settings, layers, crosses)}
    if image:
        source.check_width("visual.conv1.weight", config.vit.width, "vit.width")
        source.parts |= _make_image_fields(source, settings, config, image_size)
        depth = _count_layers(source, "visual.transformer.resblocks")
        check_depth(source, config, depth, "visual.transformer.resblocks.{}.ln_1.weight", config.vit.width)
    source.reasons = _REASONS if image else {"visual.": "the image side comes from another source"} | _REASONS
    source.plan = partial(_plan_tensors, source, image, inflate, crosses)
    return source


def find_special_ids(source: PretrainedWeights) -> dict[str, int]:
    """Ids of the special tokens where no tokenizer is given: CLIP's begins and ends texts with its last two, open_clip
    pads with 0, and <sep>, which it lacks, gets one more row."""
    rows = source.shape("text.token_embedding.weight")[0]
    return {"pad_token_id": 0, "bos_token_id": rows - 2, "eos_token_id": rows - 1, "sep_token_id": rows}


def _find_weight_file(path: Path) -> Path:
    if path.is_dir():
        found = next((path / name for name in NAMES if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"{path}: has none of {', '.join(NAMES)}")
        return found
    if not path.is_file():
        raise UserError(f"{path}: no such file: --openmammut takes an openMaMMUT state dict or its folder")
    return path


def _read_settings(file: Path, source: PretrainedWeights) -> dict[str, Any]:
    """What the tensors do not show, from the config next to them or as in the released models."""
    config_file = file.with_name(CONFIG)
    if not config_file.is_file():
        source.remarks.append(
            f"no {CONFIG} next to {file.name}: assuming heads of {HEAD_WIDTH}, GELU and CLIP's normalisation"
        )
    values = read_json(config_file) if config_file.is_file() else {}
    model, pictures = values.get("model_cfg") or {}, values.get("preprocess_cfg") or {}
    vision, text = model.get("vision_cfg") or {}, model.get("text_cfg") or {}
    text_width = source.shape("text.token_embedding.weight")[1]
    return {
        "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "vision_head_width": vision.get("head_width", HEAD_WIDTH),
        "text_heads": text.get("heads", max(1, text_width // HEAD_WIDTH)),
        "final_norm": not vision.get("final_ln_after_pool", True),
        "image_mean": pictures.get("mean", CLIP_MEAN),
        "image_std": pictures.get("std", CLIP_STD),
    }


def _count_layers(source: PretrainedWeights, prefix: str) -> int:
    """Number of numbered layers under a name."""
    found = {name[len(prefix) + 1 :].split(".")[0] for name in source.tensors if name.startswith(f"{prefix}.")}
    if not found:
        raise UserError(f"{source.name}: lacks the tensors {prefix}.*: the file is incomplete")
    return len(found)


def _make_text_fields(source: PretrainedWeights, settings: dict[str, Any], layers: int, crosses: int) -> dict[str, Any]:
    vocabulary, width = source.shape("text.token_embedding.weight")
    every = max(1, layers // crosses)
    if len(range(0, layers, every)) != crosses:
        raise UserError(f"{source.name}: {crosses} cross-attention blocks in {layers} layers are not evenly spaced")
    hidden, heads = source.shape("text.resblocks.0.mlp.c_fc.weight")[0], settings["text_heads"]
    return {
        "stack": {
            "depth": layers, "width": width, "hidden": hidden, "heads": heads, "head_width": width // heads,
            "gated": False, "bias": True, "activation": settings["activation"], "norm_eps": 1e-5,
        },
        "vocab_size": vocabulary,
        "max_length": source.shape("text.positional_embedding")[0],
        "cross_attention_every": every,
        "cross_attention_first": 1,
        "cross_attention_ffn": True,
        "cross_attention_latent_norm": True,
        "scale_embedding": False,
        "learned_positions": True,
        "tied": False,
    }  # fmt: skip


def _make_image_fields(
    source: PretrainedWeights, settings: dict[str, Any], config: MirasolConfig, image_size: int | None
) -> dict[str, Any]:
    width, _, patch, _ = source.shape("visual.conv1.weight")
    head_width = settings["vision_head_width"]
    return {
        "chunking": {"image_mean": settings["image_mean"], "image_std": settings["image_std"]},
        "video": make_video_fields(config, patch, image_size),
        "vit": {
            "heads": max(1, width // head_width), "head_width": min(width, head_width), "gated": False, "bias": True,
            "activation": settings["activation"], "norm_eps": 1e-5, "class_token": True,
            "input_norm": "visual.ln_pre.weight" in source.tensors, "final_norm": settings["final_norm"],
        },
    }  # fmt: skip


def _plan_tensors(
    source: PretrainedWeights, image: bool, inflate: bool, crosses: int, config: MirasolConfig
) -> Iterable[Copy | Fill]:
    if image:
        yield from _plan_image_tensors(source, inflate, config)
    rows = source.shape("text.token_embedding.weight")[0]
    note = f"rows 0 to {rows - 1}; the others are special tokens that the source lacks, left at random"
    note = note if config.text.vocab_size > rows else ""
    yield Copy("text.embedding.weight", ("text.token_embedding.weight",), note=note, partial=True)
    yield Copy("text.output.weight", ("text.text_projection",), torch.t, note or "transposed", partial=True)
    yield Copy("text.position", ("text.positional_embedding",))
    for index in range(config.text.stack.depth):
        yield from copy_block(f"text.blocks.{index}", f"text.resblocks.{index}", OPEN_CLIP_BLOCK)
    for number, index in zip(range(crosses), config.text.cross_attention_layers, strict=True):
        target, name = f"text.blocks.{index}", f"text.cross_attn.{number}"
        yield from copy_block(target, name, OPEN_CLIP_BLOCK, "cross_")
        yield from copy_weight_and_bias(f"{target}.cross_latent_norm", f"{name}.ln_1_kv")
    yield from copy_weight_and_bias("text.norm", "text.ln_final")
    features, width = source.shape("map_viz2txt_kv")
    if features == config.latent.stack.width != width:
        note = "transposed; trained on image features, its input here is latents"
        yield Copy("text.latent_input.weight", ("map_viz2txt_kv",), torch.t, note)
        yield Fill("text.latent_input.bias", 0.0, "the source has no bias here")


def _plan_image_tensors(source: PretrainedWeights, inflate: bool, config: MirasolConfig) -> Iterable[Copy | Fill]:
    yield from plan_patches(source, config, "visual.conv1.weight", None, inflate)
    yield from plan_positions(source, config, "visual.positional_embedding", "visual.class_embedding")
    if config.vit.input_norm:
        yield from copy_weight_and_bias(f"{VIT}.input_norm", "visual.ln_pre")
    if config.vit.final_norm:
        yield from copy_weight_and_bias(f"{VIT}.norm", "visual.ln_post")
    for index in range(config.vit.depth):
        layer = f"visual.transformer.resblocks.{index}"
        yield from copy_block(f"{VIT}.blocks.{index}", layer, OPEN_CLIP_BLOCK)

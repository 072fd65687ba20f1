"""The image side from a CLIP, SigLIP or ViT checkpoint in the format of transformers."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mirasol.config.model import MirasolConfig
from mirasol.errors import UserError
from mirasol.pretrained.files import read_folder, read_json
from mirasol.pretrained.patches import check_depth, make_video_fields, plan_patches, plan_positions
from mirasol.pretrained.weights import BlockNames, Copy, Fill, PretrainedWeights, copy_block, copy_weight_and_bias

VIT = "chunk_encoder.vit"
ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_CLIP_BLOCK = BlockNames(
    "layer_norm1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "layer_norm2",
    "mlp.fc1", "mlp.fc2",
)  # fmt: skip
_VIT_BLOCK = BlockNames(
    "layernorm_before", "attention.attention.query", "attention.attention.key", "attention.attention.value",
    "attention.output.dense", "layernorm_after", "intermediate.dense", "output.dense",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """How a kind of image model names its tensors, and which norms its features go through.

    prefixes: possible prefixes of all names. final_norm: the norm of its `last_hidden_state`, if any. reasons: why
    other tensors are not used, by the start of their names after the prefix.
    """

    prefixes: tuple[str, ...]
    layer: str
    names: BlockNames
    patch: str
    patch_bias: bool
    position: str
    class_token: str | None
    input_norm: str | None
    final_norm: str | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    reasons: dict[str, str]


_GREY = (0.5, 0.5, 0.5)
_CLIP = Family(
    ("vision_model.", ""), "encoder.layers.{}", _CLIP_BLOCK, "embeddings.patch_embedding", False,
    "embeddings.position_embedding.weight", "embeddings.class_embedding", "pre_layrnorm", None, CLIP_MEAN, CLIP_STD,
    {"post_layernorm": "norms the class token alone, after the features", "embeddings.position_ids": "no weights"},
)  # fmt: skip
_SIGLIP = Family(
    ("vision_model.", ""), "encoder.layers.{}", _CLIP_BLOCK, "embeddings.patch_embedding", True,
    "embeddings.position_embedding.weight", None, None, "post_layernorm", _GREY, _GREY,
    {"head": "pools the features into one", "embeddings.position_ids": "no weights"},
)  # fmt: skip
_VIT = Family(
    ("vit.", ""), "encoder.layer.{}", _VIT_BLOCK, "embeddings.patch_embeddings.projection", True,
    "embeddings.position_embeddings", "embeddings.cls_token", None, "layernorm", _GREY, _GREY,
    {"pooler": "pools the features into one", "embeddings.mask_token": "hides patches in pretraining"},
)  # fmt: skip
FAMILIES = {
    "clip": _CLIP, "clip_vision_model": _CLIP, "siglip": _SIGLIP, "siglip_vision_model": _SIGLIP, "vit": _VIT,
}  # fmt: skip
_OTHER_REASONS = {
    "text_": "of the source's text side",
    "text_model": "of the source's text side",
    "visual_projection": "projects the pooled class token",
    "classifier": "of the source's classifier",
    "logit_": "of the source's contrastive loss",
}


def read_image_source(
    folder: Path, config: MirasolConfig, image_size: int | None, inflate: bool, allow_pickle: bool
) -> PretrainedWeights:
    """Reads a checkpoint's folder and plans the image side of a model of `config`.

    Its features will be the patch tokens of the source's `last_hidden_state`.

    Raises:
        UserError: no checkpoint, of an unknown class, incomplete, of another depth, or with an activation that is not
            known here.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder: --image takes a checkpoint's folder, or a name of the hub (org/name)"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a checkpoint: it has no config.json")
    values = read_json(folder / "config.json")
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{folder}: model_type {kind!r} is not supported, choose one of {', '.join(FAMILIES)}")
    family, settings = FAMILIES[kind], _read_settings(kind, values, folder)
    source = PretrainedWeights(str(folder), read_folder(folder, allow_pickle))
    prefix = next((p for p in family.prefixes if f"{p}{family.position}" in source.tensors), family.prefixes[0])
    source.check_width(f"{prefix}{family.patch}.weight", config.vit.width, "vit.width")
    source.parts = _make_fields(family, settings, source, config, image_size)
    mean, std = _read_normalisation(folder, family, source)
    source.parts["chunking"] = {"image_mean": mean, "image_std": std}
    check_depth(
        source, config, settings.num_hidden_layers,
        f"{prefix}{family.layer}.{family.names.attention_norm}.weight", settings.hidden_size,
    )  # fmt: skip
    source.reasons = {f"{prefix}{name}": why for name, why in family.reasons.items()} | _OTHER_REASONS
    names = replace(family.names, qkv_bias=getattr(settings, "qkv_bias", True))
    source.plan = partial(_plan_tensors, source, replace(family, names=names), prefix, inflate)
    return source


def _read_settings(kind: str, values: dict[str, Any], folder: Path) -> Any:
    """The config of the image side, with transformers' defaults for what the file leaves out."""
    import transformers

    makers = {"clip": "CLIPVisionConfig", "siglip": "SiglipVisionConfig", "vit": "ViTConfig"}
    maker = getattr(transformers, makers[kind.split("_")[0]])
    values = values.get("vision_config", values)
    try:
        return maker(**{name: value for name, value in values.items() if name != "model_type"})
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: {' '.join(str(error).split())[:200]}") from error


def _make_fields(
    family: Family, settings: Any, source: PretrainedWeights, config: MirasolConfig, image_size: int | None
) -> dict[str, Any]:
    if settings.hidden_act not in ACTIVATIONS:
        raise UserError(f"{source.name}: activation {settings.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")
    width, heads = settings.hidden_size, settings.num_attention_heads
    if not isinstance(settings.patch_size, int):
        raise UserError(f"{source.name}: patch_size={settings.patch_size}: only square patches are supported")
    return {
        "vit": {
            "heads": heads,
            "head_width": width // heads,
            "gated": False,
            "bias": True,
            "activation": ACTIVATIONS[settings.hidden_act],
            "norm_eps": settings.layer_norm_eps,
            "class_token": family.class_token is not None,
            "input_norm": family.input_norm is not None,
            "final_norm": family.final_norm is not None,
        },
        "video": make_video_fields(config, settings.patch_size, image_size, settings.image_size),
    }


def _read_normalisation(folder: Path, family: Family, source: PretrainedWeights) -> tuple[Any, Any]:
    """Mean and standard deviation of the source's image normalisation."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        source.remarks.append(f"{folder} has no preprocessor_config.json: assuming the usual normalisation of its kind")
        return family.mean, family.std
    values = read_json(file)
    if values.get("do_normalize") is False:
        return 0.0, 1.0
    return tuple(
        _collapse_if_equal(values.get(name, default))
        for name, default in (("image_mean", family.mean), ("image_std", family.std))
    )


def _collapse_if_equal(values: Any) -> Any:
    """One number in place of three equal ones."""
    return values[0] if isinstance(values, list | tuple) and len(set(values)) == 1 else values


def _plan_tensors(
    source: PretrainedWeights, family: Family, prefix: str, inflate: bool, config: MirasolConfig
) -> Iterable[Copy | Fill]:
    patch = f"{prefix}{family.patch}"
    yield from plan_patches(source, config, f"{patch}.weight", f"{patch}.bias" if family.patch_bias else None, inflate)
    token = f"{prefix}{family.class_token}" if family.class_token else None
    yield from plan_positions(source, config, f"{prefix}{family.position}", token)
    for target, name in (("input_norm", family.input_norm), ("norm", family.final_norm)):
        if name is not None:
            yield from copy_weight_and_bias(f"{VIT}.{target}", f"{prefix}{name}")
    for index in range(config.vit.depth):
        layer = f"{prefix}{family.layer.format(index)}"
        yield from copy_block(f"{VIT}.blocks.{index}", layer, family.names)

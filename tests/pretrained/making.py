"""Small random checkpoints of other people's classes, written as they write them."""

from pathlib import Path
from typing import Any

import torch

from mirasol import MirasolConfig

SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Every weight random, norms and biases too, so that nothing agrees by being zero or one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model.eval()


def image_model(kind: str, patch: int, image_size: int, **settings: Any) -> torch.nn.Module:
    """A model of one of the classes that `mirasol init --image` reads."""
    import transformers

    torch.manual_seed(5)
    sizes = SIZES | {"patch_size": patch, "image_size": image_size} | settings
    config = {
        "CLIPVisionModel": transformers.CLIPVisionConfig, "SiglipVisionModel": transformers.SiglipVisionConfig,
        "CLIPVisionModelWithProjection": transformers.CLIPVisionConfig,
        "ViTModel": transformers.ViTConfig, "ViTForImageClassification": transformers.ViTConfig,
    }  # fmt: skip
    if kind in config:
        return randomised(getattr(transformers, kind)(config[kind](**sizes)))
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 5}
    whole = {"CLIPModel": transformers.CLIPConfig, "SiglipModel": transformers.SiglipConfig}[kind]
    return randomised(getattr(transformers, kind)(whole(vision_config=sizes, text_config=text)))


def patch_features(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The patch tokens of a model's `last_hidden_state`, positions interpolated where the images need it."""
    model = getattr(model, "vision_model", getattr(model, "vit", model))
    with torch.no_grad():
        features = model(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state
    patches = (images.shape[-1] // model.config.patch_size) ** 2
    return features[:, -patches:]


def config(patch: int = 16, image_size: int = 64, **parts: Any) -> MirasolConfig:
    """A small config with the ViT of `SIZES`, one 2D patch and one tube."""
    vit = {"depth": 2, "width": 48, "hidden": 80, "heads": 2, "head_width": 24}
    tubes = [
        {"kernel": (4, 8, 8), "stride": (4, 16, 16)},
        {"kernel": (1, 16, 16), "stride": (4, 16, 16)},
    ]
    video = {"image_size": image_size, "tubes": tubes}
    return MirasolConfig.preset("tiny", **({"vit": vit, "video": video} | parts))


def saved(model: torch.nn.Module, folder: Path, **settings: Any) -> Path:
    model.save_pretrained(folder, **settings)
    return folder

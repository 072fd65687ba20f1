"""The presets hold the models they are meant to begin with: shapes only, on the meta device."""

import pytest
import torch
import transformers

from mirasol import MirasolConfig
from mirasol.pretrained import image, openmammut
from mirasol.pretrained.assemble import adapt_config, plan_tensors

CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SIGLIP_L = CLIP_L | {"patch_size": 16, "image_size": 256}
B_16 = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "patch_size": 16, "image_size": 224,
}  # fmt: skip


def on_meta(kind: str, **settings) -> torch.nn.Module:
    with torch.device("meta"):
        config = getattr(transformers, kind.replace("Model", "Config"))(**settings)
        return getattr(transformers, kind)(config)


def open_clip_shapes() -> dict[str, torch.Tensor]:
    """The names and shapes of openMaMMUT ViT-L/14's state dict (docs/starting-weights.md)."""

    def copy_block(name: str, width: int, cross: bool = False) -> dict[str, tuple[int, ...]]:
        norms = ["ln_1", "ln_2", *["ln_1_kv"] * cross]
        shapes = {f"{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}
        linears = {"attn.out_proj": (width, width), "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
        for linear, shape in linears.items():
            shapes |= {f"{linear}.weight": shape, f"{linear}.bias": shape[:1]}
        shapes |= {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
        return {f"{name}.{key}": shape for key, shape in shapes.items()}

    shapes = {
        "map_viz2txt_kv": (1024, 768), "logit_scale": (), "visual.class_embedding": (1024,),
        "visual.positional_embedding": (257, 1024), "visual.proj": (1024, 768),
        "visual.conv1.weight": (1024, 3, 14, 14), "text.token_embedding.weight": (49408, 768),
        "text.positional_embedding": (77, 768), "text.text_projection": (768, 49408),
    }  # fmt: skip
    for name, width in (("visual.ln_pre", 1024), ("visual.ln_post", 1024), ("text.ln_final", 768)):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for index in range(24):
        shapes |= copy_block(f"visual.transformer.resblocks.{index}", 1024)
    for index in range(12):
        shapes |= copy_block(f"text.resblocks.{index}", 768)
    for index in range(6):
        shapes |= copy_block(f"text.cross_attn.{index}", 768, cross=True)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("preset", "kind", "settings", "patches", "weights"),
    [
        ("1b", "CLIPVisionModel", CLIP_L | {"patch_size": 14, "image_size": 224}, 256, 303e6),
        ("1b", "SiglipVisionModel", SIGLIP_L, 196, 303e6),
        ("base", "CLIPVisionModel", B_16, 196, 86e6),
        ("base", "SiglipVisionModel", B_16 | {"image_size": 256}, 196, 86e6),
    ],
)
def test_a_preset_begins_with_an_image_model_of_its_size(
    preset, kind, settings, patches, weights, tmp_path, monkeypatch
):
    source = on_meta(kind, **settings)
    source.config.save_pretrained(tmp_path)
    monkeypatch.setattr(image, "read_folder", lambda folder, allow_pickle: dict(source.state_dict()))
    config = MirasolConfig.preset(preset)
    read = image.read_image_source(tmp_path, config, None, True, False)
    fitted = adapt_config(config, [read.parts], {})
    values, _, report = plan_tensors(config, fitted, [read])
    assert values["chunk_encoder.tubes.learned_position"].shape == (patches, config.vit.width)
    left = {entry["target"] for entry in report.random if entry["target"].startswith(("chunk_encoder.vit", "tubes"))}
    assert not left
    loaded = sum(torch.Size(entry["shape"]).numel() for entry in report.loaded)
    assert loaded == pytest.approx(weights, rel=0.02)


def test_1b_holds_openmammut(tmp_path, monkeypatch):
    (tmp_path / "open_clip_model.safetensors").touch()
    monkeypatch.setattr(openmammut, "read_file", lambda file, allow_pickle: open_clip_shapes())
    config = MirasolConfig.preset("1b")
    read = openmammut.read_openmammut_source(tmp_path, config, None, False, True, False)
    fitted = adapt_config(config, [read.parts], {})
    _, fills, report = plan_tensors(config, fitted, [read])
    assert {name for name in fills if "bias" in name} == {
        "chunk_encoder.tubes.projections.2.bias", "text.latent_input.bias",
    }  # fmt: skip
    unused = {entry["source"] for entry in report.unused}
    assert unused == {"logit_scale", "visual.proj", "visual.ln_post.weight", "visual.ln_post.bias"}
    assert not any(e["target"].startswith(("chunk_encoder.vit", "text.")) for e in report.random)
    heads = fitted.vit.heads, fitted.text.stack.heads
    assert heads == (16, 12) and fitted.text.cross_attention_layers == range(0, 12, 2)

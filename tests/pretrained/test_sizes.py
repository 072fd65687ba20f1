"""The sizes between `tiny` and `1b` begin with an image model that others have trained, and train."""

import json

import pytest
import torch
from making import SIZES, image_model, saved
from safetensors import safe_open

from mirasol import MirasolConfig
from mirasol.cli.main import main

B_16 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TI_16 = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 3}
STACKS = ("combiner", "latent", "reconstruction")


def cut_down(preset: str) -> MirasolConfig:
    """The preset with its widths, tubes and chunks, one layer of everything."""
    one = {"stack": {"depth": 1}}
    parts = dict.fromkeys(STACKS, one) | {"audio": {"adapter": {"depth": 1}}, "vit": {"depth": 1}}
    return MirasolConfig.preset(preset, **parts, text={**one, "cross_attention_every": 1})


def read_tensor(folder, name: str) -> torch.Tensor:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return weights.get_tensor(name)


def begin_and_train(preset: str, image, shapes, folder) -> dict:
    """The record of `mirasol init` with this image model, whose checkpoint then trains a step."""
    main(["init", preset, str(folder / "start"), "--image", str(image), "--tokenizer", "tiny", "--inflate-tubes"])
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"seed: 1\noutput: {folder / 'run'}\ndata: {{root: {shapes}}}\nmodel: {{init: {folder / 'start'}}}\n"
        "stages:\n  questions: {steps: 1, clips_per_step: 1, questions_per_clip: 1}\n"
        "log_every: 1\nvalidation_clips: 1\n"
    )
    main(["train", "--config", str(recipe)])
    name = "chunk_encoder.vit.blocks.0.feed_forward.hidden.weight"
    before, after = (read_tensor(folder / place, name) for place in ("start", "run/checkpoint"))
    assert after.isfinite().all() and not torch.equal(before, after)
    return json.loads((folder / "start" / "starting_weights.json").read_text())


def make_source(kind: str, sizes: dict, folder):
    return saved(image_model(kind, 16, 224, **(SIZES | sizes)), folder / "source")


def check_record(record: dict) -> None:
    """Nothing of the image side stays random."""
    left = {
        e["target"] for e in record["random"] if e["target"].startswith(("chunk_encoder.vit.", "chunk_encoder.tubes"))
    }
    assert not left


def test_base_begins_with_clip_of_its_width(shapes, tmp_path):
    cut_down("base").save_pretrained(tmp_path / "own")
    image = make_source("CLIPModel", B_16 | {"num_hidden_layers": 1}, tmp_path)
    record = begin_and_train(str(tmp_path / "own" / "config.json"), image, shapes, tmp_path)
    check_record(record)


@pytest.mark.slow
def test_small_begins_with_a_vit_of_its_size(shapes, tmp_path):
    check_record(begin_and_train("small", make_source("ViTModel", TI_16, tmp_path), shapes, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel"])
def test_the_whole_base_begins_with_clip_and_siglip(kind, shapes, tmp_path):
    check_record(begin_and_train("base", make_source(kind, B_16, tmp_path), shapes, tmp_path))

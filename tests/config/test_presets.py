"""The presets have the paper's sizes."""

import re

import pytest
import torch

from mirasol import MirasolConfig, MirasolForConditionalGeneration
from mirasol.config.presets import LISTED_PRESETS, PAPER_PARAMETERS, PRESETS

MILLION = 1_000_000
# Ranges in millions: what the paper says, or what its figures leave when the reading of docs/model.md is taken.
SIZES = {
    "3b": {
        "vit": (629, 631), "tubes": (1.48, 1.51), "audio": (100, 102), "combiner": (132.66, 135.34),
        "latent": (132.66, 135.34), "reconstruction": (132.66, 135.34), "text": (840.5, 857.5),
        "cross_attention": (415.5, 432.5), "vocabulary": (389.3, 397.1),
    },
    "1b": {
        "vit": (299, 305), "audio": (100, 102), "combiner": (132.66, 135.34), "latent": (132.66, 135.34),
        "reconstruction": (132.66, 135.34), "text": (132.66, 135.34), "cross_attention": (15.96, 17.64),
        "vocabulary": (259.4, 264.6),
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=["3b", "1b"])
def sized(request):
    with torch.device("meta"):
        return request.param, MirasolForConditionalGeneration(MirasolConfig.preset(request.param))


def test_each_component_has_the_papers_size(sized):
    name, model = sized
    counts = model.num_params()
    for component, (low, high) in SIZES[name].items():
        assert low * MILLION <= counts[component] <= high * MILLION, (component, counts[component])
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


def test_totals_are_those_of_this_reading(sized):
    """The supplement's items do not add up to its 3B and 1.15B: see docs/model.md."""
    name, model = sized
    expected = {"3b": 2.81e9, "1b": 1.224e9}[name]
    assert sum(model.num_params().values()) == pytest.approx(expected, rel=0.002)
    assert PAPER_PARAMETERS[name].keys() - {"total"} <= model.num_params().keys()


def test_the_papers_clip_becomes_512_latents(sized):
    config = sized[1].config
    settings = config.media_settings()
    assert settings["num_chunks"] * settings["frames_per_chunk"] == 128
    assert settings["num_chunks"] * config.combiner.m == 512
    assert (config.video.tokens, config.audio.tokens) == (403, 16)
    resolution = MirasolConfig.preset(sized[0], video={"image_size": 448})
    assert resolution.video.tokens == 1612


def test_last_outputs_are_those_of_both_modalities(sized):
    """Half of the m kept positions are 2D patches of the frame, half the whole spectrogram of the chunk."""
    config = sized[1].config
    assert config.audio.tokens == config.combiner.m // 2
    assert config.video.tubes[-1].kernel == (1, 14, 14)


def test_a_part_of_a_preset_can_be_replaced():
    config = MirasolConfig.preset("1b", combiner={"stack": {"depth": 2}})
    assert (config.combiner.stack.depth, config.combiner.stack.width) == (2, 1024)
    assert MirasolConfig.preset("1b").combiner.stack.depth == 8


def test_every_preset_survives_saving(tmp_path):
    for name in PRESETS:
        config = MirasolConfig.preset(name)
        config.save_pretrained(tmp_path)
        assert MirasolConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(("name", "millions"), [("small", 25), ("base", 250)])
def test_the_sizes_between_are_about_what_they_are_said_to_be(name, millions):
    config = MirasolConfig.preset(name)
    with torch.device("meta"):
        model = MirasolForConditionalGeneration(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * MILLION, rel=0.07)
    assert sum(tube.flat for tube in config.video.tubes) == 1  # the one that an image model's patches become
    assert config.audio.tokens == config.combiner.m // 2  # so that the last m outputs are those of both modalities


def test_the_presets_are_listed_where_help_names_them():
    assert re.findall(r"\w+", LISTED_PRESETS.replace(" or", "")) == list(PRESETS)

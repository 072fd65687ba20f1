"""The table of open points in docs/model.md against the configs it speaks of."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import torch

from mirasol import MirasolConfig, MirasolForConditionalGeneration
from mirasol.config.model import PARTS
from mirasol.config.recipe_io import load_recipe
from mirasol.model.encoder import ViT

PAGE = Path(__file__).parents[1] / "docs" / "model.md"
# How media is cut and scaled is no reading of the paper's model.
NO_OPEN_POINTS = {"chunking.fit"}


def open_points() -> dict[str, tuple[str, str]]:
    """Field → (default, other readings)."""
    section = PAGE.read_text(encoding="utf-8").split("## Open points\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "| `" in line]
    return {field.strip("`"): (default, others) for _, field, default, others in rows}


def value(preset: str, path: str) -> object:
    return functools.reduce(getattr, path.split("."), MirasolConfig.preset(preset))


@pytest.mark.parametrize("path", open_points())
def test_a_default_is_that_of_the_largest_preset(path):
    default, others = open_points()[path]
    if default.startswith("`"):
        assert default.split("`")[1] == str(value("3b", path))
    for preset in ("tiny", "1b"):
        if getattr(MirasolConfig.preset(preset), path.split(".")[0]) is None or path == "video.tubes":
            continue
        if value(preset, path) != value("3b", path):
            assert f"`{preset}`" in others, f"{preset} has {value(preset, path)}"


@functools.cache
def table_1a() -> list[dict[str, str]]:
    """The rows of the supplement's Table 1a as the page has them."""
    lines = PAGE.read_text(encoding="utf-8").split("**Table 1a**")[1].split("In a recipe")[0].splitlines()
    head, _, *rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")
    ]
    return [dict(zip(head, row, strict=True)) for row in rows]


def config_of(row: dict[str, str]) -> MirasolConfig:
    parts: dict[str, dict[str, int]] = {}
    for path in (name for name in row if "." in name):
        part, field = path.split(".")
        parts.setdefault(part, {})[field] = int(row[path])
    return MirasolConfig.preset("1b", **parts)


@pytest.mark.parametrize(("index", "wanted"), [(0, (32, 1, 256)), (1, (128, 1, 256)), (2, (128, 16, 16))])
def test_table_1a_is_the_supplements(index, wanted):
    """Frames, chunks, features of a chunk; 256 features in all, and the same sound."""
    row = table_1a()[index]
    config = config_of(row)
    chunks, m = config.chunking.num_chunks, config.combiner.m
    assert (chunks * config.video.frames_per_chunk, chunks, m) == wanted
    assert int(row["frames"]) == wanted[0] and int(row["features"]) == chunks * m == 256
    assert chunks * config.audio.spectrogram_frames == 512 and chunks * config.audio.tokens == 256
    with torch.device("meta"):
        model = MirasolForConditionalGeneration(config)
        there, ids = torch.ones(1, chunks, dtype=torch.bool), torch.ones(1, 4, dtype=torch.long)
        video, audio = (
            torch.empty(1, chunks, *config.video.chunk_shape),
            torch.empty(1, chunks, *config.audio.chunk_shape),
        )
        output = model(video, audio, there, there, there, decoder_input_ids=ids)
    assert output.latents.shape[:3] == (1, chunks, m)


def test_the_command_for_table_1a_makes_its_first_row():
    page = " ".join(PAGE.read_text(encoding="utf-8").split("**Table 1a**")[1].split("A clip of one chunk")[0].split())
    [overrides] = re.findall(r"--model\.overrides='([^']+)'", page)
    options = ["--model.preset=1b", f"--model.overrides={overrides}"]
    recipe = load_recipe(PAGE.parents[1] / "recipes" / "paper" / "image_text.yaml", options)
    expected = config_of(table_1a()[0])
    assert MirasolConfig.preset("1b", **recipe.model.overrides).to_dict() == expected.to_dict()


def test_heads_of_80_would_not_be_a_vit_of_300_million():
    def count(head_width: int) -> float:
        with torch.device("meta"):
            return sum(
                p.numel() for p in ViT(MirasolConfig.preset("1b", vit={"head_width": head_width}).vit).parameters()
            )

    page = PAGE.read_text(encoding="utf-8")
    assert f"{count(80) / 1e6:.1f}M weights" in page and f"({count(64) / 1e6:.0f}M)" in page


def choices() -> dict[str, tuple[str, ...]]:
    """Every field of the config that is a choice among names."""
    fields = ((name, field) for name, part in PARTS.items() for field in dataclasses.fields(part))
    return {f"{name}.{field.name}": get_args(field.type) for name, field in fields if get_origin(field.type) is Literal}


@pytest.mark.parametrize("path", sorted(set(choices()) - NO_OPEN_POINTS))
def test_every_choice_is_in_the_table_with_all_its_values(path):
    default, others = open_points()[path]
    assert set(re.findall(r"`([a-z_]+)`", default + others)) - {"tiny", "1b"} == set(choices()[path])

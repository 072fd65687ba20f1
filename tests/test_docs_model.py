"""The table of open points in docs/model.md against the configs it speaks of."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from mirasol import MirasolConfig
from mirasol.config.model import PARTS

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


def choices() -> dict[str, tuple[str, ...]]:
    """Every field of the config that is a choice among names."""
    fields = ((name, field) for name, part in PARTS.items() for field in dataclasses.fields(part))
    return {f"{name}.{field.name}": get_args(field.type) for name, field in fields if get_origin(field.type) is Literal}


@pytest.mark.parametrize("path", sorted(set(choices()) - NO_OPEN_POINTS))
def test_every_choice_is_in_the_table_with_all_its_values(path):
    default, others = open_points()[path]
    assert set(re.findall(r"`([a-z_]+)`", default + others)) - {"tiny", "1b"} == set(choices()[path])

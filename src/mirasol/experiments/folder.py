"""The folder of an experiment: what it was asked for, and what is done."""

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mirasol.config.checks import merge_mappings
from mirasol.config.recipe import Recipe
from mirasol.config.recipe_io import parse_overrides, read_yaml, recipe_from_dict
from mirasol.errors import UserError
from mirasol.files import write_file_atomically
from mirasol.json_values import parse_own_json

SCRATCH = "scratch"
MARKER, RESULTS, TABLE = "experiment.json", "results.json", "table.txt"


@dataclass(frozen=True)
class Settings:
    """The arguments of an experiment.

    name: which one; data: folder of the recordings; output: where everything goes
    starts: `scratch` or checkpoints, each trained by the same recipe
    groups: test folds or speakers, all of them where there are none; tune: the test fold is put aside, and a training
        fold is scored in its place, to choose a recipe by
    overrides: KEY=VALUE of the recipe
    """

    name: str
    data: str
    output: str
    starts: tuple[str, ...] = (SCRATCH, "tiny")
    groups: tuple[str, ...] = ()
    tune: bool = False
    overrides: tuple[str, ...] = ()


def open_folder(settings: Settings, made_of: Mapping[str, str]) -> Path:
    """The folder of an experiment, new or begun by the same arguments on the same data and checkpoints (`made_of`:
    hashes by name). Which groups are asked for may change: finished ones are not done again.

    Raises:
        UserError: the folder has something else, or an experiment of other arguments, data or checkpoints.
    """
    path, asked = Path(settings.output), {**asdict(settings), "data": str(Path(settings.data).resolve())}
    wanted = json.loads(json.dumps({**asked, "made_of": dict(made_of)}))
    for free in ("output", "groups", "starts"):
        del wanted[free]
    marker = path / MARKER
    if marker.is_file():
        before = parse_own_json(marker.read_text(encoding="utf-8"), marker, "give another --output")
        _check_same(path, before, wanted)
        wanted["made_of"] = {**before["made_of"], **wanted["made_of"]}
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: not an experiment, and not empty: give another folder with --output")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot create this folder ({error.strerror}): give another --output") from error
    write_file_atomically(marker, json.dumps(wanted, indent=1) + "\n")
    return path


def _check_same(path: Path, before: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key in sorted(wanted.keys() - {"made_of"}):
        if before.get(key) != wanted[key]:
            raise UserError(
                f"{path}: was started with {key}={before.get(key)}, now it is {wanted[key]}: give the same to "
                "continue, or another --output"
            )
    for name, digest in wanted["made_of"].items():
        if before.get("made_of", {}).get(name, digest) != digest:
            raise UserError(f"{path}: {name} changed since it was started: restore it to continue, or another --output")


def find_recipe(name: str) -> Path:
    """The package's own recipe of an experiment. Raises UserError where the package was installed without it."""
    file = Path(str(importlib.resources.files("mirasol"))) / "recipes" / "real" / f"{name}.yaml"
    if not file.is_file():
        raise UserError(f"{file}: missing from this installation: install the package again")
    return file


def make_recipe(settings: Settings, start: str, paths: Mapping[str, Any]) -> Recipe:
    """The experiment's recipe for one training.

    start: `scratch`, or a checkpoint in place of the recipe's preset and tokenizer
    paths: output and data, which the recipe does not know
    """
    values = read_yaml(find_recipe(settings.name))
    if start != SCRATCH:
        values = {name: part for name, part in values.items() if name != "tokenizer"}
        model = {key: value for key, value in values.get("model", {}).items() if key != "preset"}
        values["model"] = {**model, "init": start}
    values = merge_mappings(values, parse_overrides(settings.overrides))
    return recipe_from_dict(merge_mappings(values, paths), f"recipes/real/{settings.name}.yaml")


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A jsonl table, complete or not at all."""
    write_file_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))

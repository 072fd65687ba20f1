"""Reads weight files of other models, and the configs next to them."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirasol.errors import UserError
from mirasol.json_values import InvalidJson, parse_json

INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if it cannot be read or is something else."""
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, InvalidJson) as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: not a JSON object")
    return values


def read_folder(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """All tensors of a checkpoint's folder: model.safetensors, the shards in its index, or a pickled file.

    Raises:
        UserError: no weights, a missing or damaged file, tensors in the index that no shard has, only
            pickled weights without `allow_pickle`.
    """
    if (folder / "model.safetensors").is_file():
        return read_file(folder / "model.safetensors", allow_pickle)
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    pickled = sorted(path for path in folder.iterdir() if path.suffix in PICKLED)
    if len(pickled) != 1:
        found = f"{len(pickled)} pickled files" if pickled else "no weights"
        raise UserError(f"{folder}: {found} found: expected model.safetensors or {INDEX}")
    return read_file(pickled[0], allow_pickle)


def read_file(file: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """All tensors of one file. What training code wraps around them (`state_dict`, the prefix `module.`) is removed.

    Raises:
        UserError: a damaged file, not a state dict, or a pickle without `allow_pickle`. Even with it only tensors and
            plain containers are unpickled.
    """
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix not in PICKLED:
        raise UserError(f"{file}: not a weight file: expected .safetensors or one of {', '.join(PICKLED)}")
    if not allow_pickle:
        raise UserError(f"{file}: a pickle can run code when it is opened: if you trust it, give --allow-pickle")
    try:
        values = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: damaged, or contains more than weights ({reason})") from error
    values = values.get("state_dict", values) if isinstance(values, dict) else values
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise UserError(f"{file}: not a state dict of tensors")
    return {name.removeprefix("module."): value for name, value in values.items()}


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged, or not a safetensors file ({error})") from error


def _read_shards(folder: Path) -> dict[str, Tensor]:
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{folder / INDEX}: no shards listed (weight_map)")
    tensors = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder}: shard {name} of {INDEX} is missing: download the checkpoint again")
        tensors.update(_read_safetensors(folder / name))
    absent = sorted(places.keys() - tensors.keys())
    if absent:
        raise UserError(f"{folder}: {absent[0]} is in no shard ({len(absent)} missing): download the checkpoint again")
    return tensors

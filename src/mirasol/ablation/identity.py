"""What a result depends on: hashes of recipe, data and code, and which of them changed."""

import ast
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mirasol
from mirasol.checkpoint import find_checkpoint
from mirasol.config.recipe import DataSetRecipe, Recipe
from mirasol.config.recipe_changes import flatten, list_free_keys
from mirasol.data.datasets.registry import read_dataset
from mirasol.data.digest import digest_examples
from mirasol.evaluation.evaluate import hash_checkpoint
from mirasol.training.run_folder import collect_versions

# What computes weights and answers. Rooms that only print, draw, plan or render cannot change a result.
_ROOMS = ("config", "model", "media", "data", "pretrained", "training", "evaluation", "checkpoint.py", "auto.py")
_ONLY_SHOWN = ("evaluation/figures.py", "evaluation/report.py", "evaluation/one_clip.py", "evaluation/lmms.py")
# Keys of a recipe that say where things are, not what they are; the identity has the hash of what is there.
_PLACES = ("output", "data.root", "data.cache", "model.init", "tokenizer.init", "data.options.annotations")

_ASKED = "asked: "  # in the identity's data, before the split whose questions are asked


@functools.cache
def hash_code(rooms: tuple[str, ...] = _ROOMS) -> str:
    """SHA-256 of the package's code, by default as far as results depend on it; comments, docstrings and layout do not
    count."""
    package, digest = Path(mirasol.__file__).parent, hashlib.sha256()
    files = [
        path
        for room in rooms
        for path in ([package / room] if room.endswith(".py") else (package / room).rglob("*.py"))
    ]
    for path in sorted(files):
        name = path.relative_to(package).as_posix()
        if name not in _ONLY_SHOWN:
            digest.update(f"{name}\n{strip_comments(path.read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()


def strip_comments(source: str) -> str:
    """Python source without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


@functools.lru_cache(maxsize=256)
def hash_split(data: DataSetRecipe, split: str) -> str:
    """SHA-256 of a split's examples, and of name and size of their media."""
    found = read_dataset(data.dataset, Path(data.root), split, data.options, open_media=False)
    return digest_examples(found.root, found.examples).sha256


@functools.lru_cache(maxsize=16)
def _hash_start(name: str) -> str:
    return hash_checkpoint(find_checkpoint(name))


def describe_identity(
    recipe: Recipe, pretraining: str | None, asked: Mapping[str, Any] | None, tested: tuple[DataSetRecipe, str] | None
) -> dict[str, Any]:
    """What the result of a run depends on, as plain data that `find_change` compares.

    pretraining: hash of the identity of the run of the suite that this one starts from
    asked, tested: how the result is evaluated, and on which data; None for a pretraining

    Raises:
        UserError: data or a checkpoint that the recipe names are missing.
    """
    values = recipe.to_dict()
    free = list_free_keys(values)
    keys = {key: value for key, value in flatten(values).items() if key not in free and not _is_place(key)}
    splits = [(name, data, data.train_split) for name, data in recipe.data.data_sets.items()]
    data = {f"{name}/{split}" if name else split: hash_split(one, split) for name, one, split in splits}
    if tested is not None:
        data[f"{_ASKED}{tested[1]}"] = hash_split(*tested)
    starts = {}
    for key, name in (("model.init", recipe.model.init), ("tokenizer.init", recipe.tokenizer.init)):
        if name is not None and not (key == "model.init" and pretraining is not None):
            starts[key] = _hash_start(name)
    return {
        "recipe": {**keys, "stages (their order)": list(recipe.stages)},
        "data": data,
        "code": {"sha256": hash_code()},
        "versions": {name: version for name, version in collect_versions().items() if name != "mirasol"},
        "start": starts | ({} if pretraining is None else {"pretraining": pretraining}),
        "evaluation": dict(asked or {}),
    }


def _is_place(key: str) -> bool:
    return key in _PLACES or (key.startswith("data.mixture.") and key.endswith((".root", ".annotations")))


def hash_identity(identity: Mapping[str, Any]) -> str:
    """SHA-256 of an identity, in hexadecimal."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def leave_questions_out(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What the training of a run depends on, of all that its result depends on."""
    data = {name: value for name, value in identity.get("data", {}).items() if not name.startswith(_ASKED)}
    return {**identity, "data": data, "evaluation": {}}


def find_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first thing in which two identities differ, in words; None where they are the same."""
    # Code before start: a pretraining made by other code is another start, and the code is why.
    for part in ("recipe", "data", "evaluation", "versions", "code", "start"):
        old, new = before.get(part, {}), now.get(part, {})
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                if part == "code":
                    return "version of mirasol's code"
                return f"{part} {key} ({_shorten(old.get(key))}, now {_shorten(new.get(key))})"
    return None


def _shorten(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:10]}…" if len(text) == 64 else f"{text:.60}"

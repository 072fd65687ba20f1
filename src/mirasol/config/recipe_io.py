"""Reading a recipe from YAML and overrides, with every key and type checked."""

import copy
import dataclasses
import importlib.resources
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mirasol.config.checks import find_nearest_name, merge_mappings, suggest_nearest_name
from mirasol.config.recipe import DataRecipe, DataSetRecipe, Recipe, Stage
from mirasol.errors import UserError


@dataclasses.dataclass(frozen=True)
class Renamed:
    """The new name of a key that earlier versions had, and the new names of its values where they changed too."""

    key: str
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def value(self, old: Any) -> Any:
        """What an old value is called now."""
        return self.values.get(old, old) if isinstance(old, str) else old


# Keys of earlier versions, by the part of a recipe. Refused in a recipe, translated in a run's folder.
RENAMED: dict[type, dict[str, Renamed]] = {
    Stage: {"window": Renamed("span", {"slot": "segment"})},
    DataRecipe: {"source": Renamed("dataset")},
    DataSetRecipe: {"source": Renamed("dataset")},
}


def load_recipe(path: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe from YAML; later files override earlier ones. A null takes a key of an earlier file back to its
    default, unless null is a value of this key. Where there is no folder `recipes`, those of the package are read by
    the names they have in the repository (`recipes/demo.yaml`).

    `overrides` are `key.path=value` (a leading `--` is allowed), e.g. `optimizer.learning_rate=1e-4` or
    `stages.questions.steps=100`; values are YAML.

    Raises:
        UserError: a missing or unreadable file, an unknown key (the message names the nearest valid one), a missing
            key, a value of the wrong type.
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    values: dict[str, Any] = {}
    for file in map(find_recipe_file, paths):
        of_a_run = (file.parent / "run.json").is_file()
        later = read_run_recipe(file)[0] if of_a_run else read_yaml(file)
        values = _override(values, later, Recipe)
    for override in overrides:
        values = _override(values, _parse_override(override), Recipe)
    return recipe_from_dict(values, where=", ".join(str(file) for file in paths))


def find_recipe_file(path: str | Path) -> Path:
    """The path itself, or the package's own recipe of that name where there is no folder `recipes` to look in."""
    path = Path(path)
    if path.is_absolute() or path.parts[:1] != ("recipes",) or Path("recipes").exists():
        return path
    own = Path(str(importlib.resources.files("mirasol"))) / path
    return own if own.is_file() else path


def override_recipe(values: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """The plain data of a recipe with those of a later file, as `load_recipe` merges files."""
    return _override(values, later, Recipe)


def _override(values: Mapping[str, Any], later: Mapping[str, Any], kind: type | None) -> dict[str, Any]:
    """`values` merged with `later`, whose nulls remove keys of `values` that cannot be null. `kind`: what both become,
    None for keys of the user's own."""
    hints = typing.get_type_hints(kind) if kind is not None else {}
    fields = {} if kind is None else {f.name: f for f in dataclasses.fields(kind)}
    merged = dict(values)
    for key, value in later.items():
        before, hint = merged.get(key), hints.get(key)
        if value is None and key in merged and hint is not None and types.NoneType not in typing.get_args(hint):
            if _is_required(fields[key]):
                merged[key] = None  # refused later, by name
            else:
                del merged[key]
        elif isinstance(value, Mapping) and isinstance(before, Mapping):
            of_entries = typing.get_args(hint)[-1] if typing.get_origin(hint) is dict else None
            if dataclasses.is_dataclass(of_entries):  # stages and data sets, by names of the user's own
                both = {n: e for n, e in value.items() if isinstance(e, Mapping) and isinstance(before.get(n), Mapping)}
                entries = {name: _override(before[name], entry, of_entries) for name, entry in both.items()}
                merged[key] = merge_mappings(before, value) | entries
            else:
                merged[key] = _override(before, value, _find_part(hint))
        else:
            merged[key] = value
    return merged


def recipe_from_dict(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Builds a recipe from plain data, checking keys and types. Raises UserError as `load_recipe` does."""
    _check_keys(values, Recipe, "", where)
    _check_lengths(values.get("stages") or {}, where)
    try:
        import jsonargparse
    except ImportError as error:
        raise UserError("reading a recipe needs the package jsonargparse: pip install jsonargparse") from error
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, "recipe")
    try:
        namespace = parser.parse_object({"recipe": copy.deepcopy(dict(values))})
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        return instantiate(namespace).recipe
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except ValueError as error:  # jsonargparse's own, around what a part that may be null refused
        if not isinstance(error.__cause__, UserError):
            raise
        raise UserError(f"{where}: {error.__cause__}") from error
    except jsonargparse.ArgumentError as error:
        cause = error.__cause__ or error.__context__
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        reason = str(cause) if cause is not None else _shorten(str(error).replace("recipe.", ""))
        raise UserError(f"{where}: {reason}") from error


def _check_lengths(stages: Mapping[str, Any], where: str) -> None:
    """Refuses a stage without a length, which often is another one's name misspelt."""
    for name, stage in stages.items():
        if isinstance(stage, Mapping) and stage.get("steps") is None and stage.get("epochs") is None:
            nearest = find_nearest_name(str(name), [other for other in stages if other != name])
            meant = "" if nearest is None else f", or did you mean {nearest!r}?"
            raise UserError(
                f"{where}: stages.{name}: a stage has one of steps and epochs, found neither: set one{meant}"
            )


def _shorten(message: str) -> str:
    """A message of jsonargparse on one line, in terms of the recipe."""
    line = " ".join(message.split())
    key = "…".join(re.findall('Parser key "(.*?)": ', line))  # jsonargparse leaves out the name of the stage
    gist = line.rpartition('": ')[2]
    if found := re.fullmatch(r"Expected an? (?:typing\.Literal\[(.*)\]|<class '(.*)'>)\. Got value: (.*)", gist):
        return f"{key}={found[3]} is not " + (f"one of {found[1]}" if found[1] else f"of type {found[2]}")
    return f"{key}: {gist}" if key else line


def read_run_recipe(file: Path) -> tuple[dict[str, Any], list[str]]:
    """The values of a run's `recipe.yaml` under today's keys, and which keys of an earlier version it has."""
    values, old_keys = read_yaml(file), []
    _translate(values, Recipe, "", old_keys)
    return values, old_keys


def _translate(values: Any, kind: type, prefix: str, old_keys: list[str]) -> None:
    """Renames keys and values of earlier versions in place; `old_keys` receives their dotted names."""
    if not isinstance(values, dict):
        return
    for key, renamed in RENAMED.get(kind, {}).items():
        if key in values:
            old_keys.append(f"{prefix}{key}")
            values[renamed.key] = renamed.value(values.pop(key))
    for key, entry, inner in _iterate_parts(values, kind):
        _translate(entry, inner, f"{prefix}{key}.", old_keys)


def _iterate_parts(values: Mapping[str, Any], kind: type) -> Iterator[tuple[str, Any, type]]:
    """(dotted key, values, dataclass) of each part of a recipe within `kind`."""
    for key, inner in typing.get_type_hints(kind).items():
        if key not in values:
            continue
        if (part := _find_part(inner)) and not (values[key] is None and part is not inner):
            yield key, values[key], part
            continue
        _, entry_kind = typing.get_args(inner) if typing.get_origin(inner) is dict else (None, None)
        if dataclasses.is_dataclass(entry_kind) and isinstance(values[key], Mapping):
            for name, entry in values[key].items():
                yield f"{key}.{name}", entry, entry_kind


def _find_part(hint: Any) -> type | None:
    """The dataclass that a key becomes, or may become (`LoraRecipe | None`); None for other keys."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError for a missing file, or one without a mapping."""
    import yaml

    if not path.is_file():
        raise UserError(f"{path}: no such recipe file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise UserError(f"{path}: not a recipe: nested too deeply") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:  # of dates that do not exist, of endless numbers
        raise UserError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: a recipe is a mapping of keys to values, this file is of type {type(values).__name__}"
        )
    return values


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The nested mapping that `key.path=value` strings stand for, as `load_recipe` reads them. Raises UserError."""
    values: dict[str, Any] = {}
    for override in overrides:
        values = merge_mappings(values, _parse_override(override))
    return values


def _parse_override(override: str) -> dict[str, Any]:
    import yaml

    key, equals, text = override.removeprefix("--").partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: write key.path=value, e.g. optimizer.learning_rate=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not YAML") from error
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _check_keys(values: Any, kind: type, prefix: str, where: str) -> None:
    """Compares plain data with the dataclass it will become; refuses unknown, renamed and missing keys."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: {prefix.rstrip('.')}: expected a mapping, got {values!r}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in fields and (renamed := RENAMED.get(kind, {}).get(key)):
            new = f"{renamed.key}: {renamed.value(value)}" if isinstance(value, str) else f"{renamed.key} instead"
            raise UserError(f"{where}: {prefix}{key}: renamed to {renamed.key}, use {new}")
        if key not in fields:
            raise UserError(
                f"{where}: unknown key {prefix + str(key)!r}{suggest_nearest_name(str(key), list(fields), prefix)}"
            )
        if typing.get_origin(hints[key]) is dict and not isinstance(value, Mapping):
            raise UserError(f"{where}: {prefix}{key}: expected a mapping of names, got {value!r}")
        if value is None and types.NoneType not in typing.get_args(hints[key]):
            raise UserError(f"{where}: {prefix}{key}: null, expected {_format_type(hints[key])}")
    for key, value, inner in _iterate_parts(values, kind):
        _check_keys(value, inner, f"{prefix}{key}.", where)
    for name, f in fields.items():
        if _is_required(f) and name not in values:
            raise UserError(f"{where}: missing key {prefix + name!r} ({_format_type(hints[name])})")


def _is_required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _format_type(kind: Any) -> str:
    return str(kind) if isinstance(kind, types.GenericAlias | types.UnionType) else kind.__name__

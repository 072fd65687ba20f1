"""What every config and recipe shares: typed fields are checked, unknown keys refused, mappings merged."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin

from mirasol.errors import UserError

Part = TypeVar("Part")
# Above every size of a model, recipe or clip, and below what PyTorch's sizes can hold when a few are multiplied.
LARGEST_SIZE = 2**24


def find_nearest_name(name: str, known: Sequence[str]) -> str | None:
    """The known name that is most like `name`, None if none is like it."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.5)), None)


def suggest_nearest_name(name: str, known: Sequence[str], prefix: str = "") -> str:
    """The end of an error message about an unknown `name`: the nearest known name, or all of them.

    prefix: the path that the known names continue, such as `stages.questions.`.
    """
    nearest = find_nearest_name(name, known)
    return f": did you mean {prefix + nearest!r}?" if nearest else f" (known: {', '.join(known)})"


def merge_mappings(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` updated with `changes`, where nested mappings are merged and everything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge_mappings(merged[key], value) if nested else value
    return merged


def check_fields(part: Any, *positive: str) -> None:
    """Checks the fields of a dataclass against their annotations, and `positive` ones to be in [1, LARGEST_SIZE].

    Raises:
        UserError: a value of another type, or not among the choices of a `Literal`, or a positive field out of range.
    """
    for field in dataclasses.fields(part):
        name, value = field.name, getattr(part, field.name)
        kinds = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
        if get_origin(field.type) is Literal:
            if value not in get_args(field.type):
                raise UserError(f"{name}={value!r}: choose one of {', '.join(get_args(field.type))}")
        elif isinstance(value, tuple) and any(get_origin(kind) is tuple for kind in kinds):
            continue  # `check_sizes` and `check_channel_values` check tuples
        elif value is not None or NoneType not in kinds:
            for kind, accepted in ((bool, bool), (int, int), (float, int | float)):
                wrong = not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool))
                if kind in kinds and wrong:
                    raise UserError(f"{name}={value!r} must be of type {kind.__name__}")
        if name in positive and value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")
        if name in positive and value is not None and value > LARGEST_SIZE:
            raise UserError(f"{name}={value} must be at most {LARGEST_SIZE}")


def check_sizes(name: str, sizes: Any, count: int, least: int = 1) -> tuple[int, ...]:
    """Returns `sizes` as a tuple. Raises UserError unless they are `count` whole numbers in [least, LARGEST_SIZE]."""
    sizes = tuple(sizes) if isinstance(sizes, list | tuple) else sizes
    if not isinstance(sizes, tuple) or len(sizes) != count or any(type(size) is not int for size in sizes):
        raise UserError(f"{name}={sizes!r} must be {count} whole numbers")
    if min(sizes) < least:
        raise UserError(f"{name}={sizes} must not contain a number below {least}")
    if max(sizes) > LARGEST_SIZE:
        raise UserError(f"{name}={sizes}: each must be at most {LARGEST_SIZE}")
    return sizes


def make_part(kind: type[Part], value: Any, path: str) -> Part:
    """Builds the dataclass `kind` from a mapping; an instance is returned unchanged.

    Raises:
        UserError: an unknown or missing key, or a value that `kind` refuses; the message begins with the `path`.
    """
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"{path}={value!r} must be a mapping with the fields of {kind.__name__}")
    fields = dataclasses.fields(kind)
    known = [field.name for field in fields]
    for key in value:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r} in {kind.__name__}{suggest_nearest_name(key, known)}")
    for field in fields:
        if field.name not in value and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{path}.{field.name} is missing: {kind.__name__} needs it")
    try:
        return kind(**value)
    except UserError as error:
        raise UserError(f"{path}.{error}") from None

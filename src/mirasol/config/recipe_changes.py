"""Which keys of a recipe affect the weights, and which of them differ between two recipes."""

from collections.abc import Mapping
from typing import Any

# Keys that may change when a run is resumed, because they do not affect the weights (beyond rounding: another number of
# processes adds gradients in another order).
FREE_TO_CHANGE = frozenset(
    [
        "parallel.kind",
        "parallel.reshard",
        "recompute",
        "output",
        "data.cache",
        "data.cache_limit",
        "data.feature_cache",
        "data.feature_cache_limit",
        "log_every",
        "validate_every",
        "validation_clips",
        "validation_batch",
        "checkpoint_every",
        "keep_last",
        "keep_best",
        "samples",
        "tracker",
        "workers",
        "batch_seconds",
        "process_seconds",
    ]
)
# What decides when a run with `patience` ends.
VALIDATION_KEYS = frozenset(["keep_best", "validate_every", "validation_clips", "validation_batch"])


def list_free_keys(*recipes: Mapping[str, Any]) -> frozenset[str]:
    """Keys that affect no weights of these recipes (from `to_dict`)."""
    free = FREE_TO_CHANGE
    if any(recipe.get("patience") is not None for recipe in recipes):
        free -= VALIDATION_KEYS
    if all(recipe["data"].get("feature_cache") is None for recipe in recipes):
        free |= {"data.feature_cache_dtype"}
    return free


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to dotted keys; an empty mapping is a value."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        result.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return result


def find_changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Dotted keys that differ between two recipes (from `to_dict`) and affect the weights."""
    old, new = flatten(before), flatten(after)
    differing = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    changed = sorted(differing - list_free_keys(before, after))
    # Stages run in their order, which equality of mappings ignores.
    if not changed and list(before["stages"]) != list(after["stages"]):
        changed = ["stages (their order)"]
    return changed

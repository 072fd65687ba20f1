"""Where the weights of a run's model come from: drawn at random, or from the checkpoint that `model.init` names, whose
weights are kept as far as they fit the recipe's changes to its config."""

import copy
import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from mirasol import MirasolConfig, MirasolFeatureExtractor, MirasolForConditionalGeneration
from mirasol.checkpoint import Loaded, Untrained, find_checkpoint, load_checkpoint, read_config, read_untrained
from mirasol.config.checks import make_part, merge_mappings, suggest_nearest_name
from mirasol.config.model import PARTS
from mirasol.config.recipe import ModelRecipe, Recipe
from mirasol.console import format_table
from mirasol.data.randomness import hash64
from mirasol.errors import UserError
from mirasol.training.weights.stages import TRAINABLE, find_trainable_component

Shapes = dict[str, tuple[int, ...]]


def load_initial(recipe: Recipe) -> Loaded | None:
    """The checkpoint that `model.init` names, changed as the recipe says; None without one.

    The weights of changed parts that do not fit are new, drawn with the recipe's seed. Raises UserError for a
    checkpoint that cannot be used, and as `change_config`.
    """
    settings = recipe.model
    if settings.init is None:
        return None
    initial = load_checkpoint(settings.init)
    config = initial.model.config
    if settings.image_size is not None and settings.image_size != config.video.image_size:
        initial.model.set_image_size(settings.image_size)
    changed = change_config(config, settings)
    model = initial.model
    if settings.overrides or settings.new:
        model = copy_fitting_weights(model, changed, hash64(recipe.seed, "weights") >> 1, check_new(settings))
    initial.processor.feature_extractor = MirasolFeatureExtractor.for_config(changed)
    if changed.text.longest_text != config.text.longest_text:
        initial.processor.max_text_length = changed.text.longest_text
    return replace(initial, model=model)


def check_new(settings: ModelRecipe) -> frozenset[str]:
    """The components of `model.new`. Raises UserError for an unknown one."""
    for name in settings.new or ():
        if name not in TRAINABLE:
            raise UserError(f"model.new: unknown component {name!r}{suggest_nearest_name(name, list(TRAINABLE))}")
    return frozenset(settings.new or ())


def copy_fitting_weights(
    source: MirasolForConditionalGeneration, config: MirasolConfig, seed: int, new: Collection[str] = ()
) -> MirasolForConditionalGeneration:
    """A model of `config` with the weights of `source` that have the same name and shape; all others, and those of the
    components `new`, are drawn."""
    torch.manual_seed(seed)
    model = MirasolForConditionalGeneration(config).eval()
    own, found = model.state_dict(), source.state_dict()
    with torch.no_grad():
        for name, value in own.items():
            if name in found and found[name].shape == value.shape and find_trainable_component(name) not in new:
                value.copy_(found[name])
    return model


def change_config(config: MirasolConfig, settings: ModelRecipe) -> MirasolConfig:
    """Changes the config of `model.init` to the recipe's frame size and number of chunks, in place; returns it, or with
    `model.overrides` a changed copy.

    Raises UserError for a number of chunks if the checkpoint cuts clips by seconds, and for overrides that do not exist
    or do not fit.
    """
    if settings.image_size is not None:
        config.set_image_size(settings.image_size)
    if settings.num_chunks is not None:
        if config.chunking.num_chunks is None:
            raise UserError(
                f"model.num_chunks={settings.num_chunks}: {settings.init} cuts clips into chunks of "
                f"{config.chunking.chunk_seconds} s: leave it out, or set model.overrides.chunking"
            )
        most = max(config.chunking.max_chunks, settings.num_chunks)
        config.chunking = replace(config.chunking, num_chunks=settings.num_chunks, max_chunks=most)
    return override_config(config, settings.overrides) if settings.overrides else config


def override_config(config: MirasolConfig, overrides: Mapping[str, Any]) -> MirasolConfig:
    """A copy of the config with other fields. Raises UserError, naming the field, for those that do not fit."""
    changed = copy.deepcopy(config)
    for name, fields in overrides.items():
        where = f"model.overrides.{name}"
        if name not in PARTS:
            raise UserError(f"{where}: unknown part{suggest_nearest_name(name, list(PARTS))}")
        if fields is None and name != "contrastive":
            raise UserError(f"{where}=null: only the part contrastive may be missing")
        before = getattr(config, name)
        values = {} if before is None else dataclasses.asdict(before)
        merged = merge_mappings(values, fields) if isinstance(fields, Mapping) else fields
        setattr(changed, name, merged if merged is None else make_part(PARTS[name], merged, where))
    combiner = overrides.get("combiner")
    if changed.combiner.kind == "concat" and not (isinstance(combiner, Mapping) and "m" in combiner):
        changed.combiner = replace(changed.combiner, m=changed.count_tokens())
    try:
        changed.check_parts_fit()
    except UserError as error:
        raise UserError(f"model.overrides: {error}") from error
    return changed


@dataclass(frozen=True)
class InitialWeights:
    """Where each parameter of a run's model comes from, by name with its number of weights.

    loaded: those of the checkpoint; new: drawn at random; unused: of the checkpoint, and of another shape or no part of
        this model
    untrained: the new ones, and loaded ones that the checkpoint itself has untrained
    """

    loaded: Mapping[str, int]
    new: Mapping[str, int]
    unused: Mapping[str, int]
    untrained: Untrained

    def count_by_component(self) -> dict[str, dict[str, int]]:
        """For each component the weights that are `loaded`, of these `untrained`, `new` and `unused`."""
        names = {"loaded": self.loaded, "new": self.new, "unused": self.unused}
        names["untrained"] = {name: size for name, size in self.loaded.items() if name in self.untrained.names}
        counts = {kind: _sum_by_component(own) for kind, own in names.items()}
        kinds = ("loaded", "untrained", "new", "unused")
        return {
            component: {kind: counts[kind][component] for kind in kinds}
            for component in TRAINABLE
            if any(counts[kind][component] for kind in kinds)
        }

    def format_rows(self) -> str:
        """The table as text; "" where nothing is loaded."""
        return format_initial_weights(self.count_by_component())


def format_initial_weights(counts: Mapping[str, Mapping[str, int]]) -> str:
    """`InitialWeights.count_by_component` as a table; "" where nothing is loaded."""
    if not any(row["loaded"] for row in counts.values()):
        return ""
    rows = [["component", "loaded", "of these untrained", "new", "unused"]]
    return format_table([*rows, *([name, *(f"{n:,}" for n in row.values())] for name, row in counts.items())])


def _sum_by_component(sizes: Mapping[str, int]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name, size in sizes.items():
        counts[find_trainable_component(name)] += size
    return counts


def find_initial_weights(recipe: Recipe, config: MirasolConfig) -> InitialWeights:
    """Where the weights of the recipe's model, which has this config, come from. Of a checkpoint only its config and
    its record of untrained weights are read. Raises UserError as `find_checkpoint`."""
    wanted = _find_shapes(config)
    if recipe.model.init is None:
        return InitialWeights({}, _count(wanted, wanted), {}, Untrained(frozenset(wanted)))
    folder = find_checkpoint(recipe.model.init)
    source = change_config(read_config(folder), replace(recipe.model, overrides={}))
    found = _find_shapes(source)
    new = check_new(recipe.model)
    loaded = {
        name for name, shape in wanted.items() if found.get(name) == shape and find_trainable_component(name) not in new
    }
    recorded = read_untrained(folder)
    rows = {name: row for name, row in recorded.rows.items() if name in loaded}
    return InitialWeights(
        loaded=_count(wanted, loaded),
        new=_count(wanted, wanted.keys() - loaded),
        unused=_count(found, found.keys() - loaded),
        untrained=Untrained((wanted.keys() - loaded) | (recorded.names & loaded), rows),
    )


def _find_shapes(config: MirasolConfig) -> Shapes:
    with torch.device("meta"):
        model = MirasolForConditionalGeneration(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _count(shapes: Shapes, names: Any) -> dict[str, int]:
    return {name: torch.Size(shapes[name]).numel() for name in shapes if name in names}

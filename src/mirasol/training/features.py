"""Frozen encoders compute each clip once: which stages can do with that, and the features of clips that the cache
lacks."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mirasol.config.augment import Augment
from mirasol.config.model import MirasolConfig
from mirasol.config.parts import StackConfig
from mirasol.config.recipe import Recipe, Stage
from mirasol.console import print_line
from mirasol.data.clip_cache import ClipCache, Window
from mirasol.data.feature_cache import FEATURES, MASKS, FeatureCache, collate_features, complete_features
from mirasol.errors import UserError
from mirasol.media.augment import shift_audio
from mirasol.media.feature_extractor import MirasolFeatureExtractor
from mirasol.model.hf import MirasolForConditionalGeneration
from mirasol.training.weights.lora import get_plain_name
from mirasol.training.weights.stages import find_trainable_component

if TYPE_CHECKING:
    from rich.console import Console

ENCODERS = ("vit", "tubes", "audio")
_RATES = ("dropout", "attention_dropout", "layer_drop")
# Take the place of what a chunk lacks, after the cache.
_MISSING = ("missing_video", "missing_audio")


def find_obstacles(recipe: Recipe, config: MirasolConfig, trained: Mapping[str, Collection[str]]) -> dict[str, str]:
    """The stages that cannot use features which are computed once, each with the reason, in terms of its keys.

    trained: names of the parameters that each stage trains
    """
    obstacles = {}
    trainer: str | None = None  # the first stage that trains an encoder
    for name, stage in recipe.stages.items():
        components = sorted({find_trainable_component(get_plain_name(each)) for each in trained[name]} & {*ENCODERS})
        reason = None
        if components:
            reason = f"stages.{name} trains {', '.join(components)}"
        elif trainer is not None:
            reason = f"stages.{trainer} trains them before stages.{name}: make two runs of them (model.init)"
        else:
            reason = _find_obstacle(recipe, config, name, stage)
        if components and trainer is None:
            trainer = name
        if reason is not None:
            obstacles[name] = reason
    return obstacles


def _find_obstacle(recipe: Recipe, config: MirasolConfig, name: str, stage: Stage) -> str | None:
    """Why a stage with frozen encoders still needs them in every step."""
    if stage.objective == "image_text":
        return f"stages.{name}.objective=image_text: single images have no such features"
    for field in dataclasses.fields(Augment):
        value = getattr(stage.augment, field.name)
        if value != getattr(Augment(), field.name):
            shown = value if isinstance(value, int | float) else "…"
            return f"stages.{name}.augment.{field.name}={shown} changes the clips every time: leave it out"
    for part, stack in (("vit", config.vit), ("audio.adapter", config.audio.adapter)):
        for rate in ("dropout", "layer_drop"):
            value = _find_rate(stack, stage, rate)
            if value:
                return f"{rate}={value:g} inside the frozen {part}: set stages.{name}.{rate} to 0"
        if stack.attention_dropout:
            key = f"model.overrides.{part}.attention_dropout"
            return f"attention_dropout={stack.attention_dropout:g} inside the frozen {part}: set {key} to 0"
    if recipe.lora is not None and recipe.lora.dropout and {*recipe.lora.targets} & {*ENCODERS}:
        return f"lora.dropout={recipe.lora.dropout:g} inside frozen adapters: set it to 0"
    return None


def _find_rate(stack: StackConfig, stage: Stage, name: str) -> float:
    of_stage = getattr(stage, name)
    return getattr(stack, name) if of_stage is None else of_stage


def hash_encoders(model: MirasolForConditionalGeneration, precision: str, device: torch.device) -> str:
    """A hash of all that features follow from besides the clip: weights, settings, precision and kind of device."""
    config = model.config
    parts = {name: dataclasses.asdict(getattr(config, name)) for name in ("vit", "video", "audio", "reconstruction")}
    parts["width"] = config.combiner.stack.width
    digest = hashlib.sha256(json.dumps([_drop_rates(parts), precision, device.type], sort_keys=True).encode())
    for name, value in sorted(model.chunk_encoder.state_dict().items()):
        if name not in _MISSING:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _drop_rates(values: Any) -> Any:
    """The settings without dropout and the like, of which there is none where features are cached."""
    if isinstance(values, Mapping):
        return {name: _drop_rates(value) for name, value in values.items() if name not in _RATES}
    return values


def make_feature_cache(
    recipe: Recipe,
    model: MirasolForConditionalGeneration,
    trained: Mapping[str, Collection[str]],
    clips: ClipCache,
    device: torch.device,
    console: "Console",
) -> FeatureCache | None:
    """The recipe's feature cache, for the stages that can use it; the others are told. None where there is none.

    Raises:
        UserError: no stage can use it, or a folder that cannot be made.
    """
    data = recipe.data
    if data.feature_cache is None:
        return None
    obstacles = find_obstacles(recipe, model.config, trained)
    stages = [name for name in recipe.stages if name not in obstacles]
    if not stages:
        raise UserError(f"data.feature_cache={data.feature_cache} has no effect: {next(iter(obstacles.values()))}")
    for name, reason in obstacles.items():
        print_line(console, f"stages.{name} does not use the feature cache: {reason}")
    limit = None if data.feature_cache_limit is None else int(data.feature_cache_limit * 1e9)
    key = hash_encoders(model, recipe.precision, device)
    return FeatureCache(Path(data.feature_cache), clips, key, data.feature_cache_dtype, limit, stages)


@torch.no_grad()
def compute_features(model: MirasolForConditionalGeneration, media: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The features of a batch of clips, by the names that they have in batches."""
    found = model.compute_features(**{name: media[name] for name in ("video", "audio", *MASKS)})
    values = found.video, found.audio, found.video_target, found.audio_target
    return {name: value for name, value in zip(FEATURES, values, strict=True) if value is not None}


class _Parallel(Protocol):
    """What is asked of `ParallelModel`."""

    model: Any

    def use_precision(self) -> AbstractContextManager[object]:
        """The recipe's arithmetic."""


class FeatureEncoder:
    """Gives batches the features of their clips: from the cache, or computed and then kept there.

    Each clip is computed on its own, and rounded as if it had been stored: what a step sees follows from the clip
    alone, not from what the cache holds or from the clip's companions.

    used, computed, damaged: how many clips were asked for, how many of them were computed, and how many files damaged
    """

    def __init__(self, cache: FeatureCache, parallel: _Parallel, console: "Console"):
        self.cache, self.parallel, self.console = cache, parallel, console
        self.computed = self.used = self.damaged = 0

    def serves(self, stage: str) -> bool:
        """Whether the stage uses features."""
        return stage in self.cache.stages

    def complete(
        self, windows: Sequence[Window], tensors: dict[str, Tensor], shifted: Sequence[bool] = ()
    ) -> dict[str, Tensor]:
        """The batch of `collate_features`, of these windows, with the features of all of them; those that are computed
        are kept as they are, and `shifted` in the batch where that says so (the loader has shifted the others)."""
        self.used += len(windows)
        self.damaged += int(tensors["damaged"]) if "damaged" in tensors else 0

        def compute(row: int, decoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = self._find_or_compute(windows[row], decoded)
            return shift_audio(found) if shifted and shifted[row] else found

        return complete_features(tensors, compute)

    def load(
        self, windows: Sequence[Window], clips: ClipCache, extractor: MirasolFeatureExtractor, device: torch.device
    ) -> dict[str, Tensor]:
        """The masks and features of a batch of windows, padded at the end to the longest. Raises BadClip."""
        rows = [self._find(window) or clips.load(*window) for window in windows]
        media = {name: value.to(device) for name, value in collate_features(rows, extractor).items()}
        return self.complete(windows, media)

    def _find(self, window: Window) -> dict[str, Tensor] | None:
        before = self.cache.damaged
        found = self.cache.load(window)
        self.damaged += self.cache.damaged - before
        return found

    def _find_or_compute(self, window: Window, decoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Batches are loaded ahead, so an earlier one may have had the clip meanwhile.
        found = self._find(window)
        if found is not None:
            return {name: value.to(decoded["video"].device) for name, value in found.items()}
        self.computed += 1
        features = self.cache.round(self._compute(decoded))
        reason = self.cache.keep(window, features)
        if reason is not None:
            print_line(
                self.console,
                f"{self.cache.folder}: {reason}: no more features are kept, those that are missing are computed in "
                "every step",
            )
        return features

    def _compute(self, decoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with self.parallel.use_precision():
            found = compute_features(self.parallel.model, {name: value[None] for name, value in decoded.items()})
        return {name: value[0] for name, value in found.items()} | {name: decoded[name] for name in MASKS}

    def describe(self) -> str:
        """What was computed and what was there, on one line."""
        text = f"feature cache: of {self.used:,} clips that were asked for {self.computed:,} were computed"
        return text + (f", {self.damaged} of them because their files were damaged" if self.damaged else "")

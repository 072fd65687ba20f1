"""What a feature cache saves: clips that frozen encoders compute once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from mirasol.config.model import MirasolConfig
from mirasol.config.recipe import Recipe
from mirasol.cost.step import EncodingCost, count_encoding_cost
from mirasol.data.clip_cache import Window
from mirasol.data.example import ClipExamples
from mirasol.training.features import find_obstacles
from mirasol.training.weights.stages import StageWeights

BF16 = 2  # bytes


@dataclass(frozen=True)
class FeaturePlan:
    """What a stage with a feature cache takes besides its steps, whose cost is that of batches of features.

    clip_flops: of computing the features of a clip
    clip_bytes: of a clip's features on disk; disk_bytes: of all clips of the stage, up to the limit (None: unknown)
    computed: how many times a clip is computed in the stage
    later_epoch_seconds: of an epoch after the first, None where the number of clips is unknown
    """

    clip_flops: int
    clip_bytes: int
    disk_bytes: int | None
    computed: int
    later_epoch_seconds: float | None


class Computed(NamedTuple):
    """Clips of a stage.

    computed: how many times one is computed in all its steps
    new: clips that no earlier stage computed; left: those that find no room in the cache, and are computed every time;
    kept: clips with a file
    """

    computed: int
    new: int
    left: int
    kept: int


class FeatureCosts:
    """The costs of a recipe's feature cache, stage after stage: later ones find the clips of earlier ones.

    Adds to `notes` what mirasol train refuses or says.
    """

    def __init__(self, recipe: Recipe, config: MirasolConfig, weights: StageWeights, notes: list[str]):
        self.recipe, self.notes = recipe, notes
        self.stages: frozenset[str] = frozenset()
        self.encoding: dict[int, EncodingCost] = {}
        self._kept: set[Window] = set()
        self._bytes = 0
        folder = recipe.data.feature_cache
        if folder is None:
            return
        obstacles = find_obstacles(recipe, config, weights.trained)
        self.stages = frozenset(recipe.stages.keys() - obstacles.keys())
        for name, reason in obstacles.items():
            notes.append(f"stages.{name} does not use the feature cache: {reason}")
        if not self.stages:
            notes.append(f"mirasol train refuses this: data.feature_cache={folder} has no effect")

    def find_encoding(self, model: nn.Module, chunks: int) -> EncodingCost:
        """The cost of encoding a clip of so many chunks, counted once."""
        if chunks not in self.encoding:
            device = "cuda" if torch.cuda.is_available() and self.recipe.device != "cpu" else "cpu"
            self.encoding[chunks] = count_encoding_cost(model, chunks, self.recipe.precision, device)
        return self.encoding[chunks]

    def count_clip_bytes(self, encoding: EncodingCost) -> int:
        """Bytes of a clip's features on disk."""
        is_small = self.recipe.data.feature_cache_dtype == "bf16"
        return BF16 * encoding.feature_values if is_small else encoding.feature_bytes

    def count_kept_bytes(self) -> int | None:
        """Bytes of all files of the cache; None where the clips are unknown."""
        return self._bytes if self._kept else None

    def count_computed(self, name: str, clips: Sequence[ClipExamples] | None, clip_bytes: int) -> Computed:
        """How many clips the stage computes; unknown ones are taken to come once each."""
        stage = self.recipe.stages[name]
        asked = stage.steps * stage.clips_per_step
        if clips is None:
            self.notes.append(f"stages.{name}: how often a clip comes is unknown: counted as if all were new")
            return Computed(asked, 0, 0, 0)
        windows = dict.fromkeys((clip.media, clip.start, clip.end) for clip in clips)
        new = [window for window in windows if window not in self._kept]
        limit = self.recipe.data.feature_cache_limit
        room = len(new) if limit is None else max(0, int(limit * 1e9 // clip_bytes) - len(self._kept))
        self._kept.update(new[:room])
        self._bytes += len(new[:room]) * clip_bytes
        left = len(new) - min(room, len(new))
        passes = asked / len(clips)
        computed = min(asked, round(min(room, len(new)) * min(1.0, passes) + left * passes))
        return Computed(computed, len(new), left, len(windows) - left)

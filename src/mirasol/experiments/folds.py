"""A data set with folds of its own: for each fold a training on all others, and baselines on the same clips."""

import importlib.metadata
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mirasol.checkpoint import find_checkpoint, load_checkpoint
from mirasol.config.recipe import Recipe
from mirasol.console import print_line, show_progress
from mirasol.data.clip_cache import ClipCache
from mirasol.data.digest import digest_examples
from mirasol.errors import UserError
from mirasol.evaluation.evaluate import Evaluation, hash_checkpoint
from mirasol.evaluation.metrics import CANDIDATES, OPEN
from mirasol.experiments.baselines import PACKAGE, check_scikit_learn, describe_sound, score_baselines
from mirasol.experiments.folder import RESULTS, SCRATCH, TABLE, Settings, make_recipe, open_folder, write_rows
from mirasol.experiments.named import EXPERIMENTS
from mirasol.experiments.recordings import Recording, Recordings
from mirasol.experiments.table import Row, format_rows, summarise
from mirasol.files import write_file_atomically
from mirasol.finetune.outcome import evaluate_split
from mirasol.json_values import read_own_object
from mirasol.media.feature_extractor import MirasolFeatureExtractor
from mirasol.training.trainer import train

if TYPE_CHECKING:
    from rich.console import Console

CONTROLS = ("no_audio",)


@dataclass(frozen=True)
class Split:
    """The clips of one fold: what is trained on and what is scored."""

    group: str
    train: tuple[Recording, ...]
    test: tuple[Recording, ...]


def choose_splits(found: Recordings, groups: tuple[str, ...], tune: bool) -> list[Split]:
    """A split for each group that is asked for, all of them where none is. With `tune` the group itself is put aside,
    and the next one is scored.

    Raises:
        UserError: an unknown group, or too few of them to tune.
    """
    known, splits = found.groups, []
    for group in groups:
        if group not in known:
            raise UserError(f"--groups {group}: the data has no such group: choose {', '.join(known)}")
    if tune and len(known) < 3:
        raise UserError(f"--tune: needs three groups, the data has {len(known)}: leave it out")
    for group in groups or known:
        scored = known[(known.index(group) + 1) % len(known)] if tune else group
        train = tuple(clip for clip in found.clips if clip.group not in (group, scored))
        splits.append(Split(group, train, tuple(clip for clip in found.clips if clip.group == scored)))
    return splits


def write_split(folder: Path, split: Split, prompt: str, labels: tuple[str, ...]) -> None:
    """Writes train.jsonl and test.jsonl, as every data set of one's own has them (docs/datasets.md)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, clips in (("train", split.train), ("test", split.test)):
        rows = [
            {
                "id": clip.file,
                "file": clip.file,
                "prompt": prompt,
                "target": clip.label,
                "question_type": "hearing",
                "candidates": list(labels),
            }
            for clip in clips
        ]
        write_rows(folder / f"{name}.jsonl", rows)


class FoldsExperiment:
    """The parts of an experiment with folds; each is done once, whatever interrupts it."""

    def __init__(self, settings: Settings, console: "Console"):
        check_scikit_learn()
        self.settings, self.console = settings, console
        self.about = EXPERIMENTS[settings.name]
        self.found = self.about.read(Path(settings.data))
        self.splits = choose_splits(self.found, settings.groups, settings.tune)
        checkpoints = {start: find_checkpoint(start) for start in settings.starts if start != SCRATCH}
        made_of = {start: hash_checkpoint(folder) for start, folder in checkpoints.items()}
        for start in settings.starts or (SCRATCH,):
            self._make_recipe(self.splits[0], start)  # a bad key is refused before anything is made
        self.path = open_folder(settings, {"data": self._digest(), **made_of})
        print_line(console, self.found.describe())

    def _digest(self) -> str:
        """Names and sizes of the recordings; their names say all else."""
        return digest_examples(self.found.root, [], [clip.file for clip in self.found.clips]).sha256

    def run(self) -> Path:
        """Runs what is not done yet, and writes results.json and table.txt; returns the experiment's folder."""
        for split in self.splits:
            write_split(self._fold(split) / "data", split, self.about.prompt, self.found.labels)
        asked = {split.group for split in self.splits}
        every = choose_splits(self.found, (), self.settings.tune)
        shown = [split for split in every if split.group in asked or self._is_finished(split)]
        results = [self._score_baselines(split) for split in shown]
        for split, result in zip(shown, results, strict=True):
            for start in self.settings.starts:
                result[start] = self._train_and_score(split, start)
        rows = summarise(results, self.about.published)
        self._write(rows, results)
        return self.path

    def _fold(self, split: Split) -> Path:
        return Path(self.settings.output) / "folds" / split.group

    def _is_finished(self, split: Split) -> bool:
        """Whether earlier calls have made all of a fold that the table shows."""
        names = ["baselines.json", *(f"{start}/fold.json" for start in self.settings.starts)]
        return all((self._fold(split) / name).is_file() for name in names)

    def _make_recipe(self, split: Split, start: str) -> Recipe:
        annotations = str(self._fold(split) / "data")
        data: dict[str, Any] = {
            "root": str(self.found.root),
            "options": {"annotations": annotations},
            "cache": str(Path(self.settings.output) / "cache"),
            "validation_split": "test" if self.settings.tune else None,
        }
        return make_recipe(self.settings, start, {"output": str(self._fold(split) / start / "train"), "data": data})

    def _score_baselines(self, split: Split) -> dict[str, Any]:
        """Whether each baseline is right about each clip of the fold."""
        file = self._fold(split) / "baselines.json"
        if not file.is_file():
            values = self._read_statistics(split)
            parts = [
                (np.stack([values[clip.file] for clip in clips]), [clip.label for clip in clips])
                for clips in (split.train, split.test)
            ]
            made = {**score_baselines(*parts), PACKAGE: importlib.metadata.version(PACKAGE)}
            write_file_atomically(file, json.dumps(made) + "\n")
        right = read_own_object(file, "remove it, and run the experiment again")
        versions = {PACKAGE: right.pop(PACKAGE, "unknown")}  # folds made before do not say
        scored = {name: {"right": each, "versions": versions} for name, each in right.items()}
        return {"group": split.group, **scored}

    def _read_statistics(self, split: Split) -> dict[str, np.ndarray]:
        """Statistics of all clips by file, of the spectrograms that the trainings read too."""
        recipe = self._make_recipe(split, SCRATCH)
        settings = find_media_settings(recipe)
        clips = ClipCache(Path(recipe.data.cache), self.found.root, settings, {clip.file for clip in self.found.clips})
        windows = [(clip.file, None, None) for clip in self.found.clips]
        with show_progress(self.console, "Decoding", "clips") as progress:
            clips.fill(windows, max(1, recipe.workers), on_progress=progress)
        return {clip.file: describe_sound(clips.load(clip.file)) for clip in (*split.train, *split.test)}

    def _train_and_score(self, split: Split, start: str) -> dict[str, Any]:
        folder = self._fold(split) / start
        file = folder / "fold.json"
        if file.is_file():
            return read_own_object(file, "remove it, and run the experiment again")
        recipe, began = self._make_recipe(split, start), time.monotonic()
        print_line(self.console, f"{self.about.group} {split.group}, from {start}: {folder}")
        checkpoint = train(recipe, resume=True, console=self.console)
        with show_progress(self.console, "Answering", "clips") as progress:
            evaluation = evaluate_split(load_checkpoint(checkpoint), folder / "test", recipe, CONTROLS, progress)
        training = json.loads((checkpoint / "training.json").read_text(encoding="utf-8"))
        result = {
            **list_verdicts(evaluation),
            "steps": training["steps"],
            "training_seconds": training["training_seconds"],
            "seconds": round(time.monotonic() - began, 1),
            "versions": training.get("versions", {}),
            "commit": json.loads((Path(recipe.output) / "run.json").read_text(encoding="utf-8")).get("commit"),
            "seed": recipe.seed,
        }
        write_file_atomically(file, json.dumps(result) + "\n")
        return result

    def _write(self, rows: list[Row], results: list[dict[str, Any]]) -> None:
        missing = [group for group in self.found.groups if group not in {result["group"] for result in results}]
        text = format_rows(rows, self.about, self.settings, results, missing)
        record = {
            "experiment": self.settings.name,
            "tune": self.settings.tune,
            "rows": [row.to_dict() for row in rows],
            "groups": results,
        }
        write_file_atomically(self.path / RESULTS, json.dumps(record, indent=1) + "\n")
        write_file_atomically(self.path / TABLE, text + "\n")
        print_line(self.console, "\n" + text)


def find_media_settings(recipe: Recipe) -> dict[str, Any]:
    """How a model of the recipe, trained from scratch, reads media."""
    from mirasol import MirasolConfig
    from mirasol.training.weights.initial import override_config

    config = MirasolConfig.preset(recipe.model.preset)
    if recipe.model.overrides:
        config = override_config(config, recipe.model.overrides)
    return MirasolFeatureExtractor.for_config(config).media.to_dict()


def list_verdicts(evaluation: Evaluation) -> dict[str, Any]:
    """Whether each test clip's most likely class is right, the same of its generated answer, and without the sound."""
    protocols: Mapping[str, Any] = evaluation.protocols
    right = {name: [bool(item.value) for item in protocols[name].judged] for name in (CANDIDATES, OPEN)}
    without = evaluation.controls[CANDIDATES]["no_audio"].judged
    return {
        "right": right[CANDIDATES],
        "generated": right[OPEN],
        "no audio": [bool(item.value) for item in without],
    }

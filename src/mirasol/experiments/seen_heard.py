"""Digits seen and heard: a training on rendered mp4, its scores with controls, and what each sense is worth when
picture and sound become noisier."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mirasol.checkpoint import find_checkpoint, load_checkpoint
from mirasol.config.recipe import Recipe
from mirasol.console import format_table, print_line, show_progress
from mirasol.data.digest import digest_examples
from mirasol.evaluation.controls import CONTROLS
from mirasol.evaluation.evaluate import Evaluation, hash_checkpoint
from mirasol.evaluation.intervals import compute_mean_intervals
from mirasol.evaluation.metrics import CANDIDATES
from mirasol.experiments.baselines import check_scikit_learn
from mirasol.experiments.digit_clips import GRID, write_digits
from mirasol.experiments.folder import RESULTS, SCRATCH, TABLE, Settings, make_recipe, open_folder
from mirasol.experiments.recordings import read_spoken_digits
from mirasol.files import write_file_atomically
from mirasol.finetune.outcome import evaluate_split, format_share
from mirasol.training.trainer import train

if TYPE_CHECKING:
    from rich.console import Console

COUNTS = {"train": 800, "validation": 60, "test": 120, GRID: 40}
BOTH, SIGHT, HEARING = "both", "no_audio", "no_video"  # controls by what is left


@dataclass(frozen=True)
class Step:
    """Accuracies on the same clips at one step of picture noise and of sound noise, each (value, low, high).

    over_sight, over_hearing: what both senses have more than one alone, question by question
    """

    picture: int
    sound: int
    both: tuple[float, float, float]
    sight: tuple[float, float, float]
    hearing: tuple[float, float, float]
    over_sight: tuple[float, float, float]
    over_hearing: tuple[float, float, float]


class SeenHeardExperiment:
    """The parts of the experiment; each is done once, whatever interrupts it."""

    def __init__(self, settings: Settings, console: "Console", counts: Mapping[str, int] = COUNTS):
        check_scikit_learn()
        self.settings, self.console, self.counts = settings, console, dict(counts)
        self.found = read_spoken_digits(Path(settings.data))
        checkpoints = {start: find_checkpoint(start) for start in settings.starts if start != SCRATCH}
        made_of = {start: hash_checkpoint(folder) for start, folder in checkpoints.items()}
        made_of["data"] = digest_examples(self.found.root, [], [clip.file for clip in self.found.clips]).sha256
        for start in settings.starts:
            self._make_recipe(start)  # a bad key is refused before anything is made
        self.path = open_folder(settings, made_of)
        print_line(console, self.found.describe())

    def _make_recipe(self, start: str) -> Recipe:
        path = Path(self.settings.output)
        data = {"root": str(path / "data"), "cache": str(path / "cache")}
        return make_recipe(self.settings, start, {"output": str(path / start / "train"), "data": data})

    def run(self) -> Path:
        """Runs what is not done yet, and writes results.json and table.txt; returns the experiment's folder."""
        if not (self.path / "data").is_dir():
            with show_progress(self.console, "Rendering", "clips") as progress:
                write_digits(self.path / "data", self.found, self.counts, 0, progress)
        results = {start: self._train_and_score(start) for start in self.settings.starts}
        record = {"experiment": self.settings.name, "counts": self.counts, "starts": results}
        write_file_atomically(self.path / RESULTS, json.dumps(record, indent=1) + "\n")
        text = "\n\n".join(format_result(start, result) for start, result in results.items())
        write_file_atomically(self.path / TABLE, text + "\n")
        print_line(self.console, "\n" + text)
        return self.path

    def _train_and_score(self, start: str) -> dict[str, Any]:
        file = self.path / start / "scores.json"
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
        recipe, began = self._make_recipe(start), time.monotonic()
        checkpoint = train(recipe, resume=True, console=self.console)
        test = self._evaluate(checkpoint, recipe, start, "test", tuple(CONTROLS))
        grid = self._evaluate(checkpoint, recipe, start, GRID, (HEARING, SIGHT))
        training = json.loads((checkpoint / "training.json").read_text(encoding="utf-8"))
        result = {
            "types": score_types(test),
            "steps": [asdict(step) for step in score_steps(collect_rights(grid))],
            "trained_steps": training["steps"],
            "training_seconds": training["training_seconds"],
            "seconds": round(time.monotonic() - began, 1),
            "versions": training["versions"],
            "commit": json.loads((Path(recipe.output) / "run.json").read_text(encoding="utf-8")).get("commit"),
            "seed": recipe.seed,
        }
        write_file_atomically(file, json.dumps(result) + "\n")
        return result

    def _evaluate(
        self, checkpoint: Path, recipe: Recipe, start: str, split: str, controls: tuple[str, ...]
    ) -> Evaluation:
        loaded = load_checkpoint(checkpoint)
        with show_progress(self.console, f"Answering {split}", "clips") as progress:
            return evaluate_split(loaded, self.path / start / split, recipe, controls, progress, split)


def score_types(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Accuracy of the most likely candidate by question type, as it is and under each control, with chance."""
    columns = {"test": evaluation.protocols[CANDIDATES], **evaluation.controls[CANDIDATES]}
    scores = {name: scores.by_type for name, scores in columns.items()}
    types = {kind: {name: score.by_type[kind] for name, score in scores.items()} for kind in scores["test"].by_type}
    chance: dict[str, list[float]] = {}
    for item in columns["test"].judged:
        chance.setdefault(item.example.type_name, []).append(1 / len(item.example.candidates))
    for kind, each in chance.items():
        types[kind]["chance"] = float(np.mean(each))
    return types


@dataclass(frozen=True)
class Right:
    """Whether a question of the grid was answered right with both senses and with each alone."""

    clip: str
    picture: int
    sound: int
    both: bool
    sight: bool
    hearing: bool


def collect_rights(evaluation: Evaluation) -> list[Right]:
    """The verdicts on the grid's questions; file names say clip and steps: `00012-21.mp4`."""
    parts = {BOTH: evaluation.protocols[CANDIDATES], **evaluation.controls[CANDIDATES]}
    by_id = {name: {item.example.id: bool(item.value) for item in scores.judged} for name, scores in parts.items()}
    rights = []
    for example in evaluation.examples:
        clip, steps = Path(example.media).stem.split("-")
        verdicts = [by_id[name][example.id] for name in (BOTH, SIGHT, HEARING)]
        rights.append(Right(clip, int(steps[0]), int(steps[1]), *verdicts))
    return rights


def score_steps(rights: Sequence[Right]) -> list[Step]:
    """Accuracies and paired differences at each step of noise, with 95 % intervals over clips (bootstrap)."""
    steps = []
    for where in sorted({(right.picture, right.sound) for right in rights}):
        own = [right for right in rights if (right.picture, right.sound) == where]
        clips = [right.clip for right in own]
        both, sight, hearing = (
            np.array([getattr(right, name) for right in own], dtype=float) for name in ("both", "sight", "hearing")
        )
        estimates = [_estimate(values, clips) for values in (both, sight, hearing, both - sight, both - hearing)]
        steps.append(Step(*where, *estimates))
    return steps


def _estimate(values: np.ndarray, clips: Sequence[str]) -> tuple[float, float, float]:
    [interval] = compute_mean_intervals(values, clips, np.ones((len(values), 1), dtype=bool))
    return float(values.mean()), float(interval.low), float(interval.high)


def format_result(start: str, result: Mapping[str, Any]) -> str:
    """The two tables of a training as text, in percent, and what they depend on."""
    columns = ["test", "chance", *CONTROLS]
    types = [["", *(name.replace("_", " ") for name in columns)]]
    types += [[kind, *(format_share(own[name]) for name in columns)] for kind, own in result["types"].items()]
    grid = [["noise: picture, sound", "both", "sight alone", "hearing alone", "both - sight", "both - hearing"]]
    for step in result["steps"]:
        shares = [_format_estimate(step[name]) for name in ("both", "sight", "hearing")]
        gains = [_format_gain(step[name]) for name in ("over_sight", "over_hearing")]
        grid.append([f"{step['picture']}, {step['sound']}", *shares, *gains])
    facts = (
        f"from {start}: seed {result['seed']}, {result['trained_steps']} steps, "
        f"{result['training_seconds'] / 3600:.2f} hours of training, torch {result['versions']['torch']}, mirasol "
        f"{result['versions']['mirasol']}, commit {(result['commit'] or 'unknown')[:10]}"
    )
    return "\n\n".join([facts, format_table(types), format_table(grid)])


def _format_estimate(estimate: Sequence[float]) -> str:
    value, low, high = map(format_share, estimate)
    return f"{value} [{low}, {high}]"


def _format_gain(estimate: Sequence[float]) -> str:
    value, low, high = (f"{100 * share:+.1f}" for share in estimate)
    return f"{value} [{low}, {high}]"

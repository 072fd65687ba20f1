"""What a run records: metrics.jsonl, TensorBoard, and Weights & Biases or trackio by the recipe's `tracker`.

`metrics.jsonl` has one JSON object per line, in the order of the steps:

- `{"kind": "train", "step", "stage", "loss", "text_loss", "latent_loss", "video_loss", "gradient_norm",
  "learning_rate", "x_cosine", "x_std", "repeated_rows", "clips_per_second", "data_wait", "replaced_clips",
  "seconds"}`: the values of this step (`loss` is the weighted sum, the other losses are unweighted). The last four are
  measured since the previous line: clips per second, the share of time spent waiting for data, bad clips that were
  replaced while decoding ahead; and seconds of training so far. A model that reconstructs audio also has an
  "audio_loss", here and below.
- `{"kind": "validation", "step", "clip": part, "segment": part}`: `part` is `{"text_loss", "latent_loss", "video_loss",
  "accuracy", "by_type": {type: {"text_loss", "accuracy", "rows"}}}`, of whole clips and of segments (only if the recipe
  trains on them); "any" of both if a stage takes both; "image" of images, with a "contrastive_loss" instead of the
  latent and video losses. Accuracy is exact match of the teacher-forced most likely tokens.
- With several data sets (`data.mixture`) a step has "clips_of_NAME", the number of its clips from each, and validation
  parts are called "NAME_clip" and so on.
- A stage with epochs has "epoch", that of the step's first clip (from 1), and "uncounted_rows", text rows that only
  fill the batch.
- `{"kind": "samples", "step", "answers": [{"id", "media", "prompt", "target", "answer"}]}`: the model's own greedy
  answers to a few fixed questions of the validation. TensorBoard shows them as text, with a picture of reconstructed
  chunks below the true ones.

`step` counts finished steps, from 1. Before version 0.2 "segment" was called "slot".
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mirasol.config.recipe import Recipe
from mirasol.errors import UserError
from mirasol.files import write_file_atomically
from mirasol.json_values import parse_own_json

if TYPE_CHECKING:
    from mirasol.training.samples import Taken

# Name of the project at the tracker's service.
PROJECT = "mirasol"


class Tracker:
    """Sends a run's numbers, sample answers and pictures to `wandb` or `trackio`, which share an interface.

    A resumed run continues under its name. The service decides what to do with steps that are logged a second time.
    """

    def __init__(self, module: ModuleType, recipe: Recipe):
        self.module = module
        folder = Path(recipe.output).resolve()
        # Runs of the same name in different places are different runs.
        name = f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:6]}"
        extra = {"id": name} if module.__name__ == "wandb" else {}
        with _print_to_stderr():
            self.run = module.init(project=PROJECT, name=name, config=recipe.to_dict(), resume="allow", **extra)

    def log_numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the numbers of a step."""
        self.run.log(dict(values), step=step)

    def log_samples(self, step: int, text: str, picture: Tensor | None) -> None:
        """Sends sample answers as text, and a picture, uint8 [3, height, width]."""
        with _print_to_stderr():
            values: dict[str, object] = {"samples/answers": text}
            if picture is not None:
                values["samples/reconstruction"] = self.module.Image(picture.permute(1, 2, 0).numpy())
            self.run.log(values, step=step)

    def close(self) -> None:
        """Sends what has not been sent yet."""
        with _print_to_stderr():
            self.run.finish()


def _print_to_stderr() -> contextlib.redirect_stdout:
    """Redirects the service's messages: stdout is for results."""
    return contextlib.redirect_stdout(sys.stderr)


def check_tracker(name: str) -> None:
    """Raises UserError where the tracker's package is not installed."""
    if name != "none":
        _import_tracker(name)


def make_tracker(recipe: Recipe) -> Tracker | None:
    """The recipe's tracker, None for `none`. Raises UserError where its package is not installed."""
    return None if recipe.tracker == "none" else Tracker(_import_tracker(recipe.tracker), recipe)


def _import_tracker(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"tracker={name}: the package {name} cannot be imported ({error}): pip install 'mirasol[{name}]', "
            "or set tracker: none"
        ) from error


class RunLog:
    """Writes a run's metrics, and sends them to `tracker` if there is one. When a run resumes after `step` steps, lines
    of later steps are removed. `watch` is called when a validation has been written."""

    def __init__(
        self,
        folder: Path,
        step: int = 0,
        tracker: Tracker | None = None,
        watch: Callable[[], None] | None = None,
    ):
        from torch.utils.tensorboard import SummaryWriter

        self.watch = watch
        self.file, self.tracker = folder / "metrics.jsonl", tracker
        kept = [line for line in read_metrics(self.file) if line["step"] <= step]
        write_file_atomically(self.file, "".join(json.dumps(line) + "\n" for line in kept))
        self.stream = self.file.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log_step(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs the values of a training step."""
        self._write({"kind": "train", "step": step, **values})
        numbers = {f"train/{name}": value for name, value in values.items() if not isinstance(value, str)}
        self._log_numbers(step, numbers)

    def log_validation(self, step: int, parts: Mapping[str, Mapping[str, Any]]) -> None:
        """Logs a validation."""
        self._write({"kind": "validation", "step": step, **parts})
        numbers = {}
        for part, values in parts.items():
            numbers |= {f"validation_{part}/{name}": value for name, value in values.items() if name != "by_type"}
            for type_name, own in values["by_type"].items():
                numbers[f"validation_{part}_accuracy/{type_name}"] = own["accuracy"]
                numbers[f"validation_{part}_text_loss/{type_name}"] = own["text_loss"]
        self._log_numbers(step, numbers)
        if self.watch is not None:
            self.watch()

    def log_samples(self, step: int, taken: "Taken") -> None:
        """Logs sample answers, and a picture of reconstructed chunks."""
        self._write({"kind": "samples", "step": step, "answers": [dataclasses.asdict(each) for each in taken.answers]})
        lines = [f"{each.prompt} → {each.answer} (wanted: {each.target})" for each in taken.answers]
        self.board.add_text("samples/answers", "  \n".join(lines), step)
        if taken.picture is not None:
            self.board.add_image("samples/reconstruction", taken.picture.numpy(), step)
        if self.tracker is not None:
            self.tracker.log_samples(step, "\n".join(lines), taken.picture)

    def _log_numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if self.tracker is not None:
            self.tracker.log_numbers(step, values)

    def _write(self, line: Mapping[str, Any]) -> None:
        self.stream.write(json.dumps(line) + "\n")
        self.stream.flush()

    def close(self) -> None:
        """Closes the files and the tracker."""
        self.stream.close()
        self.board.close()
        if self.tracker is not None:
            self.tracker.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without a last one that a kill cut short; none if there is no file yet.

    Raises UserError for a line that is damaged in another way.
    """
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return [parse_own_json(line, f"{file}, line {number}", "remove the line") for number, line in enumerate(lines, 1)]


class BestStep:
    """The step with the best value of `metric` so far; of equal ones the first.

    metric: dotted path of a number in the validation lines of `metrics.jsonl`, e.g. `clip.accuracy`,
        `segment.text_loss` or `clip.by_type.hearing.accuracy`; the lowest is best of a loss, the highest of all else
    lines: those logged before, of a resumed run

    `worse_since`: how many validations there were after the best one.
    """

    def __init__(self, metric: str, lines: list[dict[str, Any]]):
        self.metric, self.step, self.value, self.worse_since = metric, 0, 0.0, 0
        for line in lines:
            if line["kind"] == "validation":
                self.add(line["step"], line)

    def add(self, step: int, validation: Mapping[str, Any]) -> bool:
        """Adds a validation. Returns whether it is the best so far. Raises UserError if it lacks the metric."""
        value = _find_number(validation, self.metric)
        is_best = not self.step or (value < self.value if self.metric.endswith("loss") else value > self.value)
        self.worse_since += 1
        if is_best:
            self.step, self.value, self.worse_since = step, value, 0
        return is_best

    def describe(self) -> str:
        """Which step is best, by what, and for how long."""
        return (
            f"{self.metric} was best after step {self.step} ({self.value:.4g}) and no better in {self.worse_since} "
            "validations since"
        )


def _find_number(validation: Mapping[str, Any], metric: str) -> float:
    value: Any = validation
    for name in metric.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(value, int | float):
        known = ", ".join(_list_numbers(validation))
        raise UserError(f"keep_best={metric} is not a validation metric: choose one of {known}")
    return value


def _list_numbers(validation: Mapping[str, Any], prefix: str = "") -> list[str]:
    """All numbers of a validation, named as in `keep_best`."""
    names = []
    for name, value in validation.items():
        if isinstance(value, Mapping):
            names += _list_numbers(value, f"{prefix}{name}.")
        elif prefix and isinstance(value, int | float):
            names.append(prefix + name)
    return names


def check_metric(metric: str, parts: Mapping[str, Any]) -> None:
    """Raises UserError before the run begins for a metric of a part that the validation does not have."""
    part, _, name = metric.partition(".")
    if part not in parts or not name:
        raise UserError(
            f"keep_best={metric} is not a validation metric: write {' or '.join(parts)} and one of its numbers, "
            f"e.g. {next(iter(parts), 'clip')}.accuracy"
        )

"""What a run tells: metrics.jsonl and TensorBoard.

`metrics.jsonl` holds one JSON object a line, in the order of the steps:

- `{"kind": "train", "step", "stage", "loss", "text_loss", "latent_loss", "video_loss", "gradient_norm",
  "learning_rate", "x_cosine", "x_std", "repeated_rows", "clips_per_second", "data_wait", "replaced_clips",
  "seconds"}`: the values of that very step (losses unweighted but `loss`, which is the weighted sum); the last four are
  measured since the line before: clips per second, the share of time spent waiting for data, clips that turned out to
  be bad while they were decoded ahead, and seconds of training so far. A model that
  reconstructs audio has an "audio_loss" too, here and below.
- `{"kind": "validation", "step", "clip": part, "segment": part}`: `part` is `{"text_loss", "latent_loss", "video_loss",
  "accuracy", "by_type": {type: {"text_loss", "accuracy", "rows"}}}` over whole clips and over segments of clips (only
  where the recipe trains on them); "any" over both where a stage takes both; "image" over images, with a
  "contrastive_loss" in place of the latent and video losses. Accuracy is exact match of the teacher-forced most
  likely tokens.
- With several data sets (`data.mixture`) a step has "clips_of_NAME", how many of its clips are of each, and validation
  parts are called "NAME_clip" and so on.

- `{"kind": "samples", "step", "answers": [{"id", "media", "prompt", "target", "answer"}]}`: what the model answers to a
  few fixed questions of the validation, greedily and from its own words; TensorBoard has them as text, and a picture of
  reconstructed chunks below the true ones.

`step` counts the steps done, from 1.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirasol.files import write_file_atomically
from mirasol.json_values import parse_own_json
from mirasol.training.trackers import Tracker

if TYPE_CHECKING:
    from mirasol.training.samples import Taken


class RunLog:
    """Writes a run's metrics, and tells them to `tracker` where there is one. On resumption after `step` steps, what
    was logged beyond them is taken back."""

    def __init__(self, folder: Path, step: int = 0, tracker: Tracker | None = None):
        from torch.utils.tensorboard import SummaryWriter

        self.file, self.tracker = folder / "metrics.jsonl", tracker
        kept = [line for line in read_metrics(self.file) if line["step"] <= step]
        write_file_atomically(self.file, "".join(json.dumps(line) + "\n" for line in kept))
        self.stream = self.file.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def train(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs the values of one training step."""
        self._write({"kind": "train", "step": step, **values})
        self._numbers(step, {f"train/{name}": value for name, value in values.items() if not isinstance(value, str)})

    def validation(self, step: int, parts: Mapping[str, Mapping[str, Any]]) -> None:
        """Logs one validation."""
        self._write({"kind": "validation", "step": step, **parts})
        numbers = {}
        for part, values in parts.items():
            numbers |= {f"validation_{part}/{name}": value for name, value in values.items() if name != "by_type"}
            for type_name, own in values["by_type"].items():
                numbers[f"validation_{part}_accuracy/{type_name}"] = own["accuracy"]
                numbers[f"validation_{part}_text_loss/{type_name}"] = own["text_loss"]
        self._numbers(step, numbers)

    def samples(self, step: int, taken: "Taken") -> None:
        """Logs sample answers, and a picture of reconstructed chunks."""
        self._write({"kind": "samples", "step": step, "answers": [dataclasses.asdict(each) for each in taken.answers]})
        lines = [f"{each.prompt} → {each.answer} (wanted: {each.target})" for each in taken.answers]
        self.board.add_text("samples/answers", "  \n".join(lines), step)
        if taken.picture is not None:
            self.board.add_image("samples/reconstruction", taken.picture.numpy(), step)
        if self.tracker is not None:
            self.tracker.samples(step, "\n".join(lines), taken.picture)

    def _numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if self.tracker is not None:
            self.tracker.numbers(step, values)

    def _write(self, line: Mapping[str, Any]) -> None:
        self.stream.write(json.dumps(line) + "\n")
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()
        self.board.close()
        if self.tracker is not None:
            self.tracker.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, a last one that a kill cut short left out; none where there is no file yet.

    Raises UserError for a line that is damaged otherwise.
    """
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return [parse_own_json(line, f"{file}, line {number}", "remove the line") for number, line in enumerate(lines, 1)]

"""The folder of a fine-tuning: what it was asked for, and whether the same command may go on."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mirasol.data.digest import digest_examples
from mirasol.errors import UserError
from mirasol.evaluation.evaluate import hash_checkpoint
from mirasol.files import write_file_atomically
from mirasol.finetune.labels import Labels
from mirasol.finetune.settings import Settings
from mirasol.json_values import parse_own_json


class FinetuneFolder:
    """finetune.json (the arguments, hashes of data and checkpoint, and what is done), data/ (the splits), recipe.yaml,
    before/ (results of the starting checkpoint), train/ (the run), checkpoint/ (the best one), results and report.html.

    Raises:
        UserError: the folder has something else, or a fine-tuning with other arguments.
    """

    def __init__(self, settings: Settings):
        self.settings, self.path = settings, Path(settings.output)
        self.data, self.before, self.run = (self.path / name for name in ("data", "before", "train"))
        self.checkpoint, self.recipe = self.path / "checkpoint", self.path / "recipe.yaml"
        self.cache, self.report, self.marker = (self.path / name for name in ("cache", "report.html", "finetune.json"))
        self.features = self.path / "features"
        self.state: dict[str, Any] = {}
        try:
            is_file = self.path.exists() and not self.path.is_dir()
        except OSError as error:  # such as a name that is too long
            raise UserError(f"--output {self.path}: {error.strerror}: give another --output") from error
        if is_file:
            raise UserError(f"{self.path}: is a file: give a folder with --output")
        if self.marker.is_file() and self.is_resumed:
            text = self.marker.read_text(encoding="utf-8")
            self.state = parse_own_json(text, self.marker, "give another --output")
            self._check_arguments()
        elif self.path.is_dir() and any(self.path.iterdir()) and not self.marker.is_file():
            raise UserError(f"{self.path}: not a fine-tuning, and not empty: give another folder with --output")

    @property
    def is_resumed(self) -> bool:
        """Whether splits and recipe are there already."""
        return self.recipe.is_file()

    @property
    def is_finished(self) -> bool:
        """Whether everything is done."""
        return bool(self.state.get("finished"))

    def _list_arguments(self) -> dict[str, Any]:
        arguments = {name: value for name, value in asdict(self.settings).items() if name != "output"}
        arguments["data"] = str(Path(self.settings.data).resolve())
        return json.loads(json.dumps(arguments))

    def _check_arguments(self) -> None:
        """Raises UserError for an argument that differs from that at the start."""
        before, now = self.state.get("arguments", {}), self._list_arguments()
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise UserError(
                    f"{self.path}: was started with {_name_argument(name, before.get(name))}, now it is "
                    f"{_name_argument(name, now.get(name))}: give the same to continue, or another --output"
                )

    def begin(self, labels: Labels, checkpoint: Path) -> None:
        """Records what this fine-tuning is made of; of a resumed one, checks it.

        Raises UserError for data, or a starting checkpoint, that changed since the start.
        """
        digest = digest_examples(labels.root, labels.all_examples)
        made_of = {"data": digest.sha256, "checkpoint": hash_checkpoint(checkpoint)}
        if self.state:
            parts = {
                "data": (self.settings.data, "labels, or names and sizes of files"),
                "checkpoint": (self.settings.start, "files of the checkpoint"),
            }
            for name, (what, changed) in parts.items():
                if self.state.get("made_of", {}).get(name) != made_of[name]:
                    raise UserError(
                        f"{what}: changed since the start of {self.path} ({changed}): restore it to continue, or give "
                        "another --output"
                    )
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.record({"arguments": self._list_arguments(), "made_of": made_of})
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot create this folder, or write into it ({error.strerror}): give another --output"
            ) from error

    def record(self, facts: Mapping[str, Any]) -> None:
        """Adds to finetune.json."""
        self.state |= facts
        write_file_atomically(self.marker, json.dumps(self.state, indent=1) + "\n")


def _name_argument(name: str, value: Any) -> str:
    """An argument as it is written on the command line."""
    if name == "overrides":
        return f"KEY=VALUE {' '.join(value)}" if value else "no KEY=VALUE"
    option = {"data": "FOLDER", "start": "--from"}.get(name, f"--{name}")
    return f"no {option}" if value is None else f"{option} {value}"

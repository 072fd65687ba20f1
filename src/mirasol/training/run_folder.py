"""A run's folder: its files, when it may be used, and what is recorded in it.

recipe.yaml (resolved), run.json (versions, commit, hardware, data), bad_clips.jsonl, metrics.jsonl, tensorboard/,
processor/, checkpoints/ (to resume from), checkpoint/ (the result), error.txt (if an error ended the run),
bad_step.json (the samples of a step whose loss was not finite).
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import mirasol
from mirasol.checkpoint import find_checkpoint, read_rendered_world
from mirasol.config.recipe import Recipe
from mirasol.config.recipe_changes import find_changed_keys
from mirasol.config.recipe_io import read_run_recipe
from mirasol.data.clip_cache import BadWindow, write_bad_clips
from mirasol.data.datasets.files import Files
from mirasol.data.digest import ExamplesDigest
from mirasol.errors import UserError
from mirasol.files import hash_file, lock_file, write_file_atomically
from mirasol.hub import MODEL, name_commit
from mirasol.json_values import InvalidJson, parse_json, parse_own_json

# Files that only a run writes. Not bad_clips.jsonl: a start that failed at a bad clip writes it too, and is not a run.
RUN_FILES = (
    "recipe.yaml",
    "run.json",
    "metrics.jsonl",
    "tensorboard",
    "processor",
    "checkpoints",
    "checkpoint",
)


class RunFolder:
    """The folder `recipe.output`, locked against other runs while the context is open. Only the first process of a run
    locks it and writes to it.

    Before `start` nothing is written but the lock of an existing run. `warn` is called if the disk has no locks.

    Raises:
        UserError: the folder contains a run and `resume` is off; `resume` is on and the recipe differs from the run's
            in a key that affects the weights; another process is training into the folder.
    """

    def __init__(
        self, recipe: Recipe, resume: bool, is_first: bool = True, warn: Callable[[str], None] = warnings.warn
    ):
        self.recipe, self.path, self.is_first, self._warn = recipe, Path(recipe.output), is_first, warn
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: this is a file: output must be a folder")
        self._lock: int | None = None
        if not is_first:
            # It uses the folder only after the first process has started or resumed the run.
            self.holds_run = True
            return
        self.holds_run = self._find_run()
        if self.holds_run and not resume:
            raise UserError(f"{self.path}: already contains a run: choose another output, or continue it with --resume")
        if self.holds_run:
            self._check_same_recipe()
            if not self.finished:
                self._lock_folder()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def _find_run(self) -> bool:
        return any((self.path / name).exists() for name in RUN_FILES)

    def _lock_folder(self) -> None:
        """Keeps other processes out until this one ends, in whatever way."""
        self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not lock_file(self._lock):
                self._warn(f"{self.path}: this disk has no locks: nothing prevents a second run from writing here")
        except BlockingIOError as error:
            os.close(self._lock)
            self._lock = None
            raise UserError(
                f"{self.path}: another process is training into this folder: wait for it or stop it"
            ) from error

    @property
    def checkpoint(self) -> Path:
        """The folder of the finished model."""
        return self.path / "checkpoint"

    @property
    def finished(self) -> bool:
        """Whether the run is finished."""
        return self.checkpoint.is_dir()

    def _check_same_recipe(self) -> None:
        file = self.path / "recipe.yaml"
        if not file.is_file():
            raise UserError(
                f"{self.path}: this run has lost its recipe.yaml and cannot be resumed: choose another output"
            )
        (before, old_keys), after = read_run_recipe(file), self.recipe.to_dict()
        changed = find_changed_keys(before, after)
        if changed:
            raise UserError(
                f"{self.path}: cannot resume with a changed recipe: {changed[0]} differs from {file} "
                f"({len(changed)} changed: {', '.join(changed)})"
            )
        if old_keys and not self.finished:
            raise UserError(
                f"{self.path}: this run was begun by an older version of mirasol ({file.name} has {old_keys[0]}): "
                "finish it with that version, or choose another output"
            )

    def start(
        self,
        bad: list[BadWindow],
        components: Mapping[str, Any] | None = None,
        model_config: Mapping[str, Any] | None = None,
        examples: Mapping[str, ExamplesDigest] | None = None,
        steps: Mapping[str, int] | None = None,
        initial: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes recipe.yaml and run.json of a new run; checks that data and bad clips of a resumed run are unchanged.

        components: parameters by component and how many of them each stage trains
        model_config: the model's config, which a checkpoint does not contain
        examples: digests of the examples, by name
        steps: of each stage, those with epochs counted
        initial: where the weights come from, and which are untrained

        Raises UserError for a resumed run whose data changed.
        """
        if not self.is_first:
            return
        data = hash_data_files(self.recipe)
        if self.holds_run:
            recorded = self.read_facts()["data"]
            for name in sorted(recorded.keys() | data.keys()):
                if recorded.get(name) != data.get(name):
                    raise UserError(f"{self.recipe.data.folder}: {name} changed since the start of the run {self.path}")
            self._check_same_bad_clips(bad)
            before = self.read_facts().get("examples", {})
            for name, found in (examples or {}).items():
                if before.get(name, found.sha256) != found.sha256:
                    missing = f" ({len(found.missing)} are missing, {found.missing[0]} first)" if found.missing else ""
                    raise UserError(
                        f"{name}: other examples, or media files of other sizes{missing}, than at the start of the run "
                        f"{self.path}: restore its data, or start another run"
                    )
            return
        import yaml

        self.path.mkdir(parents=True, exist_ok=True)
        self._lock_folder()
        if self._find_run():
            raise UserError(f"{self.path}: another process has started a run here: choose another output, or --resume")
        write_bad_clips(self.path / "bad_clips.jsonl", bad)
        environment = {**describe_environment(), "fingerprint": self.recipe.compute_fingerprint(), "data": data}
        environment["components"] = dict(components or {})
        environment |= dict(initial or {})
        environment["model_config"] = dict(model_config or {})
        environment["stage_steps"] = dict(steps or {})
        environment["rendered_world"] = find_rendered_world(self.recipe)
        initial_name = self.recipe.model.init
        environment["initial_checkpoint"] = None if initial_name is None else name_commit(initial_name, MODEL)
        environment["examples"] = {name: found.sha256 for name, found in (examples or {}).items()}
        write_file_atomically(self.path / "run.json", json.dumps(environment, indent=1) + "\n")
        # Written last: a folder with a recipe.yaml can be resumed.
        write_file_atomically(self.path / "recipe.yaml", yaml.safe_dump(self.recipe.to_dict(), sort_keys=False))

    def read_facts(self) -> dict[str, Any]:
        """The content of run.json. Raises UserError if it is damaged."""
        file = self.path / "run.json"
        return parse_own_json(file.read_text(encoding="utf-8"), file, "restore a copy of it, or start another run")

    def _check_same_bad_clips(self, bad: list[BadWindow]) -> None:
        lines = (self.path / "bad_clips.jsonl").read_text(encoding="utf-8").splitlines()
        # Those with a step were found during training; the others are found before every start.
        rows = [row for row in map(json.loads, lines) if "step" not in row]
        before = {(row["media"], row["start"], row["end"]) for row in rows}
        now = {(entry.media, entry.start, entry.end) for entry in bad}
        for media, start, end in sorted(before ^ now, key=str):
            raise UserError(
                f"{media} ({start} to {end} s) became readable or unreadable since the start of the run {self.path}: "
                "restore it, or start another run"
            )

    def add_bad_clips(self, bad: Sequence[BadWindow], step: int) -> None:
        """Lists clips that step `step` (from 1) found to be bad, each only once."""
        if not self.is_first:
            return
        file = self.path / "bad_clips.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        listed = {(row["media"], row["start"], row["end"]) for row in map(json.loads, lines)}
        new = [entry for entry in dict.fromkeys(bad) if (entry.media, entry.start, entry.end) not in listed]
        lines += [json.dumps({**asdict(entry), "step": step}) for entry in new]
        write_file_atomically(file, "".join(line + "\n" for line in lines))

    def record_error(self, message: str, bad_step: Mapping[str, Any] | None = None) -> None:
        """Writes the error that ended the run, and the facts of a step whose values were not finite."""
        if not self.is_first:
            return
        # The error may be a full disk: then the line on the console must suffice.
        with contextlib.suppress(OSError):
            write_file_atomically(self.path / "error.txt", message + "\n")
            if bad_step is not None:
                write_file_atomically(self.path / "bad_step.json", json.dumps(bad_step, indent=1) + "\n")

    def clear_error(self) -> None:
        """Removes the error of an earlier part of the run."""
        if not self.is_first:
            return
        for name in ("error.txt", "bad_step.json"):
            (self.path / name).unlink(missing_ok=True)


def hash_data_files(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of each data set's manifest and of the splits used; with several data sets, named `NAME/…`."""
    hashes = {}
    for data_set, data in recipe.data.data_sets.items():
        splits = [split for split in (data.train_split, data.validation_split) if split]
        names = ["manifest.json", *(f"{split}{suffix}" for split in splits for suffix in (".jsonl", ".csv"))]
        folder = Path(data.root)
        if data.dataset == "folder":
            folder = Files(folder, data.options.annotations).annotation_root
        for name in names:
            file = folder / name
            if file.is_file():
                key = f"{data_set}/{name}" if data_set else name
                hashes[key] = hash_file(file)
    return hashes


def find_rendered_world(recipe: Recipe) -> str | None:
    """The rendered scenes that are all the model will ever have seen, by the name in their manifest: those of every
    data set of the run, and of the checkpoint it starts from. None where anything else is among them."""
    worlds = {_read_world(Path(data.root) / "manifest.json") for data in recipe.data.data_sets.values()}
    if recipe.model.init is not None:
        worlds.add(read_rendered_world(find_checkpoint(recipe.model.init)))
    return worlds.pop() if len(worlds) == 1 else None


def _read_world(manifest: Path) -> str | None:
    """The name of the data set that `mirasol data synthesize` rendered, from its manifest; None for other folders."""
    try:
        values = parse_json(manifest.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, InvalidJson):
        return None
    is_rendered = isinstance(values, dict) and {"data_set", "data_version", "kind", "seed"} <= values.keys()
    return str(values["data_set"]) if is_rendered else None


def collect_versions() -> dict[str, str]:
    """Versions of the packages that a run depends on."""
    found = {"mirasol": mirasol.__version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "av", "numpy", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def describe_environment() -> dict[str, Any]:
    """Versions, hardware, and the commit of this package if it runs from its repository."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    hardware = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
    }
    return {"versions": collect_versions(), "hardware": hardware, "commit": find_git_commit()}


def find_git_commit() -> str | None:
    """Commit of the repository of this package's source, with `+changes` if files differ; None without a repository."""
    package = Path(mirasol.__file__).resolve().parent

    def run_git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(["git", "-C", package, *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    # An installed package may be inside the repository of another project.
    top = run_git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() / "src" / "mirasol" != package:
        return None
    commit, status = run_git("rev-parse", "HEAD"), run_git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and status else commit

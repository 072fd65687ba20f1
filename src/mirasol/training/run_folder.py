"""A run's folder: what it holds, when it may be used, and what is recorded there.

recipe.yaml (resolved), run.json (versions, commit, hardware, data), bad_clips.jsonl, metrics.jsonl, tensorboard/,
processor/, checkpoints/ (to resume from), checkpoint/ (the result), error.txt (where a run stopped itself),
bad_step.json (the samples of a step whose loss was no number).
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
from mirasol.config.recipe import Recipe, changed_keys
from mirasol.config.recipe_io import read_run_recipe
from mirasol.data.clip_cache import BadWindow, write_bad_clips
from mirasol.data.digest import ExamplesDigest
from mirasol.errors import UserError
from mirasol.files import hash_file, lock_file, write_file_atomically
from mirasol.json_values import parse_own_json

# Whatever a run alone leaves. Not bad_clips.jsonl: a start that stopped at a bad clip leaves it, and is no run yet.
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
    """The folder `recipe.output`, locked against other runs while the context manager is open. Of a run's own processes
    the first alone locks it and writes to it.

    Nothing is written to it before `start`, save the lock where it holds a run. `warn` is told of a disk without locks.

    Raises:
        UserError: it holds a run and `resume` is off; `resume` is on and the recipe differs from the run's in
            something that decides the weights; another process is training into it.
    """

    def __init__(
        self, recipe: Recipe, resume: bool, is_first: bool = True, warn: Callable[[str], None] = warnings.warn
    ):
        self.recipe, self.path, self.is_first, self._warn = recipe, Path(recipe.output), is_first, warn
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file, output must be a folder")
        self._lock: int | None = None
        if not is_first:
            # It looks at the folder once the first process has begun or gone on with the run there.
            self.holds_run = True
            return
        self.holds_run = self._find_run()
        if self.holds_run and not resume:
            raise UserError(f"{self.path}: already holds a run: choose another output, or --resume to go on with it")
        if self.holds_run:
            self._check_same_recipe()
            if not self.finished:
                self._take()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def _find_run(self) -> bool:
        return any((self.path / name).exists() for name in RUN_FILES)

    def _take(self) -> None:
        """Keeps other processes out until this one ends, however it ends."""
        self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not lock_file(self._lock):
                self._warn(f"{self.path}: this disk has no locks: nothing keeps a second run from writing here")
        except BlockingIOError as error:
            os.close(self._lock)
            self._lock = None
            raise UserError(f"{self.path}: another process trains into this folder: wait for it or stop it") from error

    @property
    def checkpoint(self) -> Path:
        """Where the finished model goes."""
        return self.path / "checkpoint"

    @property
    def finished(self) -> bool:
        return self.checkpoint.is_dir()

    def _check_same_recipe(self) -> None:
        file = self.path / "recipe.yaml"
        if not file.is_file():
            raise UserError(
                f"{self.path}: this run has lost its recipe.yaml and cannot be resumed: choose another output"
            )
        (before, old_keys), after = read_run_recipe(file), self.recipe.to_dict()
        changed = changed_keys(before, after)
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
    ) -> None:
        """Writes down recipe and surroundings, or checks that data and bad clips are as they were.

        components: parameters by component and how many of them each stage trains
        model_config: the model's config, for a checkpoint holds tensors only
        examples: what was read, by name
        """
        if not self.is_first:
            return
        data = data_hashes(self.recipe)
        if self.holds_run:
            recorded = self.recorded()["data"]
            for name in sorted(recorded.keys() | data.keys()):
                if recorded.get(name) != data.get(name):
                    raise UserError(f"{self.recipe.data.folder}: {name} changed since the run {self.path} began")
            self._check_same_bad_clips(bad)
            before = self.recorded().get("examples", {})
            for name, found in (examples or {}).items():
                if before.get(name, found.sha256) != found.sha256:
                    missing = f" ({len(found.missing)} are missing, {found.missing[0]} first)" if found.missing else ""
                    raise UserError(
                        f"{name}: other examples, or media files of other sizes{missing}, than when the run "
                        f"{self.path} began: bring back what it had, or begin another run"
                    )
            return
        import yaml

        self.path.mkdir(parents=True, exist_ok=True)
        self._take()
        if self._find_run():
            raise UserError(f"{self.path}: another process began a run here: choose another output, or --resume")
        write_bad_clips(self.path / "bad_clips.jsonl", bad)
        surroundings = {**surroundings_now(), "fingerprint": self.recipe.fingerprint(), "data": data}
        surroundings["components"] = dict(components or {})
        surroundings["model_config"] = dict(model_config or {})
        surroundings["examples"] = {name: found.sha256 for name, found in (examples or {}).items()}
        write_file_atomically(self.path / "run.json", json.dumps(surroundings, indent=1) + "\n")
        # Written last: a folder with a recipe can be resumed.
        write_file_atomically(self.path / "recipe.yaml", yaml.safe_dump(self.recipe.to_dict(), sort_keys=False))

    def recorded(self) -> dict[str, Any]:
        """What run.json holds."""
        file = self.path / "run.json"
        return parse_own_json(file.read_text(encoding="utf-8"), file, "put its copy back, or begin another run")

    def _check_same_bad_clips(self, bad: list[BadWindow]) -> None:
        lines = (self.path / "bad_clips.jsonl").read_text(encoding="utf-8").splitlines()
        # Those with a step were found while training; the others are known before every start.
        rows = [row for row in map(json.loads, lines) if "step" not in row]
        before = {(row["media"], row["start"], row["end"]) for row in rows}
        now = {(entry.media, entry.start, entry.end) for entry in bad}
        for media, start, end in sorted(before ^ now, key=str):
            raise UserError(
                f"{media} ({start} to {end} s) became readable or unreadable since the run {self.path} began: "
                "bring it back as it was, or begin another run"
            )

    def add_bad_clips(self, bad: Sequence[BadWindow], step: int) -> None:
        """Lists clips that step `step` (from 1) found to be bad, each one once."""
        if not self.is_first:
            return
        file = self.path / "bad_clips.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        listed = {(row["media"], row["start"], row["end"]) for row in map(json.loads, lines)}
        new = [entry for entry in dict.fromkeys(bad) if (entry.media, entry.start, entry.end) not in listed]
        lines += [json.dumps({**asdict(entry), "step": step}) for entry in new]
        write_file_atomically(file, "".join(line + "\n" for line in lines))

    def record_error(self, message: str, bad_step: Mapping[str, Any] | None = None) -> None:
        """Keeps the line that a run stopped with, and the facts of a step whose numbers were none."""
        if not self.is_first:
            return
        # On a full disk, which may be what stopped it, the line on the console has to do.
        with contextlib.suppress(OSError):
            write_file_atomically(self.path / "error.txt", message + "\n")
            if bad_step is not None:
                write_file_atomically(self.path / "bad_step.json", json.dumps(bad_step, indent=1) + "\n")

    def clear_error(self) -> None:
        """The run goes on: what stopped it before is past."""
        if not self.is_first:
            return
        for name in ("error.txt", "bad_step.json"):
            (self.path / name).unlink(missing_ok=True)


def data_hashes(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of each data set's manifest and of the splits used; of several data sets `NAME/` stands before."""
    hashes = {}
    for data_set, data in recipe.data.data_sets.items():
        splits = [split for split in (data.train_split, data.validation_split) if split]
        names = ["manifest.json", *(f"{split}{suffix}" for split in splits for suffix in (".jsonl", ".csv"))]
        for name in names:
            file = Path(data.root) / name
            if file.is_file():
                key = f"{data_set}/{name}" if data_set else name
                hashes[key] = hash_file(file)
    return hashes


def versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    found = {"mirasol": mirasol.__version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "av", "numpy", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def surroundings_now() -> dict[str, Any]:
    """Versions, hardware, and the commit of this package where it runs from its repository."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    hardware = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
    }
    return {"versions": versions(), "hardware": hardware, "commit": git_commit()}


def git_commit() -> str | None:
    """Commit of the repository that this package's source lies in, `+changes` where files differ; None without."""
    package = Path(mirasol.__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(["git", "-C", package, *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    # An installed package may lie inside somebody else's repository.
    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() / "src" / "mirasol" != package:
        return None
    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and status else commit

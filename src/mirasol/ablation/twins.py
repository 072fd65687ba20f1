"""Rows of several suites that are the same run: trained once, and copied.

A finished run leaves a note in the folder that the suites share, named after all that its training depends on. A run
that has the same training takes weights and log from there; where it is asked the same questions too, the answers.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mirasol.ablation.identity import find_change, hash_identity, leave_questions_out
from mirasol.ablation.runs import ANSWERS, IDENTITY, STREAM, TRAINED, Run
from mirasol.files import write_file_atomically, write_folder_atomically
from mirasol.json_values import read_own_object


def leave_for_twins(run: Run) -> None:
    """Says where a finished row is, unless another run of the same training has said so."""
    if run.twins is None or _find_twin(run) is not None:
        return
    run.twins.mkdir(parents=True, exist_ok=True)
    write_file_atomically(_name_note(run), json.dumps({"folder": str(run.folder.resolve())}) + "\n")


def take_from_twin(run: Run) -> None:
    """Copies what a finished run of the same training has, if there is one and this run has not begun to train.

    May be killed at any moment: weights come last, and a run without them is as if nothing was taken.
    """
    train = run.folder / "train"
    if train.is_dir() or (twin := _find_twin(run)) is None:
        return
    if find_change(_read(twin / IDENTITY), run.identity) is None:
        write_folder_atomically(run.folder / "evaluation", _copy(twin / "evaluation"), replace=True)
        for name in (ANSWERS, STREAM):
            if (twin / name).is_file():
                write_file_atomically(run.folder / name, (twin / name).read_text(encoding="utf-8"))
    facts = {**_read(twin / TRAINED), "same_run_as": os.path.relpath(twin, run.folder.resolve())}
    write_file_atomically(run.folder / TRAINED, json.dumps(facts) + "\n")
    write_folder_atomically(train, _copy(twin / "train"))


def _copy(source: Path) -> Callable[[Path], None]:
    def fill(target: Path) -> None:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoints"), dirs_exist_ok=True)

    return fill


def _find_twin(run: Run) -> Path | None:
    """The folder of a finished run whose training is that of `run`; None without one, or where it was changed since."""
    if run.twins is None or not (note := _name_note(run)).is_file():
        return None
    twin = Path(_read(note)["folder"])
    if twin == run.folder.resolve():
        return twin
    wanted = (IDENTITY, TRAINED, ANSWERS)
    if not all((twin / name).is_file() for name in wanted) or not (twin / "train" / "checkpoint").is_dir():
        return None
    return twin if leave_questions_out(_read(twin / IDENTITY)) == leave_questions_out(run.identity) else None


def _name_note(run: Run) -> Path:
    assert run.twins is not None
    return run.twins / f"{hash_identity(leave_questions_out(run.identity))}.json"


def _read(file: Path) -> dict[str, Any]:
    return read_own_object(file, "remove it, and run the suite again")

"""What several commands share."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mirasol.errors import UserError


def check_positive(name: str, value: int) -> int:
    """The value, if it is at least 1; UserError otherwise."""
    if value < 1:
        raise UserError(f"{name} {value}: must be at least 1")
    return value


def check_device(name: str) -> str:
    """The device's name, if PyTorch can compute there; UserError otherwise."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available here: use cpu") from error
    return name


def check_no_results(path: str | Path) -> Path:
    """The path, if nothing is in the way of a new folder there; UserError otherwise."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: already exists: give another folder, for nothing is overwritten")
    return path


def make_folder(path: Path) -> None:
    """Makes the folder, so that one that cannot be made or written to is found before the work; UserError then."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror}): give another folder") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{path}: may not be written to: give another folder")


def problem_lines(problems: Iterable[Any], most: int = 20) -> list[str]:
    """A line for each of a data set's `Problem`s, of each kind the first `most`, and how many there are more."""
    lines, counts = [], Counter()
    for problem in problems:
        counts[problem.kind] += 1
        if counts[problem.kind] <= most:
            lines.append(str(problem))
    lines += [
        f"{kind}: {count - most} more; all are told by `mirasol data check DATASET ROOT --json`"
        for kind, count in counts.items()
        if count > most
    ]
    return lines


def add_data_arguments(parser: Any) -> None:
    """Declares what decides a data set of shapes and sounds: its seed and numbers of clips."""
    parser.add_argument("--seed", type=int, default=0, help="seed of the data: the same one gives the same files")
    parser.add_argument("--train", type=int, default=2400, help="number of training clips")
    parser.add_argument("--validation", type=int, default=100, help="number of validation clips")
    parser.add_argument("--test", type=int, default=200, help="number of test clips")


def add_dataset_arguments(parser: Any) -> None:
    """Declares DATASET, ROOT and the options of data sets; `read_dataset_options` collects them."""
    parser.add_argument("dataset", metavar="DATASET", help="folder (your own data) or a data set of docs/datasets.md")
    parser.add_argument("root", metavar="ROOT", help="folder with its annotations and media")
    add_dataset_options(parser)


def add_dataset_options(parser: Any) -> None:
    """Declares the options of data sets, those of `mirasol.data.datasets.DatasetOptions`."""
    parser.add_argument("--annotations", type=str, help="folder of the annotation files, where it is not ROOT")
    parser.add_argument("--class-list", type=str, help="text file with one class name per line")
    parser.add_argument("--prompt", type=str, help="prompt of examples without a question of their own")
    parser.add_argument(
        "--targets", type=str, default="all", metavar="all|one", help="all labels of a clip, or one at random"
    )
    parser.add_argument("--pattern", type=str, help='name of media files without extension, e.g. "{id}_{start:06d}"')


def read_dataset_options(chosen: Any) -> Any:
    """The data set's `DatasetOptions` among parsed arguments. Raises UserError for an unknown choice."""
    from mirasol.data.datasets import DatasetOptions

    if chosen.targets not in ("all", "one"):
        raise UserError(f"--targets {chosen.targets}: choose all or one")
    return DatasetOptions(chosen.annotations, chosen.class_list, chosen.prompt, chosen.targets, chosen.pattern)

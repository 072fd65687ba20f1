"""What several commands share: checks of arguments, and the options of data sets."""

from __future__ import annotations

import contextlib
import gc
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mirasol.errors import UserError, quote_text

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from mirasol.config.recipe import DatasetOptions
    from mirasol.data.datasets.contract import Problem

    # Makes the parser of a subcommand from its description.
    MakeParser = Callable[[str], ArgumentParser]


def check_positive_options(options: Namespace, *names: str) -> None:
    """Raises UserError for a named option that is given and below 1."""
    for name in names:
        if options[name] is not None:
            check_positive(f"--{name.replace('_', '-')}", options[name])


def check_positive(name: str, value: int) -> int:
    """Returns the value. Raises UserError if it is below 1."""
    if value < 1:
        raise UserError(f"{name} {value}: must be at least 1")
    return value


def check_utf8(name: str, text: str) -> str:
    """Returns the text. Raises UserError if the command line's bytes were not UTF-8: they arrive as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"its character {error.start + 1}"
        raise UserError(f"{name} {quote_text(text)}: not UTF-8 text ({where}): set the terminal to UTF-8") from error
    return text


@contextlib.contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """No garbage collection inside the context. Imports make some hundred thousand objects that stay: to look through
    them again and again is a quarter of the time that importing PyTorch takes."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def check_device(name: str) -> str:
    """Returns the device's name; for `auto` that of a CUDA GPU, else Apple's, else the CPU's. Raises UserError if
    PyTorch cannot compute there."""
    import torch

    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        return "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available here: use auto or cpu") from error
    return name


def check_no_results(path: str | Path) -> Path:
    """Returns the path. Raises UserError if it is a file or a folder with anything in it."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: already exists: give another folder, because nothing is overwritten")
    return path


def check_run_folder(path: Path) -> None:
    """Raises UserError if the folder is not that of a run."""
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"{path}: not the folder of a run: it has no recipe.yaml")


def make_folder(path: Path) -> None:
    """Makes the folder before the work begins. Raises UserError if it cannot be made or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot create this folder ({error.strerror}): give another one") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{path}: no permission to write to this folder: give another one")


def format_problems(problems: Iterable[Problem], most: int = 20) -> list[str]:
    """A line for each problem of a data set, up to `most` of each kind, and one for the rest of each kind."""
    lines, counts = [], Counter()
    for problem in problems:
        counts[problem.kind] += 1
        if counts[problem.kind] <= most:
            lines.append(str(problem))
    lines += [
        f"{kind}: {count - most} more: run `mirasol data check DATASET ROOT --json` for the full list"
        for kind, count in counts.items()
        if count > most
    ]
    return lines


def add_data_arguments(parser: ArgumentParser) -> None:
    """Declares what determines a data set of shapes and sounds: its seed and numbers of clips."""
    parser.add_argument("--seed", type=int, default=0, help="seed of the data: the same seed gives the same files")
    parser.add_argument("--train", type=int, default=2400, help="number of training clips")
    parser.add_argument("--validation", type=int, default=100, help="number of validation clips")
    parser.add_argument("--test", type=int, default=200, help="number of test clips")


def add_dataset_arguments(parser: ArgumentParser) -> None:
    """Declares DATASET, ROOT and the options of data sets; `read_dataset_options` collects them."""
    parser.add_argument("dataset", metavar="DATASET", help="folder (your own data) or a data set of docs/datasets.md")
    parser.add_argument("root", metavar="ROOT", help="folder with its annotations and media")
    add_dataset_options(parser)


def add_dataset_options(parser: ArgumentParser) -> None:
    """Declares the options of data sets, those of `mirasol.config.recipe.DatasetOptions`."""
    parser.add_argument("--annotations", type=str, help="folder of the annotation files if it is not ROOT")
    parser.add_argument("--class-list", type=str, help="text file with one class name per line")
    parser.add_argument("--prompt", type=str, help="prompt of examples that have no question")
    parser.add_argument(
        "--targets", type=str, default="all", metavar="all|one", help="all labels of a clip, or one at random"
    )
    parser.add_argument("--pattern", type=str, help='name of media files without extension, e.g. "{id}_{start:06d}"')


def read_dataset_options(chosen: Namespace) -> DatasetOptions:
    """The data set's options among parsed arguments. Raises UserError for an unknown choice, and for a prompt that is
    not UTF-8."""
    from mirasol.config.recipe import DatasetOptions

    if chosen.targets not in ("all", "one"):
        raise UserError(f"--targets {chosen.targets}: choose all or one")
    if chosen.prompt is not None:
        check_utf8("--prompt", chosen.prompt)
    return DatasetOptions(chosen.annotations, chosen.class_list, chosen.prompt, chosen.targets, chosen.pattern)

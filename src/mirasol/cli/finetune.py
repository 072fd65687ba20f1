"""`mirasol finetune`: a model for one's own clips, from a folder to a measured checkpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from mirasol.cli.common import MakeParser

HELP = "fine-tune a checkpoint on a folder of your own clips, and measure it"
DESCRIPTION = """Fine-tunes a checkpoint on a folder of clips: finds out how they are labelled, chooses a recipe by
documented rules, trains it, and evaluates it beside the checkpoint it began with. The same command continues an
interrupted fine-tuning.

Labels are folders named after classes (dog bark/a.mp4, also below train/, validation/ and test/), a caption next to
each clip (a.txt or a.json), one table (labels.csv with the columns file,target), or train, validation and test as
.jsonl or .csv. Keys of the recipe may be given as KEY=VALUE.

  mirasol finetune data/mine
  mirasol finetune data/mine --minutes 10
  mirasol finetune data/mine --from runs/base --epochs 20 --output runs/mine optimizer.learning_rate=1e-4"""

# The options that are not keys of a recipe.
OWN = ("--from", "--output", "--minutes", "--epochs")


def add_arguments(parser: ArgumentParser, make: MakeParser) -> None:
    """Declares the arguments."""
    parser.add_argument("data", metavar="FOLDER", help="your clips and their labels")
    parser.add_argument(
        "changes", metavar="KEY=VALUE", nargs="*", type=str, help="keys of the recipe (docs/training.md)"
    )
    parser.add_argument("--from", dest="start", type=str, default="tiny", metavar="CHECKPOINT", help="where to begin")
    parser.add_argument("--output", type=str, help="folder for everything; runs/finetune/NAME of the folder by default")
    parser.add_argument("--minutes", type=float, help="time to train; decoding and evaluation come on top")
    parser.add_argument("--epochs", type=int, help="how often each example is shown")


def run(options: Namespace) -> None:
    """Fine-tunes. Prints the folder of the best checkpoint."""
    from mirasol.errors import UserError
    from mirasol.finetune.settings import Settings

    overrides = [*options.changes, *(options.get("overrides") or [])]
    for word in options.changes:
        if "=" not in word:
            raise UserError(f"{word}: give one FOLDER, and keys of the recipe as KEY=VALUE")
    data = Path(options.data)
    output = options.output
    if output is None:
        output = str(Path("runs") / "finetune" / (data.resolve().name or "clips"))
    settings = Settings(options.data, options.start, output, options.minutes, options.epochs, tuple(overrides))
    try:
        is_folder, is_there = data.is_dir(), data.exists()
    except OSError as error:
        raise UserError(f"{data}: {error.strerror}") from error
    if not is_folder:
        raise UserError(f"{data}: {'is a file: give its folder' if is_there else 'no such folder of clips'}")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "finetune runs in one process: start it without torchrun, and give the recipe.yaml that it saves to "
            "`torchrun … -m mirasol.cli train` for several"
        )

    import mirasol.auto  # noqa: F401 - a resumed run loads its processor through the Auto classes
    from mirasol.console import make_console
    from mirasol.finetune.finetune import finetune

    sys.stdout.write(f"{finetune(settings, make_console())}\n")

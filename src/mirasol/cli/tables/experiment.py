"""`mirasol experiment`: a table on real recordings, by one command."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mirasol.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from mirasol.cli.common import MakeParser

FOLDS, SEEN_HEARD = ("esc10", "fsdd"), "seen_heard"
NAMES = (*FOLDS, SEEN_HEARD)
HELP = "train and score on real recordings: one table a command"
DESCRIPTION = """Trains on real recordings that you have, fold by fold, scores what was held out beside baselines of
scikit-learn, and writes the table with intervals. The same command continues an interrupted experiment.

  mirasol experiment esc10 --data ESC-10 --output runs/esc10      ten environmental sounds, five folds
  mirasol experiment fsdd --data recordings --output runs/fsdd    spoken digits, leave one speaker out
  mirasol experiment seen_heard --data recordings --output runs/both   the same speech beside handwritten digits
  mirasol experiment esc10 --data ESC-10 --output runs/tune --groups 1 --tune stages.classes.steps=300

Keys of the recipe (recipes/real/NAME.yaml) may be given as KEY=VALUE."""
OWN = ("--data", "--output", "--from", "--groups", "--tune")
FLAGS = ("--tune",)  # of these, options without a value


def add_arguments(parser: ArgumentParser, make: MakeParser) -> None:
    """Declares the arguments."""
    parser.add_argument("name", metavar="NAME", type=str, help=f"which experiment: {', '.join(NAMES)}")
    parser.add_argument("changes", metavar="KEY=VALUE", nargs="*", type=str, help="keys of the recipe")
    parser.add_argument("--data", type=str, required=True, metavar="FOLDER", help="the recordings, as published")
    parser.add_argument("--output", type=str, required=True, metavar="DIR", help="folder for everything")
    parser.add_argument(
        "--from",
        dest="starts",
        type=str,
        default="scratch,tiny",
        help="where trainings begin: scratch, checkpoints; none: baselines",
    )
    parser.add_argument("--groups", type=str, default="", help="only these folds or speakers: 1,2")
    parser.add_argument(
        "--tune", action="store_true", help="put the test fold aside and score the next one, to choose a recipe by"
    )


def run(options: Namespace) -> None:
    """Runs what is left of the experiment. Prints its folder."""
    overrides = [*options.changes, *(options.get("overrides") or [])]
    if options.name not in NAMES:
        raise UserError(f"experiment {options.name}: choose {', '.join(NAMES)}")
    for word in options.changes:
        if "=" not in word:
            raise UserError(f"{word}: give one NAME, and keys of the recipe as KEY=VALUE")
    starts, groups = _split_list(options.starts), _split_list(options.groups)
    if options.name == SEEN_HEARD and (groups or options.tune):
        raise UserError("seen_heard has one split of its own: leave out --groups and --tune")
    if starts == ("none",) and options.name in FOLDS:
        starts = ()  # baselines alone
    elif not starts or "none" in starts:
        raise UserError(
            f"--from {options.starts}: name scratch or a checkpoint, or none alone for the baselines of folds"
        )

    import mirasol.auto  # noqa: F401 - a resumed run loads its processor through the Auto classes
    from mirasol.console import make_console
    from mirasol.experiments.folder import Settings
    from mirasol.experiments.folds import FoldsExperiment
    from mirasol.experiments.seen_heard import SeenHeardExperiment

    settings = Settings(options.name, options.data, options.output, starts, groups, options.tune, tuple(overrides))
    kind = SeenHeardExperiment if options.name == SEEN_HEARD else FoldsExperiment
    sys.stdout.write(f"{kind(settings, make_console()).run()}\n")


def _split_list(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))

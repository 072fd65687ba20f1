"""`mirasol data`: data sets on disk."""

import time
from typing import Any

from mirasol.commands.common import add_data_arguments

HELP = "make data sets (data synthesize)"
DESCRIPTION = "Makes data sets on disk."
SYNTHESIZE = """Renders shapes and sounds: real mp4 files and questions about them, deterministic in the seed.

  mirasol data synthesize data/shapes --seed 7 --train 0 --validation 0 --test 100"""


def add_arguments(parser: Any, make: Any) -> None:
    """Declares the arguments of `synthesize`."""
    commands = parser.add_subcommands(required=True, dest="action", metavar="ACTION", title="actions")
    synthesize = make(SYNTHESIZE)
    commands.add_subcommand("synthesize", synthesize, help="render shapes and sounds to mp4 files with questions")
    synthesize.add_argument("directory", metavar="DIR", help="new folder for the data set")
    add_data_arguments(synthesize)
    synthesize.add_argument("--workers", type=int, default=0, help="processes that render; 0 is one per core")


def run(options: Any) -> None:
    """Renders the data set."""
    from mirasol.console import console, cores, progress
    from mirasol.data.synthetic import synthesize

    chosen, out, began = options.synthesize, console(), time.monotonic()
    with progress(out, "Rendering", "clips") as report:
        synthesize(
            chosen.directory,
            seed=chosen.seed,
            train=chosen.train,
            validation=chosen.validation,
            test=chosen.test,
            workers=chosen.workers or cores(),
            progress=report,
        )
    total = chosen.train + chosen.validation + chosen.test
    out.print(f"{chosen.directory}: {total} clips in {time.monotonic() - began:.0f} s")

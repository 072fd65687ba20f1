"""`mirasol data`: data sets on disk."""

import json
import sys
import time
from typing import Any

from mirasol.commands.common import add_data_arguments, add_source_arguments

HELP = "make and check data sets (data synthesize, data check)"
DESCRIPTION = "Makes data sets on disk, and checks those that are there."
SYNTHESIZE = """Renders shapes and sounds: real mp4 files and questions about them, deterministic in the seed.

  mirasol data synthesize data/shapes --seed 7 --train 0 --validation 0 --test 100
  mirasol data synthesize data/captions --kind captions --train 1000   for pretraining: images, captions or sounds"""

CHECK = """Reads all annotations of a data set and opens the media: counts per split and type beside the published ones,
missing and undecodable files, files without audio, durations, duplicates. Ends with code 1 where something is wrong.
SOURCE is folder (your own: SPLIT.jsonl or SPLIT.csv beside media files) or the name of a public data set, which
docs/datasets.md lists; ROOT is the folder where its annotations and media lie.

  mirasol data check folder data/shapes
  mirasol data check msrvtt_qa data/msrvtt --split test --json"""


def add_arguments(parser: Any, make: Any) -> None:
    """Declares the arguments of `synthesize` and `check`."""
    commands = parser.add_subcommands(required=True, dest="action", metavar="ACTION", title="actions")
    synthesize = make(SYNTHESIZE)
    commands.add_subcommand("synthesize", synthesize, help="render shapes and sounds to mp4 files with questions")
    synthesize.add_argument("directory", metavar="DIR", help="new folder for the data set")
    add_data_arguments(synthesize)
    synthesize.add_argument(
        "--kind", type=str, default="questions", help="questions, or for pretraining: images, captions, sounds"
    )
    synthesize.add_argument("--workers", type=int, default=0, help="processes that render; 0 is one per core")
    check = make(CHECK)
    commands.add_subcommand("check", check, help="read a data set's annotations and open its media")
    add_source_arguments(check)
    check.add_argument("--split", type=str, help="only this split")
    check.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    check.add_argument("--skip-media", action="store_true", help="look which media files are there, but open none")
    check.add_argument("--workers", type=int, default=0, help="threads that open media; 0 is one per core")


def run(options: Any) -> None:
    """Does the action."""
    {"synthesize": _synthesize, "check": _check}[options.action](options[options.action])


def _check(chosen: Any) -> None:
    from mirasol.commands.common import source_options
    from mirasol.console import console, cores, progress
    from mirasol.data.checking import check_source, table

    with progress(console(), "Opening", "files") as report:
        found = check_source(
            chosen.source,
            chosen.root,
            chosen.split,
            source_options(chosen),
            open_media=not chosen.skip_media,
            workers=chosen.workers or cores(),
            progress=report,
        )
    sys.stdout.write((json.dumps(found.to_dict()) if chosen.json else table(found)) + "\n")
    if not found.good:
        raise SystemExit(1)


def _synthesize(chosen: Any) -> None:
    from mirasol.console import console, cores, progress
    from mirasol.data.synthetic import synthesize

    out, began = console(), time.monotonic()
    with progress(out, "Rendering", "clips") as report:
        synthesize(
            chosen.directory,
            seed=chosen.seed,
            train=chosen.train,
            validation=chosen.validation,
            test=chosen.test,
            kind=chosen.kind,
            workers=chosen.workers or cores(),
            progress=report,
        )
    total = chosen.train + chosen.validation + chosen.test
    out.print(f"{chosen.directory}: {total} clips in {time.monotonic() - began:.0f} s")

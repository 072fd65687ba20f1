"""`mirasol demo`: everything once, from rendering to the report."""

from typing import Any

from mirasol.cli.common import add_data_arguments

HELP = "render data, train, evaluate, ask, and write a report"
DESCRIPTION = """The whole path once, on a CPU: renders shapes and sounds to mp4 files, trains the tiny model on them,
evaluates it on clips it has never seen, asks it about one of them, and writes a report to look at.

An interrupted demo goes on where it stopped when it is started again. A finished one is never overwritten."""


def add_arguments(parser: Any, make: Any) -> None:
    """Declares the arguments."""
    parser.add_argument("--output", type=str, default="runs/demo", help="folder for everything the demo makes")
    parser.add_argument(
        "--recipe", type=str, help="what to train, demo.yaml of this package by default; output and data.root are set"
    )
    add_data_arguments(parser)


def run(options: Any) -> None:
    """Runs the demo."""
    from mirasol.console import console
    from mirasol.demo import DemoSettings, run_demo

    settings = DemoSettings(
        options.output, options.recipe, options.seed, options.train, options.validation, options.test
    )
    run_demo(settings, console())

"""`mirasol export`: writes a run's model to a folder that others can load."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mirasol.cli.common import check_run_folder
from mirasol.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from mirasol.cli.common import MakeParser

HELP = "write a run's model as a transformers folder with a model card"
DESCRIPTION = """Writes the weights (safetensors), the processor with its tokenizer, and a model card with recipe, data
hashes, metrics and versions, from any checkpoint of a run.

  mirasol export runs/mine shared/mine               the finished model
  mirasol export runs/mine shared/early --step 500   the checkpoint after 500 steps
  mirasol export runs/mine shared/best --best        the checkpoint with the best validation"""


def add_arguments(parser: ArgumentParser, make: MakeParser) -> None:
    """Declares the arguments."""
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    parser.add_argument("out", metavar="DIR", help="new folder to write")
    parser.add_argument("--step", type=int, help="the checkpoint after STEP steps; by default the finished model")
    parser.add_argument("--best", action="store_true", help="the checkpoint with the best validation (keep_best)")
    parser.add_argument("--ema", type=bool, help="export the averaged weights or not; by default if the run keeps them")


def run(options: Namespace) -> None:
    """Exports; the last line on stdout is the folder."""
    if options.best and options.step is not None:
        raise UserError(f"--step {options.step} and --best: choose one of the two")
    check_run_folder(Path(options.run))

    from mirasol.training.export import export_run

    sys.stdout.write(f"{export_run(options.run, options.out, options.step, options.best, options.ema)}\n")

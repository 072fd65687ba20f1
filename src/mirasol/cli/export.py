"""`mirasol export`: a run becomes a folder that others can load."""

import sys
from typing import Any

HELP = "write a run's model as a transformers folder with a model card"
DESCRIPTION = """Writes the weights (safetensors), the processor with its tokenizer, and a model card with recipe, data
hashes, metrics and versions, from any checkpoint of a run.

  mirasol export runs/mine shared/mine               the finished model
  mirasol export runs/mine shared/early --step 500   as it was after 500 steps
  mirasol export runs/mine shared/best --best        the checkpoint with the best validation"""


def add_arguments(parser: Any, make: Any) -> None:
    """Declares the arguments."""
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    parser.add_argument("out", metavar="DIR", help="folder to write, which must not be there yet")
    parser.add_argument("--step", type=int, help="the checkpoint after so many steps; by default the finished model")
    parser.add_argument("--best", action="store_true", help="the checkpoint with the best validation (keep_best)")
    parser.add_argument("--ema", type=bool, help="whether averaged weights; by default where the run keeps them")


def run(options: Any) -> None:
    """Exports; the last line on stdout is the folder."""
    from mirasol.errors import UserError
    from mirasol.training.export import export_run

    if options.best and options.step is not None:
        raise UserError(f"--step {options.step} and --best: choose one of the two")
    sys.stdout.write(f"{export_run(options.run, options.out, options.step, options.best, options.ema)}\n")

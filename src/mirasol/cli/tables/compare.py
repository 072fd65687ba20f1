"""`mirasol compare`: the paired difference of two results on the same questions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from mirasol.cli.common import MakeParser

HELP = "compare two results question by question"
DESCRIPTION = """Compares two results on the questions they share: the difference of their accuracies per type, its 95 %
interval (paired bootstrap over videos) and McNemar's exact test. FIRST and SECOND are folders written by `mirasol
evaluate` or `mirasol score` with --output, or their predictions.jsonl.

  mirasol compare results/baseline results/mine"""


def add_arguments(parser: ArgumentParser, make: MakeParser) -> None:
    """Declares the arguments."""
    parser.add_argument("first", metavar="FIRST", help="folder with predictions.jsonl, or the file")
    parser.add_argument(
        "second", metavar="SECOND", help="the same for the other result: differences are SECOND - FIRST"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(options: Namespace) -> None:
    """Compares and prints."""
    from mirasol.evaluation.compare import compare_results

    comparison = compare_results(Path(options.first), Path(options.second))
    sys.stdout.write((json.dumps(comparison.to_dict()) if options.json else comparison.format_table()) + "\n")

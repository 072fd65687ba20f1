"""`mirasol evaluate`: a checkpoint's score on a data set, beside chance and controls."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HELP = "score a checkpoint on a data set, beside chance and controls"
DESCRIPTION = """Asks a checkpoint every question of a data set and scores its answers by exact match (lower case,
punctuation and articles aside). Beside the score stand chance, and controls: the same with no video, no audio, neither,
and with the audio shifted against the video.

  mirasol evaluate tiny data/shapes
  mirasol evaluate runs/demo data/shapes --split validation --output results/demo"""


def add_arguments(parser: Any, make: Any) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="tiny (shipped), a run's folder or a checkpoint folder"
    )
    parser.add_argument("data", metavar="DATA", help="folder with SPLIT.jsonl and its media files")
    parser.add_argument("--split", type=str, default="test", help="which jsonl file of the folder")
    parser.add_argument("--output", type=str, help="new folder for metrics.json and answers.jsonl")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--skip-controls", action="store_true", help="score only the untouched clips")
    parser.add_argument("--clips-per-batch", type=int, default=16, help="changes speed and memory, not answers")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="longest answer, in tokens")
    parser.add_argument("--device", type=str, default="cpu", help="where to compute, e.g. cuda")


def run(options: Any) -> None:
    """Evaluates, prints, and writes results where asked to."""
    from mirasol.checkpoint import load_checkpoint
    from mirasol.commands.common import check_device, check_no_results, check_positive, make_folder
    from mirasol.console import console
    from mirasol.data.example import group_by_clip
    from mirasol.data.folder import read_examples
    from mirasol.evaluation.protocol import decode_and_evaluate, write_results
    from mirasol.training.loader import ClipCache

    for name in ("clips_per_batch", "max_new_tokens"):
        check_positive(f"--{name.replace('_', '-')}", options[name])
    output = check_no_results(options.output) if options.output else None
    root, out = Path(options.data), console()
    examples = read_examples(root, options.split)
    loaded = load_checkpoint(options.checkpoint, check_device(options.device))
    if output is not None:
        make_folder(output)
    with tempfile.TemporaryDirectory(prefix="mirasol-clips-") as folder:
        cache = ClipCache(Path(folder), root, loaded.model.config.media_settings())
        results = decode_and_evaluate(
            loaded.model, loaded.processor, group_by_clip(examples), root, cache, out,
            controls=not options.skip_controls, clips_per_batch=options.clips_per_batch,
            max_new_tokens=options.max_new_tokens,
        )  # fmt: skip
    for clip in results.test.unusable:
        out.print(f"left out, {clip.questions} questions: {clip.media}: {clip.reason}", markup=False)
    if output is not None:
        write_results(output, results)
        out.print(f"written: {output / 'metrics.json'}, {output / 'answers.jsonl'}")
    if options.json:
        sys.stdout.write(json.dumps(results.to_dict()) + "\n")
    else:
        sys.stdout.write(results.table() + "\n")

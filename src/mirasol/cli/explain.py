"""`mirasol explain`: where an answer comes from, as a page, figures and numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirasol.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from mirasol.checkpoint import Loaded
    from mirasol.cli.common import MakeParser
    from mirasol.explain.compute import Explanation

HELP = "show where the answer to a question comes from"
DESCRIPTION = """Answers a question about a media file and shows what the model did: where each token of the answer
looks, what the Combiner reads of which chunk, what a memory holds, what the model expected to see next, and what really
mattered: how much less likely the answer is without each chunk's picture or sound.

Writes one page that needs no other file (docs/explain.md), and prints the same in words.

  mirasol explain tiny clip.mp4 "which shape is seen last?"
  mirasol explain tiny clip.mp4 "which shape is seen last?" --chunk 3 --output last.html --figures pdf
  mirasol explain runs/demo clip.mp4 "what plays?" --answer "a bell" --output bell.html --json > bell.json"""


def add_arguments(parser: ArgumentParser, make: MakeParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="tiny (shipped), a run's folder or a checkpoint folder"
    )
    parser.add_argument("file", metavar="FILE", help="a common video or sound file")
    parser.add_argument("question", metavar="QUESTION", help="the question, in quotes")
    parser.add_argument("--answer", type=str, help="explain this answer instead of the model's own")
    parser.add_argument("--chunk", type=int, metavar="N", help="chunk to look at closely, from 1; the decisive one")
    parser.add_argument("--output", type=str, default="explain.html", metavar="PAGE", help="file of the page")
    parser.add_argument("--figures", type=str, metavar="pdf|png", help="also write figures, into PAGE-figures/")
    parser.add_argument("--json", action="store_true", help="print all numbers as one JSON object instead of words")
    parser.add_argument("--start", type=float, help="second of the file where the clip begins")
    parser.add_argument("--end", type=float, help="second of the file where the clip ends")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer, in tokens")
    parser.add_argument("--device", type=str, default="auto", help="where to compute: auto, cpu, cuda or mps")


def run(options: Namespace) -> None:
    """Explains, writes the page, prints."""
    from mirasol.checkpoint import find_checkpoint
    from mirasol.cli.common import check_device, check_positive, check_utf8, pause_garbage_collection

    check_positive("--max-new-tokens", options.max_new_tokens)
    for name, text in (("QUESTION", options.question), ("--answer", options.answer)):
        if text is not None and not check_utf8(name, text).strip():
            raise UserError(f"{name} {text!r}: is empty: give its words in quotes")
    find_checkpoint(options.checkpoint)
    page, folder = _find_outputs(options.output, options.figures)

    from mirasol.media.isolation.decoders import start_decoder

    start_decoder()  # is ready by the time the checkpoint is loaded
    with pause_garbage_collection():
        from mirasol.checkpoint import load_answerer
        from mirasol.explain import explain

        loaded = load_answerer(options.checkpoint, check_device(options.device))
    extractor = loaded.processor.feature_extractor
    clip = extractor.read(options.file, options.start, options.end, threads=0)
    for note in clip.notes:
        sys.stderr.write(f"{options.file}: {note}\n")
    _check_chunk(options.chunk, clip.timeline.num_chunks)
    explanation = explain(
        loaded.model, loaded.processor, clip, options.question,
        answer=options.answer, max_new_tokens=options.max_new_tokens,
    )  # fmt: skip
    _write(explanation, loaded, options, page, folder)


def _check_chunk(number: int | None, chunks: int) -> None:
    """Raises UserError for a chunk that the clip does not have."""
    if number is not None and not 1 <= number <= chunks:
        raise UserError(f"--chunk {number}: the clip has chunks 1 to {chunks}: give one of these")


def _find_outputs(output: str, figures: str | None) -> tuple[Path, Path]:
    """The page's file and the figures' folder. Raises UserError where something is in their place, or the page's folder
    cannot be written to."""
    from mirasol.cli.common import check_no_results, make_folder

    page = Path(output)
    if page.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {output}: is the page, which is HTML: give a name that ends in .html"
                        " (--json prints the numbers, --figures writes pictures)")  # fmt: skip
    if page.exists():
        raise UserError(f"{page}: already exists: give another file with --output, because nothing is overwritten")
    folder = page.with_name(f"{page.stem}-figures")
    if figures is not None:
        from mirasol.evaluation.figures import check_figure_format

        check_figure_format(figures)
        check_no_results(folder)
    make_folder(page.parent)
    return page, folder


def _write(explanation: Explanation, loaded: Loaded, options: Namespace, page: Path, folder: Path) -> None:
    """Writes page and figures; prints the numbers or words."""
    from mirasol.evaluation.figures import write_figures
    from mirasol.evaluation.report import name_checkpoint
    from mirasol.explain.describe import describe_explanation, find_chunk, list_in_words
    from mirasol.explain.page import render_page
    from mirasol.files import write_file_atomically

    chunk = find_chunk(explanation, options.chunk)
    numbers = describe_explanation(explanation, chunk, each_token=options.json)
    record = {"file": options.file, "checkpoint": options.checkpoint, **numbers}
    text = render_page(
        explanation, chunk, file=Path(options.file).name, checkpoint=name_checkpoint(loaded.folder),
        facts=_list_facts(loaded),
    )  # fmt: skip
    written = []
    if options.figures is not None:
        from mirasol.explain.figures import draw_figures

        written = write_figures(folder, draw_figures(explanation, chunk), options.figures)
    write_file_atomically(page, text)
    if options.json:
        # A file's name need not be UTF-8: its bytes are written as escapes.
        shown = json.dumps(record, ensure_ascii=False, indent=1).encode("utf-8", errors="backslashreplace").decode()
        sys.stdout.write(f"{shown}\n")
    else:
        sys.stdout.write("".join(f"{line}\n" for line in list_in_words(record)))
    for file in (*written, page):
        (sys.stderr if options.json else sys.stdout).write(f"written: {file}\n")


def _list_facts(loaded: Loaded) -> dict[str, Any]:
    """What the page's end lists."""
    import torch

    import mirasol
    from mirasol.checkpoint import WEIGHTS
    from mirasol.files import hash_file

    return {
        "checkpoint hash": hash_file(loaded.folder / WEIGHTS)[:10],
        "device": str(loaded.model.device),
        "mirasol": mirasol.__version__,
        "torch": torch.__version__,
    }

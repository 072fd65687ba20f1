"""`mirasol ask`: a question about one media file."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from mirasol.checkpoint import Loaded
    from mirasol.cli.common import MakeParser
    from mirasol.media.clip import Clip

HELP = "ask a question about a video or sound file"
DESCRIPTION = """Answers a question about what is seen and heard in a media file.

The answer is streamed to stdout as it is generated; notes about the file go to stderr.

  mirasol ask tiny clip.mp4 "what colour is the circle?"
  mirasol ask runs/demo clip.mp4 "which sound comes after the bell?" --start 2 --end 6 --json"""


def add_arguments(parser: ArgumentParser, make: MakeParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="tiny (shipped), a run's folder or a checkpoint folder"
    )
    parser.add_argument("file", metavar="FILE", help="a common video or sound file")
    parser.add_argument("question", metavar="QUESTION", help="the question, in quotes")
    parser.add_argument("--start", type=float, help="second of the file where the clip begins")
    parser.add_argument("--end", type=float, help="second of the file where the clip ends")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer, in tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the bare answer")
    parser.add_argument("--device", type=str, default="cpu", help="where to compute, e.g. cuda")


def run(options: Namespace) -> None:
    """Reads, answers, prints."""
    from mirasol.checkpoint import find_checkpoint, load_checkpoint
    from mirasol.cli.common import check_device, check_positive, check_utf8

    check_positive("--max-new-tokens", options.max_new_tokens)
    check_utf8("QUESTION", options.question)
    find_checkpoint(options.checkpoint)

    from mirasol.media.isolation.decoders import start_decoder

    start_decoder()  # is ready by the time the checkpoint is loaded

    from mirasol.evaluation.answer import AnswerStreamer, answer_clips
    from mirasol.evaluation.predictions import EMPTY_ANSWER

    began = time.perf_counter()
    loaded = load_checkpoint(options.checkpoint, check_device(options.device))
    loaded_at = time.perf_counter()
    extractor = loaded.processor.feature_extractor
    clip = extractor.read(options.file, options.start, options.end, threads=0)
    tensors = extractor.tensors(clip)
    read_at = time.perf_counter()
    _print_notes(loaded, clip, options.file)
    streamer = None if options.json else AnswerStreamer(loaded.processor, _print_piece)
    prompts = [[options.question]]
    [[answer]] = answer_clips(
        loaded.model, loaded.processor, [tensors], prompts, max_new_tokens=options.max_new_tokens, streamer=streamer
    )
    seconds = {
        "load": loaded_at - began,
        "read": read_at - loaded_at,
        "answer": time.perf_counter() - read_at,
    }
    if not options.json:
        sys.stdout.write("\n" if answer else f"{EMPTY_ANSWER}\n")
        return
    record = {
        "answer": answer,
        "question": options.question,
        "file": options.file,
        "start": clip.timeline.start,
        "end": clip.timeline.end,
        "chunks": clip.timeline.num_chunks,
        "notes": list(clip.notes),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    # A file's name need not be UTF-8: its bytes are written as escapes.
    text = json.dumps(record, ensure_ascii=False).encode("utf-8", errors="backslashreplace").decode()
    sys.stdout.write(text + "\n")


def _print_notes(loaded: Loaded, clip: Clip, file: str) -> None:
    """Writes to stderr what limits the answer: a checkpoint that was never trained, irregularities of the file."""
    from mirasol.cli.init import REPORT

    if (loaded.folder / REPORT).is_file():
        sys.stderr.write(f"{loaded.folder}: made by `mirasol init` and not trained yet: its answers are meaningless\n")
    for note in clip.notes:
        sys.stderr.write(f"{file}: {note}\n")
    sys.stderr.flush()


def _print_piece(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

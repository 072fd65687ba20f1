"""`mirasol watch`: questions about a camera, an address, a stream of bytes or a file, while it plays."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mirasol.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from mirasol.app.live.reader import LiveReader
    from mirasol.app.live.sitting import Sitting
    from mirasol.app.live.source import LiveSource
    from mirasol.app.live.watcher import Watcher
    from mirasol.checkpoint import Doubt, Loaded
    from mirasol.cli.common import MakeParser

HELP = "ask questions about a camera, a stream or a file while it plays"
DESCRIPTION = """Watches a source and answers questions about what has been seen and heard so far. An answer is printed
when it changes: the second, the answer, its probability (as `mirasol ask` has it) and the latency, from the arrival of
the newest picture or sound to the first token. Notes and, at the end or after Ctrl-C, a summary go to stderr.

SOURCE is a file (played in real time, or with --fast as fast as it can be read), a camera (/dev/video0), a screen (:0),
an address (rtsp, rtmp, http, https, also HLS, udp, tcp, srt where FFmpeg has it), or - for a stream on standard input.

A source that breaks off is tried again. A machine that is slower than a source that plays drops whole chunks (the
oldest of those that wait), counts them, and the model sees them as missing. docs/live.md has all rules.

  mirasol watch tiny clip.mp4 "which shape is seen?" --fast
  mirasol watch runs/demo rtsp://camera.local/main "what is heard?" "who is there?" --every 2 --record events.jsonl
  ffmpeg -i … -f mpegts - | mirasol watch runs/demo - "what happens?" --json"""


def add_arguments(parser: ArgumentParser, make: MakeParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="tiny (shipped), a run's folder or a checkpoint folder"
    )
    parser.add_argument("source", metavar="SOURCE", help="a file, /dev/video0, an address, or - for standard input")
    parser.add_argument("question", metavar="QUESTION", nargs="*", help="each question in quotes")
    parser.add_argument("--candidates", type=str, metavar="A|B|C", help="score these answers, instead of a free one")
    parser.add_argument("--every", type=float, default=1.0, help="seconds of the source between askings")
    parser.add_argument("--fast", action="store_true", help="read a file as fast as it goes; nothing is dropped")
    parser.add_argument("--window", type=int, help="chunks that are remembered; default: as many as a clip may have")
    parser.add_argument("--chunk-seconds", type=float, help="length of a chunk; default: the checkpoint's")
    parser.add_argument("--most-waiting", type=int, default=4, help="chunks that may wait before one is dropped")
    parser.add_argument("--retries", type=int, default=5, help="how often a source that is gone is tried again")
    parser.add_argument("--stall", type=float, default=10.0, help="seconds of silence after which a source is gone")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer, in tokens")
    parser.add_argument("--json", action="store_true", help="print JSON objects, one a line")
    parser.add_argument("--record", type=str, metavar="FILE", help="write all that happens to this file of JSON lines")
    parser.add_argument("--device", type=str, default="auto", help="where to compute: auto, cpu, cuda or mps")


def run(options: Namespace) -> None:
    """Watches, answers, prints."""
    from mirasol.app.live.source import find_source
    from mirasol.checkpoint import find_checkpoint, read_doubt
    from mirasol.cli.ask import split_candidates

    check_options(options)
    candidates = split_candidates(options.candidates)
    source = find_source(options.source)
    if options.fast and source.kind != "file":
        raise UserError(f"--fast: {source} is not a file, and comes as fast as it comes: leave --fast out")
    doubt = read_doubt(find_checkpoint(options.checkpoint))
    with ExitStack() as opened:
        record = opened.enter_context(open_record(options.record)) if options.record is not None else None
        reader = opened.enter_context(open_reader(source, options))
        reader.start()  # is ready by the time the checkpoint is loaded
        loaded = load(options)
        watcher = make_watcher(loaded, options, candidates, doubt)
        teller = Teller(options, record)
        teller.begin(str(source), watcher, doubt)
        watch(reader, watcher, options, teller)


def check_options(options: Namespace) -> None:
    """Raises UserError for options that cannot be, and for questions that are none."""
    from mirasol.cli.common import check_positive, check_positive_options, check_utf8

    check_positive_options(options, "window", "most_waiting", "max_new_tokens")
    for name in ("every", "chunk_seconds", "stall"):
        value = options[name]
        if value is not None and not 0 < value < 1e6:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: must be a positive number of seconds")
    if options.retries:
        check_positive("--retries", options.retries)
    if not options.question:
        raise UserError("no question: give at least one in quotes")
    for number, question in enumerate(options.question, 1):
        if not check_utf8("QUESTION", question).strip():
            raise UserError(f"question {number} is empty: leave it out")
        if question in options.question[: number - 1]:
            raise UserError(f"question {number} is asked already: leave it out")


def open_record(path: str) -> IO[str]:
    """A new file for `--record`. Raises UserError where there is one, or it cannot be made."""
    try:
        return Path(path).open("x", encoding="utf-8", errors="backslashreplace")
    except FileExistsError as error:
        raise UserError(
            f"--record {path}: already exists: give another file, because nothing is overwritten"
        ) from error
    except OSError as error:
        raise UserError(f"--record {path}: cannot be written ({error.strerror}): give another file") from error


def open_reader(source: LiveSource, options: Namespace) -> LiveReader:
    """The reader of a source, with the settings of the checkpoint. Nothing is opened yet."""
    from mirasol.app.live.chunks import LiveSettings
    from mirasol.app.live.reader import LiveReader
    from mirasol.checkpoint import find_checkpoint, read_config
    from mirasol.config.media import MediaConfig

    media = MediaConfig(**read_config(find_checkpoint(options.checkpoint)).media_settings())
    if source.kind != "file" and options.chunk_seconds is None and media.chunk_seconds is None:
        raise UserError(f"{source}: has no end, and the checkpoint no length of a chunk: set --chunk-seconds")
    settings = LiveSettings(
        media,
        chunk_seconds=options.chunk_seconds,
        fast=options.fast,
        most_waiting=options.most_waiting,
        retries=options.retries,
        stall=options.stall,
    )
    if source.kind != "bytes":
        return LiveReader(source, settings)
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("SOURCE -: standard input is a terminal: pipe an mpegts, webm or mkv stream in")
    return LiveReader(source, settings, os.dup(sys.stdin.fileno()))


def load(options: Namespace) -> Loaded:
    """The checkpoint. Raises UserError also for a question that is too long for it."""
    from mirasol.cli.common import check_device, pause_garbage_collection

    with pause_garbage_collection():
        from mirasol.checkpoint import load_answerer

        loaded = load_answerer(options.checkpoint, check_device(options.device))
    loaded.processor.encode_text(options.question)
    return loaded


def make_watcher(loaded: Loaded, options: Namespace, candidates: tuple[str, ...], doubt: Doubt | None) -> Watcher:
    """The model that watches."""
    from mirasol.app.live.watcher import Watcher

    extractor = loaded.processor.feature_extractor
    window = options.window or extractor.num_chunks or extractor.max_chunks
    return Watcher(
        loaded,
        options.question,
        doubt,
        window=window,
        max_new_tokens=options.max_new_tokens,
        candidates=candidates,
    )


def watch(reader: LiveReader, watcher: Watcher, options: Namespace, teller: Teller) -> None:
    """Watches to the end of the source, or to Ctrl-C, which is a good end."""
    from mirasol.app.live.sitting import Sitting

    sitting = Sitting(reader, watcher, options.every, options.fast, teller.tell)
    stopped = False
    try:
        sitting.run()
    except KeyboardInterrupt:
        stopped = True
    teller.end(sitting, "stopped by Ctrl-C" if stopped else reader.ended)


class Teller:
    """Prints what happens, and writes it to the record."""

    def __init__(self, options: Namespace, record: IO[str] | None):
        self.options, self.record = options, record
        self.several = len(options.question) > 1

    def begin(self, source: str, watcher: Watcher, doubt: Doubt | None) -> None:
        """Says what limits the answers."""
        from mirasol.cli.ask import list_remarks

        options = self.options
        remarks = list_remarks(watcher.loaded, options.checkpoint, doubt, None)
        for remark in remarks:
            write_line(sys.stderr, remark)
        settings = {"every": options.every, "window": watcher.stream.window, "fast": options.fast}
        self._write_record("start", {"source": source, "questions": options.question, **settings, "remarks": remarks})

    def tell(self, kind: str, facts: dict[str, Any]) -> None:
        """Something has happened: see `mirasol.app.live.sitting.Tell`."""
        self._write_record(kind, facts)
        if kind == "note":
            write_line(sys.stderr, f"{format_time(facts['time'])}  {facts['note']}")
        if kind == "answer" and facts["changed"]:
            if self.options.json:
                write_line(sys.stdout, to_json({"event": kind, **facts}))
            else:
                write_line(sys.stdout, self._format_answer(facts))

    def _format_answer(self, facts: dict[str, Any]) -> str:
        from mirasol.cli.ask import format_probability
        from mirasol.evaluation.predictions import EMPTY_ANSWER

        question = f"{facts['question']}  " if self.several else ""
        doubt = ", not sure" if facts["not_sure"] else ""
        answer = facts["answer"] or EMPTY_ANSWER
        chance = format_probability(facts["probability"])
        return f"{format_time(facts['time'])}  {question}{answer}  ({chance}{doubt}; after {facts['latency']:.2f} s)"

    def end(self, sitting: Sitting, reason: str | None) -> None:
        """The summary."""
        from mirasol.app.live.reader import describe_counts

        counts, watcher = sitting.reader.counts, sitting.watcher
        newest = watcher.newest
        facts = {
            "time": 0.0 if newest is None else newest.end,
            "ended": reason or "the source has ended",
            "counts": vars(counts),
            "asked": sitting.asked,
            "changes": sitting.changes,
            "longest_latency": round(sitting.worst_latency, 4),
            "state_bytes": watcher.state_bytes,
        }
        self._write_record("end", facts)
        if self.options.json:
            write_line(sys.stdout, to_json({"event": "end", **facts}))
        lines = [
            f"{facts['ended']}: watched {facts['time']:.1f} s in {counts.chunks} chunks, asked {sitting.asked} times, "
            f"longest latency {sitting.worst_latency:.2f} s, {watcher.state_bytes / 2**20:.2f} MiB of state",
            *describe_counts(counts),
        ]
        for line in lines:
            write_line(sys.stderr, line)

    def _write_record(self, kind: str, facts: dict[str, Any]) -> None:
        if self.record is not None:
            write_line(self.record, to_json({"event": kind, **facts}))


def to_json(facts: dict[str, Any]) -> str:
    """One line; what is not UTF-8 is written as escapes."""
    return json.dumps(facts, ensure_ascii=False).encode("utf-8", errors="backslashreplace").decode()


def write_line(stream: IO[str] | None, text: str) -> None:
    """Writes a line at once."""
    if stream is not None:
        stream.write(f"{text}\n")
        stream.flush()


def format_time(seconds: float) -> str:
    """Hours, if any, minutes, seconds and their tenths."""
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"

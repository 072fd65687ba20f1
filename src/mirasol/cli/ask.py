"""`mirasol ask`: questions about one media file."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from mirasol.errors import UserError, quote_text

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from mirasol.app.live.whole import StreamedClip
    from mirasol.checkpoint import Doubt, Loaded
    from mirasol.cli.common import MakeParser
    from mirasol.evaluation.answer import Answer, RankedCandidate
    from mirasol.media.clip import Clip
    from mirasol.model.outputs import MirasolEncoderOutput

FLAGS = ("--json", "--fast", "--stream", "--help", "-h")  # options without a value
HELP = "ask questions about a video or sound file"
DESCRIPTION = """Answers questions about what is seen and heard in a media file, which is read and encoded once. Without
a question it asks for them, or reads one a line where standard input is not a terminal.

An answer is streamed to stdout as it is generated, one line each, and ends with its probability: the product of the
probabilities of its tokens, so that long answers have lower ones. "not sure" is said below the threshold that was
measured for the checkpoint (docs/evaluation.md). Notes about checkpoint and file go to stderr.

  mirasol ask tiny clip.mp4 "what colour is the circle?"
  mirasol ask tiny clip.mp4 "which shape is seen last?" --candidates "circle|square|cross"
  mirasol ask runs/demo clip.mp4 "what plays?" "which sound comes after the bell?" --start 2 --end 6 --json
  mirasol ask runs/demo clip.mp4 < questions.txt
  mirasol ask runs/demo hour.mp4 "what happens?" --stream"""


def add_arguments(parser: ArgumentParser, make: MakeParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="tiny (shipped), the folder of a run or checkpoint, a name on the hub"
    )
    parser.add_argument("file", metavar="FILE", help="a common video or sound file")
    parser.add_argument("question", metavar="QUESTION", nargs="*", help="each question in quotes; none: asks for them")
    parser.add_argument("--candidates", type=str, metavar="A|B|C", help="score these answers, instead of a free one")
    parser.add_argument("--start", type=float, help="second of the file where the clip begins")
    parser.add_argument("--end", type=float, help="second of the file where the clip ends")
    parser.add_argument(
        "--stream", action="store_true", help="encode a file of any length chunk by chunk, as it is read"
    )
    parser.add_argument("--window", type=int, help="with --stream: chunks that are remembered; default: all")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer, in tokens")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each question, one a line")
    parser.add_argument("--device", type=str, default="auto", help="where to compute: auto, cpu, cuda or mps")


def move_options_last(arguments: list[str]) -> list[str]:
    """The arguments of `ask` and `watch` with their options behind the others: argparse gives a list of positional
    arguments those before the first option only."""
    if arguments[:1] not in (["ask"], ["watch"]):
        return arguments
    positional, options, rest = arguments[:1], [], iter(arguments[1:])
    for word in rest:
        if word == "--":
            positional += rest  # whatever follows is no option
        elif not word.startswith("-") or " " in word or word == "-":
            positional.append(word)
        else:
            options.append(word)
            if word not in FLAGS and "=" not in word:
                options += [value for value in [next(rest, None)] if value is not None]
    return [*positional, *options]


def run(options: Namespace) -> None:
    """Reads, answers, prints."""
    from mirasol.checkpoint import find_checkpoint, read_doubt
    from mirasol.cli.common import check_positive, check_utf8

    check_positive("--max-new-tokens", options.max_new_tokens)
    if options.window is not None:
        check_positive("--window", options.window)
        if not options.stream:
            raise UserError(f"--window {options.window}: only a stream has one: add --stream")
    candidates = split_candidates(options.candidates)
    for question in options.question:
        check_utf8("QUESTION", question)
    doubt = read_doubt(find_checkpoint(options.checkpoint))

    from mirasol.media.isolation.decoders import start_decoder

    if not options.stream:
        start_decoder()  # is ready by the time the checkpoint is loaded

    sitting = open_sitting(options, candidates, doubt)
    at_terminal = not options.question and sys.stdin is not None and sys.stdin.isatty()
    for question in options.question or (prompt_for_questions() if at_terminal else read_questions()):
        try:
            sitting.ask(question)
        except UserError as error:
            if not at_terminal:
                raise
            sys.stderr.write(f"{error}\n")


def open_sitting(options: Namespace, candidates: tuple[str, ...], doubt: Doubt | None) -> Sitting:
    """Loads the checkpoint, reads and encodes the clip, and prints what limits the answers."""
    from mirasol.cli.common import check_device, pause_garbage_collection

    began = time.perf_counter()
    with pause_garbage_collection():
        from mirasol.checkpoint import load_answerer
        from mirasol.evaluation.answer import encode_clips, measure_surprise

        loaded = load_answerer(options.checkpoint, check_device(options.device))
    for number, question in enumerate(options.question or (), 1):
        if not question.strip():
            raise UserError(f"question {number} is empty: leave it out")
    if options.question:
        loaded.processor.encode_text(options.question)  # one that is too long is refused before any is answered
    loaded_at = time.perf_counter()
    if options.stream:
        clip, encoded, surprise = encode_stream(loaded, options, doubt)
        seconds = {"load": loaded_at - began, "encode": time.perf_counter() - loaded_at}
    else:
        extractor = loaded.processor.feature_extractor
        clip = extractor.read(options.file, options.start, options.end, threads=0)
        tensors = extractor.tensors(clip)
        read_at = time.perf_counter()
        encoded = encode_clips(loaded.model, loaded.processor, [tensors])
        seconds = {"load": loaded_at - began, "read": read_at - loaded_at, "encode": time.perf_counter() - read_at}
        surprise = measure_surprise(loaded.model, loaded.processor, tensors, encoded)
    remarks = list_remarks(loaded, options.checkpoint, doubt, surprise)
    print_notes(remarks, clip, options.file)
    return Sitting(loaded, clip, encoded, options, candidates, doubt, surprise, remarks, seconds)


def encode_stream(
    loaded: Loaded, options: Namespace, doubt: Doubt | None
) -> tuple[StreamedClip, MirasolEncoderOutput, float | None]:
    """The file, encoded chunk by chunk while it is read, with progress on stderr."""
    from mirasol.app.live.whole import encode_file
    from mirasol.console import make_console, show_progress

    with show_progress(make_console(), "encoding", "chunks") as progress:
        return encode_file(loaded, options.file, doubt, options.start, options.end, options.window, progress)


def split_candidates(text: str | None) -> tuple[str, ...]:
    """The candidates of "a|b|c". Raises UserError unless they are at least two different texts, none of them empty."""
    if text is None:
        return ()
    from mirasol.cli.common import check_utf8

    found = tuple(part.strip() for part in check_utf8("--candidates", text).split("|"))
    if len(found) < 2:
        raise UserError(f'--candidates {quote_text(text)}: give at least two answers, as in "circle|square"')
    if not all(found):
        raise UserError(f"--candidates {quote_text(text)}: candidate {found.index('') + 1} is empty: leave it out")
    for place, candidate in enumerate(found):
        if candidate in found[:place]:
            raise UserError(f"--candidates {quote_text(text)}: {candidate!r} appears twice: give it once")
    return found


def read_questions() -> Iterator[str]:
    """Questions from standard input, one a line; empty lines are ignored.

    Raises:
        UserError: there is none, or a line is not UTF-8.
    """
    from mirasol.cli.common import check_utf8

    number = count = 0
    try:
        for number, line in enumerate(sys.stdin or (), start=1):
            if question := line.strip():
                count += 1
                yield check_utf8(f"standard input, line {number}:", question)
    except UnicodeDecodeError as error:
        raise UserError(f"standard input, after line {number}: not UTF-8 text: save it as UTF-8") from error
    if not count:
        raise UserError("no question: give one in quotes, or one a line on standard input")


def prompt_for_questions() -> Iterator[str]:
    """Questions as they are typed, until the input ends (Ctrl-D) or Ctrl-C at the prompt."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` its line editing

    sys.stderr.write("One question a line; Ctrl-D ends.\n")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            if question := input("? ").strip():
                yield question
    sys.stdout.write("\n")


@dataclass
class Sitting:
    """All questions about one clip, which is encoded once.

    doubt: when an answer is "not sure"; None where it was not measured
    surprise: of the clip; None without a picture
    remarks: what is said of the checkpoint
    seconds: what took how long before the first question
    """

    loaded: Loaded
    clip: Clip | StreamedClip
    encoded: MirasolEncoderOutput
    options: Namespace
    candidates: tuple[str, ...]
    doubt: Doubt | None
    surprise: float | None
    remarks: list[str]
    seconds: dict[str, float] = field(default_factory=dict)

    def ask(self, question: str) -> None:
        """Answers a question and prints the answer. Raises UserError for one that is too long."""
        began = time.perf_counter()
        record = self._choose(question) if self.candidates else self._generate(question)
        if not self.options.json:
            return
        seconds = {**self.seconds, "answer": time.perf_counter() - began}
        timeline = self.clip.timeline
        record |= {
            "threshold": None if self.doubt is None else self.doubt.threshold,
            "surprise": self.surprise,
            "highest_surprise": None if self.doubt is None else self.doubt.highest_surprise,
            "question": question,
            "file": self.options.file,
            "start": timeline.start,
            "end": timeline.end,
            "chunks": timeline.num_chunks,
            "notes": list(self.clip.notes),
            "remarks": self.remarks,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }
        # A file's name need not be UTF-8: its bytes are written as escapes.
        text = json.dumps(record, ensure_ascii=False).encode("utf-8", errors="backslashreplace").decode()
        write_piece(text + "\n")

    def _generate(self, question: str) -> dict[str, Any]:
        from mirasol.evaluation.answer import AnswerStreamer, answer_encoded
        from mirasol.evaluation.predictions import EMPTY_ANSWER

        model, processor, longest = self.loaded.model, self.loaded.processor, self.options.max_new_tokens
        streamer = None if self.options.json else AnswerStreamer(processor, write_piece)
        answer: Answer = answer_encoded(model, processor, self.encoded, question, longest, streamer)
        not_sure = None
        if self.doubt is not None:
            not_sure = answer.probability < self.doubt.threshold or is_strange(self.doubt, self.surprise)
        if not self.options.json:
            doubt = ", not sure" if not_sure else ""
            write_piece(f"{'' if answer.text else EMPTY_ANSWER}  ({format_probability(answer.probability)}{doubt})\n")
        return {"answer": answer.text, "probability": answer.probability, "not_sure": not_sure}

    def _choose(self, question: str) -> dict[str, Any]:
        from mirasol.evaluation.answer import rank_candidates

        ranked: list[RankedCandidate] = rank_candidates(
            self.loaded.model, self.loaded.processor, self.encoded, question, self.candidates
        )
        if not self.options.json:
            others = ", ".join(f"{one.text} {format_probability(one.share)}" for one in ranked[1:])
            doubt = ", not sure" if is_strange(self.doubt, self.surprise) else ""
            write_piece(f"{ranked[0].text}  ({format_probability(ranked[0].share)}; {others}{doubt})\n")
        return {
            "answer": ranked[0].text,
            "probability": ranked[0].probability,
            "not_sure": is_strange(self.doubt, self.surprise) if self.doubt is not None else None,
            "candidates": [asdict(one) for one in ranked],
        }


def format_probability(value: float) -> str:
    """Two decimals, for small ones one significant digit."""
    return f"{value:.2f}" if value >= 0.01 else f"{value:.0e}"


def is_strange(doubt: Doubt | None, surprise: float | None) -> bool:
    """Whether a clip is of another kind than all that the checkpoint was measured on."""
    return doubt is not None and doubt.is_strange(surprise)


def list_remarks(loaded: Loaded, name: str, doubt: Doubt | None, surprise: float | None) -> list[str]:
    """What limits all answers of a checkpoint: it was never trained, it knows rendered scenes only, the clip is of
    another kind, nobody has measured when it is unsure."""
    from mirasol.checkpoint import STARTING_WEIGHTS, read_rendered_world
    from mirasol.hub import describe_folder_before_hub

    folder, remarks = loaded.folder, []
    if (folder / STARTING_WEIGHTS).is_file():
        remarks.append("made by `mirasol init` and not trained yet: its answers are meaningless")
    world = read_rendered_world(folder)
    if world is not None:
        remarks.append(f"trained on rendered scenes only ({world}): its answers about other videos are guesses")
    if is_strange(doubt, surprise):
        remarks.append(
            f"this clip is unlike all that it was measured on (surprise {surprise:.2g}, there at most "
            f"{doubt.highest_surprise:.2g}): it is not sure of anything here"
        )
    if doubt is None:
        remarks.append('no measured threshold, so it never says "not sure": `mirasol evaluate --calibrate` measures it')
    before_hub = describe_folder_before_hub(name)
    return [*([before_hub] if before_hub else []), *(f"{name}: {remark}" for remark in remarks)]


def print_notes(remarks: Sequence[str], clip: Clip | StreamedClip, file: str) -> None:
    """Writes to stderr what limits the answers: remarks about the checkpoint, irregularities of the file."""
    for line in (*remarks, *(f"{file}: {note}" for note in clip.notes)):
        sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def write_piece(text: str) -> None:
    """Writes to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()

"""What is known of a folder's clips before anything trains: lengths and sound by their headers, splits, what is left
out; in five lines and some remarks."""

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mirasol.console import count_cores
from mirasol.data.datasets.contract import Problem
from mirasol.data.example import ClipExamples, Example, group_by_clip
from mirasol.data.randomness import hash64
from mirasol.errors import BadClip, UserError
from mirasol.files import write_file_atomically, write_folder_atomically
from mirasol.finetune.headers import Header, probe_header
from mirasol.finetune.labels import Labels
from mirasol.finetune.splits import NAMES, Splits, split_examples
from mirasol.media.formats.content import PAGE, detect_content_kind
from mirasol.media.isolation.decoders import run_isolated
from mirasol.media.limits import DEFAULT_LIMITS
from mirasol.media.reader import END_TOLERANCE

MOST_HEADERS = 2000  # files whose headers are read: of more, a sample, so that 100,000 clips start within a minute
SHOWN_CLASSES, SHOWN_UNREADABLE = 8, 3
VERY_SHORT, VERY_LONG = 0.2, 600.0  # seconds
CLASS_LIST, LEFT_OUT = "classes.txt", "left_out.jsonl"
BEYOND = "beyond its file"


@dataclass(frozen=True)
class Survey:
    """The examples that can be used, and what is known of their clips.

    headers: by media file, of those that were read; `files` is how many there are
    left_out: everything that labels or files name and that is not used
    """

    labels: Labels
    splits: Splits
    headers: dict[str, Header]
    files: int
    unreadable: int
    left_out: tuple[Problem, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """As `Labels.classes`."""
        return self.labels.classes

    @property
    def is_sampled(self) -> bool:
        """Whether not all headers were read."""
        return len(self.headers) + self.unreadable < self.files

    @cached_property
    def clips(self) -> dict[str, list[ClipExamples]]:
        """The clips of each split."""
        return {name: group_by_clip(self.splits.examples[name]) for name in NAMES}

    @property
    def all_clips(self) -> list[ClipExamples]:
        """The clips of all splits."""
        return [clip for own in self.clips.values() for clip in own]

    @cached_property
    def seconds(self) -> list[float]:
        """The lengths that are known, of all clips, ascending."""
        lengths = []
        for clip in self.all_clips:
            header, end = self.headers.get(clip.media), clip.end
            if header is not None:
                end = header.seconds if end is None else min(end, header.seconds)
            if end is not None:
                lengths.append(max(0.0, end - (clip.start or 0.0)))
        return sorted(lengths)

    def format_lines(self) -> list[str]:
        """What was understood, in five lines."""
        clips, seconds, heads = self.all_clips, self.seconds, list(self.headers.values())
        share = f" (of {len(heads):,} of {self.files:,} files; the others are opened when they come up)"
        of_sample = share if self.is_sampled else ""
        show = _format_seconds
        total = f"{show(sum(seconds))} s together; " if not self.is_sampled else ""
        lengths = "lengths unknown"
        if seconds:
            median = statistics.median(seconds)
            lengths = f"{total}{show(seconds[0])} to {show(seconds[-1])} s, median {show(median)} s{of_sample}"
        silent, blind = (sum(not getattr(head, name) for head in heads) for name in ("has_audio", "has_video"))
        counts = {name: len(own) for name, own in self.clips.items()}
        return [
            f"folder:   {self.labels.root}: {self.labels.layout}",
            f"answers:  {self._describe_answers()}",
            f"clips:    {len(clips):,} in {self.files:,} files, {lengths}",
            f"left out: {self.unreadable} unreadable, {len(self.labels.unlabelled)} without a label, "
            f"{self._count_lost_labels()} labels without a clip; {silent} clips have no sound, {blind} no pictures",
            f"splits:   {', '.join(f'{name} {count:,}' for name, count in counts.items())} clips; {self.splits.drawn}",
        ]

    def _describe_answers(self) -> str:
        examples = [example for name in NAMES for example in self.splits.examples[name]]
        counts = Counter(example.target for example in examples)
        prompts = {example.prompt for example in examples}
        asked = f"to {prompts.pop()!r}" if len(prompts) == 1 else f"to {len(prompts):,} questions"
        if not self.classes:
            return f"{len(counts):,} different ones in {len(examples):,} examples, {asked}"
        shown = ", ".join(f"{name} {count:,}" for name, count in counts.most_common(SHOWN_CLASSES))
        more = f" and {len(counts) - SHOWN_CLASSES} more" if len(counts) > SHOWN_CLASSES else ""
        return f"{len(counts)} classes {asked}: {shown}{more}"

    def _count_lost_labels(self) -> int:
        return len(self.labels.orphans) + sum(problem.kind == "missing media" for problem in self.labels.problems)

    def list_remarks(self) -> list[str]:
        """What the user should know, one line each."""
        remarks = [*self.labels.remarks, *self.splits.remarks, *list_contradictions(self.labels)]
        wrong = [problem for problem in self.labels.problems if problem.kind not in ("missing media", BEYOND)]
        if wrong:
            remarks.append(f"{len(wrong)} labels cannot be read, the first: {wrong[0]}")
        unreadable = [problem for problem in self.left_out if problem.kind == "unreadable"]
        if unreadable:
            first = "; ".join(map(str, unreadable[:SHOWN_UNREADABLE]))
            more = f"; all are in data/{LEFT_OUT}" if len(unreadable) > SHOWN_UNREADABLE else ""
            remarks.append(f"{len(unreadable)} files cannot be read: {first}{more}")
        beyond = [problem for problem in self.left_out if problem.kind == BEYOND]
        if beyond:
            remarks.append(f"{len(beyond)} examples are left out, the first: {beyond[0]}")
        heads, seconds = list(self.headers.values()), self.seconds
        if heads and not any(head.has_audio for head in heads):
            remarks.append("no clip has sound: the model learns from pictures alone")
        if heads and not any(head.has_video for head in heads):
            remarks.append("no clip has pictures: the model learns from sound alone")
        if seconds and seconds[0] < VERY_SHORT and seconds[-1] > VERY_LONG:
            remarks.append(
                f"clips of {seconds[0]:.2g} s and of {seconds[-1]:.0f} s together: the long ones are cut into few long "
                "chunks; name the part that matters by start and end in a table, or cut them"
            )
        return remarks


def survey_folder(labels: Labels, seed: int, progress: Callable[[int, int], None] | None = None) -> Survey:
    """Reads headers, leaves out what cannot be read, and splits the rest.

    Raises UserError where nothing can be read, and as `split_examples`.
    """
    media = sorted({example.media for example in labels.all_examples})
    headers, reasons = read_headers(labels.root, choose_media(media, MOST_HEADERS), progress)
    if not headers:
        name, reason = next(iter(reasons.items()))
        raise UserError(f"{labels.root}: none of {len(reasons)} clips can be read, the first: {name}: {reason}")
    examples, beyond = {}, []
    for split, own in labels.examples.items():
        whole = [example for example in own if example.media not in reasons]
        outside = {example.id for example in whole if is_beyond(example, headers)}
        beyond += [describe_beyond(example, headers[example.media]) for example in whole if example.id in outside]
        examples[split] = tuple(example for example in whole if example.id not in outside)
    problems = (*labels.problems, *beyond)
    usable = replace(labels, examples=examples, problems=problems)
    if not usable.all_examples:
        raise UserError(f"{labels.root}: no example is left, the first problem: {problems[0]}")
    splits = split_examples(usable, seed)
    left_out = [
        *problems,
        *(Problem("unreadable", reason, name) for name, reason in reasons.items()),
        *(Problem("without a label", "no label names it", name) for name in labels.unlabelled),
        *(Problem("missing media", "its clip is not there", name) for name in labels.orphans),
        *(Problem("video in two splits", "left out: a later split has it", e.media) for e in splits.leaked),
    ]
    return Survey(usable, splits, headers, len(media), len(reasons), tuple(left_out))


def is_beyond(example: Example, headers: Mapping[str, Header]) -> bool:
    """Whether an example is about a part that its file, if its header was read, does not have."""
    header = headers.get(example.media)
    if header is None or not header.seconds:
        return False
    return (example.start or 0.0) >= header.seconds or (example.end or 0.0) > header.seconds + END_TOLERANCE


def describe_beyond(example: Example, header: Header) -> Problem:
    """The problem of such an example."""
    window = f"{example.start or 0:g} to {'its end' if example.end is None else f'{example.end:g} s'}"
    return Problem(BEYOND, f"{window}, but the file lasts {header.seconds:.3f} s", example.media)


def list_contradictions(labels: Labels) -> Iterator[str]:
    """Remarks on rows that say the same twice, on clips of several classes, and on classes that look the same."""
    examples = labels.all_examples
    said = Counter((e.media, e.start, e.end, e.prompt, e.target) for e in examples)
    if len(said) < len(examples):
        again = next(key for key, count in said.items() if count > 1)
        yield f"{len(examples) - len(said)} labels say what another one says, the first: {again[0]}: {again[4]!r}"
    if not labels.classes:
        return
    of_clip: dict[tuple, list[str]] = defaultdict(list)
    for media, start, end, _, target in said:
        of_clip[media, start, end].append(target)
    several = {key: targets for key, targets in of_clip.items() if len(targets) > 1}
    if several:
        (media, *_), targets = next(iter(several.items()))
        yield f"{len(several)} clips are of several classes, the first: {media}: {', '.join(targets[:4])}"
    spellings: dict[str, list[str]] = defaultdict(list)
    for name in labels.classes:
        spellings[name.casefold()].append(name)
    alike = next((names for names in spellings.values() if len(names) > 1), None)
    if alike:
        yield f"classes that differ in capital letters alone are different classes: {', '.join(alike)}"


def choose_media(media: Sequence[str], most: int) -> list[str]:
    """Some of the files, the same ones every time."""
    if len(media) <= most:
        return list(media)
    return sorted(sorted(media, key=lambda name: hash64("survey", name))[:most])


def read_headers(
    root: Path, media: Sequence[str], progress: Callable[[int, int], None] | None = None
) -> tuple[dict[str, Header], dict[str, str]]:
    """The headers of media files, read in processes of their own, and why others cannot be read."""

    def read(name: str) -> Header | str:
        path = root / name
        try:
            if path.exists() and not path.is_file():
                return "is no file, but a pipe, device or folder"
            with path.open("rb") as stream:
                if detect_content_kind(stream.read(512)) == "html":
                    return PAGE
            return run_isolated(DEFAULT_LIMITS, path, probe_header, path)
        except BadClip as error:
            return error.reason
        except OSError as error:
            return error.strerror or str(error)

    headers, reasons = {}, {}
    with ThreadPoolExecutor(count_cores()) as pool:
        for done, (name, found) in enumerate(zip(media, pool.map(read, media), strict=True), start=1):
            if isinstance(found, str):
                reasons[name] = found
            else:
                headers[name] = found
            if progress is not None:
                progress(done, len(media))
    return headers, reasons


def write_splits(folder: Path, survey: Survey) -> None:
    """Writes the splits as tables of the data set `folder`, its class list, and what is left out."""

    def fill(target: Path) -> None:
        for name in NAMES:
            lines = (json.dumps(_make_row(example), ensure_ascii=False) for example in survey.splits.examples[name])
            write_file_atomically(target / f"{name}.jsonl", "".join(line + "\n" for line in lines))
        if survey.classes:
            write_file_atomically(target / CLASS_LIST, "".join(name + "\n" for name in survey.classes))
        rows = (json.dumps(problem.to_dict(), ensure_ascii=False) for problem in survey.left_out)
        text = "".join(row + "\n" for row in rows)
        write_file_atomically(target / LEFT_OUT, text.encode("utf-8", "backslashreplace").decode())

    write_folder_atomically(folder, fill, replace=True)


def _make_row(example: Example) -> dict[str, object]:
    """The example as a line of `SPLIT.jsonl`."""
    names = ("id", "start", "end", "prompt", "target", "question_type", "candidates")
    row = {"file": example.media, **{name: getattr(example, name) for name in names}}
    return {name: value for name, value in row.items() if value not in (None, "", ())}


def _format_seconds(seconds: float) -> str:
    """Three digits of a number of seconds, all of them of many."""
    return f"{seconds:.3g}" if seconds < 999.5 else f"{seconds:,.0f}"

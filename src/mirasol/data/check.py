"""`mirasol data check`: everything about a data set on disk that can be found out before it is trained on."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.contract import AnnotationError, DatasetSplit, Problem
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.registry import find_adapter, list_listed_splits, read_listed_split
from mirasol.data.example import Example
from mirasol.data.media_files import has_wrong_extension, is_image, open_media_file
from mirasol.data.shards.verify import find_shard_problems
from mirasol.data.text_lengths import CountTokens, find_long_texts, list_targets, make_counter
from mirasol.errors import BadClip, UserError, quote_text
from mirasol.files import hash_file
from mirasol.media.formats.content import PAGE, detect_content_kind
from mirasol.media.image import check_image
from mirasol.media.integrity import inspect_media
from mirasol.media.isolation.decoders import run_isolated
from mirasol.media.limits import DEFAULT_LIMITS
from mirasol.media.reader import END_TOLERANCE

# Upper edges of the duration histogram in seconds; the last bin is open.
BINS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600)


@dataclass(frozen=True)
class MediaFacts:
    """What opening one media file showed. `seconds` is None for images and for what cannot be opened (`reason`).

    `held`: seconds up to which there is data, of a file that holds less than its header says; None of others.
    `stated`: seconds that the header says, of a file that holds more.
    `ending`: why a file that states no duration seems to be cut short all the same (`mirasol.media.integrity`).
    `changes`: where recordings meet in it, other streams begin or time stamps are damaged.
    """

    media: str
    bytes: int
    seconds: float | None = None
    has_video: bool = True
    has_audio: bool = True
    kind: str = ""
    reason: str = ""
    held: float | None = None
    ending: str = ""
    stated: float | None = None
    changes: tuple[str, ...] = ()

    @property
    def cut_short(self) -> str:
        """That the file is cut short and what it holds; "" where that is not known of it."""
        if self.held is None:
            return f"cut short: {self.ending}" if self.ending else ""
        return f"cut short: holds data for {self.held:.3f} s, but its header says {self.seconds:.3f} s"


@dataclass(frozen=True)
class Report:
    """`splits`, `media` and `problems` as `mirasol data check --json` prints them (docs/datasets.md)."""

    splits: dict[str, dict[str, Any]]
    media: dict[str, Any]
    problems: tuple[Problem, ...]

    @property
    def good(self) -> bool:
        """Whether there are no problems other than warnings."""
        return all(problem.severity == "warning" for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"splits": self.splits, "media": self.media, "problems": [p.to_dict() for p in self.problems]}


def check_dataset(
    name: str,
    root: Path,
    split: str | None = None,
    options: DatasetOptions = DatasetOptions(),  # noqa: B008 - frozen
    *,
    open_media: bool = True,
    hashes: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    max_text_length: int = 64,
    count_tokens: CountTokens | None = None,
) -> Report:
    """Reads all annotations of a data set (or of one split) and opens every media file that they name.

    `open_media=False` stops after looking which files are there. `workers` threads open files; `progress(done, total)`
    is called after each. Texts of more than `max_text_length` tokens are listed, counted by `count_tokens` or else by
    the least that there can be. Of shards the indices are compared with the tars, and with `hashes` every byte with its
    hash. Raises UserError for an unknown data set, folder, split or option; what is wrong within the
    data set is in the report.
    """
    adapter = find_adapter(name, options)
    if hashes and name != "shards":
        raise UserError(f"--hashes: only shards have hashes to compare, {name} has none: leave it out")
    files = Files(root, options.annotations)
    known = list_listed_splits(name, files)
    chosen = [split] if split is not None else [s for s in known if s not in adapter.overlapping] or known
    datasets, problems, entries = [], [], {}
    for one in chosen:
        try:
            dataset = read_listed_split(name, files, one, options, open_media)
        except AnnotationError as error:
            problems.append(error.problem)
            entries[one] = _describe_split(None)
            continue
        datasets.append(dataset)
        entries[dataset.split] = _describe_split(dataset)
        problems += dataset.problems
    problems += _find_shared_videos(datasets)
    problems += [problem for one in datasets for problem in _find_long_texts(one, max_text_length, count_tokens)]
    facts = _open_all(files.root, datasets, workers, progress) if open_media else []
    found_wrong = _find_media_problems(files.root, datasets, facts)
    if name == "shards":
        found_wrong += find_shard_problems(
            files.root, datasets, {p.file for p in found_wrong if p.examples}, hashes=hashes
        )
    problems += found_wrong
    return Report(entries, _describe_media(datasets, facts, found_wrong), tuple(problems))


def _describe_split(dataset: DatasetSplit | None) -> dict[str, Any]:
    if dataset is None:
        return {"examples": 0, "videos": 0, "types": {}, "published": {}, "facts": {}}
    published = dataset.published
    known = {"examples": published.examples, "videos": published.videos, "types": dict(published.types)}
    return {
        "examples": len(dataset.annotated),
        "videos": len({example.video_name for example in dataset.annotated}),
        "types": count_types(dataset),
        "published": {key: value for key, value in known.items() if value},
        "facts": dict(dataset.facts),
    }


def count_types(dataset: DatasetSplit) -> dict[str, int]:
    """How many examples each question type has; of each class, where the data set is one of classes or labels."""
    if dataset.protocol in ("classes", "labels"):
        counted = Counter(label for e in dataset.annotated for label in e.references or (e.target,) if label)
        return {name: counted[name] for name in dataset.classes if counted[name]}
    return dict(Counter(example.type_name for example in dataset.annotated).most_common())


def _find_shared_videos(datasets: Sequence[DatasetSplit]) -> list[Problem]:
    """Videos that are in more than one split."""
    where: dict[str, dict[str, None]] = defaultdict(dict)
    for dataset in datasets:
        for example in dataset.annotated:
            where[example.video_name].setdefault(dataset.split)
    shared = {video: list(splits) for video, splits in where.items() if len(splits) > 1}
    return [Problem("video in two splits", f"is in {' and '.join(splits)}", video) for video, splits in shared.items()]


def _find_long_texts(dataset: DatasetSplit, limit: int, count: CountTokens | None) -> list[Problem]:
    """Texts that training refuses, leaves out or cuts where its limit is this one (`data.on_long_text`)."""
    tokens = find_long_texts(dataset.annotated, count or make_counter(None), limit)
    texts = {e.id: f"{e.prompt} -> {max(list_targets(e), key=len)}" for e in dataset.annotated if e.id in tokens}
    least = "" if count else "at least "
    return [
        Problem("long text", f"{least}{tokens[id]} tokens, over {limit}: {quote_text(texts[id])}", file, line)
        for id, (file, line) in dataset.locate(tokens).items()
    ]


def _open_all(
    root: Path, datasets: Sequence[DatasetSplit], workers: int, progress: Callable[[int, int], None] | None
) -> list[MediaFacts]:
    media = list(dict.fromkeys(example.media for dataset in datasets for example in dataset.examples))
    facts = []
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for done, fact in enumerate(pool.map(lambda name: check_media_file(root, name), media), start=1):
            facts.append(fact)
            if progress is not None:
                progress(done, len(media))
    return facts


def check_media_file(root: Path, media: str) -> MediaFacts:
    """Opens a media file, decoding one picture of it; what cannot be read has a `reason`."""
    size, kind = 0, ""
    try:
        with open_media_file(root, media) as path:
            with path.open("rb") as stream:
                kind = detect_content_kind(stream.read(512))
            size = path.stat().st_size
            if kind == "html":
                return MediaFacts(media, size, kind=kind, reason=PAGE)
            if is_image(media):
                run_isolated(DEFAULT_LIMITS, path, check_image, path, kind)
                return MediaFacts(media, size, has_audio=False, kind=kind)
            info, held, ending = run_isolated(DEFAULT_LIMITS, path, inspect_media, path)
    except OSError as error:
        return MediaFacts(media, size, kind=kind, reason=error.strerror or str(error))
    except BadClip as error:
        return MediaFacts(media, size, kind=kind, reason=error.reason)
    seen, heard = info.video is not None, info.audio is not None
    return MediaFacts(
        media,
        size,
        info.duration,
        seen,
        heard,
        kind,
        held=held,
        ending=ending,
        stated=info.stated,
        changes=info.changes,
    )


def _find_media_problems(root: Path, datasets: Sequence[DatasetSplit], facts: Sequence[MediaFacts]) -> list[Problem]:
    examples = Counter(example.media for dataset in datasets for example in dataset.examples)
    problems = []
    for fact in facts:
        if fact.reason:
            kind = "not media" if fact.kind == "html" else "undecodable"
            problems.append(Problem(kind, fact.reason, fact.media, examples=examples[fact.media]))
        elif has_wrong_extension(fact.media, fact.kind):
            problems.append(Problem("named otherwise", f"holds {fact.kind}: read by content", fact.media))
        if fact.stated is not None:
            message = f"its header says {fact.stated:.3f} s, it holds {fact.seconds:.3f} s: all of it is read"
            problems.append(Problem("header too short", message, fact.media))
        if fact.changes:
            problems.append(Problem("several recordings", "; ".join(fact.changes), fact.media))
        if fact.ending and fact.held is None:
            problems.append(Problem("ends early", f"{fact.cut_short}; read as all there is", fact.media))
    problems += _find_cut_short(datasets, facts)
    problems += _find_outside(datasets, {fact.media: fact.seconds for fact in facts if fact.seconds is not None})
    for group in find_identical_files(root, facts):
        message = f"the same bytes as {', '.join(group[1:4])}" + (
            f" and {len(group) - 4} more" if len(group) > 4 else ""
        )
        problems.append(Problem("identical files", message, group[0]))
    return problems


def _find_cut_short(datasets: Sequence[DatasetSplit], facts: Sequence[MediaFacts]) -> list[Problem]:
    """Files that end before their header says so; they cost the examples that ask for what is not there."""
    problems = []
    cut = {fact.media: fact for fact in facts if fact.held is not None}
    asked: dict[str, list[Example]] = defaultdict(list)
    for example in (example for dataset in datasets if cut for example in dataset.examples):
        if example.media in cut:
            asked[example.media].append(example)
    for media, fact in cut.items():
        lost = [e for e in asked[media] if not _reaches_beyond(e, fact.seconds) and (e.end or fact.seconds) > fact.held]
        problems.append(Problem("cut short", fact.cut_short, media, examples=len(lost)))
    return problems


def _reaches_beyond(example: Example, length: float) -> bool:
    """Whether an example's window reaches beyond its file's length by more than the reader lets pass."""
    return (example.start or 0) >= length or (example.end or 0) > length + END_TOLERANCE


def _find_outside(datasets: Sequence[DatasetSplit], seconds: dict[str, float]) -> list[Problem]:
    """Windows that reach beyond their file's end by more than the reader lets pass."""
    problems = []
    for dataset in datasets:
        for example in dataset.examples:
            length = seconds.get(example.media)
            if length is None or (example.start is None and example.end is None):
                continue
            if _reaches_beyond(example, length):
                window = f"{example.start or 0:g} to {'the end' if example.end is None else f'{example.end:g}'} s"
                message = f"window {window} of example {example.id!r}, but the file lasts {length:.3f} s"
                problems.append(Problem("window outside", message, example.media, examples=1))
    return problems


def find_identical_files(root: Path, facts: Iterable[MediaFacts]) -> list[list[str]]:
    """Groups of media whose bytes are the same; only those of one size are read."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for fact in facts:
        if fact.bytes:
            by_size[fact.bytes].append(fact.media)
    groups: dict[str, list[str]] = defaultdict(list)
    for media in (name for names in by_size.values() if len(names) > 1 for name in names):
        with open_media_file(root, media) as path:
            groups[hash_file(path)].append(media)
    return [group for group in groups.values() if len(group) > 1]


def _describe_media(
    datasets: Sequence[DatasetSplit], facts: Sequence[MediaFacts], problems: Sequence[Problem]
) -> dict[str, Any]:
    """The report's `media`: n_annotated = n_usable + the sum of the reasons."""
    reasons: Counter[str] = Counter()
    for dataset in datasets:
        reasons.update(dataset.reasons)
    unusable = {p.file for p in problems if p.kind in ("undecodable", "not media")}
    for problem in problems:
        if problem.severity == "error" and not (problem.kind == "window outside" and problem.file in unusable):
            reasons[problem.kind] += problem.examples
    annotated = sum(dataset.counts.n_annotated for dataset in datasets)
    good = [fact for fact in facts if not fact.reason]
    return {
        "n_annotated": annotated,
        "n_found": sum(dataset.counts.n_found for dataset in datasets),
        "n_usable": annotated - sum(reasons.values()),
        "reasons": dict(reasons),
        "files": len(facts),
        "missing": sum(p.kind == "missing media" for dataset in datasets for p in dataset.problems),
        "undecodable": sum(bool(fact.reason) for fact in facts),
        "without_audio": sum(not fact.has_audio and fact.seconds is not None for fact in good),
        "without_video": sum(not fact.has_video for fact in good),
        "duplicates": sum(problem.kind == "identical files" for problem in problems),
        "seconds": _count_durations([fact.seconds for fact in good if fact.seconds is not None]),
    }


def _count_durations(seconds: list[float]) -> dict[str, Any]:
    labels = [f"< {edge}" for edge in BINS] + [f">= {BINS[-1]}"]
    histogram = dict.fromkeys(labels, 0)
    for value in seconds:
        histogram[labels[sum(value >= edge for edge in BINS)]] += 1
    if not seconds:
        return {"histogram": histogram}
    return {
        "histogram": histogram,
        "shortest": round(min(seconds), 3),
        "median": round(statistics.median(seconds), 3),
        "longest": round(max(seconds), 3),
        "total": round(sum(seconds), 3),
    }


def format_report(report: Report, most_problems: int = 20) -> str:
    """The report in lines for a terminal; of the problems the first `most_problems` of each kind."""
    lines = []
    for split, entry in report.splits.items():
        published = entry["published"]
        lines.append(
            f"{split}: {_format_count('examples', entry, published)}, {_format_count('videos', entry, published)}"
        )
        lines += [f"  {name}: {value}" for name, value in entry["facts"].items()]
        types = published.get("types", {})
        shown = list(dict.fromkeys([*entry["types"], *types]))
        for kind in shown[:most_problems]:
            beside = f" (published {types[kind]})" if kind in types else ""
            lines.append(f"  {kind}: {entry['types'].get(kind, 0)}{beside}")
        if len(shown) > most_problems:
            lines.append(f"  … and {len(shown) - most_problems} more")
    media = report.media
    lines.append(f"annotated {media['n_annotated']}, found {media['n_found']}, usable {media['n_usable']}")
    lines += [f"  {kind}: {count}" for kind, count in media["reasons"].items()]
    names = ("files", "missing", "undecodable", "without_audio", "without_video", "duplicates")
    lines.append("media: " + ", ".join(f"{name.replace('_', ' ')} {media[name]}" for name in names))
    filled = {label: count for label, count in media["seconds"]["histogram"].items() if count}
    lines += [f"  {label} s: {count}" for label, count in filled.items()]
    by_kind: dict[str, list[Problem]] = defaultdict(list)
    for problem in report.problems:
        by_kind[problem.kind].append(problem)
    for kind, problems in by_kind.items():
        lines.append(f"{problems[0].severity}: {kind} ({len(problems)})")
        lines += [f"  {problem}" for problem in problems[:most_problems]]
        if len(problems) > most_problems:
            lines.append(f"  … and {len(problems) - most_problems} more: see --json")
    lines.append("no problems found" if report.good else "problems found")
    return "\n".join(lines)


def _format_count(name: str, entry: dict[str, Any], published: dict[str, Any]) -> str:
    return f"{entry[name]} {name}" + (f" (published {published[name]})" if name in published else "")

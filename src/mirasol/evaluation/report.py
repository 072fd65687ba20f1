"""The report of an evaluation: one HTML page that needs no other file and no network, and its figures for papers."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mirasol.checkpoint import Loaded
from mirasol.errors import BadClip
from mirasol.evaluation.answer import load_clip
from mirasol.evaluation.evaluate import Evaluation
from mirasol.evaluation.figures import (
    TYPE_COLOURS,
    ScoreBar,
    convert_to_svg,
    draw_confusion,
    draw_learning,
    draw_losses,
    draw_one_clip,
    draw_reliability,
    draw_scores,
    make_picture_url,
    write_figures,
)
from mirasol.evaluation.intervals import compute_mean_intervals
from mirasol.evaluation.metrics import (
    CANDIDATES,
    MAIN_BASELINES,
    Estimate,
    JudgedAnswer,
    ProtocolScores,
    collect_columns,
    format_number,
)
from mirasol.evaluation.one_clip import OneClip, describe_one_clip
from mirasol.files import write_file_atomically
from mirasol.media.timeline import ChunkGrid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "report.html"
SHOWN_EXAMPLES = 6  # right ones, and as many wrong ones
LENGTH_BINS = 5
MOST_CONFUSIONS = 15
MOST_CLASSES = 600  # of a confusion matrix; in a larger one nothing can be seen
MOST_UNUSABLE = 20
# The question types of shapes and sounds, in the order of the page and with their meaning.
TYPE_MEANINGS = {
    "sight": "what is seen",
    "hearing": "what is heard",
    "bound": "sight and sound at one time",
    "order": "what comes after, before",
    "count": "how many",
    "range": "first against last",
}


@dataclass(frozen=True)
class ReportExtras:
    """What a report shows besides the evaluation.

    title, lead: heading and first sentence; by default the data set's name and split, and the checkpoint's name
    log: lines of the training run's metrics.jsonl, for the curves
    others: evaluations of other checkpoints on the same questions, by the heading of their column
    one_clip: the clip that is shown closely
    facts: what the page's end lists, by name
    training_seconds: shown with the headline numbers
    recipe: `Recipe.to_dict` of the run
    """

    title: str = ""
    lead: str = ""
    log: Sequence[Mapping[str, Any]] = ()
    others: Mapping[str, Evaluation] = field(default_factory=dict)
    one_clip: OneClip | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    training_seconds: float | None = None
    recipe: Mapping[str, Any] | None = None


def write_report(
    folder: Path,
    loaded: Loaded,
    evaluation: Evaluation,
    extras: ReportExtras | None = None,
    figure_format: str | None = None,
) -> list[str]:
    """Writes report.html, and with a `figure_format` ("pdf" or "png") the figures as files in `figures/` before it.

    The clips of the examples shown are decoded once more for their frames. Returns the names of the files.
    """
    extras = extras or ReportExtras()
    figures: dict[str, Figure] = {}
    page = _render_page(loaded, evaluation, extras, figures)
    written = []
    if figure_format is not None:
        if extras.one_clip is not None:
            figures["one clip"] = draw_one_clip(extras.one_clip)
        files = write_figures(folder / "figures", figures, figure_format)
        written = [f"figures/{file.name}" for file in files]
    # Names of files on disk need not be UTF-8.
    write_file_atomically(folder / REPORT, page.encode("utf-8", "replace").decode("utf-8"))
    return [*written, REPORT]


def _render_page(loaded: Loaded, evaluation: Evaluation, extras: ReportExtras, figures: dict[str, "Figure"]) -> str:
    """The page; the figures drawn for it are added to `figures` by name."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mirasol.evaluation", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["percent"] = lambda share: "–" if share is None else f"{100 * share:.1f}"
    environment.filters["sentence"] = lambda text: text[:1].upper() + text[1:]

    def draw(name: str, figure: "Figure") -> str:
        figures[name] = figure
        return convert_to_svg(figure, name)

    record, unusable = evaluation.record, evaluation.record["unusable_clips"]
    colours = choose_type_colours(evaluation)
    losses = draw_losses(extras.log)
    learning = draw_learning(extras.log, colours)
    return environment.get_template("report.html.jinja").render(
        title=extras.title or f"{name_dataset(evaluation)}, {record['split']}",
        lead=extras.lead or f"Checkpoint {name_checkpoint(loaded.folder)}.",
        record=record,
        protocols=[
            _describe_protocol(loaded, evaluation, name, extras.others, colours, draw) for name in evaluation.protocols
        ],
        calibration=_describe_calibration(record["calibration"], draw),
        training_time=format_seconds(extras.training_seconds) if extras.training_seconds else None,
        steps=max((row["step"] for row in extras.log), default=0),
        losses=[
            {"title": title, "last": last, "unit": unit, "svg": draw(f"loss {title}", figure)}
            for title, (last, unit, figure) in losses.items()
        ],
        learning=draw("learning", learning) if learning is not None else None,
        one_clip=describe_one_clip(extras.one_clip) if extras.one_clip is not None else None,
        unusable=unusable[:MOST_UNUSABLE],
        more_unusable=max(0, len(unusable) - MOST_UNUSABLE),
        facts={**extras.facts, **_collect_facts(record)},
        details=json.dumps(
            {key: value for key, value in record.items() if key not in ("protocols", "unusable_clips")}, indent=1
        ),
        recipe=extras.recipe,
    )


def _describe_calibration(
    calibration: Mapping[str, Any], draw: Callable[[str, "Figure"], str]
) -> dict[str, Any] | None:
    """The reliability curve and its table; None without answers."""
    if not calibration["answers"]:
        return None
    sets = {"clips as they are": calibration["bins"]}
    if "bins_removed" in calibration:
        sets["picture, sound or both removed"] = calibration["bins_removed"]
    found = calibration.get("threshold")
    figure = draw_reliability(sets, found and found["value"])
    return {
        "svg": draw("reliability", figure),
        "sets": list(sets),
        "rows": [bins for bins in zip(*sets.values(), strict=True) if any(one["answers"] for one in bins)],
        "error": calibration["calibration_error"],
        "threshold": found,
    }


def name_dataset(evaluation: Evaluation) -> str:
    """The data set's name, for your own folder the folder's."""
    name = evaluation.record["source"]
    return Path(evaluation.dataset.root).resolve().name if name == "folder" else name


def name_checkpoint(folder: Path) -> str:
    """The checkpoint's name, for that of a run the run's name too."""
    folder = folder.resolve()
    return f"{folder.parent.name}/{folder.name}" if folder.name == "checkpoint" else folder.name


def _collect_facts(record: Mapping[str, Any]) -> dict[str, str]:
    """The settings and versions that the end of the page lists."""
    settings = {
        name.replace("_", " "): str(value)
        for name, value in record["settings"].items()
        if value is not None and name != "controls"  # they head the table's columns
    }
    hashes = {"checkpoint": record["checkpoint"]["sha256"][:10], "data": record["data"]["sha256"][:10]}
    return {**{f"{name} hash": value for name, value in hashes.items()}, **settings, **record["versions"]}


def choose_type_colours(evaluation: Evaluation) -> dict[str, str]:
    """A colour for every question type, the same all over the page; none where there are more types than colours."""
    scores = next(iter(evaluation.protocols.values()))
    types = order_rows({item.example.type_name for item in scores.judged})
    return dict(zip(types, TYPE_COLOURS, strict=False)) if len(types) <= len(TYPE_COLOURS) else {}


def order_rows(names: Sequence[str] | set[str]) -> list[str]:
    """Rows of a table in the order of the page: types of shapes and sounds first, all others as they come (of a set,
    by alphabet)."""
    own = [name for name in TYPE_MEANINGS if name in names]
    return own + [name for name in (sorted(names) if isinstance(names, set) else names) if name not in own]


def _describe_protocol(
    loaded: Loaded,
    evaluation: Evaluation,
    name: str,
    others: Mapping[str, Evaluation],
    colours: Mapping[str, str],
    draw: Callable[[str, "Figure"], str],
) -> dict[str, Any]:
    scores, controls = evaluation.protocols[name], evaluation.controls[name]
    columns = collect_columns(
        scores, controls, {key: other.protocols[name] for key, other in others.items() if name in other.protocols}
    )
    order = order_rows(list(scores.metrics))
    right = [item for item in scores.judged if item.right]
    wrong = [item for item in scores.judged if not item.right]
    bars = collect_bars(scores, columns, {control.replace("_", " ") for control in controls}, colours)
    by_length = compute_accuracy_by_length(scores.judged, evaluation.chunks, loaded.processor.feature_extractor.grid)
    confusion = count_confusions(scores.judged, evaluation.dataset.classes) if name == CANDIDATES else None
    record = evaluation.record["protocols"][name]
    return {
        "name": name,
        "how": record["how"],
        "normalisation": scores.normalisation,
        "headline": scores.headline,
        "value": scores.headline_estimate,
        "over_annotated": record["headline_over_annotated"],
        "columns": columns,
        "rows": [describe_row(row, scores.metrics[row], columns) for row in order],
        "tiles": {key: values.get(scores.headline) for key, values in columns.items()},
        "chart": draw(f"{name} scores", draw_scores(bars)) if bars else None,
        "lengths": draw(f"{name} by length", draw_scores(by_length)) if len(by_length) > 1 else None,
        "one_length": by_length[0].name if len(by_length) == 1 else None,
        "confusion": draw(f"{name} confusion", draw_confusion(*confusion)) if confusion is not None else None,
        "confusions": find_most_confused(scores.judged),
        "right": [_describe_example(item, loaded, evaluation) for item in choose_examples(right)],
        "wrong": [_describe_example(item, loaded, evaluation) for item in choose_examples(wrong)],
        "right_count": len(right),
        "wrong_count": len(wrong),
    }


def describe_row(name: str, estimate: Estimate, columns: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
    """A row of the table of numbers: texts, and the shares that shade its cells."""
    interval = ""
    if estimate.low is not None and estimate.high is not None:
        interval = f"{format_number(name, estimate.low)} to {format_number(name, estimate.high)}"
    values = [estimate.value, *(column[name] for column in columns.values())]
    is_share = name != "d-prime" and all(value is None or value <= 1 for value in values)
    cells = [
        {"text": "–" if value is None else format_number(name, value), "share": value if is_share else None}
        for value in values
    ]
    return {
        "name": name,
        "meaning": TYPE_MEANINGS.get(name, ""),
        "score": cells[0],
        "interval": interval,
        "n": estimate.n,
        "others": cells[1:],
    }


def collect_bars(
    scores: ProtocolScores,
    columns: Mapping[str, Mapping[str, float | None]],
    controls: set[str],
    colours: Mapping[str, str],
) -> list[ScoreBar]:
    """The bars of the chart of scores: every number that is a share, with baselines and controls."""
    bars = []
    for name in order_rows(list(scores.metrics)):
        estimate = scores.metrics[name]
        if estimate.value is None or estimate.value > 1 or name == "d-prime":
            continue
        bars.append(
            ScoreBar(
                name,
                estimate.value,
                estimate.low,
                estimate.high,
                colours.get(name, "soft" if colours else "accent"),
                lines={key: columns[key][name] for key in MAIN_BASELINES if key in columns},
                marks={key: values[name] for key, values in columns.items() if key in controls},
            )
        )
    return bars


def compute_accuracy_by_length(
    judged: Sequence[JudgedAnswer], chunks: Mapping[str, int], grid: ChunkGrid
) -> list[ScoreBar]:
    """Accuracy of up to five bins of about equally many questions, by the length of their clips; with 95 % intervals
    over videos."""
    lengths = np.array([chunks[item.example.id] for item in judged])
    if not len(lengths):
        return []
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, LENGTH_BINS + 1), method="lower"))
    bins = np.searchsorted(edges[1:-1], lengths, side="right")
    values = np.array([item.value for item in judged])
    chosen = bins[:, None] == np.unique(bins)
    intervals = compute_mean_intervals(values, [item.example.video_name for item in judged], chosen)
    bars = []
    for inside, interval in zip(chosen.T, intervals, strict=True):
        label = format_length(int(lengths[inside].min()), int(lengths[inside].max()), grid)
        name = f"{label}, n = {int(inside.sum())}"
        bars.append(ScoreBar(name, float(values[inside].mean()), interval.low, interval.high))
    return bars


def format_length(shortest: int, longest: int, grid: ChunkGrid) -> str:
    """Numbers of chunks, with seconds where chunks have a fixed length; clips of `max_chunks` chunks may be longer."""
    numbers = [shortest] if shortest == longest else [shortest, longest]
    chunks = f"{' to '.join(map(str, numbers))} chunk{'s' if longest > 1 else ''}"
    if grid.chunk_seconds is None:
        return chunks
    seconds = " to ".join(f"{number * grid.chunk_seconds:g}" for number in numbers)
    return f"{seconds} s{' or more' if longest == grid.max_chunks else ''} ({chunks})"


def find_most_confused(judged: Sequence[JudgedAnswer]) -> list[tuple[str, str, int]]:
    """(target, answer, times) of the most frequent wrong answers; ties in alphabetical order."""
    wrong = Counter((item.example.target, item.shown_answer) for item in judged if not item.right)
    ranked = sorted(wrong.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_CONFUSIONS]
    return [(*pair, count) for pair, count in ranked]


def count_confusions(judged: Sequence[JudgedAnswer], classes: Sequence[str]) -> tuple[np.ndarray, list[str]] | None:
    """How many clips of each class (row) were given each class (column), and the names of those classes: the ones that
    occur. None without classes, or where they are too many for a picture."""
    place = {name: index for index, name in enumerate(classes)}
    pairs = [(place.get(item.example.target), place.get(item.predicted or "")) for item in judged]
    known = [(target, chosen) for target, chosen in pairs if target is not None and chosen is not None]
    if not known or len(classes) > MOST_CLASSES:
        return None
    counts = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(counts, tuple(np.array(known).T), 1)
    present = np.flatnonzero(counts.any(axis=0) | counts.any(axis=1))
    return counts[np.ix_(present, present)], [classes[index] for index in present]


def choose_examples(items: Sequence[JudgedAnswer], count: int = SHOWN_EXAMPLES) -> list[JudgedAnswer]:
    """A few answers from evenly spaced videos, one of each, that together cover several question types."""
    by_video: dict[str, list[JudgedAnswer]] = defaultdict(list)
    for item in items:
        by_video[item.example.video_name].append(item)
    groups = list(by_video.values())
    if len(groups) > count:
        groups = [groups[(2 * place + 1) * len(groups) // (2 * count)] for place in range(count)]
    shown: Counter[str] = Counter()
    chosen = []
    for group in groups:
        chosen.append(min(group, key=lambda item: shown[item.example.type_name]))
        shown[chosen[-1].example.type_name] += 1
    return chosen


def _describe_example(item: JudgedAnswer, loaded: Loaded, evaluation: Evaluation) -> dict[str, Any]:
    example = item.example
    return {
        "prompt": example.prompt,
        "target": example.target,
        "answer": item.shown_answer,
        "right": item.right,
        "type": example.question_type,
        "media": example.media,
        "frames": _draw_frames(item, loaded, evaluation.dataset.root),
    }


def _draw_frames(item: JudgedAnswer, loaded: Loaded, root: Path, count: int = 4) -> str | None:
    """The middle frames of a few chunks in one row; None for a clip without video or with a missing file."""
    try:
        tensors = load_clip(loaded.processor.feature_extractor, root, item.example)
    except BadClip:
        return None
    if not tensors["video_mask"].any():
        return None
    video = tensors["video"]
    chosen = np.unique(np.linspace(0, len(video) - 1, count).round().astype(int))
    frames = [video[int(place), video.shape[1] // 2].permute(1, 2, 0).numpy() for place in chosen]
    return make_picture_url(np.ascontiguousarray(np.concatenate(frames, axis=1)), 112)


def format_seconds(seconds: float) -> str:
    """Seconds as text, in minutes from one and a half minutes on."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"

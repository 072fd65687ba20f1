"""AudioSet (Gemmeke et al., ICASSP 2017): ten-second clips with one or more of 527 labels, whose names are the target.

The paper pre-trains on AudioSet-2M, "output the text of the class names", and does not say of which of them or in what
order: `targets` chooses between all and one at random.
"""

import math
from pathlib import Path

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.contract import Adapter, Published, Rows
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.tables import read_csv_rows, read_strict_csv
from mirasol.data.datasets.windows import find_segment
from mirasol.data.example import Example
from mirasol.errors import UserError

PROMPT = "what are the sounds?"
LABELS = "class_labels_indices.csv"
SEPARATOR = "; "  # names hold commas
# AST and audioset-processing write the start as in the csv (30.000) or as a whole number; the last two are PANNs' name
# of a clip and the name of a whole video, or the other way round: `recognise_cut_files` looks.
PATTERNS = ("{id}_{start_ms}_{end_ms}", "{id}_{start}.000", "{id}_{start}", "{id}_{start:06d}", "Y{id}", "{id}")
FILES = {
    "balanced_train": ("balanced_train_segments.csv",),
    "unbalanced_train": ("unbalanced_train_segments.csv",),
    "train": ("balanced_train_segments.csv", "unbalanced_train_segments.csv"),  # AudioSet-2M
    "eval": ("eval_segments.csv",),
}
PUBLISHED = {
    "balanced_train": Published(22_160, 22_160),
    "unbalanced_train": Published(2_041_789, 2_041_789),
    "train": Published(2_063_949, 2_063_949),
    "eval": Published(20_371, 20_371),
}


def list_splits(files: Files) -> list[str]:
    """The splits all of whose segment files are there."""
    return [split for split, names in FILES.items() if all(files.annotation(name) for name in names)]


def read_split(files: Files, split: str, options: DatasetOptions) -> Rows:
    """The segments of a split; ids are `{id}_{start in milliseconds}`."""
    rows = Rows()
    names = _read_label_names(files)
    rows.classes = tuple(names.values())
    rows.facts["targets"] = options.targets
    for name in FILES[split]:
        path = files.annotation(name)
        assert path is not None
        rows.annotation_files.append(files.shown(path))
        _read_segments(path, rows.annotation_files[-1], files, names, options, rows)
    return rows


def _read_segments(
    path: Path, shown: str, files: Files, names: dict[str, str], options: DatasetOptions, rows: Rows
) -> None:
    columns = ("id", "start", "end", "labels")
    table = read_csv_rows(path, shown, rows, columns, header=False, skip_initial_space=True, comment="#")
    folder = path.stem.removesuffix("_segments")
    for line, row in table:
        id = row["id"]
        window = _parse_window(row)
        if window is None:
            message = f"expected seconds, the start before the end; found {row['start']!r} and {row['end']!r}"
            rows.skip("malformed", message, shown, line)
            continue
        mids = dict.fromkeys(row["labels"].split(","))
        unknown = [mid for mid in mids if mid not in names]
        if unknown:
            message = f"label {unknown[0]!r} is not among the {len(names)} classes of {LABELS}"
            rows.skip("unknown label", message, shown, line)
            continue
        labels = tuple(names[mid] for mid in mids)
        example = Example(
            f"{id}_{int(window[0] * 1000)}",
            *find_segment(files, options, PATTERNS, id, window, rows, (folder,)),
            options.prompt or PROMPT,
            SEPARATOR.join(labels) if options.targets == "all" else labels[0],
            video=id,
            references=labels,
            random_target=options.targets == "one",
        )
        rows.add(example, shown, line)


def _parse_window(row: dict[str, str]) -> tuple[float, float] | None:
    """Start and end in seconds; None where the row tells none."""
    try:
        start, end = float(row["start"]), float(row["end"])
    except ValueError:
        return None
    return (start, end) if 0 <= start < end < math.inf else None


def _read_label_names(files: Files) -> dict[str, str]:
    """Display names by mid, in the order of the class index."""
    path = files.annotation(LABELS)
    if path is None:
        raise UserError(f"{files.annotation_root}: {LABELS}, which names AudioSet's labels, is not there: add it")
    table = read_strict_csv(path, files.shown(path), ("index", "mid", "display_name"))
    return {row["mid"]: row["display_name"] for row in table}


ADAPTER = Adapter(
    "AudioSet",
    list_splits,
    read_split,
    PUBLISHED,
    overlapping=("train",),
    options=("annotations", "targets", "prompt", "pattern"),
    protocol="labels",
)

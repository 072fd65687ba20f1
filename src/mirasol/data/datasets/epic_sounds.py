"""EPIC-SOUNDS (Huh et al., ICASSP 2023): windows of long kitchen videos, stamped in samples of 24 kHz audio."""

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.contract import Adapter, AnnotationError, Problem, Published, Rows
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.tables import is_whole_number, read_csv_rows, read_strict_csv
from mirasol.data.example import Example
from mirasol.errors import UserError

PROMPT = "what is the sound?"
SAMPLE_RATE = 24_000  # Hz
# Milliseconds of the time stamps are rounded, samples are not.
TOLERANCE = 0.002
MOST_CLASSES = 1_000  # there are 44: a mistyped class_id must not make a list of millions
FILES = {
    "train": "EPIC_Sounds_train.csv",
    "validation": "EPIC_Sounds_validation.csv",
    "test": "EPIC_Sounds_recognition_test_timestamps.csv",  # labels are the challenge server's
    "not_categorised": "sound_events_not_categorised.csv",
}
PUBLISHED = {
    "train": Published(60_055),
    "validation": Published(8_035, 137),
    "test": Published(5_131, 44),
    "not_categorised": Published(39_187),
}
COLUMNS = (
    "annotation_id",
    "participant_id",
    "video_id",
    "start_timestamp",
    "stop_timestamp",
    "start_sample",
    "stop_sample",
)


def list_splits(files: Files) -> list[str]:
    """The splits whose csv is there. Raises UserError where only the pickles are: opening one can run code."""
    found = [split for split, name in FILES.items() if files.annotation(name)]
    pickle = None if found else files.annotation(*(name.replace(".csv", ".pkl") for name in FILES.values()))
    if pickle is not None:
        raise UserError(f"{pickle}: pickles are not opened, for they can run code: use the csv file of the same name")
    return found


def read_split(files: Files, split: str, options: DatasetOptions) -> Rows:
    """The sounds of a split; windows are the sample stamps in seconds.

    Sounds without a category have their free description as target, those of `test` have none.
    """
    path = files.annotation(FILES[split])
    assert path is not None
    rows, shown = Rows(), files.shown(path)
    rows.annotation_files.append(shown)
    labelled = split in ("train", "validation")
    label = {"class", "class_id"} if labelled else {"description"} if split == "not_categorised" else set()
    table = list(read_csv_rows(path, shown, rows, (*COLUMNS, *sorted(label))))
    rows.classes = classes = _read_classes(files, [row for _, row in table] if labelled else [], rows)
    if files.annotation("EPIC_audio.hdf5"):
        rows.facts["audio"] = "EPIC_audio.hdf5 is not read: extract it to {video_id}.wav, or give the videos"
    media: dict[str, str] = {}
    for line, row in table:
        window = _parse_window(row)
        if isinstance(window, str):
            rows.skip("malformed", window, shown, line)
            continue
        target = row["class"] if labelled else row.get("description", "")
        if split != "test" and not target.strip():
            rows.skip("empty text", "the class or description is empty", shown, line)
            continue
        if labelled and (not is_whole_number(row["class_id"]) or classes[int(row["class_id"]) :][:1] != (target,)):
            message = f"class {target!r} with class_id {row['class_id']} is not among the {len(classes)} classes"
            rows.skip("unknown label", message, shown, line)
            continue
        video = row["video_id"]
        if video not in media:
            media[video] = files.media([video], [row["participant_id"]]) or ""
        example = Example(
            row["annotation_id"], media[video], *window, options.prompt or PROMPT, target,
            candidates=classes if labelled else (), video=video,
        )  # fmt: skip
        rows.add(example, shown, line)
    return rows


def _parse_window(row: dict[str, str]) -> tuple[float, float] | str:
    """Start and end in seconds, or what is wrong with them."""
    try:
        samples = int(row["start_sample"]), int(row["stop_sample"])
        stamps = _parse_seconds(row["start_timestamp"]), _parse_seconds(row["stop_timestamp"])
    except ValueError:
        return "expected HH:MM:SS.mmm and whole numbers of samples; found " + ",".join(
            row[name] for name in COLUMNS[3:]
        )
    start, end = (sample / SAMPLE_RATE for sample in samples)
    if not 0 <= start < end:
        return f"start_sample {samples[0]} must be before stop_sample {samples[1]}"
    if not (abs(start - stamps[0]) <= TOLERANCE and abs(end - stamps[1]) <= TOLERANCE):  # "nan" is a float, too
        return (
            f"samples {samples[0]} to {samples[1]} at 24 kHz are {start:.3f} to {end:.3f} s, "
            f"but the time stamps say {stamps[0]:.3f} to {stamps[1]:.3f} s"
        )
    return start, end


def _parse_seconds(stamp: str) -> float:
    hours, minutes, seconds = stamp.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def _read_classes(files: Files, labelled: list[dict[str, str]], rows: Rows) -> tuple[str, ...]:
    """Class names by class_id: from classes.csv, or those that occur in the split where it is not there."""
    path = files.annotation("classes.csv")
    if path is not None:
        shown = files.shown(path)
        table = read_strict_csv(path, shown, ("class_id", "class"))
        if [row["class_id"] for row in table] != [str(place) for place in range(len(table))]:
            raise AnnotationError(Problem("malformed", "class_id must count 0, 1, 2 … in its order", shown, 2))
        return tuple(row["class"] for row in table)
    known = (row for row in labelled if is_whole_number(row["class_id"]) and int(row["class_id"]) < MOST_CLASSES)
    found = sorted({(row["class_id"], row["class"]) for row in known})
    if not found:
        return ()
    rows.facts["class_list"] = "the classes that occur: classes.csv is not there"
    names = dict.fromkeys(range(max(int(id) for id, _ in found) + 1), "")
    for id, name in found:
        names[int(id)] = names[int(id)] or name
    return tuple(names.values())


ADAPTER = Adapter(
    "EPIC-SOUNDS", list_splits, read_split, PUBLISHED, options=("annotations", "prompt"), protocol="classes"
)

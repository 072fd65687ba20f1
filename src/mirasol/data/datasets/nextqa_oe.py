"""NExT-QA, open-ended: answers of a few words; half of the test videos have a second reference answer."""

from typing import Any

from mirasol.data.datasets.contract import Adapter, AnnotationError, DatasetOptions, Problem, Published, Rows
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.nextqa import FILES, TYPES, Videos, annotation
from mirasol.data.datasets.tables import csv_header, csv_rows, kind_of, read_json_object
from mirasol.data.example import Example

REFERENCES = "add_reference_answer_test.json"


def _published(examples: int, videos: int, *counts: int) -> Published:
    return Published(examples, videos, dict(zip(TYPES, counts, strict=True)))


PUBLISHED = {
    "train": _published(37_523, 3_870, 13552, 4400, 5685, 292, 4797, 2928, 1378, 1942, 2549),
    "validation": _published(5_343, 570, 1928, 683, 895, 54, 663, 277, 192, 295, 356),
    "test": _published(9_178, 1_000, 3333, 1174, 1399, 93, 1165, 495, 365, 482, 672),
}


def splits(files: Files) -> list[str]:
    """The splits whose csv has answers and no options."""
    return [split for split in FILES if annotation(files, split, multiple_choice=False)]


def read(files: Files, split: str, options: DatasetOptions) -> Rows:
    """The questions of a split; ids are `{video}_{qid}`, a second question of one id gets `#2`.

    (The training split has three such pairs, and both questions of each are meant.)
    """
    path = annotation(files, split, multiple_choice=False)
    assert path is not None
    rows, shown, videos = Rows(), files.shown(path), Videos(files)
    rows.annotation_files.append(shown)
    seconds = _references(files, rows) if split == "test" else {}
    named = "video_id" if "video_id" in csv_header(path) else "video"
    for line, row in csv_rows(path, shown, rows, (named, "question", "answer", "qid", "type")):
        video, answer = row[named].strip(), row["answer"].strip()
        if not row["question"].strip() or not answer:
            rows.skip("empty text", "question or answer is empty", shown, line)
            continue
        id = f"{video}_{row['qid']}"
        if split == "train" and rows.seen(id):
            id += "#2"
        second = seconds.get(video, {}).get(row["qid"], "")
        example = Example(
            id, videos.find(video), None, None, row["question"], answer, row["type"],
            video=video, references=(answer, second) if second and second != answer else (),
        )  # fmt: skip
        rows.add(example, shown, line)
    return rows


def _references(files: Files, rows: Rows) -> dict[str, dict[str, Any]]:
    """The second reference answers of the test split by video and qid."""
    path = files.annotation(REFERENCES)
    if path is None:
        rows.facts["second_references"] = f"none: {REFERENCES} is not there"
        return {}
    shown = files.shown(path)
    rows.annotation_files.append(shown)
    references = read_json_object(path, shown)
    for video, answers in references.items():
        if not isinstance(answers, dict) or not all(isinstance(answer, str) for answer in answers.values()):
            message = f"answers of video {video!r} must be an object of texts by qid, not {kind_of(answers)}"
            raise AnnotationError(Problem("malformed", message, shown))
    return references


ADAPTER = Adapter("NExT-QA, open-ended", splits, read, PUBLISHED)

"""NExT-QA (Xiao et al., CVPR 2021): why, how and when questions, with five options each or with open-ended answers.

In the multiple-choice csv `answer` is the index of the right option, in one variant its text. Open-ended answers are a
few words; half of the test videos have a second reference answer.
"""

from pathlib import Path
from typing import Any

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.contract import Adapter, AnnotationError, Problem, Published, Rows
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.tables import describe_type, read_csv_header, read_csv_rows, read_json_object
from mirasol.data.example import Example

FILES = {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}
CHOICES = ("a0", "a1", "a2", "a3", "a4")
SHARED = {"question", "answer", "qid", "type"}
# Causal why and how; temporal next, previous, current; descriptive binary, count, location, other.
TYPES = ("CW", "CH", "TN", "TP", "TC", "DB", "DC", "DL", "DO")


def _find_annotation(files: Files, split: str, multiple_choice: bool) -> Path | None:
    """The split's csv of the task: both tasks call theirs alike, the header tells which it is."""
    wanted = FILES[split]
    candidates = [path for path in files.annotation_paths if path.name.lower().endswith(wanted)]
    for path in sorted(candidates, key=lambda path: path.name.lower() != wanted):
        header = set(read_csv_header(path))
        if header >= SHARED and (set(CHOICES) <= header) == multiple_choice:
            return path
    # A file of neither task is reported as a wrong header when it is read, rather than as missing.
    exact = (path for path in candidates if path.name.lower() == wanted)
    return next((path for path in exact if not set(read_csv_header(path)) >= SHARED), None)


class _VideoFinder:
    """Where the videos are: in VidOR's folders, to which a json maps ids, or in one folder."""

    def __init__(self, files: Files):
        self.files = files
        path = files.annotation("map_vid_vidorID.json")
        self.folders = read_json_object(path, files.shown(path)) if path is not None else {}

    def find(self, video: str) -> str:
        """The video's file, "" where it is not there."""
        mapped = str(self.folders.get(video, ""))
        return self.files.media([video], mapped.split("/")[:-1]) or ""


PUBLISHED_CHOICES = {
    "train": Published(34_132, 3_870),
    "validation": Published(
        4_996, 570, {"CW": 1924, "CH": 683, "TN": 895, "TP": 54, "TC": 663, "DC": 177, "DL": 295, "DO": 305}
    ),
    "test": Published(
        8_564, 1_000, {"CW": 3329, "CH": 1173, "TN": 1399, "TP": 93, "TC": 1165, "DC": 322, "DL": 483, "DO": 600}
    ),
}


def list_choice_splits(files: Files) -> list[str]:
    """The splits whose csv has the columns a0 to a4."""
    return [split for split in FILES if _find_annotation(files, split, multiple_choice=True)]


def read_choices(files: Files, split: str, options: DatasetOptions) -> Rows:
    """The questions of a split; ids are `{video}_{qid}`, as the official predictions have them."""
    path = _find_annotation(files, split, multiple_choice=True)
    assert path is not None
    rows, shown, videos = Rows(), files.shown(path), _VideoFinder(files)
    rows.annotation_files.append(shown)
    video_column = "video_id" if "video_id" in read_csv_header(path) else "video"
    for line, row in read_csv_rows(path, shown, rows, (video_column, "question", "answer", "qid", "type", *CHOICES)):
        choices = tuple(row[name].strip() for name in CHOICES)
        right = _find_right_choice(row["answer"].strip(), choices)
        if not row["question"].strip() or not all(choices):
            rows.skip("empty text", "question or option is empty", shown, line)
        elif right is None:
            message = (
                f"answer {row['answer']!r} is out of range: neither 0 to {len(choices) - 1} nor one of the options"
            )
            rows.skip("answer out of range", message, shown, line)
        else:
            video = row[video_column].strip()
            example = Example(
                f"{video}_{row['qid']}", videos.find(video), None, None, row["question"], choices[right], row["type"],
                choices, video=video, answer_index=right,
            )  # fmt: skip
            rows.add(example, shown, line)
    return rows


def _find_right_choice(answer: str, choices: tuple[str, ...]) -> int | None:
    # Options can be numbers too ("2"): as an index is how the original means them.
    if answer.isascii() and answer.isdigit() and int(answer) < len(choices):
        return int(answer)
    return choices.index(answer) if answer in choices else None


REFERENCES = "add_reference_answer_test.json"


def _count_by_type(examples: int, videos: int, *counts: int) -> Published:
    return Published(examples, videos, dict(zip(TYPES, counts, strict=True)))


PUBLISHED_OPEN = {
    "train": _count_by_type(37_523, 3_870, 13552, 4400, 5685, 292, 4797, 2928, 1378, 1942, 2549),
    "validation": _count_by_type(5_343, 570, 1928, 683, 895, 54, 663, 277, 192, 295, 356),
    "test": _count_by_type(9_178, 1_000, 3333, 1174, 1399, 93, 1165, 495, 365, 482, 672),
}


def list_open_splits(files: Files) -> list[str]:
    """The splits whose csv has answers and no options."""
    return [split for split in FILES if _find_annotation(files, split, multiple_choice=False)]


def read_open_questions(files: Files, split: str, options: DatasetOptions) -> Rows:
    """The questions of a split; ids are `{video}_{qid}`, a second question of one id gets `#2`.

    (The training split has three such pairs, and both questions of each are meant.)
    """
    path = _find_annotation(files, split, multiple_choice=False)
    assert path is not None
    rows, shown, videos = Rows(), files.shown(path), _VideoFinder(files)
    rows.annotation_files.append(shown)
    second_references = _read_second_references(files, rows) if split == "test" else {}
    video_column = "video_id" if "video_id" in read_csv_header(path) else "video"
    for line, row in read_csv_rows(path, shown, rows, (video_column, "question", "answer", "qid", "type")):
        video, answer = row[video_column].strip(), row["answer"].strip()
        if not row["question"].strip() or not answer:
            rows.skip("empty text", "question or answer is empty", shown, line)
            continue
        id = f"{video}_{row['qid']}"
        if split == "train" and rows.seen(id):
            id += "#2"
        second = second_references.get(video, {}).get(row["qid"], "")
        example = Example(
            id, videos.find(video), None, None, row["question"], answer, row["type"],
            video=video, references=(answer, second) if second and second != answer else (),
        )  # fmt: skip
        rows.add(example, shown, line)
    return rows


def _read_second_references(files: Files, rows: Rows) -> dict[str, dict[str, Any]]:
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
            message = f"answers of video {video!r} must be an object of texts by qid, not {describe_type(answers)}"
            raise AnnotationError(Problem("malformed", message, shown))
    return references


OPEN_ENDED = Adapter("NExT-QA, open-ended", list_open_splits, read_open_questions, PUBLISHED_OPEN)
MULTIPLE_CHOICE = Adapter(
    "NExT-QA, multiple choice", list_choice_splits, read_choices, PUBLISHED_CHOICES, protocol="multiple choice"
)

"""NExT-QA, multiple choice: five options a question; `answer` is the right one's index, or in a variant its text."""

from mirasol.data.datasets.contract import Adapter, DatasetOptions, Published, Rows
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.nextqa import CHOICES, FILES, Videos, annotation
from mirasol.data.datasets.tables import csv_header, csv_rows
from mirasol.data.example import Example

PUBLISHED = {
    "train": Published(34_132, 3_870),
    "validation": Published(
        4_996, 570, {"CW": 1924, "CH": 683, "TN": 895, "TP": 54, "TC": 663, "DC": 177, "DL": 295, "DO": 305}
    ),
    "test": Published(
        8_564, 1_000, {"CW": 3329, "CH": 1173, "TN": 1399, "TP": 93, "TC": 1165, "DC": 322, "DL": 483, "DO": 600}
    ),
}


def splits(files: Files) -> list[str]:
    """The splits whose csv has the columns a0 to a4."""
    return [split for split in FILES if annotation(files, split, multiple_choice=True)]


def read(files: Files, split: str, options: DatasetOptions) -> Rows:
    """The questions of a split; ids are `{video}_{qid}`, as the official predictions have them."""
    path = annotation(files, split, multiple_choice=True)
    assert path is not None
    rows, shown, videos = Rows(), files.shown(path), Videos(files)
    rows.annotation_files.append(shown)
    named = "video_id" if "video_id" in csv_header(path) else "video"
    for line, row in csv_rows(path, shown, rows, (named, "question", "answer", "qid", "type", *CHOICES)):
        choices = tuple(row[name].strip() for name in CHOICES)
        right = _right(row["answer"].strip(), choices)
        if not row["question"].strip() or not all(choices):
            rows.skip("empty text", "question or option is empty", shown, line)
        elif right is None:
            message = (
                f"answer {row['answer']!r} is out of range: neither 0 to {len(choices) - 1} nor one of the options"
            )
            rows.skip("answer out of range", message, shown, line)
        else:
            video = row[named].strip()
            example = Example(
                f"{video}_{row['qid']}", videos.find(video), None, None, row["question"], choices[right], row["type"],
                choices, video=video, answer_index=right,
            )  # fmt: skip
            rows.add(example, shown, line)
    return rows


def _right(answer: str, choices: tuple[str, ...]) -> int | None:
    # DatasetOptions can be numbers too ("2"): as an index is how the original means them.
    if answer.isascii() and answer.isdigit() and int(answer) < len(choices):
        return int(answer)
    return choices.index(answer) if answer in choices else None


ADAPTER = Adapter("NExT-QA, multiple choice", splits, read, PUBLISHED, protocol="multiple choice")

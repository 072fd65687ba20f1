"""NExT-QA (Xiao et al., CVPR 2021): what its multiple-choice and its open-ended task share."""

from pathlib import Path

from mirasol.data.datasets.files import Files
from mirasol.data.datasets.tables import csv_header, read_json_object

FILES = {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}
CHOICES = ("a0", "a1", "a2", "a3", "a4")
SHARED = {"question", "answer", "qid", "type"}
# Causal why and how; temporal next, previous, current; descriptive binary, count, location, other.
TYPES = ("CW", "CH", "TN", "TP", "TC", "DB", "DC", "DL", "DO")


def annotation(files: Files, split: str, multiple_choice: bool) -> Path | None:
    """The split's csv of the task: both tasks call theirs alike, the header tells which it is."""
    wanted = FILES[split]
    named = [path for path in files.annotation_paths if path.name.lower().endswith(wanted)]
    for path in sorted(named, key=lambda path: path.name.lower() != wanted):
        header = set(csv_header(path))
        if header >= SHARED and (set(CHOICES) <= header) == multiple_choice:
            return path
    # One that is neither task's is told as a wrong header when it is read, rather than as missing.
    exact = (path for path in named if path.name.lower() == wanted)
    return next((path for path in exact if not set(csv_header(path)) >= SHARED), None)


class Videos:
    """Where the videos lie: in VidOR's folders, which a json maps ids to, or flat."""

    def __init__(self, files: Files):
        self.files = files
        path = files.annotation("map_vid_vidorID.json")
        self.folders = read_json_object(path, files.shown(path)) if path is not None else {}

    def find(self, video: str) -> str:
        """The video's file, "" where it is not there."""
        mapped = str(self.folders.get(video, ""))
        return self.files.media([video], mapped.split("/")[:-1]) or ""

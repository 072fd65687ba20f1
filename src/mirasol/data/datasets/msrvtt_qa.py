"""MSRVTT-QA (Xu et al., ACM MM 2017): the original json, the jsonl of ClipBERT's line, the csv of HQGA and just-ask."""

from collections.abc import Iterator
from pathlib import Path

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.contract import Adapter, AnnotationError, Problem, Published, Rows
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.tables import ID, JsonArray, read_csv_header, read_csv_rows, read_json_lines
from mirasol.data.example import Example

# The original goes first: only it has both the ids and the whole questions.
FILES = {
    "train": ("train_qa.json", "train.jsonl", "train.csv", "hqga_train.csv"),
    "validation": ("val_qa.json", "val.jsonl", "val.csv", "hqga_val.csv"),
    "test": ("test_qa.json", "test.jsonl", "test.csv", "hqga_test.csv"),
}
PUBLISHED = {
    "train": Published(158_581, 6_513),
    "validation": Published(
        12_278, 497, {"what": 8_337, "who": 3_439, "how": 344, "when": 106, "where": 52}
    ),
    "test": Published(72_821, 2_990, {"what": 49_869, "who": 20_385, "how": 1_640, "when": 677, "where": 250}),
}  # fmt: skip


def list_splits(files: Files) -> list[str]:
    """The splits of which a file in one of the three formats is there."""
    return [split for split, names in FILES.items() if files.annotation(*names)]


def read_split(files: Files, split: str, options: DatasetOptions) -> Rows:
    """The questions of a split; `question_type` is the first word, as the papers' tables have it."""
    path = files.annotation(*FILES[split])
    assert path is not None
    rows, shown = Rows(), files.shown(path)
    rows.annotation_files.append(shown)
    rows.facts["annotation_format"] = path.suffix.removeprefix(".")
    reader = {".json": _read_original, ".jsonl": _read_lines, ".csv": _read_table}[path.suffix.lower()]
    for line, column, id, video, question, answer in reader(path, shown, rows):
        question = question.strip()
        if not question or not answer.strip():
            rows.skip("empty text", "question or answer is empty", shown, line, column)
            continue
        example = Example(
            id, files.media([video]) or "", None, None, question, answer, question.split()[0].lower(), video=video
        )
        rows.add(example, shown, line, column)
    return rows


Parsed = Iterator[tuple[int | None, int | None, str, str, str, str]]  # line, column, id, video, question, answer


def _read_original(path: Path, shown: str, rows: Rows) -> Parsed:
    items = JsonArray(path, shown)
    fields = {"answer": str, "id": ID, "question": str, "video_id": ID}
    for _, item in items.iterate_valid(rows, fields):
        yield None, None, str(item["id"]), _format_video(str(item["video_id"])), item["question"], item["answer"]


def _read_lines(path: Path, shown: str, rows: Rows) -> Parsed:
    # This variant has no ids: the line's number is used instead.
    for line, item in read_json_lines(path, shown, rows, {"answer": str, "question": str, "video_id": ID}):
        yield line, None, str(line), _format_video(str(item["video_id"])), item["question"], item["answer"]


def _read_table(path: Path, shown: str, rows: Rows) -> Parsed:
    header = read_csv_header(path)
    variants = {"qid": ("video", "qid"), "id": ("video_id", "id")}  # HQGA, just-ask
    known = [names for names in variants.values() if set(names) <= set(header)]
    if not known:
        message = (
            "wrong header: expected video,question,answer,qid,type or question,answer,category_id,video_id,id,type; "
            f"found {','.join(header) or 'nothing'}"
        )
        raise AnnotationError(Problem("wrong header", message, shown, 1, 1))
    video, id = known[0]
    for line, row in read_csv_rows(path, shown, rows, (video, "question", "answer", id)):
        # HQGA took the question marks away: with them all variants are the same questions.
        question = row["question"].rstrip()
        question += "" if question.endswith("?") or not question else "?"
        yield line, None, row[id], _format_video(row[video]), question, row["answer"]


def _format_video(name: str) -> str:
    return name if name.startswith("video") else f"video{name}"


ADAPTER = Adapter("MSRVTT-QA", list_splits, read_split, PUBLISHED)

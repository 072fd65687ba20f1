"""ActivityNet-QA (Yu et al., AAAI 2019): questions and answers in two json files, joined on `question_id`."""

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.contract import Adapter, Published, Rows
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.tables import ID, JsonArray
from mirasol.data.example import Example

FILES = {"train": "train", "validation": "val", "test": "test"}
# By the number of `type`; all from Yes/No on are what the papers call "Free".
TYPES = (
    "Motion", "Spatial relationship", "Temporal relationship",
    "Yes/No", "Color", "Object", "Location", "Number", "Other",
)  # fmt: skip
FREE = TYPES[3:]


def _count_published(examples: int, videos: int, *counts: int) -> Published:
    return Published(examples, videos, dict(zip(TYPES, counts, strict=True)))


PUBLISHED = {
    "train": _count_published(32_000, 3_200, 3200, 3200, 3200, 7242, 2833, 1338, 761, 2684, 7542),
    "validation": _count_published(18_000, 1_800, 1800, 1800, 1800, 4041, 1565, 961, 473, 1479, 4081),
    "test": _count_published(8_000, 800, 800, 800, 800, 2094, 697, 318, 386, 606, 1499),
}


def list_splits(files: Files) -> list[str]:
    """The splits of which the questions are there."""
    return [split for split, name in FILES.items() if files.annotation(f"{name}_q.json")]


def read_split(files: Files, split: str, options: DatasetOptions) -> Rows:
    """The questions of a split with their answers; a question without answer and an answer without question count."""
    rows = Rows()
    path = files.annotation(f"{FILES[split]}_q.json")
    assert path is not None
    questions, shown = JsonArray(path, files.shown(path)), files.shown(path)
    rows.annotation_files.append(shown)
    answers = _read_answers(files, split, rows)
    asked = set()
    fields = {"video_name": ID, "question": str, "question_id": ID}
    for index, item in questions.iterate_valid(rows, fields):
        id, video = str(item["question_id"]), str(item["video_name"])
        asked.add(id)
        if answers is not None and id not in answers:
            rows.skip("no answer", f"question {id!r} has no answer", shown, *questions.locate(index))
            continue
        answer, kind = answers[id] if answers is not None else ("", "")
        if not item["question"].strip() or (answers is not None and not answer.strip()):
            rows.skip("empty text", f"question {id!r} or its answer is empty", shown, *questions.locate(index))
            continue
        media = files.media((f"v_{video}", video)) or ""
        if rows.seen(id):
            rows.skip("duplicate id", f"id {id!r} was already used: left out", shown, *questions.locate(index))
            continue
        rows.add(Example(id, media, None, None, item["question"], answer, kind, video=video), shown)
    for id in answers or ():
        if id not in asked:
            rows.skip("answer without question", f"answer {id!r} has no question", rows.annotation_files[-1])
    return rows


def _read_answers(files: Files, split: str, rows: Rows) -> dict[str, tuple[str, str]] | None:
    """Answer and type by question id; None where the split has no answer file."""
    path = files.annotation(f"{FILES[split]}_a.json")
    if path is None:
        rows.facts["answers"] = f"none: {FILES[split]}_a.json is not there"
        return None
    shown, answers = files.shown(path), {}
    rows.annotation_files.append(shown)
    items = JsonArray(path, shown)
    for index, item in items.iterate_valid(rows, {"answer": str, "type": int, "question_id": ID}):
        id = str(item["question_id"])
        if not 0 <= item["type"] < len(TYPES):
            message = f"type {item['type']} is out of range: 0 to {len(TYPES) - 1}"
            rows.skip("malformed", message, shown, *items.locate(index), rows=0)
        elif id in answers:
            message = f"answer {id!r} was already given: the first one counts"
            rows.skip("duplicate id", message, shown, *items.locate(index), rows=0)
        else:
            answers[id] = (item["answer"], TYPES[item["type"]])
    return answers


ADAPTER = Adapter("ActivityNet-QA", list_splits, read_split, PUBLISHED)

"""How the clips of a folder are labelled: by tables, by folders named after classes, or by a text next to each clip."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mirasol.data.datasets.contract import Rows
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.folder import BadRow
from mirasol.data.datasets.tables import is_utf8, parse_annotation_json, read_text
from mirasol.data.example import Example
from mirasol.errors import UserError
from mirasol.finetune.label_tables import TABLES, read_tables
from mirasol.finetune.labels import ASK_CLASS, SPLITS, Labels, fill_prompts, is_media, name_columns, parse_example

SIDES = (".txt", ".json")
HOW_TO_LABEL = (
    "put the clips of each class into a folder of its name, or a caption next to each clip (a.mp4, a.txt), or write a "
    "table labels.csv with the columns file,target"
)


def read_labels(root: Path) -> Labels:
    """What the folder says about its clips; nothing is decoded.

    Raises:
        UserError: no folder, no media, media without labels or labels without media, tables that cannot be read, or
            that leave open which is which.
    """
    files = Files(root)
    found = [path for path in files.paths if is_media(path)]
    media = [path for path in found if is_utf8(path) and "\\" not in path]
    tables = [path for path in files.paths if "/" not in path and path.lower().endswith(TABLES) and path[0] != "."]
    if not media:
        raise UserError(_describe_no_media(files, tables))
    labels = read_tables(files, media, tables) if tables else _read_names(files, media)
    if not labels.all_examples:
        first = f", the first problem: {labels.problems[0]}" if labels.problems else ""
        raise UserError(
            f"{files.root}: {labels.layout}: no label has a clip{first}; paths are relative to {files.root}"
        )
    if len(media) < len(found):
        why = f"{len(found) - len(media)} files are not read: their names have a backslash or are not UTF-8"
        return replace(labels, remarks=(*labels.remarks, why))
    return labels


def _describe_no_media(files: Files, tables: Sequence[str]) -> str:
    kinds = Counter(Path(path).suffix.lower() or "without suffix" for path in files.paths)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4)) or "it is empty"
    where = f": {tables[0]} has labels, but the clips it names must be below this folder too" if tables else ""
    return (
        f"{files.root}: no video or sound file in this folder or below it ({listed}){where or ': give another folder'}"
    )


def _read_names(files: Files, media: Sequence[str]) -> Labels:
    """Folders named after classes, or side files, whichever says more; both may be below folders named after splits."""
    folders = {path.split("/")[0].lower() for path in media}
    # A class may be called "test", but hardly beside one called "train".
    splits = {name: SPLITS[name] for name in folders if name in SPLITS} if folders & {"train", "training"} else {}
    sides = _find_sides(files)
    described = [path for path in media if _find_side(path, sides)]
    if 2 * len(described) >= len(media):
        return _read_sides(files, media, sides, splits)
    inside = [path for path in media if path.count("/") > (path.split("/")[0].lower() in splits)]
    if inside:
        return _read_class_folders(files, media, sides, splits)
    if described:
        return _read_sides(files, media, sides, splits)
    raise UserError(f"{files.root}: {len(media)} clips without labels: {HOW_TO_LABEL}")


def _split_of(path: str, splits: Mapping[str, str]) -> tuple[str, str]:
    """The split that a path's first folder names, "" for none, and the rest of the path."""
    first, _, rest = path.partition("/")
    split = splits.get(first.lower(), "") if rest else ""
    return split, rest if split else path


def _describe_splits(splits: Mapping[str, str], found: Mapping[str, Any]) -> str:
    names = [name for name in sorted(splits) if splits[name] in found]
    return f" below {', '.join(f'{name}/' for name in names)}" if names else ""


def _read_class_folders(
    files: Files, media: Sequence[str], sides: Mapping[str, str], splits: Mapping[str, str]
) -> Labels:
    examples, unlabelled = defaultdict(list), []
    for path in media:
        split, rest = _split_of(path, splits)
        name, slash, _ = rest.partition("/")
        if not slash or (splits and not split) or not name.strip() or not is_utf8(name):
            unlabelled.append(path)
            continue
        examples[split].append(Example(path, path, None, None, ASK_CLASS, name.strip()))
    remarks = [f"{len(sides)} files that may be captions are not read: most clips have none"] if sides else []
    ordered = {split: tuple(examples[split]) for split in ("train", "validation", "test", "") if split in examples}
    layout = f"folders named after classes{_describe_splits(splits, ordered)}"
    return Labels(files.root, layout, ordered, (), tuple(unlabelled), (), tuple(remarks), named_classes=True)


def _find_sides(files: Files) -> dict[str, str]:
    """Side files by their path without the extension: `a` of a.txt, and `a.mp4` of a.mp4.txt."""
    found: dict[str, str] = {}
    for path in files.paths:
        if path.lower().endswith(SIDES) and not any(part.startswith(".") for part in path.split("/")):
            found.setdefault(path.rpartition(".")[0], path)
    return found


def _find_side(path: str, sides: Mapping[str, str]) -> str | None:
    return sides.get(path) or sides.get(path.rpartition(".")[0])


def _read_sides(files: Files, media: Sequence[str], sides: Mapping[str, str], splits: Mapping[str, str]) -> Labels:
    rows, used, unlabelled, split_of = Rows(), set(), [], []
    for path in media:
        side = _find_side(path, sides)
        split, _ = _split_of(path, splits)
        if side is None or (splits and not split):
            unlabelled.append(path)
            continue
        used.add(side)
        before = len(rows.examples)
        for line, fields in _read_side(files.root / side, side, rows):
            try:
                example = parse_example({**fields, "file": path}, line, files.root)
            except BadRow as error:
                rows.skip(error.kind, str(error), side, line)
                continue
            name = path if line == 1 else f"{path}#{line}"
            rows.add(replace(example, id=name, media=path), side, line)
        split_of += [split] * (len(rows.examples) - before)
    examples = defaultdict(list)
    for example, split in zip(rows.examples, split_of, strict=True):
        examples[split].append(example)
    ordered = fill_prompts(examples)
    orphans = tuple(sorted(side for side in sides.values() if side not in used and not side.lower().endswith(".json")))
    layout = f"a text next to each clip{_describe_splits(splits, ordered)}"
    return Labels(files.root, layout, ordered, tuple(rows.problems), tuple(unlabelled), orphans)


def _read_side(path: Path, shown: str, rows: Rows) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, fields) of what a side file says: a text is one caption; json has an object, or a list of them."""
    text = read_text(path, shown)
    if path.suffix.lower() == ".txt":
        caption = re.sub(r"\s+", " ", text).strip()
        if not caption or not is_utf8(caption):
            rows.skip(
                "empty text" if not caption else "not UTF-8", "says nothing" if not caption else "not UTF-8", shown
            )
            return
        yield 1, {"target": caption}
        return
    try:
        value = parse_annotation_json(text, shown)
    except UserError as error:
        rows.skip("malformed", str(error).partition(": ")[2], shown)
        return
    for number, item in enumerate(value if isinstance(value, list) else [value], start=1):
        item = {"target": item} if isinstance(item, str) else item
        if not isinstance(item, dict):
            rows.skip("malformed", f"must hold a text, an object or a list of them, item {number} is none", shown)
            continue
        columns = name_columns(item)
        fields = {columns[name]: content for name, content in item.items() if name in columns}
        if "target" not in fields:
            rows.skip("malformed", f"item {number} has no target, caption or label", shown)
            continue
        yield number, {name: content for name, content in fields.items() if name not in ("split", "id")}

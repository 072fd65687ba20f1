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
from mirasol.finetune.labels import (
    ASK_CLASS,
    MEDIA,
    SPLITS,
    Labels,
    fill_prompts,
    is_media,
    name_columns,
    parse_example,
    tidy,
)

SIDES = (".json", ".txt")
OTHER_TABLES = (".xlsx", ".xls", ".ods", ".parquet", ".feather", ".xml", ".yaml", ".yml")
# Pictures, and what the reader does not open.
NEARLY_MEDIA = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".rmvb", ".rm", ".asf", ".mxf", ".zip", ".tar",
    ".gz", ".npy", ".mid",
)  # fmt: skip
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
    remarks = list(labels.remarks)
    if len(media) < len(found):
        remarks.append(f"{len(found) - len(media)} files are not read: their names have a backslash or are not UTF-8")
    remarks += _describe_others(files.paths, tables)
    return replace(labels, remarks=tuple(remarks))


def _describe_others(paths: Sequence[str], tables: Sequence[str]) -> Iterator[str]:
    """Remarks on files that are no media, captions or tables, but may be what the user meant."""
    unread = [path for path in paths if path.lower().endswith((*OTHER_TABLES, *TABLES)) and path not in tables]
    unread = [path for path in unread if "/" in path or path.lower().endswith(OTHER_TABLES)]
    if unread:
        yield f"not read: {', '.join(unread[:4])}: labels may be in a csv, tsv or jsonl at the top of the folder"
    hidden = [path for path in paths if any(part.startswith(".") for part in path.split("/"))]
    hidden = [path for path in hidden if path.lower().endswith(MEDIA) and "/._" not in f"/{path}"]
    if hidden:
        yield f"{len(hidden)} clips are hidden files or in hidden folders ({hidden[0]}), and not read"
    known = (*MEDIA, *SIDES, *TABLES, *OTHER_TABLES)
    kinds = Counter(Path(path).suffix.lower() for path in paths if not path.lower().endswith(known))
    media = {kind: count for kind, count in kinds.items() if kind in NEARLY_MEDIA}
    if media:
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(media.items()))
        yield f"files of other kinds are not read: {listed}"


def _describe_no_media(files: Files, tables: Sequence[str]) -> str:
    kinds = Counter(Path(path).suffix.lower() or "without suffix" for path in files.paths)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4)) or "it is empty"
    where = f": {tables[0]} has labels, but the clips it names must be below this folder too" if tables else ""
    return (
        f"{files.root}: no video or sound file in this folder or below it ({listed}){where or ': give another folder'}"
    )


def _read_names(files: Files, media: Sequence[str]) -> Labels:
    """Folders named after classes, or side files, whichever says more; both may be below folders named after splits."""
    splits, sides = _find_split_folders(files.root, media), _find_sides(files)
    described = [path for path in media if _find_own_sides(path, sides)]
    if 2 * len(described) >= len(media):
        return _read_sides(files, media, sides, splits)
    inside = [path for path in media if path.count("/") > (path.split("/")[0].lower() in splits)]
    if inside:
        return _read_class_folders(files, media, sides, splits)
    if described:
        return _read_sides(files, media, sides, splits)
    raise UserError(f"{files.root}: {len(media)} clips without labels: {HOW_TO_LABEL}")


def _find_split_folders(root: Path, media: Sequence[str]) -> dict[str, str]:
    """Which of the folders at the top are splits. Raises UserError for splits without one that trains."""
    folders = {path.split("/")[0].lower() for path in media if "/" in path}
    splits = {name: SPLITS[name] for name in folders if name in SPLITS}
    if not folders & {"train", "training"}:  # a class may be called "test", but hardly all of them are
        if len(splits) > 1 and len(splits) == len(folders):
            listed = " and ".join(f"{name}/" for name in sorted(splits))
            raise UserError(f"{root}: {listed} but no train/: add it, or give a folder above classes of these names")
        return {}
    flat = all(path.count("/") == 1 for path in media if path.split("/")[0].lower() in splits)
    return {} if flat and len(splits) < len(folders) else splits  # "train" beside "car" is a class


def _split_of(path: str, splits: Mapping[str, str]) -> tuple[str, str]:
    """The split that a path's first folder names, "" for none, and the rest of the path."""
    first, _, rest = path.partition("/")
    split = splits.get(first.lower(), "") if rest else ""
    return split, rest if split else path


def _describe_splits(splits: Mapping[str, str], found: Mapping[str, Any]) -> str:
    names = [name for name in sorted(splits) if splits[name] in found]
    return f" below {', '.join(f'{name}/' for name in names)}" if names else ""


def _read_class_folders(
    files: Files, media: Sequence[str], sides: Mapping[str, list[str]], splits: Mapping[str, str]
) -> Labels:
    examples, unlabelled = defaultdict(list), []
    for path in media:
        split, rest = _split_of(path, splits)
        name, slash, _ = rest.partition("/")
        if not slash or (splits and not split) or not name.strip() or not is_utf8(name):
            unlabelled.append(path)
            continue
        examples[split].append(Example(path, path, None, None, ASK_CLASS, tidy(name)))
    count = sum(map(len, sides.values()))
    remarks = [f"{count} files that may be captions are not read: most clips have none"] if count else []
    ordered = {split: tuple(examples[split]) for split in ("train", "validation", "test", "") if split in examples}
    if empty := _list_empty_folders(files.root, media, splits):
        remarks.append(f"no clips in {', '.join(empty[:4])}{' …' if len(empty) > 4 else ''}: no classes of that name")
    layout = f"folders named after classes{_describe_splits(splits, ordered)}"
    return Labels(files.root, layout, ordered, (), tuple(unlabelled), (), tuple(remarks), named_classes=True)


def _list_empty_folders(root: Path, media: Sequence[str], splits: Mapping[str, str]) -> list[str]:
    """Folders where classes are, that have no clip in any split and so are no classes."""
    parents = [one for one in root.iterdir() if one.is_dir() and one.name.lower() in splits] if splits else [root]
    names = {one.name for parent in parents for one in parent.iterdir() if one.is_dir() and one.name[0] not in "._"}
    return sorted(names - {_split_of(path, splits)[1].partition("/")[0] for path in media})


def _find_sides(files: Files) -> dict[str, list[str]]:
    """Side files by their path without the extension: `a` of a.txt, and `a.mp4` of a.mp4.txt; json before txt."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in files.paths:
        if path.lower().endswith(SIDES) and not any(part.startswith(".") for part in path.split("/")):
            found[path.rpartition(".")[0]].append(path)
    return found


def _find_own_sides(path: str, sides: Mapping[str, list[str]]) -> list[str]:
    return sides.get(path) or sides.get(path.rpartition(".")[0]) or []


def _read_sides(
    files: Files, media: Sequence[str], sides: Mapping[str, list[str]], splits: Mapping[str, str]
) -> Labels:
    rows, used, unlabelled, split_of = Rows(), set(), [], []
    for path in media:
        own = _find_own_sides(path, sides)
        split, _ = _split_of(path, splits)
        if not own or (splits and not split):
            unlabelled.append(path)
            continue
        used.update(own)
        before, problems = len(rows.examples), len(rows.problems)
        for side in own:
            del rows.problems[problems:]  # of one that says nothing, where another one follows
            _add_side(files.root, path, side, rows)
            if len(rows.examples) > before:
                break
        split_of += [split] * (len(rows.examples) - before)
    examples = defaultdict(list)
    for example, split in zip(rows.examples, split_of, strict=True):
        examples[split].append(example)
    ordered = fill_prompts(examples)
    others = (side for own in sides.values() for side in own if side not in used)
    orphans = tuple(sorted(side for side in others if not side.lower().endswith(".json")))
    layout = f"a text next to each clip{_describe_splits(splits, ordered)}"
    return Labels(files.root, layout, ordered, tuple(rows.problems), tuple(unlabelled), orphans)


def _add_side(root: Path, path: str, side: str, rows: Rows) -> None:
    """Adds what a side file says of the clip at `path`."""
    for line, fields in _read_side(root / side, side, rows):
        try:
            example = parse_example({**fields, "file": path}, line, root)
        except BadRow as error:
            rows.skip(error.kind, str(error), side, line)
            continue
        rows.add(replace(example, id=path if line == 1 else f"{path}#{line}", media=path), side, line)


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

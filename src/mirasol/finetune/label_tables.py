"""Labels in tables at the top of a folder: one for each split, or one for all clips."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mirasol.data.datasets.contract import Rows
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.folder import OPTIONAL, BadRow, parse_csv_fields
from mirasol.data.datasets.tables import read_csv_header, read_csv_rows, read_json_lines
from mirasol.data.example import Example
from mirasol.errors import UserError
from mirasol.finetune.labels import ALIASES, SPLITS, Labels, fill_prompts, name_columns, parse_example

TABLES = (".jsonl", ".csv", ".tsv")


@dataclass
class _Table:
    """A table while it is read."""

    path: Path
    rows: Rows = field(default_factory=Rows)
    splits: list[str] = field(default_factory=list)  # of each of `rows.examples`
    unused: tuple[str, ...] = ()
    moved: int = 0  # rows whose file is in another folder than they say


class _MediaNames:
    """Finds the file that a row means: by its path, or by its name alone where only one file has it."""

    def __init__(self, media: Sequence[str]):
        self.paths = frozenset(media)
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for path in media:
            name = path.rpartition("/")[2]
            self._by_name[name].append(path)
            self._by_name[name.rpartition(".")[0]].append(path)

    def find(self, name: str, by_name: bool) -> str | None:
        """The path, None where there is no such file, or several; `by_name`: whatever folder the row names."""
        if name in self.paths:
            return name
        if "/" in name and not by_name:
            return None
        found = self._by_name.get(name.rpartition("/")[2], [])
        return found[0] if len(found) == 1 else None


def read_tables(files: Files, media: Sequence[str], tables: Sequence[str]) -> Labels:
    """The labels in some tables of the folder. Raises UserError for tables that cannot be read, or that leave open
    which is which."""
    by_split = _assign_tables(files.root, tables)
    names, examples, problems, remarks = _MediaNames(media), defaultdict(list), [], []
    for split, name in by_split.items():
        table = _read_table(files.root / name, name, names)
        problems += table.rows.problems
        for example, own in zip(table.rows.examples, table.splits, strict=True):
            examples[split or own].append(example)
        if table.moved:
            remarks.append(f"{name}: {table.moved} rows name another folder: their files were found by name alone")
        if table.unused:
            remarks.append(f"{name}: columns that are not read: {', '.join(table.unused)}")
    given = [split for split in examples if split]
    if "" in examples and given:
        raise UserError(
            f"{files.root / by_split['']}: some rows name a split and some none: fill in the column, or remove it"
        )
    listed = ", ".join(by_split.values())
    layout = f"one table for each split ({listed})" if "" not in by_split else f"one table ({listed})"
    asked = {example.media for own in examples.values() for example in own}
    ignored = [name for name in tables if name not in by_split.values()]
    if ignored:
        remarks.append(f"tables that are not read: {', '.join(ignored)}")
    unlabelled = tuple(path for path in media if path not in asked)
    return Labels(files.root, layout, fill_prompts(examples), tuple(problems), unlabelled, (), tuple(remarks))


def _assign_tables(root: Path, tables: Sequence[str]) -> dict[str, str]:
    """Which table is which split; "" for a table of all clips. Raises UserError where that is not clear."""
    by_split: dict[str, str] = {}
    for name in tables:
        split = SPLITS.get(Path(name).stem.lower())
        if split in by_split:
            raise UserError(f"{root / by_split[split]} and {name}: two tables for {split}: remove one")
        if split is not None:
            by_split[split] = name
    if "train" in by_split:
        return {split: by_split[split] for split in ("train", "validation", "test") if split in by_split}
    if len(tables) > 1:
        raise UserError(
            f"{root}: {len(tables)} tables ({', '.join(tables[:4])}) and none of them train.csv or train.jsonl: call "
            "them train, validation and test, or leave one with all clips"
        )
    return {"": tables[0]}


def _read_table(path: Path, shown: str, names: _MediaNames) -> _Table:
    table, is_csv = _Table(path), path.suffix.lower() != ".jsonl"
    unused: dict[str, None] = {}
    parsed: list[tuple[int, str, Example]] = []
    for line, row in _iterate_rows(path, shown, table.rows):
        try:
            fields, others = _parse_fields(row, is_csv)
            unused |= dict.fromkeys(others)
            split = _parse_split(fields.pop("split", None))
            parsed.append((line, split, parse_example(fields, line, path.parent)))
        except BadRow as error:
            table.rows.skip(error.kind, str(error), shown, line)
    # Where some rows' folders are right, those of the others are wrong, not of another machine.
    by_name = not any("/" in example.media and example.media in names.paths for _, _, example in parsed)
    for line, split, example in parsed:
        found = names.find(example.media, by_name)
        if found is None:
            table.rows.skip("missing media", f"no media file {example.media!r}", shown, line)
            continue
        before = len(table.rows.examples)
        table.rows.add(replace(example, media=found), shown, line)
        table.splits += [split] * (len(table.rows.examples) - before)
        table.moved += "/" in example.media and found != example.media
    table.unused = tuple(name or "one without a name" for name in unused)
    return table


def _iterate_rows(path: Path, shown: str, rows: Rows) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of a table, its columns named as in an example. Raises AnnotationError, and UserError for a header
    without a column of files or of answers."""
    if path.suffix.lower() == ".jsonl":
        for line, row in read_json_lines(path, shown, rows, {}):
            columns = name_columns(row)
            yield line, {columns.get(name, name): value for name, value in row.items()}
        return
    header = read_csv_header(path)
    columns = name_columns(header)
    for name in ("file", "target"):
        if name not in columns.values():
            raise UserError(
                f"{path}: no column {name!r} (or {', '.join(ALIASES[name])}); found {', '.join(header) or 'nothing'}: "
                "add a first row that names the columns"
            )
    for line, row in read_csv_rows(path, shown, rows, list(dict.fromkeys(header))):
        yield line, {columns.get(name, name): text for name, text in row.items()}


def _parse_fields(row: Mapping[str, Any], is_csv: bool) -> tuple[dict[str, Any], list[str]]:
    """The row's fields as an example has them, and the names of those that are not read. Raises BadRow."""
    fields = {name: value for name, value in row.items() if name in (*ALIASES, *OPTIONAL)}
    if is_csv:
        must = ("file", "target")
        fields = {name: value for name, value in parse_csv_fields(fields).items() if value != "" or name in must}
    for name in ("file", "target"):
        if name not in fields:
            raise BadRow(f"field {name!r} is missing; found {', '.join(map(repr, row)) or 'none'}")
    return fields, [name for name in row if name not in (*ALIASES, *OPTIONAL)]


def _parse_split(value: Any) -> str:
    if value is None:
        return ""
    split = SPLITS.get(str(value).strip().lower())
    if split is None:
        raise BadRow(f"split {value!r}: must be train, validation or test")
    return split

"""Reading annotation files: json, jsonl, csv, lists of names. Every problem has a file, a line and a column.

Files are UTF-8, or UTF-16 with a byte order mark, as spreadsheets write it. The fields of a table are separated by
commas, tabs or semicolons.
"""

import codecs
import csv
import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from json import JSONDecoder
from pathlib import Path
from typing import Any

from mirasol.data.datasets.contract import AnnotationError, Problem, Rows
from mirasol.json_values import InvalidJson, parse_json

_DIGITS = 18  # of the longest number in a field
_BEGINNING = 1024  # bytes from which an encoding is recognised
_LONGEST_HEADER = 2**20  # bytes
_OTHER_DELIMITERS = ("\t", ";")
# What identifies things, as a json field: a number is taken as its text.
ID = (str, int)
# Bytes that are not UTF-8 become such surrogates, so that one bad caption costs one row and not the file. JSON can
# contain escaped surrogates, too.
_NOT_UTF8 = re.compile("[\ud800-\udfff]")
# Python's csv module refuses fields over 128 KiB by default; captions from the web may be longer.
csv.field_size_limit(16 * 2**20)


def read_text(path: Path, file: str | None = None) -> str:
    """A text file, UTF-8 or UTF-16, without a byte order mark. Bytes that are not UTF-8 stay, as lone surrogates.

    file: the file's name in messages; its path by default

    Raises AnnotationError for other encodings that can be recognised, and for damaged UTF-16.
    """
    return _decode_text(path.read_bytes(), file or str(path))


def _decode_text(content: bytes, file: str) -> str:
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise _wrong_encoding_error("is UTF-32 text", file)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return content.decode("utf-16")
        except UnicodeDecodeError as error:
            raise _wrong_encoding_error(f"is UTF-16 text, damaged at byte {error.start + 1}", file) from error
    beginning = content[:_BEGINNING]
    if 0 in beginning and beginning.count(0) * 4 >= len(beginning):
        raise _wrong_encoding_error("looks like UTF-16 text without a byte order mark", file)
    return content.decode("utf-8-sig", errors="surrogateescape")


def _wrong_encoding_error(found: str, file: str) -> AnnotationError:
    return AnnotationError(Problem("not UTF-8", f"{found}: save it as UTF-8", file, 1, 1))


def is_utf8(text: str) -> bool:
    """Whether a text of `read_text` contains no bytes that were not UTF-8."""
    return text.isascii() or _NOT_UTF8.search(text) is None


def make_malformed_file_error(
    message: str, file: str, line: int | None = None, column: int | None = None
) -> AnnotationError:
    """The error for a file that cannot be read any further."""
    return AnnotationError(Problem("malformed", message, file, line, column))


class JsonArray:
    """The objects of a json array; `locate` gives the place of one.

    Raises AnnotationError where the text is not json, or not an array.
    """

    def __init__(self, path: Path, file: str):
        self.file, self.text = file, read_text(path, file)
        self.items = parse_annotation_json(self.text, file)
        if not isinstance(self.items, list):
            raise make_malformed_file_error(
                f"must hold an array of objects, not {describe_type(self.items)}", file, 1, 1
            )

    def locate(self, index: int) -> tuple[int, int]:
        """Line and column, from 1, of item `index`, from 0."""
        begin = self._begins[index]
        return self.text.count("\n", 0, begin) + 1, begin - self.text.rfind("\n", 0, begin)

    @cached_property
    def _begins(self) -> list[int]:
        decoder, blank = JSONDecoder(), re.compile(r"[\s,]*")
        begins, position = [], self.text.index("[") + 1
        for _ in self.items:
            position = blank.match(self.text, position).end()
            begins.append(position)
            _, position = decoder.raw_decode(self.text, position)
        return begins

    def iterate_valid(
        self, rows: Rows, fields: dict[str, type | tuple[type, ...]]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """(index, object) of the objects that have all `fields` with these types; the others are skipped in `rows`."""
        for index, item in enumerate(self.items):
            wrong = find_wrong_field(item, fields)
            if wrong is None:
                yield index, item
            else:
                rows.skip(*wrong, self.file, *self.locate(index))


def parse_annotation_json(text: str, file: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a json text; `pairs` converts its objects. Raises AnnotationError with line and column."""
    try:
        return parse_json(text, pairs)
    except InvalidJson as error:
        raise make_malformed_file_error(f"is not JSON ({error.reason})", file, error.line, error.column) from error


def read_json_object(path: Path, file: str) -> dict[str, Any]:
    """The object of a json file. Raises AnnotationError where it contains none."""
    text = read_text(path, file)
    value = parse_annotation_json(text, file)
    if not isinstance(value, dict):
        raise make_malformed_file_error(f"must hold one object, not {describe_type(value)}", file, 1, 1)
    raise_if_not_utf8(text, file)
    return value


def raise_if_not_utf8(text: str, file: str) -> None:
    """Raises AnnotationError, with line and column, for a text of `read_text` that is not UTF-8 throughout."""
    if not is_utf8(text):
        line, column = _find_place(text, _NOT_UTF8.search(text).start())
        raise AnnotationError(Problem("not UTF-8", "is not UTF-8 text", file, line, column))


def _find_place(text: str, position: int) -> tuple[int, int]:
    return text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)


def read_json_lines(
    path: Path, file: str, rows: Rows, fields: dict[str, type | tuple[type, ...]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line of a jsonl file that is not blank; lines without an object that has these
    `fields` are skipped in `rows`."""
    for number, line in enumerate(read_text(path, file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = parse_json(line)
        except InvalidJson as error:
            rows.skip("malformed", f"is not JSON ({error.reason})", file, number, error.column)
            continue
        wrong = find_wrong_field(item, fields)
        if wrong is None:
            yield number, item
        else:
            rows.skip(*wrong, file, number)


def find_wrong_field(item: Any, fields: dict[str, type | tuple[type, ...]]) -> tuple[str, str] | None:
    """(kind, message) of the reason why `item` is not an object with these fields; None where it is one."""
    if not isinstance(item, dict):
        wanted = f" with {', '.join(fields)}" if fields else ""
        return "malformed", f"must be an object{wanted}, not {describe_type(item)}"
    for name, kind in fields.items():
        if name not in item:
            return "malformed", f"field {name!r} is missing; found {', '.join(map(repr, item)) or 'none'}"
        value = item[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted = " or ".join(describe_type(k()) for k in (kind if isinstance(kind, tuple) else (kind,)))
            return "malformed", f"field {name!r} must be {wanted}, not {describe_type(value)}"
        if isinstance(value, str) and not is_utf8(value):
            return "not UTF-8", f"field {name!r} is not UTF-8 text"
    return None


def is_whole_number(text: str) -> bool:
    """Whether a field is a whole number from 0 on that `int` reads: `str.isdigit` is true of "²" as well."""
    return text.isascii() and text.isdigit() and len(text) <= _DIGITS


def describe_type(value: Any) -> str:
    """The type of a json value in words."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


def read_csv_rows(
    path: Path,
    file: str,
    rows: Rows,
    columns: Sequence[str],
    *,
    optional: Sequence[str] = (),
    refuse_others: bool = False,
    header: bool = True,
    delimiter: str | None = None,
    skip_initial_space: bool = False,
    comment: str | None = None,
    quoted: bool = True,
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, {column: field}) of a csv file, all fields as text; no text is taken for a missing value.

    With a `header`, columns are found by name, in any order; those of `optional` are given where the file has them,
    others are ignored, or refused with `refuse_others`. Without a header, `columns` are all columns in their order.
    Without a `delimiter`, the first row shows whether fields are separated by commas, tabs or semicolons.
    Lines at the top that begin with `comment` are left out. If fields are not `quoted`, quotes are ordinary characters.
    Rows with too few or too many fields, or with bytes that are not UTF-8, are skipped in `rows`.

    Raises AnnotationError for another header, another encoding, and for quotes that are not closed.
    """
    lines, skipped = _read_lines(path, file, comment)
    width = len(columns)
    if delimiter is None:
        delimiter = _detect_delimiter(lines[0] if lines else "", None if header else width)
    table = _iterate_csv(lines, skipped, file, delimiter, skip_initial_space, quoted)
    if header:
        _, names = next(table, (1, []))
        names = [name.strip() for name in names]
        raise_if_wrong_header(names, columns, file, optional if refuse_others else None)
        width = len(names)
        columns = [*columns, *(name for name in optional if name in names)]
        places = [names.index(name) for name in columns]
    else:
        places = list(range(width))
    for line, fields in table:
        if len(fields) != width:
            message = f"{len(fields)} fields, {width} expected"
            end = _find_end_of_field(fields[: min(len(fields), width)], delimiter, quoted)
            rows.skip("malformed", message, file, line, end)
            continue
        row = {name: fields[place] for name, place in zip(columns, places, strict=True)}
        # One check of the whole row is faster than one for each field.
        if is_utf8("".join(row.values())):
            yield line, row
            continue
        bad = next(name for name, field in row.items() if not is_utf8(field))
        rows.skip("not UTF-8", f"field {bad!r} is not UTF-8 text", file, line)


def read_strict_csv(path: Path, file: str, columns: Sequence[str], *, header: bool = True) -> list[dict[str, str]]:
    """The rows of a csv file that others depend on, such as a class list. Raises AnnotationError for a bad row."""
    rows = Rows()
    table = [row for _, row in read_csv_rows(path, file, rows, columns, header=header)]
    if rows.problems:
        raise AnnotationError(rows.problems[0])
    return table


def raise_if_wrong_header(
    found: Sequence[str], expected: Sequence[str], file: str, optional: Sequence[str] | None = None
) -> None:
    """Raises AnnotationError, with what was expected and found, where a header lacks a column or has one twice; with
    `optional` also where it has a column that is neither expected nor optional."""
    unknown = [] if optional is None else [name for name in found if name not in (*expected, *optional)]
    if unknown or any(name not in found for name in expected):
        wanted = ",".join(expected) + (f" and any of {','.join(optional)}" if optional else "")
        message = f"wrong header: expected {wanted}; found {','.join(found) or 'nothing'}"
        raise AnnotationError(Problem("wrong header", message, file, 1, 1))
    twice = [name for name in (*expected, *(optional or ())) if found.count(name) > 1]
    if twice:
        message = f"wrong header: column {twice[0]!r} appears twice; found {','.join(found)}"
        raise AnnotationError(Problem("wrong header", message, file, 1, 1))


def read_csv_header(path: Path, delimiter: str | None = None) -> list[str]:
    """The first row of a csv file; empty where there is none, or none that can be read. Reads no more than it needs.

    The delimiter is detected as in `read_csv_rows`.
    """
    with path.open("rb") as stream:
        content = stream.readline(_LONGEST_HEADER)
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            content += stream.read(_LONGEST_HEADER)
            content = content[: len(content) // 2 * 2]
    try:
        first = re.split(r"\r\n?|\n", _decode_text(content, str(path)), maxsplit=1)[0]
    except AnnotationError:
        return []  # reading the table says why
    if delimiter is None:
        delimiter = _detect_delimiter(first)
    return [name.strip() for name in _split_fields(first, delimiter)]


def _detect_delimiter(first: str, width: int | None = None) -> str:
    """How the fields of a table's first line are separated. Without the number of fields, `width`, another delimiter
    than a comma is recognised where the line has no comma."""
    delimiters = (",", *_OTHER_DELIMITERS)
    if width is None:
        return next((each for each in delimiters if each in first), ",")
    return next((each for each in delimiters if len(_split_fields(first, each)) == width), ",")


def _split_fields(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return []


def _read_lines(path: Path, file: str, comment: str | None) -> tuple[list[str], int]:
    """A table's lines with their ends, and how many comment lines at the top are left out."""
    lines = io.StringIO(read_text(path, file), newline="").readlines()
    skipped = 0
    if comment is not None:
        skipped = sum(1 for _ in itertools.takewhile(lambda line: line.startswith(comment), lines))
    return lines[skipped:], skipped


def _iterate_csv(
    lines: list[str], skipped: int, file: str, delimiter: str, skip_initial_space: bool, quoted: bool
) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of every row that is not empty. Raises AnnotationError for quotes that are not closed."""
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=skip_initial_space, strict=True, quoting=quoting)
    line = skipped + 1
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise make_malformed_file_error(
                f"is not csv ({error})", file, line, _find_open_quote(lines, line - skipped)
            ) from error
        if fields:
            yield line, fields
        line = skipped + reader.line_num + 1


def _find_open_quote(lines: list[str], line: int) -> int:
    """Column, from 1, of the last quote of a line, from 1: where the field begins that is not closed."""
    return lines[line - 1].rfind('"') + 1 or 1


def _find_end_of_field(fields: Sequence[str], delimiter: str, quoted: bool) -> int:
    """Column, from 1, after the first fields of a row, as a csv writer would write them."""
    if not quoted:
        return len(delimiter.join(fields)) + 1
    written = io.StringIO()
    csv.writer(written, delimiter=delimiter, lineterminator="").writerow(fields)
    return len(written.getvalue()) + 1


def read_names(path: Path, file: str) -> tuple[str, ...]:
    """The names of a text file with one name on each line, in its order. Raises AnnotationError for a repeated one."""
    names: dict[str, int] = {}
    for number, line in enumerate(read_text(path, file).split("\n"), start=1):
        name = line.strip()
        if not name:
            continue
        if not is_utf8(name):
            raise AnnotationError(Problem("not UTF-8", "is not UTF-8 text", file, number, 1))
        if name in names:
            raise make_malformed_file_error(f"{name!r} appears already on line {names[name]}", file, number, 1)
        names[name] = number
    if not names:
        raise make_malformed_file_error("contains no names", file)
    return tuple(names)

"""Reading JSON: every reason why a text cannot be read becomes one kind of error, with its place."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from mirasol.errors import UserError


class InvalidJson(ValueError):
    """Why a text is not readable JSON; `line` and `column` count from 1 and are None where there is no place."""

    def __init__(self, reason: str, line: int | None = None, column: int | None = None):
        super().__init__(reason)
        self.reason, self.line, self.column = reason, line, column


def parse_json(text: str | bytes, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text; `object_pairs_hook` as in `json.loads`.

    Raises InvalidJson, and UnicodeDecodeError for bytes that are not UTF-8.
    """
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    except json.JSONDecodeError as error:
        raise InvalidJson(error.msg, error.lineno, error.colno) from error
    except RecursionError as error:
        raise InvalidJson("nested too deeply") from error
    except (UnicodeDecodeError, UserError):  # the second one comes from the hook
        raise
    except ValueError as error:  # Python refuses numbers of more than 4,300 digits
        raise InvalidJson("a number with too many digits") from error


def parse_own_json(text: str, where: object, fix: str) -> Any:
    """The value of a JSON text that this program wrote.

    Raises UserError if it is damaged, in one line with `where` it is and the `fix`.
    """
    try:
        return parse_json(text)
    except InvalidJson as error:
        place = f" at line {error.line}, column {error.column}" if error.line is not None else ""
        raise UserError(f"{where}: is damaged ({error}{place}): {fix}") from error


def read_own_object(file: Path, fix: str, keys: Collection[str] = ()) -> dict[str, Any]:
    """The object in a JSON file that this program wrote, with at least these `keys`.

    Raises UserError if the file is missing or damaged, or has something else in it, in one line with the `fix`.
    """
    try:
        found = parse_own_json(file.read_text(encoding="utf-8"), file, fix)
    except FileNotFoundError:
        raise UserError(f"{file}: is missing: {fix}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: is damaged (not UTF-8): {fix}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: is damaged (not an object): {fix}")
    for key in keys:
        if key not in found:
            raise UserError(f"{file}: is damaged, or of another version (it has no {key!r}): {fix}")
    return found

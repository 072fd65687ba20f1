"""JSON of other people: whatever keeps a text from being read is one kind of error, with its place."""

import json
from collections.abc import Callable
from typing import Any

from mirasol.errors import UserError


class NotJson(ValueError):
    """Why a text is not JSON that can be read; `line` and `column` count from 1, None where there is no place."""

    def __init__(self, reason: str, line: int | None = None, column: int | None = None):
        super().__init__(reason)
        self.reason, self.line, self.column = reason, line, column


def json_value(text: str | bytes, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text; `object_pairs_hook` as in `json.loads`.

    Raises NotJson, and UnicodeDecodeError for bytes that are not UTF-8.
    """
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    except json.JSONDecodeError as error:
        raise NotJson(error.msg, error.lineno, error.colno) from error
    except RecursionError as error:
        raise NotJson("nested too deeply") from error
    except (UnicodeDecodeError, UserError):  # the second is the hook's own
        raise
    except ValueError as error:  # Python reads no numbers of more than 4,300 digits
        raise NotJson("a number of too many digits") from error

"""Output on the console: progress of long work with its rate and time left, and tables as text."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Rate and time left leave out this many updates once there are later ones: workers start, layers are compiled.
_WARM_UP = 3


class Progress:
    """Progress of long work: a live bar on a terminal, otherwise a plain line every `seconds_between_lines`.

    Use as a context manager. `start` of `total` are done at the beginning; rate and time left are those of the rest.
    """

    def __init__(
        self, console: Console, title: str, total: int, unit: str, start: int = 0, seconds_between_lines: float = 15
    ):
        self.console, self.title, self.total, self.unit = console, title, total, unit
        self.start, self.done, self.between = start, start, seconds_between_lines
        self.began = self.last_line = time.monotonic()
        self.updates, self.note = 0, ""
        self.warm: tuple[int, float] | None = None
        self.bar = self.task = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            from rich import progress

            self.bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TextColumn("{task.fields[state]}"),
                console=self.console,
                refresh_per_second=4,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.start, state="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        elif error is None and self.updates:
            self._print_line()

    def update(self, done: int, note: str = "") -> None:
        """Shows that `done` of `total` are finished, with `note` after the numbers."""
        self.done, self.note, self.updates = done, note, self.updates + 1
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=self.total, state=self._format_state())
        elif time.monotonic() - self.last_line >= self.between:
            self._print_line()
        if self.updates == _WARM_UP:
            self.warm = done, time.monotonic()

    def _print_line(self) -> None:
        self.last_line = time.monotonic()
        self.console.print(f"{self.title}: {self._format_state()}", highlight=False, markup=False, soft_wrap=True)

    def _format_state(self) -> str:
        warm = self.warm is not None and self.done > self.warm[0]
        start, began = self.warm if warm else (self.start, self.began)
        rate = (self.done - start) / max(time.monotonic() - began, 1e-9)
        left = _format_time((self.total - self.done) / rate) if rate > 0 else "?"
        state = f"{self.done}/{self.total} {self.unit}, {rate:.3g} {self.unit}/s, {left} left"
        return f"{state}, {self.note}" if self.note else state


def _format_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def make_console() -> Console:
    """A console on stderr for progress: stdout is for results only."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def show_progress(console: Console, title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a callback `(done, total)` that shows rate and time left on the console."""
    with Progress(console, title, 0, unit) as shown:

        def report(done: int, total: int) -> None:
            shown.total = total
            shown.update(done)

        yield report


def print_line(console: Console, text: str) -> None:
    """Prints text as it is: no markup, colours or wrapping."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def count_cores() -> int:
    """The number of processes that can run at once."""
    return os.cpu_count() or 1


def format_table(rows: Sequence[Sequence[str]], left_columns: int = 1) -> str:
    """A table as text: the first `left_columns` columns aligned left, the others right. Rows are of equal length."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        padded = [
            cell.ljust(width) if column < left_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)

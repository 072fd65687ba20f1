"""Errors that the user can fix: one clear line, no traceback, exit code 2 on the command line."""

import signal

LONGEST_QUOTE = 80


class UserError(ValueError):
    """Wrong input from the user; the message names the offending value and the fix in one line."""


class BadClip(UserError):
    """A media file that cannot be used: missing, empty, undecodable, cut short, over a limit."""

    def __init__(self, file: object, reason: str):
        super().__init__(f"{file}: {reason}")
        self.file = str(file)
        self.reason = reason

    def __reduce__(self):
        # Exceptions cross process boundaries (workers) as (class, args): restore both arguments.
        return type(self), (self.file, self.reason)


class Stopped(Exception):
    """A signal stopped a run. The message says, in one line, how far the run is and how to resume it."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number

    def __reduce__(self):
        # A run's processes send it to each other.
        return type(self), (str(self), self.signal_number)

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, as shells expect of an interrupted command; 0 for a scheduler's signal."""
        return 130 if self.signal_number == signal.SIGINT else 0


def quote_text(text: str) -> str:
    """A text in quotes for a message; the middle of a long one is left out, and its length is given."""
    if len(text) <= LONGEST_QUOTE:
        return repr(text)
    half = LONGEST_QUOTE // 2
    return f"{text[:half] + ' … ' + text[-half:]!r} ({len(text)} characters)"

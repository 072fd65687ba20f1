"""Errors that are the user's to mend: one clear line, no traceback, exit code 2 on the command line."""


class UserError(ValueError):
    """Something the user gave is wrong; the message names the offending value and the fix on one line."""


class BadClip(UserError):
    """A media file that cannot be used: missing, empty, undecodable, cut short, over a limit."""

    def __init__(self, file: object, reason: str):
        super().__init__(f"{file}: {reason}")
        self.file = str(file)
        self.reason = reason

    def __reduce__(self):
        # Exceptions cross process boundaries (decoding pool) as (class, args): restore both arguments.
        return type(self), (self.file, self.reason)

"""Why a request is not answered: an HTTP status and one line, in the shape of OpenAI's errors."""

from typing import Any

from mirasol.errors import UserError

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "server_error"}
LONGEST_MESSAGE = 600


class Refusal(Exception):
    """A request that is not answered.

    param: the name of the request's field that is to blame. code: a word for programs.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def body(self) -> dict[str, Any]:
        """What the client is sent."""
        kind = TYPES.get(self.status, "invalid_request_error")
        error = {"message": shorten(self.message), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """What the client is sent along."""
        found = {}
        if self.status in (429, 503):
            found["retry-after"] = "1"
        if self.status == 401:
            # Has browsers ask for it. Clients that send a bearer need no challenge, and Chromium reads only the first.
            found["www-authenticate"] = 'Basic realm="mirasol: any name, and the API key", charset="UTF-8"'
        return found


def shorten(message: str) -> str:
    """A message on one line of bounded length, control characters and lone surrogates as escapes."""
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in " ".join(message.split()))
    half = LONGEST_MESSAGE // 2
    return line if len(line) <= LONGEST_MESSAGE else f"{line[:half]} … {line[-half:]}"


def refuse(error: UserError, param: str | None = None) -> Refusal:
    """What a user's error is to a client: the request cannot be understood."""
    return Refusal(400, str(error), "invalid_value", param)

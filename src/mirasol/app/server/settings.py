"""What a server may be asked for, and how much of it: every cap has a name, a default and an option."""

import dataclasses
import ipaddress
import math
from dataclasses import dataclass, field
from typing import Any

from mirasol.errors import UserError
from mirasol.media.limits import Limits

MEBIBYTE, GIBIBYTE = 2**20, 2**30


def _declare(default: Any, meaning: str) -> Any:
    """A cap, with what the command line says of it."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Caps:
    """Upper limits of a server, in bytes, seconds and numbers; in brackets what a request over one is answered."""

    max_body: int = _declare(64 * MEBIBYTE, "bytes of one request (413)")
    max_bodies: int = _declare(512 * MEBIBYTE, "bytes of all requests being read at a time (503)")
    max_stored: int = _declare(2 * GIBIBYTE, "bytes of all uploaded files on the disk (413)")
    max_files: int = _declare(1000, "uploaded files (429)")
    max_latents: int = _declare(256 * MEBIBYTE, "bytes of encoded clips kept for further questions")
    max_pixels: int = _declare(4096 * 2304, "width x height of a picture (422)")
    max_seconds: float = _declare(600.0, "length of a clip (422)")
    max_streams: int = _declare(16, "streams of a media file (422)")
    max_decoder_memory: int = _declare(GIBIBYTE, "bytes that decoding one file may take (422)")
    max_decode_seconds: float = _declare(120.0, "time that decoding one file may take (422)")
    max_tokens: int = _declare(256, "tokens of an answer (400)")
    max_messages: int = _declare(64, "messages of a conversation (400)")
    max_candidates: int = _declare(256, "candidates that one request scores (400)")
    max_batch: int = _declare(16, "questions answered together; more wait")
    max_decoders: int = _declare(2, "files decoded at a time; more wait")
    max_open: int = _declare(64, "open requests (429)")
    max_connections: int = _declare(256, "open connections (503)")
    max_sessions: int = _declare(4, "realtime sessions (429)")
    max_session_bytes: int = _declare(GIBIBYTE, "bytes sent to one realtime session, which then ends (413)")
    max_session_state: int = _declare(64 * MEBIBYTE, "bytes of state of one realtime session, which then ends (413)")
    max_session_idle: float = _declare(60.0, "seconds without a message after which a realtime session ends (408)")
    max_idle: float = _declare(15.0, "seconds without a byte of a request that is being sent (408)")
    max_upload: float = _declare(120.0, "seconds that sending one request may take (408)")
    max_send: float = _declare(30.0, "seconds that a client may take to accept a part of its answer")
    max_request: float = _declare(300.0, "seconds of one request altogether (503)")
    stop_seconds: float = _declare(30.0, "seconds that open requests have when the server is told to stop")

    def __post_init__(self):
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"--{each.name.replace('_', '-')} {value}: must be above 0")

    @property
    def media_limits(self) -> Limits:
        """The limits of one media file."""
        return Limits(
            max_bytes=max(self.max_body, self.max_stored),
            max_seconds=self.max_seconds,
            max_pixels=self.max_pixels,
            max_streams=self.max_streams,
            max_memory=self.max_decoder_memory,
            max_idle_seconds=min(self.max_decode_seconds, 60.0),
            max_work_seconds=self.max_decode_seconds,
        )


@dataclass(frozen=True)
class ServerSettings:
    """How a server is reached and what it allows.

    api_key: what clients have to give; None on the loopback address, or where `insecure` says that anybody may ask
    server_names: names under which clients reach it, in addition to its own
    allow_hosts: hosts that media may be fetched from
    name: of the model, as /v1/models lists it
    log_questions: write questions and answers to the log
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    insecure: bool = False
    server_names: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    name: str = "mirasol"
    log_questions: bool = False
    caps: Caps = Caps()

    def __post_init__(self):
        if self.api_key is not None and (len(self.api_key) < 16 or not self.api_key.isascii()):
            raise UserError("--api-key: give at least 16 characters of ASCII")
        if not self.is_local and self.api_key is None and not self.insecure:
            raise UserError(
                f"--host {self.host}: other machines could ask: give --api-key, or --insecure if anybody may"
            )

    @property
    def is_local(self) -> bool:
        """Whether only programs of this machine reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

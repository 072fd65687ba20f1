"""What a media file may ask of this machine. Media is untrusted: a small file can declare enormous pictures."""

import math
from dataclasses import dataclass

from mirasol.errors import BadClip


@dataclass(frozen=True)
class Limits:
    """Upper limits on one media file; a file over any of them is a `BadClip`.

    max_bytes: size of the file. max_seconds: length of the window that is read (the waveform of the window is in
    memory: 64 kB per second at 16 kHz). max_pixels: width x height of a stored picture. max_streams: streams of any
    kind. Pictures are measured before they are decoded, also where their size changes within the file.

    Where a file is decoded in a process of its own (`mirasol.media.isolation`): max_memory: bytes that this process may
    use in addition to the frames and the waveform that it returns. max_idle_seconds: how long it may take without
    reading a packet. max_work_seconds: how long it may take altogether.
    """

    max_bytes: int = 32 * 2**30
    max_seconds: float = 4 * 3600.0
    max_pixels: int = 8192 * 4608
    max_streams: int = 64
    max_memory: int = 2 * 2**30
    max_idle_seconds: float = 60.0
    max_work_seconds: float = math.inf

    def check_bytes(self, file: object, count: int) -> None:
        if count > self.max_bytes:
            raise BadClip(
                file,
                f"{count} bytes exceed the limit of {self.max_bytes}: cut the file, or {_suggest_raising('max_bytes')}",
            )

    def check_seconds(self, file: object, seconds: float) -> None:
        if seconds > self.max_seconds:
            raise BadClip(
                file,
                f"a window of {seconds:.1f} s exceeds the limit of {self.max_seconds:g} s: "
                f"ask about a shorter one (start and end), or {_suggest_raising('max_seconds')}",
            )

    def check_pixels(self, file: object, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise BadClip(
                file,
                f"pictures of {width}x{height} exceed the limit of {self.max_pixels} pixels: "
                f"scale the video down, or {_suggest_raising('max_pixels')}",
            )

    def check_streams(self, file: object, count: int) -> None:
        if count > self.max_streams:
            raise BadClip(
                file,
                f"{count} streams exceed the limit of {self.max_streams}: "
                f"copy the ones you need to a new file, or {_suggest_raising('max_streams')}",
            )

    def describe_memory(self) -> str:
        """The reason of a file that takes more than `max_memory`."""
        return (
            f"decoding it takes more than {_format_bytes(self.max_memory)} of memory: {_suggest_raising('max_memory')}"
        )

    def describe_idleness(self) -> str:
        """The reason of a file at which the decoder makes no progress for `max_idle_seconds`."""
        seconds = f"{self.max_idle_seconds:g}"
        fix = f"leave the file out, or {_suggest_raising('max_idle_seconds')}"
        return f"the decoder made no progress for {seconds} s: {fix}"

    def describe_work(self) -> str:
        """The reason of a file that takes more than `max_work_seconds`."""
        return f"decoding it takes more than {self.max_work_seconds:g} s: {_suggest_raising('max_work_seconds')}"


DEFAULT_LIMITS = Limits()


def _suggest_raising(name: str) -> str:
    """How somebody who trusts a file raises a limit: only from Python, so that no command line is talked into it."""
    return f"raise it in Python with read(..., limits=Limits({name}=...))"


def _format_bytes(count: int) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if count >= 2**power:
            return f"{count / 2**power:.3g} {unit}"
    return f"{count} bytes"

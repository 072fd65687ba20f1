"""What a media file may ask of this machine. Media is untrusted: a small file can declare enormous pictures."""

from dataclasses import dataclass

from mirasol.errors import BadClip


@dataclass(frozen=True)
class Limits:
    """Upper limits on one media file; a file over any of them is a `BadClip`.

    max_bytes: size of the file. max_seconds: length of the window that is read (the waveform of the window is held
    whole: 64 kB per second at 16 kHz). max_pixels: width x height of a stored picture. max_streams: streams of any
    kind. Pictures are measured before they are decoded, also where their size changes on the way.
    """

    max_bytes: int = 32 * 2**30
    max_seconds: float = 4 * 3600.0
    max_pixels: int = 8192 * 4608
    max_streams: int = 64

    def check_bytes(self, file: object, count: int) -> None:
        if count > self.max_bytes:
            raise BadClip(
                file, f"{count} bytes exceed the limit of {self.max_bytes}: cut the file, or {_raised('max_bytes')}"
            )

    def check_seconds(self, file: object, seconds: float) -> None:
        if seconds > self.max_seconds:
            raise BadClip(
                file,
                f"a window of {seconds:.1f} s exceeds the limit of {self.max_seconds:g} s: "
                f"ask about a shorter one (start and end), or {_raised('max_seconds')}",
            )

    def check_pixels(self, file: object, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise BadClip(
                file,
                f"pictures of {width}x{height} exceed the limit of {self.max_pixels} pixels: "
                f"scale the video down, or {_raised('max_pixels')}",
            )

    def check_streams(self, file: object, count: int) -> None:
        if count > self.max_streams:
            raise BadClip(
                file,
                f"{count} streams exceed the limit of {self.max_streams}: "
                f"copy the ones you need to a new file, or {_raised('max_streams')}",
            )


DEFAULT_LIMITS = Limits()


def _raised(name: str) -> str:
    """How somebody who trusts a file raises a limit: only from Python, so that no command line is talked into it."""
    return f"raise it in Python with read(..., limits=Limits({name}=...))"

"""What the header of a media file says. Imports no torch: it runs in the process that decodes."""

import os
from dataclasses import dataclass

from mirasol.media.joined.parts import open_source
from mirasol.media.limits import DEFAULT_LIMITS, Limits
from mirasol.media.span import find_span


@dataclass(frozen=True)
class Header:
    """Length in seconds, and whether there are pictures and sound."""

    seconds: float
    has_video: bool
    has_audio: bool


def probe_header(path: str | os.PathLike, limits: Limits = DEFAULT_LIMITS) -> Header:
    """What the header says; nothing is decoded, and packets are read only where it gives no length. Raises BadClip."""
    with open_source(path, limits) as source:
        seconds = find_span(source).seconds
        return Header(seconds, source.chosen.video is not None, source.chosen.audio is not None)

"""Jobs for a decoder process, without their code: the process that gives them need not import PyAV."""

from typing import Any

from mirasol.media.decoded import DecodedWindow


def read_window(*arguments: Any, **settings: Any) -> DecodedWindow:
    """`mirasol.media.reader.read_window`, imported where it runs."""
    from mirasol.media import reader

    return reader.read_window(*arguments, **settings)

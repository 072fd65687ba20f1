"""Jobs for the process that reads a live source, without their code: who gives them need not import PyAV."""

from typing import Any

from mirasol.app.live.chunks import Progress


def open_connection(*arguments: Any) -> bool:
    """`mirasol.app.live.receiver.open_connection`, imported where it runs."""
    from mirasol.app.live import receiver

    return receiver.open_connection(*arguments)


def poll_connection(seconds: float) -> Progress:
    """`mirasol.app.live.receiver.poll_connection`, imported where it runs."""
    from mirasol.app.live import receiver

    return receiver.poll_connection(seconds)

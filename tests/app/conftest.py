"""Live sources without a process of their own, where a test is not about that process."""

from collections.abc import Callable

import pytest

from mirasol.app.live import receiver
from mirasol.app.live.chunks import LiveChunk, LiveSettings
from mirasol.app.live.reader import LiveReader
from mirasol.app.live.receiver import Connection
from mirasol.app.live.source import LiveSource


@pytest.fixture
def here(monkeypatch):
    """Readers decode in this process: it is a second faster."""
    monkeypatch.setattr(LiveReader, "start", lambda reader: None)
    monkeypatch.setattr(LiveReader, "_run", lambda reader, job, *arguments: job(*arguments))
    yield
    if receiver._connection is not None:
        receiver._connection.close()
        receiver._connection = None


@pytest.fixture
def read_all() -> Callable[..., tuple[list[LiveChunk], Connection]]:
    """Reads a source to its end in this process; nothing is dropped."""

    def read(source: LiveSource, settings: LiveSettings) -> tuple[list[LiveChunk], Connection]:
        connection, chunks, progress, notes = Connection(source, settings, None, None), [], None, []
        connection.thread.start()
        while progress is None or progress.ended is None:
            progress = connection.poll(1.0)
            chunks += progress.chunks
            notes += progress.notes
        connection.thread.join()
        connection.notes = notes
        if connection.failure is not None:
            raise connection.failure
        return chunks, connection

    return read

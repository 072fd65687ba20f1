"""Watching from the first chunk to the end: when questions are asked, and what is told of it."""

import time
from collections.abc import Callable
from typing import Any

from mirasol.app.live.chunks import LiveChunk
from mirasol.app.live.reader import LiveReader
from mirasol.app.live.watcher import Said, Watcher

EVENT_SECONDS = 0.5  # how long a look at the source takes at most, so that what happens is told soon

# Receives everything that happens: a kind ("chunk", "answer", "note") and its facts.
Tell = Callable[[str, dict[str, Any]], None]


class Sitting:
    """One source and one watcher.

    every: seconds of the source between askings. in_turn: ask at exactly those moments, whatever waits; otherwise
    only once no chunk waits, so that answers are about what is there now.
    """

    def __init__(self, reader: LiveReader, watcher: Watcher, every: float, in_turn: bool, tell: Tell):
        self.reader, self.watcher, self.every, self.in_turn, self.tell = reader, watcher, every, in_turn, tell
        self.due = 0.0
        self.asked = 0  # times
        self.changes = 0
        self.worst_latency = 0.0
        self.began = time.monotonic()
        self._asked_chunk: int | None = None

    def run(self) -> None:
        """Watches until the source ends. Raises UserError as `LiveReader.poll`."""
        while self.reader.ended is None:
            chunks = self.reader.poll(EVENT_SECONDS)
            self._tell_notes()
            for place, chunk in enumerate(chunks):
                self._see(chunk)
                waits = not self.in_turn and place < len(chunks) - 1
                if chunk.end + 1e-9 >= self.due and not waits:
                    self._ask()
        self._tell_notes()
        if self.watcher.newest is not None and self._asked_chunk != self.watcher.newest.number:
            self._ask()

    def _see(self, chunk: LiveChunk) -> None:
        self.watcher.append(chunk)
        if self.due == 0.0:
            self.due = chunk.start + min(self.every, chunk.end - chunk.start)
        facts = {
            "chunk": chunk.number,
            "start": chunk.start,
            "end": chunk.end,
            "source_time": chunk.source_start,
            "video": chunk.has_video,
            "audio": chunk.has_audio,
            "missing": chunk.missing or None,
        }
        self.tell("chunk", facts)

    def _ask(self) -> None:
        newest = self.watcher.newest
        while self.due <= newest.end + 1e-9:
            self.due += self.every
        self.asked, self._asked_chunk = self.asked + 1, newest.number
        for said in self.watcher.ask():
            self.changes += said.changed
            self.worst_latency = max(self.worst_latency, said.latency)
            counts = self.reader.counts
            self.tell("answer", describe_answer(said) | {"dropped": counts.dropped + counts.undecoded})

    def _tell_notes(self) -> None:
        notes, self.reader.notes = self.reader.notes, []
        newest = self.watcher.newest
        for note in notes:
            self.tell("note", {"time": 0.0 if newest is None else newest.end, "note": note})


def describe_answer(said: Said) -> dict[str, Any]:
    """An answer's facts, for a line of JSON."""
    return {
        "time": round(said.second, 6),
        "source_time": round(said.source_second, 6),
        "question": said.question,
        "answer": said.answer,
        "probability": said.probability,
        "not_sure": said.not_sure,
        "changed": said.changed,
        "latency": round(said.latency, 4),
    }

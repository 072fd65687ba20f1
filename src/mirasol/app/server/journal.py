"""What the server writes down: a JSON line for each request, and numbers for Prometheus. No media and, unless they are
asked for, no questions."""

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from mirasol.app.server.service import Service

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Journal:
    """Writes a line of JSON for each event."""

    def __init__(self, stream: TextIO | None = None):
        self.stream, self._lock = stream, threading.Lock()

    def write(self, event: str, **facts: Any) -> None:
        """Writes an event with the time. An output that is gone stops nothing."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts})
        stream = sys.stderr if self.stream is None else self.stream
        with self._lock:
            try:
                stream.write(line + "\n")
                stream.flush()
            except (OSError, ValueError):
                pass


class Metrics:
    """The server's numbers, in a registry of its own: several servers of a process do not mix."""

    def __init__(self):
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("mirasol_requests", "Requests answered", ["route", "status"], **own)
        self.seconds = Histogram("mirasol_request_seconds", "Seconds of a request", ["route"], buckets=SECONDS, **own)
        self.first_token = Histogram(
            "mirasol_first_token_seconds",
            "Seconds from a question's arrival to its first piece",
            buckets=SECONDS,
            **own,
        )
        self.tokens = Counter("mirasol_tokens", "Tokens of answers", **own)
        self.clips = Counter(
            "mirasol_clips", "Clips asked about, by whether their latents were kept", ["latents"], **own
        )
        self.chunks = Counter(
            "mirasol_session_chunks", "Chunks of realtime sessions, by what became of them", ["fate"], **own
        )

    def watch(self, service: "Service") -> None:
        """Adds what is read when the numbers are asked for."""
        answerer, files, clips = service.answerer, service.files, service.clips
        readings: dict[str, tuple[str, Callable[[], float]]] = {
            "mirasol_open_requests": ("Requests being answered", lambda: service.open),
            "mirasol_sessions": ("Realtime sessions", lambda: service.sessions),
            "mirasol_waiting_questions": ("Questions that are not in the batch yet", lambda: answerer.waiting),
            "mirasol_batch_questions": ("Questions answered together now", lambda: len(answerer.batch)),
            "mirasol_steps": ("Steps of the batch so far", lambda: answerer.steps),
            "mirasol_step_rows": ("Rows of all steps so far", lambda: answerer.stepped_rows),
            "mirasol_latent_bytes": ("Bytes of kept latents", lambda: clips.memory.nbytes),
            "mirasol_latent_clips": ("Clips whose latents are kept", lambda: len(clips.memory)),
            "mirasol_stored_bytes": ("Bytes of uploaded files", lambda: files.nbytes),
            "mirasol_stored_files": ("Uploaded files", lambda: len(files)),
        }
        from prometheus_client import Gauge

        for name, (meaning, read) in readings.items():
            Gauge(name, meaning, registry=self.registry).set_function(read)

    def format(self) -> bytes:
        """The text that Prometheus reads."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)

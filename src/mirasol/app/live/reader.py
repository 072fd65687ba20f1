"""A live source, chunk by chunk: opened, decoded and opened again in a process of its own, which it may crash."""

import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any

from mirasol.app.live import jobs
from mirasol.app.live.chunks import LiveChunk, LiveCounts, LiveSettings, Progress, Resume
from mirasol.app.live.source import LiveSource
from mirasol.errors import BadClip, UserError
from mirasol.media.isolation.decoders import Decoder

LONGEST_RETRY = 30.0
LOOK_SECONDS = 0.5
FULL_SECONDS = 0.002  # until a full pipe is tried again


class LiveReader:
    """Gives the chunks of a source in order, none left out: what is lost comes as a chunk without content.

    Of a source of the kind "bytes" either `descriptor` is read (what `fileno` of a pipe or of stdin gives), or what
    `append` is given. For one thread; `append` and `end` may be called from another. A context manager.

    counts: so far. notes: what has happened, one line each; the caller may take lines away.
    """

    def __init__(self, source: LiveSource, settings: LiveSettings, descriptor: int | None = None):
        self.source, self.settings = source, settings
        self.counts = LiveCounts()
        self.notes: list[str] = []
        self.ended: str | None = None
        """None while the source goes on; "" at its end; else why it is not read further."""
        self.total: int | None = None
        """How many chunks there are, where that is known."""
        self._decoder: Decoder | None = None
        self._is_open = False  # the connection
        self._is_new = True  # no connection has been open yet
        self._resume: Resume | None = None
        self._failures = 0  # in a row
        self._retry_at = self._last_news = time.monotonic()
        self._opening_since: float | None = None
        self._write_end: int | None = None
        self._writing = threading.Lock()
        self._read_end = descriptor
        if source.kind == "bytes" and descriptor is None:
            self._read_end, self._write_end = os.pipe()
            os.set_blocking(self._write_end, False)

    def __enter__(self) -> "LiveReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[LiveChunk]:
        """All chunks until the source ends."""
        while self.ended is None:
            yield from self.poll(LOOK_SECONDS)

    def start(self) -> None:
        """Starts the process that will read, and does not wait for it; it connects when `poll` is called."""
        if self._decoder is None:
            self._decoder = Decoder((self._read_end,) if self._read_end is not None else ())

    def append(self, content: bytes) -> None:
        """Gives more of the stream's bytes; waits while the model is behind. Raises BrokenPipeError after the end."""
        rest = memoryview(content)
        while True:
            # Never waiting within the lock, nor writing without it: the number of a closed pipe is soon another file's.
            with self._writing, suppress(BlockingIOError):
                if self._write_end is None:
                    raise BrokenPipeError("the stream has ended")
                rest = rest[os.write(self._write_end, rest) :]
            if not rest:
                return
            time.sleep(FULL_SECONDS)

    def end(self) -> None:
        """No more bytes follow."""
        with self._writing:
            if self._write_end is not None:
                os.close(self._write_end)
                self._write_end = None

    def poll(self, seconds: float) -> tuple[LiveChunk, ...]:
        """The chunks that are ready, after waiting for one up to about that many seconds; none if none came.

        Raises:
            UserError: the source cannot be opened, after all tries, or a file cannot be decoded.
        """
        deadline = time.monotonic() + seconds
        while self.ended is None:
            left = deadline - time.monotonic()
            if self._is_open:
                chunks = self._poll_connection(min(LOOK_SECONDS, max(0.0, left)))
                if chunks:
                    return chunks
            elif time.monotonic() < self._retry_at:
                time.sleep(max(0.0, min(left, self._retry_at - time.monotonic())))
            else:
                self._open()
            if left <= 0:
                break
        return ()

    def close(self) -> None:
        """Ends the process that reads."""
        if self._decoder is not None:
            self._decoder.kill()
            self._decoder = None
        self._is_open = False
        if self.ended is None:
            self.ended = "closed"
        self.end()
        if self.source.kind == "bytes" and self._read_end is not None:
            with suppress(OSError):
                os.close(self._read_end)
            self._read_end = None

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.start()
        if not self._decoder.alive:
            raise BadClip(self.source, "the decoder ended")
        return self._decoder.run(self.settings.limits, self.source, pickle.dumps((function, arguments, {}), 5))

    def _open(self) -> None:
        """Tries to open the source. Raises UserError where that has failed too often, or can never work."""
        began = self._opening_since = self._opening_since or time.monotonic()
        try:
            is_open = self._run(
                jobs.open_connection, self.source, self.settings, self._resume, self._read_end, LOOK_SECONDS
            )
        except UserError as error:
            self._opening_since = None
            self._end_dead_decoder()
            self._fail(error)
            return
        if not is_open and self.source.kind == "address" and time.monotonic() - began > 3 * self.settings.stall:
            self._opening_since = None
            self._replace_decoder()
            self._fail(BadClip(self.source, f"does not open within {3 * self.settings.stall:g} s"))
        elif is_open:
            self._opening_since, self._is_open, self._last_news = None, True, time.monotonic()
            self.counts.connections += 1
            if not self._is_new:
                self.notes.append(f"connected again after {self._failures} tries")
            self._is_new = False

    def _poll_connection(self, seconds: float) -> tuple[LiveChunk, ...]:
        try:
            progress: Progress = self._run(jobs.poll_connection, seconds)
        except UserError as error:
            self.counts.crashes += 1
            self._end_dead_decoder(always=True)
            self._break_off(getattr(error, "reason", str(error)))
            return ()
        self.counts.add(progress.counts)
        self.notes += progress.notes
        self.total = progress.total
        self._resume = progress.resume
        if progress.arrived > self._last_news:
            self._last_news = progress.arrived
        if progress.chunks:
            self._failures, self._last_news = 0, max(self._last_news, time.monotonic())
        if progress.ended is not None:
            self._end_connection(progress)
        elif self.source.kind in ("address", "camera") and self._has_stalled():
            self._replace_decoder()
            self._break_off(f"nothing came for {self.settings.stall:g} s")
        return progress.chunks

    def _has_stalled(self) -> bool:
        # The process that reads notices a silent connection itself, and then says why: this is for one that hangs.
        return time.monotonic() - self._last_news > self.settings.stall + 2.0

    def _end_connection(self, progress: Progress) -> None:
        self._is_open = False
        if progress.ended == "" and not self.source.is_unstoppable:
            self.ended = ""
        else:
            self._break_off(progress.ended or "the source closed the connection")

    def _break_off(self, reason: str) -> None:
        """A connection that was open is gone: plans another one, or ends."""
        self._is_open = False
        if self.source.kind == "file":
            raise BadClip(self.source, reason)
        if self.source.kind == "bytes":
            self.ended = reason
            return
        self._fail(BadClip(self.source, reason))

    def _fail(self, error: UserError) -> None:
        """Counts a failure: plans the next try, or gives up."""
        reason = getattr(error, "reason", str(error))
        settings, self._failures = self.settings, self._failures + 1
        if self.source.kind in ("file", "bytes") or not isinstance(error, BadClip):
            raise error
        if self._failures > settings.retries:
            tries = f"{self._failures} tries" if self._failures > 1 else "one try"
            if self._is_new:
                raise BadClip(self.source, f"{reason} ({tries}): is it there, and may it be read?")
            self.ended = f"{reason}; not there again after {tries}" if settings.retries else reason
            return
        wait = min(LONGEST_RETRY, settings.first_retry * 2 ** (self._failures - 1))
        self._retry_at = time.monotonic() + wait
        self.notes.append(f"{reason}: trying again in {wait:g} s")

    def _end_dead_decoder(self, always: bool = False) -> None:
        if self._decoder is not None and (always or not self._decoder.alive):
            self._replace_decoder()

    def _replace_decoder(self) -> None:
        if self._decoder is not None and self._decoder.alive:
            self._decoder.kill()
        self._decoder = None


def describe_counts(counts: LiveCounts) -> list[str]:
    """What did not reach the model, and why, a line for each kind of loss."""
    words = {
        "dropped": "chunks dropped because the model is slower than the source",
        "undecoded": "chunks dropped because decoding is slower than the source",
        "empty": "chunks in which nothing came",
        "packets_failed": "packets that could not be decoded",
        "before_keyframe": "packets of video before the first picture that can be decoded alone",
        "late_samples": "samples of sound that came after their chunk",
        "jumps": "jumps of the source's clock",
        "crashes": "crashes of the decoder",
    }
    lines = [f"{getattr(counts, name)} {text}" for name, text in words.items() if getattr(counts, name)]
    if counts.gap_seconds >= 0.05:
        lines.append(f"{counts.gap_seconds:.1f} s in which nothing came")
    return lines

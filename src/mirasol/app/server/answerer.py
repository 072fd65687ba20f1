"""The one thread that computes: it encodes clips and streams, scores candidates, and answers questions in batches."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

from mirasol.app.server.batching import DecodingBatch
from mirasol.app.server.questions import Question
from mirasol.checkpoint import Loaded

Parameters = ParamSpec("Parameters")
Value = TypeVar("Value")


class Stopping(Exception):
    """The thread of the model ends: nothing more is computed."""


class Answerer:
    """A model and the thread that it computes in. May be used from any thread, and closed once.

    Between two steps of the questions that are being answered come at most one other job and all questions that have
    arrived, `max_batch` questions at a time.
    """

    def __init__(self, loaded: Loaded, max_batch: int = 16):
        self.model, self.processor, self.folder = loaded.model, loaded.processor, loaded.folder
        self.max_batch = max_batch
        self._lock = threading.Condition()
        self._jobs: deque[tuple[Future, Callable[[], Any]]] = deque()
        self._waiting: deque[Question] = deque()
        self._closed = False
        self.batch = DecodingBatch(self.model)
        self.steps = self.stepped_rows = 0
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Questions that are not being answered yet."""
        return len(self._waiting)

    def ask(self, question: Question) -> None:
        """Has a question answered. Raises Stopping after `close`."""
        with self._lock:
            if self._closed:
                raise Stopping
            self._waiting.append(question)
            self._lock.notify()

    def run(
        self, function: Callable[Parameters, Value], /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> "Future[Value]":
        """Has `function(*args, **kwargs)` run in the thread of the model. Raises Stopping after `close`."""
        future: Future[Value] = Future()
        with self._lock:
            if self._closed:
                raise Stopping
            self._jobs.append((future, lambda: function(*args, **kwargs)))
            self._lock.notify()
        return future

    def close(self) -> None:
        """Ends the thread; what is still open fails with Stopping."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (self._closed or self._jobs or self._waiting or self.batch):
                    self._lock.wait()
                if self._closed:
                    break
                job = self._jobs.popleft() if self._jobs else None
                room = self.max_batch - len(self.batch)
                arrived = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            if job is not None:
                _run_job(*job)
            self._decode([question for question in arrived if not question.is_cancelled])
        self._fail_all()

    def _decode(self, arrived: list[Question]) -> None:
        """One step of the batch, then the first tokens of the questions that have arrived."""
        try:
            if self.batch:
                self.steps, self.stepped_rows = self.steps + 1, self.stepped_rows + len(self.batch)
                self.batch.step()
        except Exception as error:  # out of memory, say: the thread goes on with the next questions
            self.batch.fail(error)
        try:
            if arrived:
                self.batch.join(arrived)
        except Exception as error:
            for question in arrived:
                if question not in self.batch.questions:
                    question.fail(error)

    def _fail_all(self) -> None:
        self.batch.fail(Stopping())
        for question in self._waiting:
            question.fail(Stopping())
        for future, _ in self._jobs:
            if future.set_running_or_notify_cancel():
                future.set_exception(Stopping())


def _run_job(future: Future, function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        value = function()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(value)

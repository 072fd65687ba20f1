"""The processes of a run: which one this is, and how they agree. A run has one unless `torchrun` starts more."""

import contextlib
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from mirasol.errors import Stopped, UserError

Value = TypeVar("Value")

# Seconds between the signs of life that processes give each other while they wait for long work.
SIGNS_EVERY = 1.0


class ProcessLost(UserError):
    """Another process of the run has gone, or stands still. Each process that is left says so for itself."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. A run of one process needs no process group: it is this class as it is.

    rank, world_size: which process this is, and of how many
    local_rank: which one on its machine: the number of its GPU
    host: group for what the processes tell each other in the CPU's memory; `files` is another one for checkpoints,
        whose collectives run in a thread of their own beside the step's
    seconds: how long these groups wait for a process, as messages tell it
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    host: dist.ProcessGroup | None = None
    files: dist.ProcessGroup | None = None
    seconds: float = 0.0

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files and speaks for all."""
        return self.rank == 0

    def in_thread(self) -> "Ranks":
        """The same processes for a thread beside the step: its collectives have a group of their own."""
        return replace(self, host=self.files)

    def from_first(self, value: Value) -> Value:
        """The first process's value, on all of them."""
        if self.host is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host)
        return box[0]

    def gathered(self, value: Value) -> list[Value]:
        """Every process's value, by rank."""
        if self.host is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host)
        return values

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor, on the device it lies on; the tensor itself in a run of one."""
        if self.host is None:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total, group=self.host if tensor.device.type == "cpu" else None)
        return total

    def exchange(self, work: Callable[[], Value]) -> list[Value]:
        """What `work()` gave on every process, by rank; where it fails on any, it fails on all of them, with one error.

        The error of the lowest rank that failed is raised everywhere: nobody is left waiting for a process that has
        gone. On all but the first process it is marked as `told_by_first`.
        """
        if self.host is None:
            return [work()]
        result, error = None, None
        try:
            result = work()
        except ProcessLost:
            raise  # there is one less to tell it to, and each of the others finds out
        except Exception as raised:
            error = raised
        told = self.gathered((result, _sendable(error)))
        failure = next((failed for _, failed in told if failed is not None), None)
        if failure is None:
            return [value for value, _ in told]
        failure = failure if error is None else error
        failure.told_by_first = not self.is_first
        raise failure

    def together(self, work: Callable[[], Value]) -> Value:
        """`work()` of this process; errors are shared as by `exchange`."""
        if self.host is None:
            return work()
        results: list[Value] = []
        self.exchange(lambda: results.append(work()))
        return results[0]

    def patiently(self, work: Callable[[], Value]) -> Value:
        """As `together`, of work that may take any time on any process: the others wait for as long as it gives signs
        of life, which a thread of its own does."""
        if self.host is None:
            return work()
        results: list[Value] = []
        self.exchange(lambda: results.append(self._giving_signs(work)))
        return results[0]

    def _giving_signs(self, work: Callable[[], Value]) -> Value:
        """What `work()` gave here, once it has ended on all processes."""
        ended, failed, signs = threading.Event(), [], self.in_thread()

        def give() -> None:
            try:
                with signs.losses_told():
                    while any(signs.gathered(not ended.wait(SIGNS_EVERY))):
                        pass
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=give, name="signs of life", daemon=True)
        thread.start()
        result = None
        try:
            result = work()
        except Exception as error:
            failed.append(error)
        ended.set()
        while thread.is_alive():
            try:
                thread.join()
            except Stopped as stopped:  # a signal that came here alone; the others learn of it when they have ended
                failed.append(stopped)
        if failed:
            raise failed[0]
        return result

    def first_then_rest(self, work: Callable[[], Value]) -> Value:
        """`work()` of the first process, then of the others: what it leaves on the disk they find there. Patiently."""
        if self.is_first:
            result = self.patiently(work)
            self.patiently(lambda: None)
            return result
        self.patiently(lambda: None)
        return self.patiently(work)

    @contextlib.contextmanager
    def losses_told(self) -> Iterator[None]:
        """Raises ProcessLost in place of what PyTorch raises where another process has gone or stands still."""
        try:
            yield
        except RuntimeError as error:
            # gloo's errors have no type of their own, but all name its source file.
            if self.host is None or not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
                raise
            what = "has gone: its own output says why"
            if re.search("timed out|timeout", str(error), re.IGNORECASE):
                what = f"gave no answer within process_seconds={self.seconds:g}: it hangs, or was stopped"
            raise ProcessLost(
                f"process {self.rank} of {self.world_size}: another process {what}; --resume goes on"
            ) from error


def _sendable(error: Exception | None) -> Exception | None:
    """An error as another process can build it again."""
    if error is None:
        return None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return (
            UserError(str(error)) if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {error}")
        )
    return error

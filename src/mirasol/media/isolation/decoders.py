"""Decoding in a process of its own: a file that crashes, stalls or floods the decoder is one `BadClip`.

The decoder (`mirasol.media.isolation.process`) stays for the next file. It is a plain child process, so daemonic
processes such as loading workers may have one, and ends with the process that reads, however that one ends.
"""

import atexit
import ctypes
import mmap
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

import mirasol
from mirasol.errors import BadClip, UserError
from mirasol.media.isolation.shared import PAGE, make_memory, receive_message, send_message
from mirasol.media.limits import DEFAULT_LIMITS, Limits
from mirasol.processes import STOP_SIGNALS

LOOK_SECONDS = 0.1  # how often a decoder at work is looked at
START_SECONDS = 300.0  # what a decoder may take to start on a busy machine
END_SECONDS = 5.0  # what the kernel may take to end a process
# Memory that a decoder may keep from its last file, as a share of the limit: with more it is replaced.
KEPT_SHARE = 0.25
# No threads of libraries that the decoder has no use for. And glibc keeps the memory that one file needed for the next
# one: giving it back meant 350 page faults for a clip of 160x120, about 1 % of reading it.
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(2**26),
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
}

Parameters = ParamSpec("Parameters")
Value = TypeVar("Value")


class DecoderEnded(BadClip):
    """A decoder's process ended while it was at work on the file, by the file's fault or by somebody else's."""


def run_isolated(
    limits: Limits,
    file: object,
    function: Callable[Parameters, Value],
    /,
    *args: Parameters.args,
    **kwargs: Parameters.kwargs,
) -> Value:
    """`function(*args, **kwargs)`, an importable function that decodes `file`, run in a decoder process.

    Arrays of the result are shared with that process, not copied. Threads may call this at the same time: there are as
    many decoders as calls at a time.

    Raises:
        BadClip: of `file`: the decoder crashed (`DecoderEnded`), made no progress for `limits.max_idle_seconds`, took
            more than `limits.max_work_seconds` or `limits.max_memory` bytes, or failed in a way that the reader does
            not know.
        Exception: a `UserError` (other `BadClip`s among them) that the function raised.
        UserError: no decoder process can be started.
    """
    decoder = _pool.take()
    try:
        value = decoder.run(limits, file, pickle.dumps((function, args, kwargs), 5))
    except UserError:
        raise
    except BaseException:
        decoder.kill()  # perhaps interrupted with the result half received
        raise
    finally:
        _pool.give_back(decoder, limits)
    return value


def start_decoder() -> None:
    """Starts a decoder for the next file, unless one is ready, and does not wait for it."""
    _pool.give_back(_pool.take(), DEFAULT_LIMITS)


def format_decoder_program(descriptors: tuple[int, int, int]) -> str:
    """What a decoder process runs; `descriptors` are the arguments of `serve`."""
    home = str(Path(mirasol.__file__).parents[1])
    start = f"import sys; sys.path.insert(0, {home!r}); from mirasol.media.isolation.process import serve"
    return f"{start}; serve{descriptors}"


def _get_working_folder() -> str | None:
    """The folder that relative paths start from; None if it was deleted."""
    with suppress(FileNotFoundError):
        return os.getcwd()
    return None


def _start_process(given: tuple[int, int, int], inherited: tuple[int, ...]) -> subprocess.Popen:
    """A process that runs `serve` with these descriptors, and that has those of `inherited` too."""
    # It inherits the mask: no signal reaches it before it says what is done with it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return subprocess.Popen(
            [sys.executable, "-c", format_decoder_program(given)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(*given, *inherited),
            env=os.environ | ENVIRONMENT,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _describe_no_start(why: str) -> str:
    return (
        f"no process can be started to decode media ({why}): free memory, processes or open files of this machine, or "
        "raise their limits (ulimit -a)"
    )


class Decoder:
    """A decoder process and the connection to it. For one thread at a time.

    inherited: descriptors of this process that its jobs may use under the same numbers
    """

    def __init__(self, inherited: tuple[int, ...] = ()):
        with ExitStack() as undone:
            try:
                self._start(undone, inherited)
            except (OSError, ValueError) as error:
                raise UserError(_describe_no_start(getattr(error, "strerror", None) or str(error))) from error
            undone.pop_all()
        self._memory: int | None = None
        with suppress(OSError):
            self._memory = os.open(f"/proc/{self.pid}/statm", os.O_RDONLY)
        self._poller = select.poll()
        self._poller.register(self._connection, select.POLLIN)
        self._regions: dict[int, mmap.mmap] = {}
        self._returned: list[int] = []  # regions whose arrays nobody uses any more
        self.alive = True
        with suppress(ConnectionError):  # one that has failed to start is found out by the first job
            send_message(self._connection, pickle.dumps([place for place in sys.path if place]))

    def _start(self, undone: ExitStack, inherited: tuple[int, ...]) -> None:
        """Starts the process; `undone` closes what this process keeps of the connection to it."""
        self._connection, theirs = socket.socketpair()
        undone.callback(self._connection.close)
        with theirs:
            lifeline, pipe = os.pipe()
            self._lifeline: int | None = pipe
            undone.callback(os.close, pipe)
            with ExitStack() as given:
                given.callback(os.close, lifeline)
                progress = make_memory(PAGE)
                given.callback(os.close, progress)
                self._progress = memoryview(mmap.mmap(progress, PAGE)).cast("q")
                given_to = (theirs.fileno(), lifeline, progress)
                self._process = _start_process(given_to, inherited)

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, limits: Limits, file: object, job: bytes) -> Any:
        """Runs a pickled (function, arguments, named arguments); see `run_isolated`."""
        self._wait_for_start()
        returned, self._returned = self._returned, []
        try:
            send_message(self._connection, pickle.dumps((job, _get_working_folder(), limits.max_memory, returned), 5))
            self._wait(limits, file)
            message = receive_message(self._connection)
        except ConnectionError:
            message = None
        if message is None:
            raise DecoderEnded(file, self._describe_end())
        content, descriptors = message
        content, places, sizes, dropped = pickle.loads(content)
        for (number, size), descriptor in zip(sizes, descriptors, strict=True):
            self._regions[number] = mmap.mmap(descriptor, size)
            os.close(descriptor)
        for number in dropped:
            del self._regions[number]
        good, value, trace = pickle.loads(content, buffers=[self._array(*place) for place in places])
        if good:
            return value
        if isinstance(value, MemoryError):
            raise BadClip(file, limits.describe_memory()) from value
        if isinstance(value, UserError):
            raise value
        words = " ".join(f"{type(value).__name__}: {value}".split())
        raise BadClip(file, f"the reader failed: {words}") from RuntimeError(trace)

    def kill(self) -> None:
        """Ends the process at once."""
        self.alive = False
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # one that waits for a disk that is gone
            self._process.wait(END_SECONDS)
        self._close()

    def leave_to_parent(self) -> None:
        """In a forked process: the decoder belongs to the one that was forked."""
        self.alive = False
        self._process.returncode = 0
        self._close()

    def _close(self) -> None:
        self._connection.close()
        for descriptor in (self._lifeline, self._memory):
            if descriptor is not None:
                os.close(descriptor)
        self._lifeline = self._memory = None

    def measure_private_bytes(self) -> int:
        """The process's memory, without what is shared; 0 where the system does not say."""
        if self._memory is None:
            return 0
        try:
            _, resident, shared, *_ = os.pread(self._memory, 256, 0).split()
        except (OSError, ValueError):  # the process has ended
            return 0
        return (int(resident) - int(shared)) * PAGE

    def _array(self, number: int, offset: int, length: int) -> np.ndarray:
        """Bytes of a region, which is returned once no array uses it."""
        content = (ctypes.c_char * length).from_buffer(self._regions[number], offset)
        weakref.finalize(content, self._watch_return(number)).atexit = False
        return np.frombuffer(content, np.uint8)

    def _watch_return(self, number: int) -> Callable[[], None]:
        # Bound to the list at that time, not to the decoder, which may be gone long before its last array.
        decoder = weakref.ref(self)

        def give_back() -> None:
            alive = decoder()
            if alive is not None:
                alive._returned.append(number)

        return give_back

    def _wait_for_start(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self._progress[0] == 0:
            if self._process.poll() is not None or time.monotonic() > deadline:
                why = f"exit code {self._process.returncode}" if self._process.returncode is not None else "no answer"
                self.kill()
                raise UserError(_describe_no_start(f"{why}: its errors are above"))
            time.sleep(0.005)

    def _wait(self, limits: Limits, file: object) -> None:
        """Waits for the job's answer, or the process's end. Raises BadClip for one that is over its limits."""
        idle, worked, last = 0.0, 0.0, self._progress[0]
        while not self._poller.poll(LOOK_SECONDS * 1000):
            # Looks are counted, not the clock: this process may have been stopped in between.
            idle, last = (idle + LOOK_SECONDS if self._progress[0] == last else 0.0), self._progress[0]
            worked += LOOK_SECONDS
            if self.measure_private_bytes() > limits.max_memory:
                self.kill()
                raise BadClip(file, limits.describe_memory())
            if idle >= limits.max_idle_seconds:
                self.kill()
                raise BadClip(file, limits.describe_idleness())
            if worked >= limits.max_work_seconds:
                self.kill()
                raise BadClip(file, limits.describe_work())

    def _describe_end(self) -> str:
        """How the process ended by itself."""
        self.alive = False
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        code = self._process.returncode
        self.kill()
        if code is None:
            return "the decoder closed its connection"
        if code >= 0:
            return f"the decoder ended with exit code {code}"
        name = signal.Signals(-code).name
        return f"the decoder crashed: {name}" + (" (out of memory perhaps)" if name == "SIGKILL" else "")


class _Pool:
    """The decoders of this process that are not at work."""

    def __init__(self):
        self.lock = threading.Lock()
        self.idle: list[Decoder] = []
        self.all: weakref.WeakSet[Decoder] = weakref.WeakSet()

    def take(self) -> Decoder:
        with self.lock:
            if self.idle:
                return self.idle.pop()
        decoder = Decoder()
        self.all.add(decoder)
        return decoder

    def give_back(self, decoder: Decoder, limits: Limits) -> None:
        if not decoder.alive:
            return
        if decoder.measure_private_bytes() > KEPT_SHARE * limits.max_memory:
            decoder.kill()
            return
        with self.lock:
            self.idle.append(decoder)

    def close(self) -> None:
        for decoder in list(self.all):
            if decoder.alive:
                decoder.kill()

    def forget(self) -> None:
        """In a forked process."""
        for decoder in list(self.all):
            if decoder.alive:
                decoder.leave_to_parent()
        self.__init__()


def _close_all() -> None:
    _pool.close()


def _forget_all() -> None:
    _pool.forget()


_pool = _Pool()
atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_all)

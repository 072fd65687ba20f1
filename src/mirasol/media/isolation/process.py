"""The process in which untrusted media is decoded: a file that crashes, stalls or floods it costs nothing else.

`isolation.decoders` starts and watches it. It imports NumPy and PyAV, not torch, so it is ready in a fraction of the
time and memory of a process that trains.
"""

import fcntl
import mmap
import os
import pickle
import resource
import select
import signal
import socket
import sys
import traceback
from contextlib import suppress

from mirasol.media.isolation.shared import (
    PAGE,
    SharedRegions,
    receive_message,
    report_progress,
    send_message,
    share_with_reader,
)

# Beyond the limit that the watching process enforces: what is asked for at once, before it can look.
BACKSTOP = 2


def serve(connection: int, lifeline: int, progress: int) -> None:
    """Runs jobs until the process that started this one is gone.

    connection: socket of the jobs and their results; lifeline: end of a pipe that closes with that process; progress:
    shared memory for the counter of `report_progress`
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the process that reads decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
    _end_with_reader(lifeline)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    regions = SharedRegions()
    share_with_reader(memoryview(mmap.mmap(progress, PAGE)).cast("q"), regions)
    os.close(progress)
    with socket.socket(fileno=connection) as stream:
        message = receive_message(stream)
        if message is None:
            return
        sys.path[:] = pickle.loads(message[0])
        import mirasol.media.reader  # noqa: F401 - ready before the first job arrives

        report_progress()
        limited = -1
        while (message := receive_message(stream)) is not None:
            job, folder, memory, returned = pickle.loads(message[0])
            if folder is not None:  # relative paths are the reader's, who may have moved since the last job
                with suppress(OSError):
                    os.chdir(folder)
            regions.take_back(returned)
            if memory != limited:
                _limit_memory(memory)
                limited = memory
            report_progress()
            content, descriptors = _run(job, regions)
            send_message(stream, content, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)


def _run(job: bytes, regions: SharedRegions) -> tuple[bytes, list[int]]:
    """The message of a job's result or error, and the descriptors that go with it."""
    places: list[tuple[int, int, int]] = []

    def keep_in_message(buffer: pickle.PickleBuffer) -> bool:
        place = regions.place(buffer)
        if place is not None:
            places.append(place)
        return place is None

    try:
        function, arguments, named = pickle.loads(job)
        content = pickle.dumps((True, function(*arguments, **named), ""), 5, buffer_callback=keep_in_message)
    except Exception as error:  # whatever a broken file makes of the reader is this file's error
        places.clear()
        content = _pickle_error(error)
    sizes, descriptors, dropped = regions.end_job({number for number, _, _ in places})
    return pickle.dumps((content, places, sizes, dropped), 5), descriptors


def _pickle_error(error: Exception) -> bytes:
    trace = "".join(traceback.format_exception(error))
    with suppress(Exception):
        content = pickle.dumps((False, error, trace), 5)
        pickle.loads(content)  # an error may be pickled and then refuse its arguments
        return content
    return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}"), trace), 5)


def _end_with_reader(lifeline: int) -> None:
    """The kernel ends this process when the other end of the pipe closes, even amid a call that never returns."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    poller = select.poll()
    poller.register(lifeline, select.POLLIN)
    if poller.poll(0):  # closed before the kernel was asked
        os._exit(1)


def _limit_memory(limit: int) -> None:
    """Bounds private memory at more than `limit` bytes, for what is asked for at once."""
    if not sys.platform.startswith("linux"):
        return
    with open("/proc/self/statm", encoding="ascii") as file:
        present = int(file.read().split()[5]) * PAGE
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = present + BACKSTOP * limit
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if most < 0 else min(wanted, most), most))

"""What goes wrong in a decoder process. Files are told by their names: `crash.mp4` crashes whatever opens it there."""

import ctypes
import os
import re
import signal
import sys
import time
from pathlib import Path

import av
import numpy as np

from mirasol.errors import BadClip, UserError
from mirasol.media.isolation import decoders as isolation
from mirasol.media.isolation import shared as decoder_process
from mirasol.media.limits import DEFAULT_LIMITS

STEP = 2**25
FAULTS = ("crash", "kill", "leave", "hang", "allocate", "fail")


def crash() -> None:
    """Reads at address 0, as a decoder with a bug does."""
    ctypes.string_at(0)


def kill() -> None:
    """Is killed, as by a machine that is out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    """Ends at once, as C libraries do that call exit()."""
    os._exit(3)


def hang() -> None:
    """Never returns from a call that never lets another thread run."""
    re.match(r"(a+)+b", "a" * 64)


def allocate(limit: int = 2**34) -> int:
    """Takes more and more memory, and uses it."""
    held = []
    while sum(map(len, held)) < limit:
        held.append(np.ones(STEP, np.uint8))
        decoder_process.report_progress()
    return sum(map(len, held))


def fail() -> None:
    """Raises what no reader raises on purpose."""
    raise IndexError("tuple index out\nof range")


def work(seconds: float) -> str:
    """Takes long, and gets on with it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        decoder_process.report_progress()
        time.sleep(0.01)
    return "done"


def wait(seconds: float) -> None:
    """Takes long without getting on."""
    time.sleep(seconds)


def pid() -> int:
    """The decoder's process id."""
    return os.getpid()


def loaded_modules() -> list[str]:
    """The modules of the decoder process."""
    return list(sys.modules)


def arrays(*counts: int) -> list[np.ndarray]:
    """An array of ones of each of these many bytes."""
    made = []
    for count in counts:
        made.append(decoder_process.allocate_array((count,), np.uint8))
        assert not made[-1].any()
        made[-1][:] = 1
    return made


def refuse(path: str, kind: str) -> None:
    """Raises errors of the user's."""
    raise BadClip(path, "reason") if kind == "clip" else UserError("a setting")


def open_with_faults(file: object, *arguments: object, **named: object) -> object:
    """`av.open`, with the fault that the file's name says."""
    name = Path(str(file)).name
    for fault in FAULTS:
        if name.startswith(fault):
            globals()[fault]()
    return _open(file, *arguments, **named)


_open = av.open


def faulty_program(descriptors: tuple[int, int, int]) -> str:
    """The program of a decoder process in which `av.open` is `open_with_faults`."""
    here = str(Path(__file__).parent)
    install = "import av, decoder_faults; av.open = decoder_faults.open_with_faults"
    return f"import sys; sys.path.insert(0, {here!r}); {install}; {_program(descriptors)}"


_program = isolation.format_decoder_program


def install_faults(idle_seconds: float, memory: int) -> None:
    """Decoders of this process have faults from now on, and less time and memory than by default."""
    isolation.format_decoder_program = faulty_program
    object.__setattr__(DEFAULT_LIMITS, "max_idle_seconds", idle_seconds)
    object.__setattr__(DEFAULT_LIMITS, "max_memory", memory)


class FaultsToInstall:
    """Installs faults in whichever process this is sent to."""

    def __init__(self, idle_seconds: float, memory: int):
        self.arguments = idle_seconds, memory

    def __reduce__(self):
        return install_faults, self.arguments


def _is_changed(root: Path) -> bool:
    return (root / "recipe.yaml").read_bytes().startswith(bytes(8))


def crash_if_changed(root: Path, name: str) -> list[str]:
    """Crashes at a recipe that begins with zeros."""
    if _is_changed(root):
        crash()
    return ["read"]


def fail_if_changed(root: Path, name: str) -> list[str]:
    """Fails at a recipe that begins with zeros."""
    if _is_changed(root):
        fail()
    return ["read"]


def write_if_changed(root: Path, name: str) -> list[str]:
    """Writes beside the folder of a recipe that begins with zeros."""
    if _is_changed(root):
        (root.parent / "outside").write_text("")
    return ["read"]

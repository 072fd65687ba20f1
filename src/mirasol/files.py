"""Files and folders that are written completely or not at all, their hashes and locks."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from mirasol.errors import UserError


def write_file_atomically(file: Path, text: str) -> None:
    """Writes a text file such that an interruption, or a power cut, leaves either the old content or all of the new."""
    unfinished = file.with_name(f".{file.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(unfinished, file)


def write_folder_atomically(
    target: Path, fill: Callable[[Path], None], *, replace: bool = False, sync: bool = True
) -> None:
    """Makes the folder `target` with what `fill(folder)` writes.

    The folder gets its name once it is complete, and after an error nothing of it remains. A killed process leaves a
    hidden folder that the next call uses and empties.

    replace: an older folder of that name is replaced, also one that is not empty
    sync: wait until everything is on the disk, so that a power cut cannot damage a folder that has its name

    Raises:
        UserError: the folder cannot be made, has content that may not be replaced, or another process is writing it.
    """
    target = target.absolute()
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(unfinished, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{target}: cannot be created ({error.strerror}): give another folder") from error
    try:
        lock_file(descriptor)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"{target}: another process is writing this folder: wait for it or stop it") from error
    try:
        _empty_folder(unfinished)
        fill(unfinished)
        for path in [*sorted(unfinished.rglob("*")), unfinished]:
            copy_folder_permissions(path)
            if sync:
                sync_to_disk(path)
        if replace:
            remove_folder(target)
        elif target.is_dir():
            _remove_empty_folder(target)
        unfinished.rename(target)
        sync_to_disk(target.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def _empty_folder(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove_empty_folder(target: Path) -> None:
    try:
        target.rmdir()
    except OSError as error:
        raise UserError(f"{target}: already exists and is not empty: give another folder") from error


def remove_folder(target: Path) -> None:
    """Removes a folder if it exists: renamed first, so that a half-removed one is never taken for a complete one."""
    removed = target.with_name(".removed")
    shutil.rmtree(removed, ignore_errors=True)
    if target.exists():
        target.rename(removed)
        shutil.rmtree(removed)


def sync_to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_folder_permissions(path: Path) -> None:
    """Lets everyone who may read or write in a file's folder do so with the file: safetensors allows its owner only."""
    if path.is_file():
        path.chmod(path.parent.stat().st_mode & 0o666)


def hash_file(file: Path) -> str:
    """SHA-256 of a file of any size, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def lock_file(descriptor: int, wait: bool = False) -> bool:
    """Locks an open file or folder until it is closed or the process ends; False where the disk has no locks.

    Raises BlockingIOError where another process holds the lock, unless `wait` is set.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return False
    return True


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keeps other processes that hold the folder waiting until the end of the context."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock_file(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)

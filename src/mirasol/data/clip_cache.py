"""Decoded clips, on disk where there is a cache."""

import contextlib
import functools
import hashlib
import json
import os
import queue
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mirasol.config.media import MediaConfig
from mirasol.data.media_files import find_stored_file, is_image, open_media_file
from mirasol.data.workers import WorkerFailed, WorkerStatus
from mirasol.errors import BadClip, UserError
from mirasol.files import copy_folder_permissions, lock_file
from mirasol.media.feature_extractor import MirasolFeatureExtractor
from mirasol.media.timeline import cut_into_chunks
from mirasol.processes import make_process_context

# Goes up whenever a file may be read otherwise than before. 2: joined files, AVI, far streams, headers that lie, HDR.
CACHE_FORMAT = 2
TENSORS = ("video", "audio", "video_mask", "audio_mask")

# (media relative to the data's root, start in seconds or None, end in seconds or None)
Window = tuple[str, float | None, float | None]
WHOLE = (None, None)
_MOST_CUTS = 100_000  # remembered: a run may go through millions of windows


@dataclass(frozen=True)
class BadWindow:
    """A clip that could not be decoded; `start` and `end` are None for the whole file."""

    media: str
    start: float | None
    end: float | None
    reason: str


class UnreadableWindow(BadClip):
    """The clip that `ClipCache.fill` stopped at; `window` says which part of the file was wanted."""

    def __init__(self, root: Path, window: BadWindow):
        super().__init__(Path(root) / window.media, window.reason)
        self.root, self.window = root, window

    def __reduce__(self):
        return type(self), (self.root, self.window)


class Room:
    """How much a folder of safetensors files may hold, counted in a file there that processes share.

    limit: in bytes, None for any; key: the recipe's key that sets it
    """

    def __init__(self, folder: Path, limit: int | None, key: str):
        self.folder, self.limit, self.key = folder, limit, key

    def take(self, size: int) -> bool:
        """Whether the folder may take so many bytes more; if so, they are counted in."""
        if self.limit is None:
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "size").open("a+", encoding="utf-8") as file:
            if not lock_file(file.fileno(), wait=True):
                # Always the same text, so that the warning is shown once.
                warnings.warn(
                    f"{self.folder}: this disk has no locks: processes that write here may count its size wrongly, and "
                    f"exceed {self.key}",
                    stacklevel=2,
                )
            file.seek(0)
            text = file.read()
            taken = int(text) if text.isdecimal() else self.measure()
            if taken + size > self.limit:
                return False
            file.truncate(0)
            file.write(str(max(0, taken + size)))
        return True

    def measure(self) -> int:
        """Bytes of all files in the folder, as it is now."""
        size = 0
        for file in self.folder.rglob("*.safetensors"):
            with contextlib.suppress(FileNotFoundError):  # another process may just have found it damaged
                size += file.stat().st_size
        return size


class ClipCache:
    """The compact tensors of decoded clips, one safetensors file each, decoded on first use.

    A file's name is a hash of the clip's path, size, time of change, window and of the extractor's settings, so a
    changed clip or another model shape never gets stale tensors. Files are written atomically, so processes may share a
    folder; a damaged file is decoded again, with a warning.

    folder: of the files; None keeps nothing, and every use decodes
    root: what `media` is relative to; settings: `MirasolConfig.media_settings()`
    whole: media of which windows are cut out of the whole clip where they consist of its chunks; windows of other
        media, and those off the chunk grid, are decoded on their own. (Named here and not found out from what the
        folder holds: a cut differs from a decoded window in the sound at its edges, and results must not depend on
        what was decoded before.) Needs a folder without limit.
    limit: bytes that the folder's files may take, None for any; beyond it, clips are decoded and not kept. No file is
        removed for new ones: a run returns to a clip only after all others, so replacing files gains nothing.
    """

    def __init__(
        self,
        folder: Path | None,
        root: Path,
        settings: Mapping[str, Any],
        whole: Collection[str] = (),
        limit: int | None = None,
    ):
        assert not whole or (folder is not None and limit is None)
        self.whole, self.limit = frozenset(whole), limit
        self.folder, self.root, self.settings = folder and Path(folder), Path(root), MediaConfig(**settings).to_dict()
        self._settings = json.dumps(self.settings, sort_keys=True)
        self.grid = _make_extractor(self._settings).grid
        self._cuts: dict[Window, tuple[int, int] | None] = {}
        self._room = Room(self.folder, limit, "data.cache_limit") if self.folder else None

    def at_size(self, image_size: int) -> "ClipCache":
        """The cache, in the same folder, of the same clips with frames of `image_size` pixels."""
        if image_size == self.settings["image_size"]:
            return self
        return ClipCache(self.folder, self.root, self.settings | {"image_size": image_size}, self.whole, self.limit)

    def make_key(self, window: Window) -> list[Any]:
        """What the window's tensors follow from. Raises BadClip where the media file is missing."""
        try:
            facts = find_stored_file(self.root, window[0]).stat()
        except OSError as error:
            raise BadClip(self.root / window[0], "no such file") from error
        return [CACHE_FORMAT, *window, facts.st_size, facts.st_mtime_ns, self.settings]

    def file(self, window: Window) -> Path:
        """The file of the window's tensors, which may not exist yet. Raises BadClip where the media file is missing."""
        return name_file(self.folder, self.make_key(window))

    def load(self, media: str, start: float | None = None, end: float | None = None) -> dict[str, Tensor]:
        """The clip's tensors as `MirasolFeatureExtractor.tensors` gives them; of an image file `image` alone.

        Raises BadClip when the clip has to be decoded and cannot be.
        """
        window = (media, start, end)
        if window[1:] != WHOLE and media in self.whole:
            self._decode_if_missing((media, *WHOLE))
            chunks = self._find_chunks_of_whole(window)
            if chunks is not None:
                whole = self._read_stored((media, *WHOLE), chunks)
                return {name: whole[name] for name in TENSORS}
        tensors = self._read_stored(window) if self.folder is not None and self.file(window).exists() else None
        if tensors is None:
            tensors = self._decode_and_keep(window)
        return {name: value for name, value in tensors.items() if name != "edges"}

    def _decode_and_keep(self, window: Window) -> dict[str, Tensor]:
        """Decodes a window, and keeps it if it may. Raises BadClip."""
        tensors, notes = _read(self._make_job(window))
        if self._room is not None and self._room.take(sum(tensor.nbytes for tensor in tensors.values())):
            _write(self.file(window), tensors, window[0], notes)
        return tensors

    def _decode_if_missing(self, window: Window) -> None:
        if not self.file(window).exists():
            self._decode_and_keep(window)

    def _read_stored(self, window: Window, chunks: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """What the window's file holds, or some of its chunks; decoded again if the file is damaged."""
        file = self.file(window)
        try:
            with safe_open(file, framework="pt") as stored:
                return {
                    name: stored.get_tensor(name)
                    if chunks is None or name == "edges"
                    else stored.get_slice(name)[slice(*chunks)]
                    for name in stored.keys()  # noqa: SIM118
                }
        except (SafetensorError, OSError) as error:
            warnings.warn(f"{file}: damaged file in the clip cache ({error}): decoded again", stacklevel=2)
        file.unlink(missing_ok=True)
        tensors = self._decode_and_keep(window)
        if chunks is None:
            return tensors
        return {name: value[slice(*chunks)] if name != "edges" else value for name, value in tensors.items()}

    def size(self) -> int:
        """Bytes of all clips in the folder, as it is now."""
        return self._room.measure()

    def fill(
        self,
        windows: Iterable[Window],
        workers: int = 1,
        on_bad: str = "error",
        on_progress: Callable[[int, int], None] | None = None,
        seconds: float | None = None,
    ) -> list[BadWindow]:
        """Decodes what is not decoded yet, in `workers` processes; `on_progress(done, total)` after every clip.

        seconds: how long no process may end a clip before WorkerFailed names those they are at; None is for ever.

        A file whose whole clip is bad is bad in all its windows. Returns the bad ones (`on_bad="skip"`) in the order
        given, or stops at the first with UnreadableWindow (`on_bad="error"`).
        """
        windows = list(windows)
        wholes = dict.fromkeys((w[0], *WHOLE) for w in windows if w[1:] == WHOLE or w[0] in self.whole)
        bad = self._fill(list(wholes), workers, on_bad, on_progress, seconds)
        broken = {window[0]: reason for window, reason in bad.items()}
        alone = []
        for window in windows:
            if window[0] in broken:
                bad[window] = broken[window[0]]
            elif window[1:] != WHOLE and (window[0] not in self.whole or self._find_chunks_of_whole(window) is None):
                alone.append(window)
        bad.update(self._fill(alone, workers, on_bad, on_progress, seconds))
        return [BadWindow(*window, bad[window]) for window in windows if window in bad]

    def _fill(self, windows, workers, on_bad, on_progress, seconds) -> dict[Window, str]:
        bad: dict[Window, str] = {}
        jobs = []
        for window in windows:
            try:
                if not self.file(window).exists():
                    jobs.append((window, self._make_job(window)))
            except BadClip as error:
                bad[window] = error.reason
                if on_bad == "error":
                    raise UnreadableWindow(self.root, BadWindow(*window, error.reason)) from error
        for done, (window, reason) in enumerate(_decode_all(jobs, workers, seconds), start=1):
            if reason is not None:
                bad[window] = reason
                if on_bad == "error":
                    raise UnreadableWindow(self.root, BadWindow(*window, reason))
            if on_progress is not None:
                on_progress(done, len(jobs))
        return bad

    def _make_job(self, window: Window) -> tuple[str, Window, str, str]:
        return str(self.root), window, self._settings, "" if self.folder is None else str(self.file(window))

    def _find_chunks_of_whole(self, window: Window) -> tuple[int, int] | None:
        """First and last (exclusive) chunk of the decoded whole clip that make up the window, if they exactly do."""
        if len(self._cuts) > _MOST_CUTS:
            self._cuts.clear()
        if window not in self._cuts:
            self._cuts[window] = self._find_chunks(*window)
        return self._cuts[window]

    def _find_chunks(self, media: str, start: float | None, end: float | None) -> tuple[int, int] | None:
        edges = self._read_stored((media, *WHOLE))["edges"]
        start = float(edges[0]) if start is None else start
        end = float(edges[-1]) if end is None else end
        if end <= start:
            return None
        wanted = torch.tensor(cut_into_chunks(start, end, self.grid).edges, dtype=torch.float64)
        first = int((edges - wanted[0]).abs().argmin())
        found = edges[first : first + len(wanted)]
        # A microsecond: finer than any sample or time stamp, coarser than rounding.
        if len(found) != len(wanted) or (found - wanted).abs().max() > 1e-6:
            return None
        return first, first + len(wanted) - 1


def name_file(folder: Path, key: Sequence[Any]) -> Path:
    """The file in a cache's folder that a key of plain data has."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return folder / name[:2] / f"{name}.safetensors"


def describe_window(window: Window) -> str:
    """A window as messages name it."""
    media, start, end = window
    if start is None and end is None:
        return media
    return f"{media} from {start or 0:g} s to {'its end' if end is None else f'{end:g} s'}"


@functools.lru_cache(maxsize=4)
def _make_extractor(settings: str) -> MirasolFeatureExtractor:
    return MirasolFeatureExtractor(**json.loads(settings))


def _read(job: tuple[str, Window, str, str]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a window and what was noted about it. Raises BadClip where the media cannot be used."""
    root, (media, start, end), settings, _ = job
    extractor = _make_extractor(settings)
    try:
        with open_media_file(Path(root), media) as path:
            if is_image(media):
                tensors, notes = {"image": extractor.read_image(path)}, ()
            else:
                clip = extractor.read(path, start, end)
                tensors, notes = extractor.tensors(clip), clip.notes
                tensors["edges"] = torch.tensor(clip.timeline.edges, dtype=torch.float64)
    except BadClip as error:
        raise BadClip(Path(root) / media, error.reason) from error
    except UserError as error:
        raise BadClip(Path(root) / media, str(error)) from error
    return {name: value.contiguous() for name, value in tensors.items()}, notes


def _write(target: Path, tensors: Mapping[str, Tensor], media: str, notes: Sequence[str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Several runs may fill one cache: each writes under its own name, the last rename wins with equal content.
    unfinished = target.with_suffix(f".{os.getpid()}.unfinished")
    save_file(dict(tensors), unfinished, metadata={"media": media, "notes": json.dumps(notes)})
    copy_folder_permissions(unfinished)
    os.replace(unfinished, target)


def _decode(job: tuple[str, Window, str, str]) -> str | None:
    """Decodes one window into its cache file. Returns the reason where the media cannot be used."""
    try:
        tensors, notes = _read(job)
    except BadClip as error:
        return error.reason
    _write(Path(job[3]), tensors, job[1][0], notes)
    return None


def _decode_all(jobs: Sequence[tuple[Window, tuple]], workers: int, seconds: float | None):
    """Yields (window, reason or None) as jobs end; in this process where a pool would not pay.

    Raises WorkerFailed where a process dies, and where none ends a job for `seconds`.
    """
    if workers <= 1 or len(jobs) < 16:
        for window, job in jobs:
            yield window, _decode(job)
        return
    context, status = make_process_context(), WorkerStatus(workers)
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin_decoding, initargs=(status, context.Value("i", 0))
    )
    ended: queue.SimpleQueue = queue.SimpleQueue()
    try:
        running = {pool.submit(_decode_reporting, job): window for window, job in jobs}
        for future in running:
            future.add_done_callback(ended.put)
        for _ in jobs:
            future = ended.get(timeout=seconds)
            yield running[future], future.result()
    except queue.Empty:
        stuck = status.describe()
        status.kill_workers()
        raise WorkerFailed(
            f"no clip decoded within batch_seconds={seconds:g}: being decoded are {stuck}: "
            "leave out the one that hangs, or allow more time"
        ) from None
    except BrokenProcessPool as error:
        raise WorkerFailed(
            f"a process that decodes clips died, out of memory perhaps; being decoded were {status.describe()}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_decoding(status: WorkerStatus, entered: Any) -> None:
    """A process of the decoding pool begins: with one thread, and a place to report to."""
    global _status
    torch.set_num_threads(1)
    with entered.get_lock():
        entered.value += 1
        status.enter(entered.value)
    _status = status


# Of a process of the decoding pool.
_status: WorkerStatus | None = None


def _decode_reporting(job: tuple[str, Window, str, str]) -> str | None:
    with _status.report_while(describe_window(job[1])):
        return _decode(job)


def write_bad_clips(file: Path, bad: Sequence[BadWindow]) -> None:
    """One JSON line per bad clip: media, start, end, reason."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(asdict(entry)) + "\n" for entry in bad), encoding="utf-8")

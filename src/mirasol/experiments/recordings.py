"""Real recordings as their authors publish them: names of files and folders say what is heard, and what belongs
together."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mirasol.errors import UserError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FEWEST_GROUPS = 2
SHOWN = 3
_ESC_FOLDER = re.compile(r"\d{3} - (\S.*)")
_ESC_FILE = re.compile(r"([1-9])-(\d+)-[A-Z]\.(?:ogg|wav)")
_SPOKEN_FILE = re.compile(r"(\d)_([^\W_]+)_(\d+)\.wav")


@dataclass(frozen=True)
class Recording:
    """A file, relative to the data set's folder, what is heard in it, and its group: clips of a group are never on both
    sides of a split."""

    file: str
    label: str
    group: str


@dataclass(frozen=True)
class Recordings:
    """The usable recordings by name of their file, and what is left out: (file, reason)."""

    root: Path
    clips: tuple[Recording, ...]
    left_out: tuple[tuple[str, str], ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(sorted({clip.label for clip in self.clips}))

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(sorted({clip.group for clip in self.clips}))

    def describe(self) -> str:
        """One line: what is there, and what is left out with the first reasons."""
        found = (
            f"{self.root}: {len(self.clips)} recordings, {len(self.labels)} classes, groups {', '.join(self.groups)}"
        )
        if not self.left_out:
            return found
        first = "; ".join(f"{file}: {reason}" for file, reason in self.left_out[:SHOWN])
        more = f"; and {len(self.left_out) - SHOWN} more" if len(self.left_out) > SHOWN else ""
        return f"{found}; left out {len(self.left_out)}: {first}{more}"


def read_esc10(root: Path) -> Recordings:
    """ESC-10: `001 - Dog bark/1-100032-A.ogg`. The first digit of a file's name is its fold, the second number the
    recording it was cut from.

    Raises:
        UserError: no such recordings, fewer than two folds, clips of one recording in two folds.
    """
    _check_folder(root)
    folds: dict[str, set[str]] = defaultdict(set)

    def parse(path: Path) -> Recording | str:
        folder, file = _ESC_FOLDER.fullmatch(path.parent.name), _ESC_FILE.fullmatch(path.name)
        if folder is None or file is None:
            return "not named like '001 - Dog bark/1-100032-A.ogg'"
        folds[file[2]].add(file[1])
        return Recording(path.relative_to(root).as_posix(), folder[1].lower(), file[1])

    found = _collect(root, root.glob("*/*"), parse, "ESC-10: folders like '001 - Dog bark'")
    for recording, own in folds.items():
        if len(own) > 1:
            raise UserError(
                f"{root}: clips of recording {recording} are in folds {' and '.join(sorted(own))}: put them into one"
            )
    return found


def read_spoken_digits(root: Path) -> Recordings:
    """The Free Spoken Digit Dataset: `7_jackson_32.wav`: digit, speaker, take. The group is the speaker.

    Raises:
        UserError: no such recordings, fewer than two speakers.
    """
    _check_folder(root)

    def parse(path: Path) -> Recording | str:
        name = _SPOKEN_FILE.fullmatch(path.name)
        if name is None:
            return "not named like '7_jackson_32.wav'"
        return Recording(path.name, DIGITS[int(name[1])], name[2].lower())

    return _collect(root, root.glob("*"), parse, "the Free Spoken Digit Dataset: files like '7_jackson_32.wav'")


def _check_folder(root: Path) -> None:
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of recordings: give it with --data")


def _collect(root: Path, paths: Iterator[Path], parse: Callable[[Path], Recording | str], wanted: str) -> Recordings:
    """Sorts files into usable ones and others, with reasons. Raises UserError for fewer than two groups."""
    clips, left_out = [], []
    for path in sorted(paths):
        if path.name.startswith(".") or path.is_dir():
            continue
        parsed = parse(path)
        if isinstance(parsed, Recording) and path.stat().st_size == 0:
            parsed = "is empty"
        if isinstance(parsed, Recording):
            clips.append(parsed)
        else:
            left_out.append((path.relative_to(root).as_posix(), parsed))
    found = Recordings(root, tuple(clips), tuple(left_out))
    if not clips:
        raise UserError(f"{root}: not {wanted}: give another folder with --data")
    if len(found.groups) < FEWEST_GROUPS:
        raise UserError(f"{root}: all recordings are of group {found.groups[0]}: two groups are the least")
    return found

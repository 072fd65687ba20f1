"""Which clips train, validate and test: as the folder says, or drawn by video so that no video is on two sides."""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirasol.data.example import Example
from mirasol.data.randomness import hash64
from mirasol.errors import UserError
from mirasol.files import hash_file
from mirasol.finetune.labels import Labels

NAMES = ("train", "validation", "test")
# Of each class: a fifth of its videos test, a seventh validate.
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.15
FEW_TESTED = 30
LEAST_IDS = 10
# A YouTube id and where the clip begins (and ends): what makes several clips of one video recognisable.
_CUT_NAME = re.compile(r"([\w-]{11})_\d+(?:\.\d+)?(?:_\d+(?:\.\d+)?)?")
_BLOCK = 2**16


@dataclass(frozen=True)
class Splits:
    """The examples of each of `NAMES`.

    drawn: how the splits came about, in words
    leaked: examples that were left out of a split because their video is in a later one
    remarks: what the user should know
    """

    examples: Mapping[str, tuple[Example, ...]]
    drawn: str
    leaked: tuple[Example, ...]
    remarks: tuple[str, ...]


class Videos:
    """Which video each media file shows: files of the same content, and cuts that are named after the same video, are
    one.

    same_files, cuts: how many files are copies of others, and how many further cuts of a video there are
    """

    def __init__(self, root: Path, media: Iterable[str]):
        self.media = sorted(set(media))
        self._parent = {path: path for path in self.media}
        self.same_files = self._join(find_same_files(root, self.media))
        self.cuts = self._join(self._list_cuts())

    def find(self, media: str) -> str:
        """The name of the video that a media file shows."""
        while self._parent[media] != media:
            self._parent[media] = self._parent[self._parent[media]]
            media = self._parent[media]
        return media

    def _join(self, groups: Iterable[Sequence[str]]) -> int:
        """Makes each group one video. Returns how many files were others before."""
        joined = 0
        for first, *others in groups:
            for other in others:
                one, two = sorted((self.find(first), self.find(other)))
                joined += one != two
                self._parent[two] = one
        return joined

    def _list_cuts(self) -> list[list[str]]:
        by_id: dict[str, list[str]] = defaultdict(list)
        for path in self.media:
            match = _CUT_NAME.fullmatch(path.rpartition("/")[2].rpartition(".")[0])
            if match:
                by_id[match[1]].append(path)
        # Names such as `recording-2_001` look alike: real ids are many, and few clips share one.
        is_alike = len(by_id) < LEAST_IDS or max(map(len, by_id.values())) * 5 > len(self.media)
        return [] if is_alike else [paths for paths in by_id.values() if len(paths) > 1]


def find_same_files(root: Path, media: Sequence[str]) -> list[list[str]]:
    """Groups of media with the same bytes. Files are compared by size, then by their ends, then completely."""
    groups = [list(media)]
    for key in (os.path.getsize, _hash_ends, lambda path: hash_file(Path(path))):
        groups = [part for group in groups for part in _divide(root, group, key)]
    return [sorted(group) for group in groups]


def _divide(root: Path, group: Sequence[str], key: Callable[[str], object]) -> list[list[str]]:
    """The parts of a group that are equal by `key`, those of one alone left out, and empty files, which no key tells
    apart."""
    parts: dict[object, list[str]] = defaultdict(list)
    for name in group:
        try:
            value = key(f"{root}/{name}")
        except OSError:
            continue  # reading it says why
        parts[value].append(name)
    return [part for value, part in parts.items() if len(part) > 1 and value]


def _hash_ends(path: str) -> str:
    with open(path, "rb") as stream:
        content = stream.read(_BLOCK)
        size = os.fstat(stream.fileno()).st_size
        if size > _BLOCK:
            stream.seek(max(_BLOCK, size - _BLOCK))
            content += stream.read()
        return hashlib.sha256(content).hexdigest()


def split_examples(labels: Labels, seed: int) -> Splits:
    """The examples that train, validate and test: as the folder says; a split that it does not have is drawn from the
    others' clips.

    Raises UserError for too few videos, or a single class.
    """
    _check_answers(labels)
    videos = Videos(labels.root, (example.media for example in labels.all_examples))
    given = {name: list(labels.examples[name]) for name in NAMES if labels.examples.get(name)}
    pool = given.pop("train", []) if "train" in given else list(labels.examples.get("", ()))
    missing = [name for name in ("validation", "test") if name not in given]
    kept, leaked = _remove_leaks({"train": pool, **given}, videos)
    parts = {name: tuple(kept.get(name, ())) for name in NAMES}
    drawn = "as the folder says"
    if missing:
        parts |= _draw(kept["train"], missing, videos, seed, labels.root)
        source = "" if "" in labels.examples else " from train"
        drawn = f"{' and '.join(missing)} drawn{source} by video, seed {seed}"
    splits = Splits(parts, drawn, tuple(leaked), tuple(_make_remarks(parts, leaked, videos, missing)))
    for name in NAMES:
        if not splits.examples[name]:
            lost = " that is not in a later split too" if leaked else ""
            raise UserError(f"{labels.root}: no clip for {name}{lost}: add clips to {name}, or leave its table out")
    return splits


def _check_answers(labels: Labels) -> None:
    """Raises UserError where every answer is the same."""
    answers = {example.target for example in labels.all_examples}
    if len(answers) == 1 and len({example.prompt for example in labels.all_examples}) == 1:
        [answer] = answers
        folder, inside, lost = labels.root / answer, "", ""
        if labels.problems:
            lost = f"; {len(labels.problems)} labels were left out, the first: {labels.problems[0]}"
        elif labels.remarks:
            lost = f"; {labels.remarks[0]}"
        if labels.named_classes and folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir()):
            inside = f", or give {folder} if its folders are the classes"
        raise UserError(
            f"{labels.root}: one class only, {answer!r}, in {len(labels.all_examples)} clips: there is nothing to tell "
            f"apart: add clips of another class{inside}{lost}"
        )


def _remove_leaks(given: Mapping[str, list[Example]], videos: Videos) -> tuple[dict[str, list[Example]], list[Example]]:
    """The splits without examples whose video is in a later split: what is tested stays."""
    kept, leaked, later = {}, [], set()
    for name in reversed(NAMES):
        own = given.get(name, [])
        kept[name] = [example for example in own if videos.find(example.media) not in later]
        leaked += [example for example in own if videos.find(example.media) in later]
        later |= {videos.find(example.media) for example in own}
    return kept, leaked


def _draw(
    pool: Sequence[Example], missing: Sequence[str], videos: Videos, seed: int, root: Path
) -> dict[str, tuple[Example, ...]]:
    """The pool shared between training and the missing splits, each class by itself, by a hash of seed and video."""
    by_video: dict[str, list[Example]] = defaultdict(list)
    for example in pool:
        by_video[videos.find(example.media)].append(example)
    least = len(missing) + 1
    if len(by_video) < least:
        raise UserError(
            f"{root}: {len(by_video)} video{'s' * (len(by_video) != 1)} cannot train, validate and test: {least} are "
            "the least, 20 of each class are better"
        )
    counts = Counter(example.target for example in pool)
    classes: dict[str, list[str]] = defaultdict(list)
    are_few = 2 * len(counts) <= len(by_video)  # else each answer would be a class of its own
    for video, own in by_video.items():
        classes[own[0].target if are_few else ""].append(video)
    shares = {"test": TEST_SHARE, "validation": VALIDATION_SHARE}
    chosen: dict[str, list[str]] = {name: [] for name in NAMES}
    for members in classes.values():
        members.sort(key=lambda video: (hash64(seed, "split", video), video))
        begin = 0
        for name in reversed(missing):
            count = max(1, round(shares[name] * len(members))) if len(members) - begin > 1 else 0
            chosen[name] += members[begin : begin + count]
            begin += count
        chosen["train"] += members[begin:]
    for name in missing:  # where each class has too few videos for all splits
        if not chosen[name]:
            giver = max(("train", *missing), key=lambda other: len(chosen[other]))
            chosen[name].append(chosen[giver].pop())
    split_of = {video: name for name, own in chosen.items() for video in own}
    parts = {name: [e for e in pool if split_of[videos.find(e.media)] == name] for name in ("train", *missing)}
    return {name: tuple(own) for name, own in parts.items()}


def _make_remarks(
    parts: Mapping[str, Sequence[Example]], leaked: Sequence[Example], videos: Videos, missing: Sequence[str]
) -> list[str]:
    remarks = []
    if leaked:
        shown = ", ".join(dict.fromkeys(example.media for example in leaked[:3]))
        remarks.append(
            f"{len(leaked)} examples are left out because their video is also in a later split ({shown}): remove them "
            "from there or from here"
        )
    if missing and videos.same_files:
        remarks.append(f"{videos.same_files} files are copies of others, and are in the same split as those")
    if missing and videos.cuts:
        remarks.append(f"{videos.cuts} clips are cuts of videos that others show too, and are in the same split")
    known = {example.target for example in parts["train"]}
    if len(known) * 2 <= len(parts["train"]):
        never = sorted({example.target for example in parts["test"]} - known)
        if never:
            listed = ", ".join(map(repr, never[:5]))
            remarks.append(f"{len(never)} answers of the test are in no training clip ({listed}): add clips of them")
    tested = len({example.media for example in parts["test"]})
    if tested < FEW_TESTED:
        remarks.append(
            f"{tested} clips test the model: intervals will be wide, {FEW_TESTED} clips or more give useful ones"
        )
    return remarks

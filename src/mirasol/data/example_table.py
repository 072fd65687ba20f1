"""Examples by the million: packed into a few arrays, made into objects when they are asked for.

An `Example` with its texts takes about 600 bytes as Python objects, and every loading process would have a copy. A
table takes about 200, and once it is in files (`store`) processes share one copy that need not be in memory.
"""

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from mirasol.data.example import ClipExamples, Example
from mirasol.data.media_files import is_image

# Class lists are shared by many examples; the few candidates of a multiple choice are an example's own.
_MANY_CANDIDATES = 8
_ROWS_AT_ONCE = 100_000


class Arrays:
    """Named arrays, in memory or in the .npy files of a folder. Those in files are mapped, and travel to another
    process as the folder's name."""

    def __init__(self, arrays: dict[str, np.ndarray], folder: Path | None = None):
        self._arrays, self._folder = arrays, folder

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def items(self) -> Iterable[tuple[str, np.ndarray]]:
        """(name, array) of all of them."""
        return self._arrays.items()

    def store(self, folder: Path) -> "Arrays":
        """The same arrays, mapped from files that this writes."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in self._arrays.items():
            # Whoever still maps an older file of that name keeps it: the new one takes its place.
            unfinished = folder / f".{name}.{uuid.uuid4().hex}.npy"  # several machines may do the same at once
            np.save(unfinished, array)
            os.replace(unfinished, folder / f"{name}.npy")
        return self._map_files(folder, self._arrays)

    @staticmethod
    def _map_files(folder: Path, names: Iterable[str]) -> "Arrays":
        # A plain array over the mapping: indexing a memmap costs ten times as much.
        return Arrays({name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in names}, folder)

    def __reduce__(self):
        if self._folder is None:
            return Arrays, (self._arrays,)
        return Arrays._map_files, (self._folder, list(self._arrays))


class ExampleTable(Sequence[Example]):
    """A sequence of examples, equal to the one it was made of."""

    def __init__(self, arrays: Arrays, types: tuple[str, ...], class_lists: tuple[tuple[str, ...], ...]):
        """See `of`. arrays: content uint8, the rows one after the other; ends int64 [row], where each ends; clip
        int32 [row], the number of its (media, start, end); windowed and image bool [row], whether it is about a window
        of a clip, or a still image; type int32 [row], place in `types`."""
        self.arrays, self.types, self._class_lists = arrays, types, class_lists
        self._content, self._ends = arrays["content"], arrays["ends"]
        self.clip, self.windowed, self.type = arrays["clip"], arrays["windowed"], arrays["type"]
        self.image = arrays["image"]

    def __reduce__(self):
        return ExampleTable, (self.arrays, self.types, self._class_lists)

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "ExampleTable":
        """Packs examples; a table is taken as it is."""
        if isinstance(examples, ExampleTable):
            return examples
        packer = _Packer()
        for example in examples:
            packer.add(example)
        return packer.table()

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        place = place + len(self) if place < 0 else place
        if not 0 <= place < len(self):
            raise IndexError(place)
        begin = int(self._ends[place - 1]) if place else 0
        values = json.loads(self._content[begin : int(self._ends[place])].tobytes())
        candidates, references = values[6], values[8]
        return Example(
            *values[:5],
            target=values[5],
            question_type=self.types[self.type[place]],
            candidates=self._class_lists[candidates] if isinstance(candidates, int) else tuple(candidates),
            video=values[7],
            references=tuple(references),
            answer_index=values[9],
            random_target=values[10],
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[place] for place in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None

    @property
    def nbytes(self) -> int:
        """Size in bytes, the class lists left out."""
        return sum(array.nbytes for _, array in self.arrays.items())

    def store(self, folder: Path) -> "ExampleTable":
        """The same table, in files of `folder` instead of in memory."""
        return ExampleTable(self.arrays.store(folder), self.types, self._class_lists)

    def without(self, windows: Iterable[tuple[str, float | None, float | None]]) -> "ExampleTable":
        """The examples about other clips than these."""
        unwanted = set(windows)
        return ExampleTable.of(
            example for example in self if (example.media, example.start, example.end) not in unwanted
        )

    def clips(self, wanted: np.ndarray) -> "ClipTable":
        """The clips that rows with `wanted` (bool [row]) are about, each with those rows.

        Clips come in the order of their first example, examples in theirs, as `group_by_clip` has it.
        """
        (rows,) = np.nonzero(wanted)
        clip = self.clip[rows]
        rows = rows[np.argsort(clip, kind="stable")].astype(np.int32 if len(self) < 2**31 else np.int64)
        # A clip's number is the order of its first example in the whole table; among the wanted it may differ.
        _, starts = np.unique(self.clip[rows], return_index=True)
        order = np.argsort(rows[starts], kind="stable")
        ends = np.append(starts[1:], len(rows))
        return ClipTable(self, Arrays({"rows": rows, "starts": starts[order], "ends": ends[order]}))


class ClipTable(Sequence[ClipExamples]):
    """A sequence of clips with their examples, each made when it is asked for."""

    def __init__(self, examples: ExampleTable, arrays: Arrays):
        self.examples, self._arrays = examples, arrays

    def __len__(self) -> int:
        return len(self._arrays["starts"])

    @overload
    def __getitem__(self, place: int) -> ClipExamples: ...
    @overload
    def __getitem__(self, place: slice) -> list[ClipExamples]: ...
    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        place = place + len(self) if place < 0 else place
        if not 0 <= place < len(self):
            raise IndexError(place)
        rows = self._arrays["rows"][self._arrays["starts"][place] : self._arrays["ends"][place]]
        members = tuple(self.examples[int(row)] for row in rows)
        return ClipExamples(members[0].media, members[0].start, members[0].end, members)

    def __iter__(self) -> Iterator[ClipExamples]:
        return (self[place] for place in range(len(self)))

    @property
    def question_counts(self) -> np.ndarray:
        """The number of examples of every clip: int [clip]."""
        return self._arrays["ends"] - self._arrays["starts"]

    def windows(self) -> Iterator[tuple[str, float | None, float | None]]:
        """(media, start, end) of every clip."""
        for start in self._arrays["starts"]:
            example = self.examples[int(self._arrays["rows"][start])]
            yield example.media, example.start, example.end

    def store(self, folder: Path, examples: ExampleTable) -> "ClipTable":
        """The same table over `examples`, which are the same as its own, in files of `folder`."""
        return ClipTable(examples, self._arrays.store(folder))


class _Packer:
    """Makes a table of examples that come one by one."""

    def __init__(self) -> None:
        self.blocks: dict[str, list[np.ndarray]] = {
            name: [] for name in ("content", "ends", "clip", "windowed", "image", "type")
        }
        self.size = 0
        self.types: dict[str, int] = {}
        self.clips: dict[tuple[str, float | None, float | None], int] = {}
        # By identity: comparing lists of hundreds of names for every example would take the longest of all.
        self.class_lists: dict[int, int] = {}
        self.kept: list[tuple[str, ...]] = []
        self._begin()

    def _begin(self) -> None:
        self.rows: list[bytes] = []
        self.columns: list[tuple[int, bool, bool, int]] = []

    def add(self, example: Example) -> None:
        candidates = example.candidates if len(example.candidates) <= _MANY_CANDIDATES else self._add_shared(example)
        # References often are the target alone, or labels: they stay with the row.
        values = [
            example.id, example.media, example.start, example.end, example.prompt, example.target, candidates,
            example.video, example.references, example.answer_index, example.random_target,
        ]  # fmt: skip
        self.rows.append(json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass"))
        clip = self.clips.setdefault((example.media, example.start, example.end), len(self.clips))
        question_type = self.types.setdefault(example.question_type, len(self.types))
        windowed = example.start is not None or example.end is not None
        self.columns.append((clip, windowed, is_image(example.media), question_type))
        if len(self.rows) >= _ROWS_AT_ONCE:
            self._end()

    def _add_shared(self, example: Example) -> int:
        place = self.class_lists.get(id(example.candidates))
        if place is None:
            place = self.class_lists[id(example.candidates)] = len(self.kept)
            self.kept.append(example.candidates)
        return place

    def _end(self) -> None:
        lengths = np.fromiter(map(len, self.rows), np.int64, len(self.rows))
        ends = self.size + np.cumsum(lengths)
        self.size += int(lengths.sum())
        clip, windowed, image, question_type = zip(*self.columns, strict=True) if self.columns else ((),) * 4
        for name, array in (
            ("content", np.frombuffer(b"".join(self.rows), np.uint8)),
            ("ends", ends),
            ("clip", np.array(clip, np.int32)),
            ("windowed", np.array(windowed, bool)),
            ("image", np.array(image, bool)),
            ("type", np.array(question_type, np.int32)),
        ):
            self.blocks[name].append(array)
        self._begin()

    def table(self) -> ExampleTable:
        self._end()
        arrays = {}
        for name in list(self.blocks):
            arrays[name] = np.concatenate(self.blocks.pop(name))
        return ExampleTable(Arrays(arrays), tuple(self.types), tuple(self.kept))

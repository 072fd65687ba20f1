"""What is known of a folder's clips once its labels are read, and how one row of labels becomes an example."""

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mirasol.data.datasets.contract import Problem
from mirasol.data.datasets.files import AUDIO, VIDEO
from mirasol.data.datasets.folder import OPTIONAL, BadRow, parse_row
from mirasol.data.example import Example

# What the reader opens besides the formats that public data sets come in.
MEDIA = (
    *VIDEO, *AUDIO, ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".vob", ".wmv", ".ogv", ".3g2", ".gif", ".aac", ".amr",
    ".aiff", ".aif", ".au", ".caf", ".wma", ".ac3", ".eac3", ".dts", ".wv",
)  # fmt: skip
SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "val": "validation", "valid": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test",
}  # fmt: skip
# Other names of a table's columns, and of the keys of a side file.
ALIASES = {
    "file": ("path", "video", "media", "filename", "file_name", "clip", "audio"),
    "target": ("label", "class", "category", "answer", "caption", "text", "description"),
    "prompt": ("question",),
    "split": ("subset", "set"),
}
ASK_CLASS, ASK_CAPTION = "what is it?", "describe the clip"


@dataclass(frozen=True)
class Labels:
    """What a folder says about its clips.

    layout: how it was understood, in words
    examples: by split; those of "" have no split yet
    problems: what in tables and side files gives no example
    unlabelled: media that nothing is said about; orphans: side files whose clip is not there
    remarks: what else the user should know
    named_classes: folders name the classes, so that answers are classes however rarely each comes up
    """

    root: Path
    layout: str
    examples: Mapping[str, tuple[Example, ...]]
    problems: tuple[Problem, ...] = ()
    unlabelled: tuple[str, ...] = ()
    orphans: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    named_classes: bool = False

    @property
    def all_examples(self) -> list[Example]:
        """The examples of all splits."""
        return [example for own in self.examples.values() for example in own]

    @property
    def classes(self) -> tuple[str, ...]:
        """The answers, sorted, where all examples have one prompt and no candidates of their own, and answers repeat
        (`are_classes`) or are named by folders; empty where answers are open."""
        examples = self.all_examples
        is_one = len({example.prompt for example in examples}) == 1
        if not is_one or any(example.candidates for example in examples):
            return ()
        targets = [example.target for example in examples]
        return tuple(sorted(set(targets))) if self.named_classes or are_classes(targets) else ()


def is_media(path: str) -> bool:
    """Whether a file is a video or a sound, by its name. Hidden files, which some systems add, are not."""
    return path.lower().endswith(MEDIA) and not any(part.startswith(".") for part in path.split("/"))


def are_classes(targets: Sequence[str]) -> bool:
    """Whether answers are classes: each comes up twice on average (of up to four answers, two are enough)."""
    return 2 * len(set(targets)) <= max(4, len(targets))


def name_columns(found: Iterable[str]) -> dict[str, str]:
    """The name in an example of each column that is read; the same of the keys of an object."""
    found = [name for name in found if isinstance(name, str)]
    columns = {name: name for name in found if name in (*ALIASES, *OPTIONAL)}
    for name, others in ALIASES.items():
        if name in columns.values():
            continue
        same = {each.strip().lower(): each for each in found if each not in columns}
        other = next((same[alias] for alias in (name, *others) if alias in same), None)
        if other is not None:
            columns[other] = name
    return columns


def tidy(text: str) -> str:
    """An answer without line breaks, double spaces and other ways to write the same letters (NFC)."""
    return unicodedata.normalize("NFC", re.sub(r"\s+", " ", text).strip())


def parse_example(fields: Mapping[str, Any], line: int, root: Path) -> Example:
    """The example of a row; one without a prompt gets it from `fill_prompts`. Raises BadRow."""
    fields = dict(fields)
    for name in ("file", "target"):
        value = fields[name]
        if isinstance(value, float) and not math.isfinite(value):
            raise BadRow(f"field {name!r} is {value}, no text")
        if isinstance(value, int | float) and not isinstance(value, bool):
            fields[name] = str(value)  # classes may be numbers
    if isinstance(fields["file"], str):
        path = fields["file"].strip().replace("\\", "/").removeprefix("./")
        for above in (root, root.resolve()):
            path = path.removeprefix(f"{above.as_posix()}/") if above.is_absolute() else path
        fields["file"] = path
    has_prompt = fields.get("prompt") is not None
    example = parse_row({**fields, "prompt": fields["prompt"] if has_prompt else ASK_CLASS}, line, root)
    target = example.target if example.candidates else example.target.strip()
    return replace(example, prompt=example.prompt if has_prompt else "", target=target)


def fill_prompts(examples: Mapping[str, Sequence[Example]]) -> dict[str, tuple[Example, ...]]:
    """The examples by split, in the order of splits, with a prompt for those without: one that asks for a class where
    their answers repeat, else for a caption. Answers that repeat are tidied: they are names."""
    everything = [example for own in examples.values() for example in own]
    bare = [example.target for example in everything if not example.prompt]
    prompt = ASK_CLASS if are_classes(bare) else ASK_CAPTION
    is_one = len({example.prompt for example in everything}) == 1
    are_names = is_one and are_classes([example.target for example in everything])

    def fill(example: Example) -> Example:
        target = tidy(example.target) if are_names and not example.candidates else example.target
        return replace(example, prompt=example.prompt or prompt, target=target)

    ordered = (split for split in ("train", "validation", "test", "") if split in examples)
    return {split: tuple(map(fill, examples[split])) for split in ordered}

"""What is known of a folder's clips once its labels are read, and how one row of labels becomes an example."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mirasol.data.datasets.contract import Problem
from mirasol.data.datasets.files import AUDIO, VIDEO
from mirasol.data.datasets.folder import OPTIONAL, parse_row
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


def parse_example(fields: Mapping[str, Any], line: int, root: Path) -> Example:
    """The example of a row; one without a prompt gets it from `fill_prompts`. Raises BadRow."""
    fields = dict(fields)
    for name in ("file", "target"):
        if isinstance(fields[name], int | float) and not isinstance(fields[name], bool):
            fields[name] = str(fields[name])  # classes may be numbers
    if isinstance(fields["file"], str):
        fields["file"] = fields["file"].strip().replace("\\", "/").removeprefix("./")
    has_prompt = fields.get("prompt") is not None
    example = parse_row({**fields, "prompt": fields["prompt"] if has_prompt else ASK_CLASS}, line, root)
    target = example.target if example.candidates else example.target.strip()
    return replace(example, prompt=example.prompt if has_prompt else "", target=target)


def fill_prompts(examples: Mapping[str, Sequence[Example]]) -> dict[str, tuple[Example, ...]]:
    """The examples by split, in the order of splits, with a prompt for those without: one that asks for a class where
    their answers repeat, else for a caption."""
    bare = [example.target for own in examples.values() for example in own if not example.prompt]
    prompt = ASK_CLASS if are_classes(bare) else ASK_CAPTION
    return {
        split: tuple(example if example.prompt else replace(example, prompt=prompt) for example in examples[split])
        for split in ("train", "validation", "test", "")
        if split in examples
    }

"""Your own data: a folder with <split>.jsonl or <split>.csv next to media files (see `folder_reader`)."""

import os
from dataclasses import replace

from mirasol.data.datasets.contract import Adapter, DatasetOptions, Rows
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.folder_reader import BadRow, rows_of, split_file, split_names


def read(files: Files, split: str, options: DatasetOptions) -> Rows:
    """The rows of a split. A file that is named and not there is missing; its name stays in the messages."""
    path = split_file(files.root, split)
    rows, there, shown = Rows(), {}, files.shown(path)
    rows.annotation_files.append(shown)
    for line, example in rows_of(path):
        if isinstance(example, BadRow):
            kind = "wrong header" if example.reason.startswith("wrong header") else "malformed"
            kind = "not UTF-8" if "UTF-8" in example.reason else kind
            kind = "empty text" if example.reason.endswith("is empty") else kind
            rows.skip(kind, example.reason, shown, line, example.column)
            continue
        name = example.media
        if name not in there:
            there[name] = os.path.isfile(os.path.join(files.root, name))
        rows.add(example if there[name] else replace(example, media="", video=name), shown, line)
    return rows


ADAPTER = Adapter("your own folder", lambda files: split_names(files.root), read, options=())

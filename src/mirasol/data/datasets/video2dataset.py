"""Shards of video2dataset (webdataset or files format): clips with captions.

Failed downloads are samples without media, a 404 page can be stored as `.mp4` with status "success", and `.mp4` may
hold webm: all are told apart by content.
"""

from mirasol.data.datasets.contract import Adapter, DatasetOptions, Rows
from mirasol.data.datasets.files import VIDEO, Files
from mirasol.data.datasets.shards import read_shards, splits
from mirasol.data.datasets.webvid import PROMPT


def read(files: Files, split: str, options: DatasetOptions) -> Rows:
    """The samples of all shards; ids are `{shard}/{key}`."""
    return read_shards(files, split, options, extensions=VIDEO, prompt=PROMPT, failures_inside=True)


ADAPTER = Adapter("video2dataset shards", splits, read, options=("prompt",), protocol="captions")

"""Shards of img2dataset (webdataset or files format): images with captions; what failed is only in its statistics."""

from mirasol.data.datasets.contract import Adapter, DatasetOptions, Rows
from mirasol.data.datasets.files import Files
from mirasol.data.datasets.image_text import PROMPT
from mirasol.data.datasets.shards import read_shards, splits
from mirasol.data.media_files import IMAGE


def read(files: Files, split: str, options: DatasetOptions) -> Rows:
    """The samples of all shards; ids are `{shard}/{key}`."""
    return read_shards(files, split, options, extensions=IMAGE, prompt=PROMPT, failures_inside=False)


ADAPTER = Adapter("img2dataset shards", splits, read, options=("prompt",), protocol="captions")

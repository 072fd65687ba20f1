"""Shards of img2dataset (webdataset or files format): images with captions; what failed is only in its statistics."""

from mirasol.data.media_files import IMAGE
from mirasol.data.sources.contract import Adapter, Options, Rows
from mirasol.data.sources.files import Files
from mirasol.data.sources.image_text import PROMPT
from mirasol.data.sources.shards import read_shards, splits


def read(files: Files, split: str, options: Options) -> Rows:
    """The samples of all shards; ids are `{shard}/{key}`."""
    return read_shards(files, split, options, extensions=IMAGE, prompt=PROMPT, failures_inside=False)


ADAPTER = Adapter("img2dataset shards", splits, read, options=("prompt",), protocol="captions")

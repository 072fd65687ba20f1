"""A file of any length, encoded chunk by chunk while it is read: memory holds neither its pictures nor its sound."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from mirasol.app.live.chunks import LiveSettings
from mirasol.app.live.reader import LiveReader
from mirasol.app.live.source import LiveSource
from mirasol.app.live.watcher import Watcher
from mirasol.checkpoint import Doubt, Loaded
from mirasol.media.timeline import Timeline
from mirasol.model.outputs import MirasolEncoderOutput


@dataclass(frozen=True)
class StreamedClip:
    """What is known of a file that was encoded chunk by chunk: its chunks, and one line for every irregularity met."""

    timeline: Timeline
    notes: tuple[str, ...]


def encode_file(
    loaded: Loaded,
    path: str | os.PathLike,
    doubt: Doubt | None = None,
    start: float | None = None,
    end: float | None = None,
    window: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[StreamedClip, MirasolEncoderOutput, float | None]:
    """The clip of [start, end) seconds of a file, what the model makes of its chunks (of the last `window`), and its
    surprise, where that makes a difference.

    Chunks have the checkpoint's length, however many they are; of a clip with as many as the checkpoint takes at once
    the result is that of reading and encoding it whole. `progress(done, total)` counts chunks.

    Raises:
        BadClip: the file cannot be used.
    """
    media = loaded.processor.feature_extractor.media
    settings = LiveSettings(media, fast=True, start=start, end=end)
    watcher = Watcher(loaded, (), doubt, window=window)
    edges: list[float] = []
    with LiveReader(LiveSource("file", str(path)), settings) as reader:
        for chunk in reader:
            watcher.append(chunk)
            edges.append(chunk.start)
            if progress is not None:
                progress(chunk.number + 1, reader.total or chunk.number + 1)
        notes = tuple(reader.notes)
    last = watcher.newest.end
    timeline = Timeline(edges[0], last, (*edges, last), media.frames_per_chunk)
    encoded = watcher.stream.encoder_outputs
    return StreamedClip(timeline, notes), encoded, watcher.measure_surprise(encoded)

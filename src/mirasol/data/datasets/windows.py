"""Where an annotated segment of a video is: in a file of its own that was cut out already, or in the whole video."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.contract import Rows
from mirasol.data.datasets.files import Files
from mirasol.data.media_files import open_media_file
from mirasol.errors import BadClip, UserError
from mirasol.media.isolation.decoders import run_isolated
from mirasol.media.limits import DEFAULT_LIMITS
from mirasol.media.reader import probe_seconds

# Seconds by which a file that was cut out may be longer than its segment: codecs fill up their last frame.
CUT_TOLERANCE = 0.5

Place = tuple[str, float | None, float | None]  # media, start and end in seconds


def _format_clip_stems(patterns: Iterable[str], id: str, start: float, end: float) -> Iterator[str]:
    """A clip's file names without extension. Raises UserError for a pattern with a field that clips do not have.

    `start` and `end` are the seconds as the annotation has them, `start_ms` and `end_ms` milliseconds.
    """
    fields = {"id": id, "start": int(start), "end": int(end), "start_ms": int(start * 1000), "end_ms": int(end * 1000)}
    for pattern in patterns:
        try:
            yield pattern.format_map(fields)
        except (KeyError, ValueError, IndexError) as error:
            known = ", ".join(fields)
            raise UserError(f"pattern={pattern!r}: its fields are {known}, e.g. '{{id}}_{{start:06d}}'") from error


def find_segment(
    files: Files,
    options: DatasetOptions,
    patterns: Iterable[str],
    id: str,
    window: tuple[float, float],
    rows: Rows,
    folders: Iterable[str] = (),
) -> Place:
    """The file that has a segment, by the user's pattern or else by the first of `patterns` that some file fits, and
    the segment's place in it; the file is "" where there is none.

    A name that contains the start is that of a file cut out already. Any other may be the whole video's:
    `recognise_cut_files` decides by its length, once all rows are read.
    """
    given = options.pattern is not None
    # Most lists name many clips that are gone: nothing is spelled out for those.
    if not given and id not in files.youtube_ids:
        return "", None, None
    for pattern in [options.pattern] if given else patterns:
        media = files.media(_format_clip_stems([pattern], id, *window), folders)
        if media is not None:
            return place_segment(media, window, rows, named_by_start="{start" in pattern)
    return "", None, None


def place_segment(media: str, window: tuple[float, float], rows: Rows, named_by_start: bool) -> Place:
    """The segment's place in a file whose name says whether it was cut out already, or does not say."""
    if named_by_start:
        return media, None, None
    rows.found_by_video.add(media)
    return media, *window


def recognise_cut_files(files: Files, rows: Rows, open_media: bool = True) -> None:
    """Decides for files named after their video alone whether they are the segment: those that are no longer than it.

    The others keep the window. `rows.facts` tells how many are of which kind. A file as short as a segment that
    several segments could be is left out, and so are its examples, as "ambiguous name". Without `open_media` all keep
    their windows.
    """
    asked: dict[str, set[tuple[float | None, float | None]]] = defaultdict(set)
    for example in rows.examples:
        if example.media in rows.found_by_video:
            asked[example.media].add((example.start, example.end))
    if not asked:
        return
    if not open_media:
        rows.facts["files_named_by_id"] = f"{len(asked)}, whose lengths were not looked at: read as whole videos"
        return
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        lengths = dict(zip(asked, pool.map(lambda media: measure_seconds(files, media), asked), strict=True))
    kept, counts = [], Counter(
        "of unknown length (read as whole videos)" if length is None else "longer (read in their windows)"
        for media, length in lengths.items()
        if not any(_is_cut_out(length, *window) for window in asked[media])
    )  # fmt: skip
    counts["no longer than their segment (already cut out)"] = len(asked) - counts.total()
    for example in rows.examples:
        windows = asked.get(example.media, set())
        if not windows or not _is_cut_out(lengths[example.media], example.start, example.end):
            kept.append(example)
        elif len(windows) == 1:
            kept.append(replace(example, start=None, end=None))
        else:
            message = f"{example.media} is as short as one of the {len(windows)} segments that it could be"
            rows.skip("ambiguous name", f"id {example.id!r}: {message}", *rows.find_place(example.id))
    rows.examples[:] = kept
    rows.facts["files_named_by_id"] = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def _is_cut_out(length: float | None, start: float | None, end: float | None) -> bool:
    return length is not None and start is not None and end is not None and length <= end - start + CUT_TOLERANCE


def measure_seconds(files: Files, media: str) -> float | None:
    """A media file's length by its header; None where it cannot be opened, which is found out when it is read."""
    try:
        with open_media_file(files.root, media) as path:
            return run_isolated(DEFAULT_LIMITS, path, probe_seconds, path)
    except (BadClip, OSError):
        return None

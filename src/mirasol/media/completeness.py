"""Whether a media file holds all that its header says; looks where the end should be and decodes nothing."""

import math
import os
from collections.abc import Iterable

import av
import av.error
from av.container import InputContainer
from av.packet import Packet

from mirasol.media.container import Chosen, Span, choose, find_span, missing_bytes, open_media, packet_span, packets
from mirasol.media.limits import DEFAULT_LIMITS, Limits
from mirasol.media.reading import COVER_SECONDS

_NEAR_SECONDS = 1.0  # how far before the end is looked


def held_seconds(path: str | os.PathLike, limits: Limits = DEFAULT_LIMITS) -> float | None:
    """Seconds of the media timeline up to which a file that was cut short holds data; None of one that is whole.

    A file is cut short by the same rule by which `read_clip` refuses all of it. Without a duration in the header there
    is nothing to compare: such a file passes for whole. Only a file without packets near its end is read through.

    Raises:
        BadClip: the file cannot be used.
    """
    with open_media(path, limits) as container:
        chosen = choose(container, path, limits)
        span = find_span(container, chosen, path, limits)
        if span.measured:
            return None
        size = os.path.getsize(path)
        lost = container.format.name.startswith("mov") and any(
            missing_bytes(stream, size, span.zero, span.end) for stream in chosen.streams
        )
        if not lost and _found_near_end(container, chosen, span):
            return None
    # Where no index says what is lost, seeking proves nothing: what the file holds does.
    with open_media(path, limits) as container:
        errors: list[str] = []
        chosen = choose(container, path, limits)
        end, slack, count = _last(packets(container, chosen.streams, errors), chosen)
    single = count == 1 and chosen.audio is None
    short = end < span.end - slack and (bool(errors) or not single)
    return max(0.0, min(end, span.end) - span.zero) if lost or short else None


def _found_near_end(container: InputContainer, chosen: Chosen, span: Span) -> bool:
    target = max(span.zero, span.end - _NEAR_SECONDS)
    try:
        container.seek(math.floor(target * av.time_base))
    except (av.error.FFmpegError, OSError):
        return False
    end, slack, _ = _last(packets(container, chosen.streams, []), chosen)
    return end >= span.end - slack


def _last(found: Iterable[Packet], chosen: Chosen) -> tuple[float, float, int]:
    """Container seconds at which the last packet ends, by how much that may miss the end, and how many there were."""
    ticks = {stream.index: float(stream.time_base) for stream in chosen.streams}
    end, step, before, count = -math.inf, 0.0, math.inf, 0
    for packet in found:
        tick = ticks[packet.stream_index]
        end = max(end, packet_span(packet, tick)[1])
        count += 1
        if chosen.video is not None and packet.stream_index == chosen.video.index and packet.dts is not None:
            step, before = max(step, packet.dts * tick - before), packet.dts * tick
    return end, max(COVER_SECONDS, 2 * step), count

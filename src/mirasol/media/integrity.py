"""Whether a media file is complete: against its header, and by the rules of formats whose headers state no duration."""

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import av
import av.error
from av.container import InputContainer
from av.packet import Packet

from mirasol.media.container import (
    ChosenStreams,
    choose_streams,
    get_packet_times,
    lacks_bytes,
    open_media,
    read_packets,
)
from mirasol.media.joined.parts import open_source
from mirasol.media.limits import DEFAULT_LIMITS, Limits
from mirasol.media.reader import COVER_SECONDS, MediaInfo, probe_media
from mirasol.media.span import Span, find_span

_NEAR_SECONDS = 1.0  # how far before the end is looked


def inspect_media(path: str | os.PathLike, limits: Limits = DEFAULT_LIMITS) -> tuple[MediaInfo, float | None, str]:
    """What `probe_media`, `find_truncated_end` and `describe_early_end` say of a file. Raises BadClip."""
    info = probe_media(path, limits)
    truncated_end = None if info.duration_measured else find_truncated_end(path, limits)
    return info, truncated_end, describe_early_end(path, info.container)


def find_truncated_end(path: str | os.PathLike, limits: Limits = DEFAULT_LIMITS) -> float | None:
    """Seconds of the media timeline up to which a file that was cut short has data; None for a complete file.

    A file is cut short by the same rule by which `read_clip` refuses all of it. Without a duration in the header there
    is nothing to compare: such a file counts as complete. Only a file without packets near its end is read completely.

    Raises:
        BadClip: the file cannot be used.
    """
    with open_source(path, limits) as source:
        container, chosen = source.container, source.chosen
        span = find_span(source)
        if span.measured:
            return None
        size = os.path.getsize(path)
        lost = container.format.name.startswith("mov") and any(
            lacks_bytes(stream, size, span.zero, span.end) for stream in chosen.streams
        )
        if not lost and _is_found_near_end(container, chosen, span):
            return None
    # Where no index says what is lost, seeking proves nothing: what the file holds does.
    with open_media(path, limits) as container:
        errors: list[str] = []
        chosen = choose_streams(container, path, limits)
        end, slack, count = _measure_last_packet(read_packets(container, chosen.streams, errors), chosen)
    single = count == 1 and chosen.audio is None
    short = end < span.end - slack and (bool(errors) or not single)
    return max(0.0, min(end, span.end) - span.zero) if lost or short else None


def _is_found_near_end(container: InputContainer, chosen: ChosenStreams, span: Span) -> bool:
    target = max(span.zero, span.end - _NEAR_SECONDS)
    try:
        container.seek(math.floor(target * av.time_base))
    except (av.error.FFmpegError, OSError):
        return False
    end, slack, _ = _measure_last_packet(read_packets(container, chosen.streams, []), chosen)
    return end >= span.end - slack


def _measure_last_packet(found: Iterable[Packet], chosen: ChosenStreams) -> tuple[float, float, int]:
    """Container seconds at which the last packet ends, by how much that may miss the end, and how many there were."""
    ticks = {stream.index: float(stream.time_base) for stream in chosen.streams}
    end, step, before, count = -math.inf, 0.0, math.inf, 0
    for packet in found:
        tick = ticks[packet.stream_index]
        end = max(end, get_packet_times(packet, tick)[1])
        count += 1
        if chosen.video is not None and packet.stream_index == chosen.video.index and packet.dts is not None:
            step, before = max(step, packet.dts * tick - before), packet.dts * tick
    return end, max(COVER_SECONDS, 2 * step), count


_OGG_PAGE = 27 + 255 + 255 * 255  # bytes of the longest
_OGG_LAST = 4  # the flag of a stream's last page
_TS_PACKETS = ((188, 0), (192, 4), (204, 0))  # bytes of a packet, and where in it the sync byte 0x47 is
_TS_SEEN = 4  # packets in a row whose marks say that this is their size
# From here on a size in a wav's header is what programs write that cannot know it, such as into a pipe.
_WAV_UNKNOWN = 0x7FFF_F000
_PNG_SEARCHED = 1024  # bytes at the end in which the last chunk is, whatever programs append
_MP3_SEARCHED = 4096  # bytes in which the first frame begins


def describe_early_end(path: str | os.PathLike, container: str) -> str:
    """Why a file seems to be cut short, "" where nothing says so; `container` is FFmpeg's name of its format.

    Sure of MPEG transport streams within a packet, of wav, of animated PNG, and of mp3 with a Xing, Info or VBRI
    header. The last page of an Ogg stream has a mark, which writers that were stopped leave out, too. Of raw AAC
    or AC-3, of mp3 without such a header, and of Matroska without a duration nothing is known.
    """
    look = _LOOKS.get(container)
    if look is None:
        return ""
    with Path(path).open("rb") as stream:
        return look(stream, os.fstat(stream.fileno()).st_size)


def _describe_transport_stream(stream: BinaryIO, size: int) -> str:
    beginning = stream.read(_TS_PACKETS[-1][0] * _TS_SEEN)
    for packet, mark in _TS_PACKETS:
        marks = beginning[mark : packet * _TS_SEEN : packet]
        if marks == b"\x47" * _TS_SEEN:
            return "its last packet is incomplete" if size % packet else ""
    return ""


def _describe_ogg(stream: BinaryIO, size: int) -> str:
    stream.seek(max(0, size - _OGG_PAGE))
    end = stream.read()
    place = end.rfind(b"OggS\0")
    page = end[place:] if place >= 0 else b""
    lengths = page[27 : 27 + page[26]] if len(page) > 26 else b""
    if len(page) <= 26 or len(page) < 27 + page[26] + sum(lengths):
        return "its last page is incomplete"
    return "" if page[5] & _OGG_LAST else "its last page is not marked as the last"


def _describe_wav(stream: BinaryIO, size: int) -> str:
    place = 12
    while place + 8 <= size:
        stream.seek(place)
        head = stream.read(8)
        length = int.from_bytes(head[4:], "little")
        if head[:4] == b"data":
            short = place + 8 + length > size and length < _WAV_UNKNOWN
            return f"its header says {length} bytes of sound, {size - place - 8} are there" if short else ""
        place += 8 + length + length % 2
    return ""


def _describe_mp3(stream: BinaryIO, size: int) -> str:
    head = stream.read(10)
    # An ID3 tag's length has seven bits a byte.
    begin = 10 + sum(byte << 7 * (3 - n) for n, byte in enumerate(head[6:10])) if head[:3] == b"ID3" else 0
    stream.seek(begin)
    found = stream.read(_MP3_SEARCHED)
    frame = next((n for n in range(len(found) - 4) if found[n] == 0xFF and found[n + 1] >= 0xE0), None)
    stated = _count_mp3_bytes(found[frame:]) if frame is not None else None
    there = size - begin - (frame or 0)
    return f"its header says {stated} bytes of sound, {there} are there" if stated and stated > there else ""


def _count_mp3_bytes(frame: bytes) -> int | None:
    """Bytes of all frames from this first one on, where it holds a header of Xing's or Fraunhofer's."""
    first_version, mono = frame[1] & 0x08, frame[3] & 0xC0 == 0xC0
    side = (17 if mono else 32) if first_version else (9 if mono else 17)
    tag = frame[4 + side :]
    if tag[:4] in (b"Xing", b"Info"):
        flags = int.from_bytes(tag[4:8], "big")
        place = 8 + 4 * (flags & 1)  # behind the number of frames
        return int.from_bytes(tag[place : place + 4], "big") if flags & 2 else None
    tag = frame[36:]
    return int.from_bytes(tag[10:14], "big") if tag[:4] == b"VBRI" else None


def _describe_apng(stream: BinaryIO, size: int) -> str:
    stream.seek(max(0, size - _PNG_SEARCHED))
    return "" if b"IEND" in stream.read() else "its last chunk is missing"


_LOOKS: dict[str, Callable[[BinaryIO, int], str]] = {
    "mpegts": _describe_transport_stream,
    "ogg": _describe_ogg,
    "wav": _describe_wav,
    "mp3": _describe_mp3,
    "apng": _describe_apng,
}

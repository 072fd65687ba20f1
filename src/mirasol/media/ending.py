"""Whether a file ends where its format lets one end: for formats whose headers state no duration to hold it against."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_OGG_PAGE = 27 + 255 + 255 * 255  # bytes of the longest
_OGG_LAST = 4  # the flag of a stream's last page
_TS_PACKETS = ((188, 0), (192, 4), (204, 0))  # bytes of a packet, and where in it the mark 0x47 stands
_TS_SEEN = 4  # packets in a row whose marks say that this is their size
# From here on a size in a wav's header is what programs write that cannot know it, such as into a pipe.
_WAV_UNKNOWN = 0x7FFF_F000
_MP3_SEARCHED = 4096  # bytes in which the first frame begins


def early_end(path: str | os.PathLike, container: str) -> str:
    """Why a file seems to be cut short, "" where nothing says so; `container` is FFmpeg's name of its format.

    Sure of MPEG transport streams within a packet, of wav, and of mp3 with a Xing, Info or VBRI header. The last page
    of an Ogg stream has a mark, which writers that were stopped leave out, too. Of raw AAC or AC-3, of mp3 without such
    a header, and of Matroska without a duration nothing is known.
    """
    look = _LOOKS.get(container)
    if look is None:
        return ""
    with Path(path).open("rb") as stream:
        return look(stream, os.fstat(stream.fileno()).st_size)


def _transport_stream(stream: BinaryIO, size: int) -> str:
    beginning = stream.read(_TS_PACKETS[-1][0] * _TS_SEEN)
    for packet, mark in _TS_PACKETS:
        marks = beginning[mark : packet * _TS_SEEN : packet]
        if marks == b"\x47" * _TS_SEEN:
            return "its last packet is not whole" if size % packet else ""
    return ""


def _ogg(stream: BinaryIO, size: int) -> str:
    stream.seek(max(0, size - _OGG_PAGE))
    end = stream.read()
    place = end.rfind(b"OggS\0")
    page = end[place:] if place >= 0 else b""
    lengths = page[27 : 27 + page[26]] if len(page) > 26 else b""
    if len(page) <= 26 or len(page) < 27 + page[26] + sum(lengths):
        return "its last page is not whole"
    return "" if page[5] & _OGG_LAST else "its last page is not marked as the last"


def _wav(stream: BinaryIO, size: int) -> str:
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


def _mp3(stream: BinaryIO, size: int) -> str:
    head = stream.read(10)
    # An ID3 tag's length has seven bits a byte.
    begin = 10 + sum(byte << 7 * (3 - n) for n, byte in enumerate(head[6:10])) if head[:3] == b"ID3" else 0
    stream.seek(begin)
    found = stream.read(_MP3_SEARCHED)
    frame = next((n for n in range(len(found) - 4) if found[n] == 0xFF and found[n + 1] >= 0xE0), None)
    stated = _mp3_bytes(found[frame:]) if frame is not None else None
    there = size - begin - (frame or 0)
    return f"its header says {stated} bytes of sound, {there} are there" if stated and stated > there else ""


def _mp3_bytes(frame: bytes) -> int | None:
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


_LOOKS: dict[str, Callable[[BinaryIO, int], str]] = {
    "mpegts": _transport_stream,
    "ogg": _ogg,
    "wav": _wav,
    "mp3": _mp3,
}

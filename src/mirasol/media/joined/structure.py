"""Where the streams of a file change, from its bytes: FFmpeg's readers do not say, and PyAV drops streams that appear
while reading."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mirasol.media.isolation.shared import report_progress

BLOCK_PACKETS = 40_000
SYNC_SEARCHED = 2**20  # bytes in which packets are looked for after damage
PACKETS = ((188, 0), (192, 4), (204, 0))  # bytes of a transport stream's packet, and where in it the sync byte is
MARKS = 4  # packets in a row whose marks say that this is their size
NEAR_PACKETS = 100  # a program's table follows the list of programs as closely as this
# Kinds of elementary streams in MPEG-TS by `stream_type`, and the descriptors that name the sound of a private one.
TS_VIDEO = {0x01, 0x02, 0x10, 0x1B, 0x20, 0x21, 0x24, 0x33, 0x42, 0xD1, 0xD2, 0xEA}
TS_AUDIO = {0x03, 0x04, 0x0F, 0x11, 0x1C, *range(0x80, 0x8B)}
TS_AUDIO_DESCRIPTORS = {0x6A, 0x7A, 0x7B, 0x7C, 0x81}
REGISTRATION = 0x05
REGISTERED = {
    b"Opus": "audio",
    b"AC-3": "audio",
    b"EAC3": "audio",
    b"BSSD": "audio",
    b"HEVC": "video",
    b"VC-1": "video",
}
CLOCK_JUMP = 10.0  # seconds between the clock times of MPEG packs from which on one begins another recording
PS_CODE = re.compile(rb"\x00\x00\x01([\xb9\xba\xbd\xc0-\xef])")
RAW_AC3 = 0x80  # FFmpeg's id of it
PS_HEADER = 300  # bytes of the longest
PS_OVERLAP = 2**16 + PS_HEADER  # bytes of the next block that a header may reach into
BLOCK_BYTES = 2**23
OGG_MARK = b"OggS\0"
OGG_PAGE = 27  # bytes of the shortest
OGG_MOST = OGG_PAGE + 255 + 255 * 255
OGG_FIRST = 2  # the flag of a stream's first page


@dataclass
class Section:
    """A part of a file in which the same streams are there.

    begin: byte. streams: by FFmpeg's id of each video or sound stream, its kind and what else tells that it is another
    one; None where no stream goes on from the section before. firsts: bytes at which streams begin later than that.
    """

    begin: int
    streams: dict[int, tuple[str, ...]] | None
    firsts: dict[int, int] = field(default_factory=dict)


def find_sections(path: str | os.PathLike, format_name: str) -> list[Section]:
    """The sections of a transport stream, program stream or Ogg file, at least one; `format_name` is FFmpeg's."""
    with Path(path).open("rb") as stream:
        if format_name == "mpegts":
            return _find_transport_sections(stream) or [Section(0, {})]
        return _find_program_sections(stream) if format_name == "mpeg" else _find_ogg_sections(stream)


def _compute_crc(content: bytes, value: int) -> int:
    """The checksum of MPEG tables (`value` 2**32 - 1) and Ogg pages (0)."""
    for byte in content:
        value = (value << 8 & 0xFFFFFFFF) ^ _CRC[value >> 24 ^ byte]
    return value


def _make_crc_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1 ^ 0x04C11DB7 if value & 0x80000000 else value << 1) & 0xFFFFFFFF
        table.append(value)
    return table


_CRC = _make_crc_table()


# MPEG transport streams: the tables of programs


def _find_transport_sections(stream: BinaryIO) -> list[Section]:
    sections: list[Section] = []
    programs: dict[int, dict[int, tuple[str, ...]]] = {}
    latest: dict[int, bytes] = {}
    listed = media_seen = 0  # bytes of the latest list of programs, and of media since the last section
    for place, pid, size, content in _list_transport_starts(stream):
        if not content:
            media_seen += 1
            continue
        if content[0] == 0:
            listed = place
        if latest.get(pid) == content:
            continue
        latest[pid] = content
        number = int.from_bytes(content[3:5], "big")
        if content[0] == 0:
            body = content[8:-4]
            known = {int.from_bytes(body[n : n + 2], "big") for n in range(0, len(body) - 3, 4)}
            programs = {key: streams for key, streams in programs.items() if key in known}
            continue
        programs[number] = _list_program_streams(content)
        streams = {key: kind for found in programs.values() for key, kind in found.items()}
        if sections and streams == sections[-1].streams:
            continue
        near = place - listed <= NEAR_PACKETS * size
        if sections and not media_seen:
            sections[-1].streams = streams
        else:
            sections.append(Section((listed if near else place) if sections else 0, streams))
        media_seen = 0
    return sections


def _list_program_streams(table: bytes) -> dict[int, tuple[str, ...]]:
    """Kind and coding of a program's video and sound streams by their PID, from its table (ISO 13818-1, 2.4.4.8)."""
    streams = {}
    place, end = 12 + (int.from_bytes(table[10:12], "big") & 0xFFF), len(table) - 4
    while place + 5 <= end:
        coding, pid = table[place], int.from_bytes(table[place + 1 : place + 3], "big") & 0x1FFF
        begin = place + 5
        place = begin + (int.from_bytes(table[place + 3 : place + 5], "big") & 0xFFF)
        tags = dict(_list_descriptors(table[begin : min(place, end)]))
        registered = tags.get(REGISTRATION, b"")[:4]
        kind = REGISTERED.get(registered, "")
        if coding in TS_VIDEO:
            kind = "video"
        elif coding in TS_AUDIO or (coding == 6 and TS_AUDIO_DESCRIPTORS & tags.keys()):
            kind = "audio"
        if kind:
            private = sorted(TS_AUDIO_DESCRIPTORS & tags.keys()) if coding == 6 else []
            streams[pid] = (kind, f"{coding} {private} {registered!r}")
    return streams


def _list_descriptors(content: bytes) -> Iterator[tuple[int, bytes]]:
    place = 0
    while place + 2 <= len(content):
        yield content[place], content[place + 2 : place + 2 + content[place + 1]]
        place += 2 + content[place + 1]


def _list_transport_starts(stream: BinaryIO) -> Iterator[tuple[int, int, int, bytes]]:
    """(byte, PID, bytes of a packet, table) of each packet in which something begins; no table where that is media.

    Tables are those of programs and the list of programs, with a right checksum.
    """
    position, size, mark = _find_packets(stream, 0, PACKETS)
    while size:
        report_progress()
        stream.seek(position)
        block = stream.read(BLOCK_PACKETS * size)
        rows = np.frombuffer(block, np.uint8, len(block) // size * size).reshape(-1, size)
        good = rows[:, mark] == 0x47
        count = len(rows) if good.all() else int(np.argmin(good))
        head = rows[:count, mark + 1 : mark + 4]
        begins = (head[:, 0] & 0xC0 == 0x40) & (head[:, 2] & 0x10 > 0)
        for number in np.flatnonzero(begins).tolist():
            row = block[number * size + mark : number * size + mark + 188]
            payload = _get_payload(row)
            pid = int.from_bytes(row[1:3], "big") & 0x1FFF
            if payload[:3] == b"\0\0\1":
                yield position + number * size, pid, size, b""
                continue
            table = payload[1 + payload[0] :] if payload else b""
            if table[:1] not in (b"\0", b"\2") or len(table) < 3:
                continue
            length = 3 + (int.from_bytes(table[1:3], "big") & 0xFFF)
            if len(table) < length:
                table += _read_rest(stream, position + (number + 1) * size + mark, size, pid, length - len(table))
            table = table[:length]
            if len(table) == length and length >= 12 and table[5] & 1 and _compute_crc(table, 0xFFFFFFFF) == 0:
                yield position + number * size, pid, size, table
        position += count * size
        if count < len(rows):
            position, size, mark = _find_packets(stream, position, ((size, mark),))
        elif len(rows) < BLOCK_PACKETS:
            return


def _get_payload(packet: bytes) -> bytes:
    return packet[5 + packet[4] :] if packet[3] & 0x20 else packet[4:]


def _read_rest(stream: BinaryIO, place: int, size: int, pid: int, missing: int) -> bytes:
    """The rest of a table, from the packets of its PID that follow."""
    found = b""
    stream.seek(place)
    for _ in range(10 * NEAR_PACKETS):
        packet = stream.read(size)[:188]
        if len(packet) < 188 or packet[0] != 0x47 or len(found) >= missing:
            break
        if int.from_bytes(packet[1:3], "big") & 0x1FFF == pid and packet[3] & 0x10:
            if packet[1] & 0x40:
                break
            found += _get_payload(packet)
    return found


def _find_packets(stream: BinaryIO, position: int, sizes: tuple[tuple[int, int], ...]) -> tuple[int, int, int]:
    """Where the next packets begin, how long they are and where in them the mark is; no length: there are none."""
    while True:
        report_progress()
        stream.seek(position)
        content = stream.read(SYNC_SEARCHED)
        found = []
        for size, mark in sizes:
            pattern = b"(?=" + (b".{%d}" % (size - 1)).join([b"\x47"] * MARKS) + b")"
            match = re.compile(pattern, re.DOTALL).search(content, mark)
            if match:
                found.append((position + match.start() - mark, size, mark))
        if found:
            return min(found)
        if len(content) < SYNC_SEARCHED:
            return position, 0, 0
        position += SYNC_SEARCHED - MARKS * PACKETS[-1][0]


# MPEG program streams: clock times of packs, ids of packets


def _find_program_sections(stream: BinaryIO) -> list[Section]:
    sections = [Section(0, {})]
    clock, ended, raw_sound = None, False, False
    for place, code, header in _list_program_codes(stream):
        streams = sections[-1].streams
        if code == 0xB9:
            ended = True
        elif code == 0xBA:
            time = _read_clock(header)
            jumps = clock is not None and time is not None and not -0.1 <= time - clock <= CLOCK_JUMP
            if (ended or jumps) and streams:
                sections.append(Section(place, {}))
                raw_sound = False
            clock, ended = (clock if time is None else time), False
        else:
            key, kind, raw = _identify_packet(code, header)
            raw_sound = raw_sound or raw
            if code == 0xBD and raw_sound:
                key, kind = RAW_AC3, "audio"  # AC-3 that FFmpeg writes without the numbers that discs have
            if kind and key not in streams:
                streams[key] = (kind,)
                sections[-1].firsts[key] = place
    return sections


def _list_program_codes(stream: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """(byte, code, what follows) of everything in a program stream that looks like a header."""
    position, rest = 0, b""
    complete = False
    while not complete:
        report_progress()
        block = stream.read(BLOCK_BYTES)
        content, complete = rest + block, len(block) < BLOCK_BYTES
        last = len(content) if complete else len(content) - PS_OVERLAP
        for match in PS_CODE.finditer(content):
            if match.start() >= last:
                break
            code, header = match[1][0], content[match.end() : match.end() + PS_HEADER]
            if code > 0xBA:  # bytes of a packet may look like another one: a real one ends where something begins
                end = match.end() + 2 + int.from_bytes(header[:2], "big")
                if content[end : end + 3] not in (b"\0\0\1", b""):
                    continue
            yield position + match.start(), code, header
        position, rest = position + last, content[last:]


def _read_clock(header: bytes) -> float | None:
    """Clock time of a pack, seconds; MPEG-2's (ISO 13818-1, 2.5.3.3) or MPEG-1's."""
    if len(header) < 6:
        return None
    bits = int.from_bytes(header[:6], "big")
    if header[0] >> 6 == 1:
        ticks = (bits >> 43 & 7) << 30 | (bits >> 27 & 0x7FFF) << 15 | (bits >> 11 & 0x7FFF)
    elif header[0] >> 4 == 2:
        ticks = (bits >> 41 & 7) << 30 | (bits >> 25 & 0x7FFF) << 15 | (bits >> 9 & 0x7FFF)
    else:
        return None
    return ticks / 90_000


def _identify_packet(code: int, header: bytes) -> tuple[int, str, bool]:
    """FFmpeg's id and the kind ("" for neither) of a packet's stream, and whether it is AC-3 without a number."""
    if code >= 0xC0:
        return 0x100 | code, "video" if code >= 0xE0 else "audio", False
    place = _skip_packet_header(header)
    number = header[place] if place < len(header) else 0
    return number, "audio" if 0x80 <= number < 0xD0 else "", header[place : place + 2] == b"\x0b\x77"


def _skip_packet_header(content: bytes) -> int:
    """Where the data of an MPEG-1 or MPEG-2 packet begins, in what follows its code."""
    place = 2
    while content[place : place + 1] == b"\xff":
        place += 1
    if len(content) < place + 3:
        return len(content)
    if content[place] >> 6 == 2:
        return place + 3 + content[place + 2]
    if content[place] >> 6 == 1:
        place += 2
    return place + {2: 5, 3: 10}.get(content[place] >> 4, 1)


# Ogg: the first pages of streams


def _find_ogg_sections(stream: BinaryIO) -> list[Section]:
    sections = [Section(0, None)]
    beginning = True  # no page other than the first ones of streams since the section's beginning
    for place, flags in _list_pages(stream):
        first = bool(flags & OGG_FIRST)
        if first and not beginning:
            if not _is_sound_page(stream, place):
                continue
            sections.append(Section(place, None))
        beginning = first
    return sections


def _list_pages(stream: BinaryIO) -> Iterator[tuple[int, int]]:
    """Byte and flags of each page, by the lengths of those before; where these are wrong, by the mark of a page."""
    base, content, place, before = 0, b"", 0, 0  # `before`: what may be skipped if no page is at `place`
    complete = False
    while True:
        if len(content) - place < OGG_MOST and not complete:
            report_progress()
            block = stream.read(BLOCK_BYTES)
            base, content, place, before = base + before, content[before:] + block, place - before, 0
            complete = not block
            continue
        if content[place : place + 5] != OGG_MARK:
            place = before = content.find(OGG_MARK, before)
            if place < 0:
                return
            continue
        if len(content) < place + OGG_PAGE:
            return
        yield base + place, content[place + 5]
        lengths = content[place + OGG_PAGE : place + OGG_PAGE + content[place + 26]]
        before, place = place + 1, place + OGG_PAGE + len(lengths) + sum(lengths)


def _is_sound_page(stream: BinaryIO, place: int) -> bool:
    """Whether a page's checksum is right: one flipped bit makes any page a first one."""
    here = stream.tell()
    stream.seek(place)
    head = stream.read(OGG_PAGE)
    lengths = stream.read(head[26])
    page = bytearray(head + lengths + stream.read(sum(lengths)))
    stream.seek(here)
    stated, page[22:26] = page[22:26], bytes(4)
    return _compute_crc(bytes(page), 0) == int.from_bytes(stated, "little")

"""An open file, or the parts of one that was made by appending recordings with different streams to each other."""

import contextlib
import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from av.container import InputContainer
from av.packet import Packet

from mirasol.errors import BadClip
from mirasol.media.container import (
    LACKING,
    WHOLE,
    ByteRange,
    ChosenStreams,
    choose_streams,
    get_packet_times,
    open_media,
    read_packets,
)
from mirasol.media.joined.clock import PacketScan, scan_packets
from mirasol.media.joined.structure import Section, find_sections
from mirasol.media.limits import Limits

# Formats in which recordings can simply be appended to each other, by FFmpeg's names.
JOINABLE_FORMATS = ("mpegts", "mpeg", "ogg")
MOST_PARTS = 1000
MOST_NOTES = 5


@dataclass(frozen=True)
class Part:
    """Bytes of a file that are opened as a file of their own.

    ids: FFmpeg's ids of the streams to choose from, None for all. late: (byte, kind) of streams that begin within it,
    next to those that are read. unread: why nothing of it is read, "" if it is. kinds: "video", "audio" or both.
    """

    place: ByteRange = WHOLE
    ids: frozenset[int] | None = None
    late: tuple[tuple[int, str], ...] = ()
    unread: str = ""
    kinds: frozenset[str] = frozenset()


class Source:
    """An open media file: the first of its parts (`container`, `chosen`), and the others one after the other."""

    def __init__(
        self,
        path: str | os.PathLike,
        limits: Limits,
        parts: list[Part],
        opened: contextlib.ExitStack,
        threads: int = 1,
        container: InputContainer | None = None,
    ):
        self.path, self.limits, self.threads = path, limits, threads
        self.parts, self.unread = [part for part in parts if not part.unread], [part for part in parts if part.unread]
        if not self.parts:
            raise BadClip(path, self.unread[0].unread)
        self._opened = opened
        self.container, self.chosen = self._open(opened, self.parts[0], container)

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of streams that some part has."""
        return frozenset(stream.type for stream in self.chosen.streams).union(*(part.kinds for part in self.parts))

    @property
    def notes(self) -> list[str]:
        """What choosing streams gave rise to, and `losses`."""
        return [
            note for note in self.chosen.notes if not any(note == LACKING[kind] for kind in self.kinds)
        ] + self.losses

    @property
    def losses(self) -> list[str]:
        """Parts of the file of which nothing is read."""
        lost = [f"what begins at byte {part.place.begin} is not read: {part.unread}" for part in self.unread]
        return lost[:MOST_NOTES] + [f"{len(lost)} such parts"] * (len(lost) > MOST_NOTES)

    def _open(
        self, opened: contextlib.ExitStack, part: Part, container: InputContainer | None = None
    ) -> tuple[InputContainer, ChosenStreams]:
        container = container or opened.enter_context(open_media(self.path, self.limits, part.place))
        chosen = choose_streams(container, self.path, self.limits, part.ids)
        for stream in chosen.streams:
            if self.threads != 1:
                stream.thread_type = "AUTO"
            stream.codec_context.thread_count = self.threads
        return container, chosen

    def reopen(self) -> None:
        """Goes back to the beginning of the file."""
        self.container, self.chosen = self._open(self._opened, self.parts[0])

    def open_parts(self) -> Iterator[tuple[InputContainer, ChosenStreams]]:
        """Each part, the first one where it is now. The one before stays open until the one after is asked for."""
        yield self.container, self.chosen
        before = contextlib.ExitStack()
        for part in self.parts[1:]:
            opened = self._opened.enter_context(contextlib.ExitStack())
            yield self._open(opened, part)
            before.close()
            before = opened

    def scan(self) -> tuple[PacketScan, list[tuple[float, str]]]:
        """Reads all packets, in containers of their own; decodes nothing.

        Also returns at which seconds, on the rising clock, other streams are read or are left out, in words.
        """
        with contextlib.ExitStack() as opened:
            copy = Source(self.path, self.limits, self.parts, opened)
            places = _Places()
            scan = scan_packets(_list_packets(copy, places), self.container.format.name in JOINABLE_FORMATS)
            return scan, places.describe(scan)


@contextlib.contextmanager
def open_source(path: str | os.PathLike, limits: Limits, threads: int = 1) -> Iterator[Source]:
    """Opens a media file; `threads` are for decoding, 0 lets FFmpeg choose.

    Raises:
        BadClip: it cannot be used.
    """
    with contextlib.ExitStack() as opened:
        container = opened.enter_context(open_media(path, limits))
        parts = [Part()]
        if container.format.name in JOINABLE_FORMATS:
            sections = find_sections(path, container.format.name)
            if len(sections) > 1:
                container, parts = None, _plan_parts(path, limits, sections)
            else:
                parts = [Part(late=_list_late(sections, {stream.id for stream in container.streams}))]
        yield Source(path, limits, parts, opened, threads, container)


def _plan_parts(path: str | os.PathLike, limits: Limits, sections: list[Section]) -> list[Part]:
    """Sections with the streams that are read from the first of them are one part."""
    parts: list[Part] = []
    first = 0
    while first < len(sections) and len(parts) < MOST_PARTS:
        stop, ids, kept, reason = first + 1, None, {}, ""
        begin = sections[first].begin
        try:
            with open_media(path, limits, _make_range(begin, sections[stop:])) as container:
                kept = {stream.type: stream.id for stream in choose_streams(container, path, limits).streams}
                ids = frozenset(stream.id for stream in container.streams)
            while stop < len(sections) and _goes_on(sections[first], sections[stop], kept):
                stop += 1
        except BadClip as error:
            reason = error.reason
        late = () if ids is None else _list_late(sections[first:stop], ids)
        parts.append(Part(_make_range(begin, sections[stop:]), ids, late, reason, frozenset(kept)))
        first = stop
    if first < len(sections):
        parts.append(Part(ByteRange(sections[first].begin), unread=f"a file is read as {MOST_PARTS} parts at most"))
    return parts


def _make_range(begin: int, following: list[Section]) -> ByteRange:
    return ByteRange(begin, following[0].begin if following else 0)


def _goes_on(first: Section, other: Section, kept: dict[str, int]) -> bool:
    """Whether a section has the streams that are kept of the first one, and none of a kind that this one lacks."""
    if first.streams is None or other.streams is None:
        return False
    for kind in ("video", "audio"):
        key = kept.get(kind)
        if key is None and any(own[0] == kind for new, own in other.streams.items() if new not in first.streams):
            return False
        if key in first.streams and other.streams.get(key) != first.streams[key]:
            return False
    return True


def _list_late(sections: list[Section], ids: Collection[int]) -> tuple[tuple[int, str], ...]:
    """Where streams begin that are not among the first ones, and their kinds."""
    found: dict[int, tuple[int, str]] = {}
    for section in sections:
        for key, (kind, *_) in (section.streams or {}).items():
            if key not in ids:
                found.setdefault(key, (section.firsts.get(key, section.begin), kind))
    return tuple(sorted(found.values()))


class _Places:
    """Where on the rising clock parts begin, and streams that are not read."""

    def __init__(self):
        self._found: list[tuple[list[tuple[str, int, float]], str]] = []
        self._words: tuple[str, ...] = ()

    def add_part(self, chosen: ChosenStreams, packets: list[tuple[str, int, float]]) -> None:
        """`packets`: kind, number and second of its first packets, filled in later."""
        words = (f"other streams begin: {_describe_streams(chosen)}", *chosen.notes)
        new = [word for word in words if word not in self._words]
        if self._words:
            self._found += [(packets, word) for word in new]
        self._words = words

    def add_late(self, kind: str, packet: tuple[str, int, float]) -> None:
        self._found.append(([packet], f"another {kind} stream begins: it is not read"))

    def describe(self, scan: PacketScan) -> list[tuple[float, str]]:
        remarks = [
            (min(time + scan.find_shift(kind, number) for kind, number, time in packets), words)
            for packets, words in self._found
            if packets
        ]
        return sorted(remarks, key=lambda remark: remark[0])


def _describe_streams(chosen: ChosenStreams) -> str:
    words = []
    if chosen.video is not None:
        codec = chosen.video.codec_context
        words.append(f"{codec.name} {codec.width}x{codec.height}")
    if chosen.audio is not None:
        codec = chosen.audio.codec_context
        words.append(f"{codec.name} {codec.sample_rate} Hz {codec.layout.name}")
    return " and ".join(words)


def _list_packets(source: Source, places: _Places) -> Iterator[tuple[str, float, Packet, int]]:
    """All packets with their kind, the unit of their times and their part; notes in `places` where parts begin."""
    counts = {"video": 0, "audio": 0}
    for place, (part, (container, chosen)) in enumerate(zip(source.parts, source.open_parts(), strict=True)):
        kinds = {stream.index: (stream.type, float(stream.time_base)) for stream in chosen.streams}
        firsts: list[tuple[str, int, float]] = []
        places.add_part(chosen, firsts)
        starting, late = {kind for kind, _ in kinds.values()}, list(part.late)
        last = None
        for packet in read_packets(container, chosen.streams, []):
            kind, tick = kinds[packet.stream_index]
            if starting or late:
                time = get_packet_times(packet, tick)[0]
                if math.isfinite(time):
                    last = (kind, counts[kind], time)
                    if kind in starting:
                        starting.remove(kind)
                        firsts.append(last)
                    while late and (packet.pos or 0) >= late[0][0] - part.place.begin:
                        places.add_late(late.pop(0)[1], last)
            counts[kind] += 1
            yield kind, tick, packet, place
        for _, kind in late if last is not None else ():
            places.add_late(kind, last)

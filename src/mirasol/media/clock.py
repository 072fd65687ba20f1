"""One rising clock for files whose time stamps start over: joined transport streams and VOBs, chained Ogg files."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from av.packet import Packet
from av.stream import Stream as AvStream

# Formats in which recordings can simply be appended to each other, by FFmpeg's names.
JOINABLE_FORMATS = ("mpegts", "mpeg", "ogg")
BACKWARD_SECONDS = 0.1  # decoding times of one stream never run backwards within a recording
# A stream may pause, and a screen recording stand still: forward jumps count if all streams make them, or if no pause
# lasts that long.
FORWARD_SECONDS = 10.0
PAUSE_SECONDS = 1.0  # from here on a forward jump is looked at
ABSURD_SECONDS = 3600.0
SAME_START_SECONDS = 10.0  # streams of one recording begin within this time of each other
REORDER_SECONDS = 600.0  # no frame waits that long to be shown
# Damaged time stamps jump and come back: so short a piece is out of place, not a recording.
STRAY_SECONDS = 1.0
STRAY_PACKETS = 10


@dataclass
class _Piece:
    """Packets of one stream without a jump between them; times in seconds as stored."""

    stream: int
    first: int  # which packet of the stream it begins with
    order: int  # which packet of the file that is
    begin: float
    end: float
    first_decoded: float  # decoding time of the first packet
    decoded: float  # of the last one
    count: int = 1
    untimed: float = 0.0  # seconds of packets without a time since the last one that has one
    ends_elsewhere: dict[int, float] = field(default_factory=dict)  # how far the other streams had come
    recording: int = -1


@dataclass(frozen=True)
class PacketScan:
    """What reading all packets of some streams found.

    end: presentation second, on the rising clock, at which the last packet ends; -inf without packets.
    begin: presentation second of the first packet in file order of whichever stream begins first.
    joints: where, on the rising clock, time stamps start over.
    shifts: by stream index, (number of the packet, seconds) pairs: from that packet on, seconds are added.
    last_begin: the latest presentation second at which a packet begins.
    """

    end: float
    begin: float
    joints: tuple[float, ...]
    shifts: dict[int, tuple[tuple[int, float], ...]]
    last_begin: float


def scan_packets(packets: Iterable[Packet], streams: list[AvStream], joinable: bool) -> PacketScan:
    """Reads packets to the end, decodes nothing; with `joinable`, finds where their time stamps start over."""
    ticks = {stream.index: float(stream.time_base) for stream in streams}
    pieces: dict[int, list[_Piece]] = {index: [] for index in ticks}
    counts = dict.fromkeys(ticks, 0)
    last_begin = -math.inf
    for order, packet in enumerate(packets):
        index = packet.stream_index
        tick = ticks[index]
        number, counts[index] = counts[index], counts[index] + 1
        stamp = packet.pts if packet.pts is not None else packet.dts
        own = pieces[index]
        if stamp is None:
            if own:
                own[-1].untimed += (packet.duration or 0) * tick
            continue
        time, stop = stamp * tick, (stamp + (packet.duration or 0)) * tick
        decoded = packet.dts * tick if packet.dts is not None else time
        if abs(decoded - time) > REORDER_SECONDS:
            decoded = time  # one of the two is damaged, and pictures are shown at this one
        last_begin = max(last_begin, time)
        jump = decoded - own[-1].decoded if own else 0.0
        if not own or (joinable and not -BACKWARD_SECONDS <= jump <= PAUSE_SECONDS):
            if own:
                own[-1].end += own[-1].untimed
            elsewhere = {other: found[-1].end for other, found in pieces.items() if found and other != index}
            own.append(_Piece(index, number, order, time, stop, decoded, decoded, ends_elsewhere=elsewhere))
        else:
            piece = own[-1]
            piece.begin, piece.end = min(piece.begin, time), max(piece.end, stop)
            piece.decoded, piece.untimed = decoded, 0.0
            piece.count += 1
    return _place_pieces(pieces, last_begin)


def _place_pieces(pieces: dict[int, list[_Piece]], last_begin: float) -> PacketScan:
    found = [own for own in pieces.values() if own]
    if not found:
        return PacketScan(-math.inf, math.inf, (), {}, -math.inf)
    begin = min((own[1] if _is_wrapped_start(own) else own[0]).begin for own in found)
    if all(len(own) == 1 for own in found):
        return PacketScan(max(own[0].end for own in found), begin, (), {}, last_begin)
    kept = {index: _merge_pauses(own, index, pieces) for index, own in pieces.items()}
    shifts, joints = _shift_recordings(kept)
    placed = {
        index: tuple((piece.first, shifts[id(piece)]) for piece in own) for index, own in kept.items() if len(own) > 1
    }
    end = max(piece.end + shifts[id(piece)] for own in kept.values() for piece in own)
    return PacketScan(end, begin, joints, placed, last_begin)


def _is_stray(own: list[_Piece], number: int) -> bool:
    """Whether a piece is short and the one after it goes on where the one before it ended."""
    if not 0 < number < len(own) - 1:
        return False
    piece, before, after = own[number], own[number - 1], own[number + 1]
    short = piece.count <= STRAY_PACKETS and piece.decoded - piece.first_decoded <= STRAY_SECONDS
    comes_back = (piece.first_decoded > before.decoded) != (after.first_decoded > piece.decoded)
    return short and comes_back and -BACKWARD_SECONDS <= after.first_decoded - before.decoded <= STRAY_SECONDS


def _is_wrapped_start(own: list[_Piece]) -> bool:
    """Whether a stream begins with a few packets from before zero, which writers may store as the highest times."""
    if len(own) < 2 or own[0].count > STRAY_PACKETS:
        return False
    return own[1].first_decoded - own[0].decoded < -ABSURD_SECONDS


def _merge_pauses(own: list[_Piece], index: int, pieces: dict[int, list[_Piece]]) -> list[_Piece]:
    """The pieces of one stream, those joined again between which it only paused."""
    kept: list[_Piece] = []
    others = [found for other, found in pieces.items() if other != index and found]
    for number, piece in enumerate(own):
        jump = piece.first_decoded - own[number - 1].decoded if number else 0.0
        stray = _is_stray(own, number) or _is_stray(own, number - 1)
        pauses = jump <= FORWARD_SECONDS or not _all_jump(piece, others)
        if number and 0 < jump < ABSURD_SECONDS and not stray and pauses:
            last = kept[-1]
            last.begin, last.end = min(last.begin, piece.begin), max(last.end, piece.end)
            last.decoded, last.count = piece.decoded, last.count + piece.count
        else:
            kept.append(piece)
    return kept


def _all_jump(piece: _Piece, others: list[list[_Piece]]) -> bool:
    """Whether every other stream, of which there is at least one, jumps forward to about the same time."""
    return bool(others) and all(
        any(
            after.first_decoded - before.decoded > FORWARD_SECONDS
            and abs(after.begin - piece.begin) < SAME_START_SECONDS
            for before, after in itertools.pairwise(own)
        )
        for own in others
    )


def _shift_recordings(kept: dict[int, list[_Piece]]) -> tuple[dict[int, float], tuple[float, ...]]:
    """Seconds to add to each piece (by identity), and where the recordings meet on the rising clock."""
    shifts: dict[int, float] = {}
    for own in (own for own in kept.values() if own):
        shifts[id(own[0])] = own[1].begin - own[0].end if _is_wrapped_start(own) else 0.0
    current = dict.fromkeys(kept, 0)  # which recording a stream is in
    recordings: list[tuple[float, float]] = [(0.0, 0.0)]  # where each begins as stored, and its shift
    joints: list[float] = []
    starts = [(piece.order, number, piece) for own in kept.values() for number, piece in enumerate(own) if number]
    for _, number, piece in sorted(starts, key=lambda start: start[0]):
        own = kept[piece.stream]
        before = own[number - 1]
        reached = before.end + shifts[id(before)]
        if number == 1 and _is_wrapped_start(own):
            shifts[id(piece)] = 0.0
            continue
        if _is_stray(own, number):
            shifts[id(piece)] = reached - piece.begin
            continue
        if _is_stray(own, number - 1):
            shifts[id(piece)] = shifts[id(own[number - 2])]
            continue
        later = range(current[piece.stream] + 1, len(recordings))
        same = next((k for k in later if abs(recordings[k][0] - piece.begin) < SAME_START_SECONDS), None)
        if same is None:
            same = len(recordings)
            starting = [piece.begin, *_find_starts_of_others(piece, kept, current)]
            joint = max([reached, *_find_ends_of_others(piece, kept, shifts)])
            recordings.append((piece.begin, joint - min(starting)))
            joints.append(joint)
        current[piece.stream] = same
        shifts[id(piece)] = recordings[same][1]
    return shifts, tuple(joints)


def _find_starts_of_others(piece: _Piece, kept: dict[int, list[_Piece]], current: dict[int, int]) -> list[float]:
    """Where the next pieces of other streams begin, if they are of the same recording."""
    following = [
        next((other for other in own if other.order > piece.order), None)
        for index, own in kept.items()
        if index != piece.stream
    ]
    return [o.begin for o in following if o is not None and abs(o.begin - piece.begin) < SAME_START_SECONDS]


def _find_ends_of_others(piece: _Piece, kept: dict[int, list[_Piece]], shifts: dict[int, float]) -> list[float]:
    """How far, on the rising clock, other streams come before they start over too."""
    ends = []
    for index, own in kept.items():
        before = [(k, other) for k, other in enumerate(own) if other.order < piece.order]
        if index == piece.stream or not before:
            continue
        number, last = before[-1]
        following = own[number + 1] if number + 1 < len(own) else None
        starts_over = following is not None and abs(following.begin - piece.begin) < SAME_START_SECONDS
        end = last.end if starts_over else piece.ends_elsewhere.get(index, last.end)
        ends.append(end + shifts.get(id(last), 0.0))
    return ends


class RisingClock:
    """Moves the time stamps of packets, in file order from the beginning of the file, to the rising clock."""

    def __init__(self, shifts: dict[int, tuple[tuple[int, float], ...]]):
        self._shifts, self._counts = shifts, dict.fromkeys(shifts, 0)
        self._places = dict.fromkeys(shifts, 0)

    def place(self, packet: Packet) -> None:
        """Changes the packet's `pts` and `dts`."""
        index = packet.stream_index
        own = self._shifts.get(index)
        if own is None:
            return
        number, place = self._counts[index], self._places[index]
        self._counts[index] = number + 1
        while place + 1 < len(own) and number >= own[place + 1][0]:
            place += 1
        self._places[index] = place
        shift = own[place][1]
        if shift:
            ticks = round(shift / packet.time_base)
            packet.pts = None if packet.pts is None else packet.pts + ticks
            packet.dts = None if packet.dts is None else packet.dts + ticks

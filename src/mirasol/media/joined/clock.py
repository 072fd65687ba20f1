"""One rising clock for files whose time stamps start over: joined transport streams and VOBs, chained Ogg files."""

import itertools
import math
import statistics
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from av.packet import Packet

BACKWARD_SECONDS = 0.1  # decoding times of one stream never run backwards within a recording
# A stream may pause, and a screen recording stand still: forward jumps count if all streams make them, or if no pause
# lasts that long.
FORWARD_SECONDS = 10.0
PAUSE_SECONDS = 1.0  # from here on a forward jump is looked at
SHORTEST_PAUSE_SECONDS = 0.2  # or from here on, where packets have come closer together
STEADY_PACKETS = 3
STEADY_STEPS = 10
ABSURD_SECONDS = 3600.0
SAME_START_SECONDS = 10.0  # streams of one recording begin within this time of each other
REORDER_SECONDS = 600.0  # no frame waits that long to be shown
REORDERED_FRAMES = 8
USUAL_REORDER_SECONDS = 1.0  # few frames wait for longer, unless all of a slow video do
# Damaged time stamps jump and come back: so short a piece is out of place, not a recording.
STRAY_SECONDS = 1.0
STRAY_PACKETS = 100
FIRST_PACKETS = 10  # from before zero
FEW_PACKETS = 3  # less than any recording has
CROSSING_SECONDS = 1.0  # a stream that goes on for that long shows that no other one begins another recording


@dataclass(eq=False)
class _Piece:
    """Packets of one stream without a jump between them; times in seconds as stored."""

    stream: Hashable
    part: int  # of the file
    first: int  # which packet of the stream it begins with
    order: int  # which packet of the file that is
    begin: float
    end: float
    first_decoded: float  # decoding time of the first packet
    decoded: float  # of the last one
    count: int = 1
    delay: float | None = None  # between decoding and showing the last packet
    longest_delay: float = 0.0  # of any packet of the stream so far
    step_before: float | None = None  # of the pieces before
    untimed: float = 0.0  # seconds of packets without a time since the last one that has one
    # Pieces of other streams in which this one begins, and how far they had come: end, decoding time.
    elsewhere: "dict[Hashable, tuple[_Piece, float, float]]" = field(default_factory=dict)
    stray: bool = False
    base: "_Piece | None" = None  # what it goes on with, after strays
    merged: "_Piece | None" = None  # what it is a part of
    recording: int = 0
    shift: float = 0.0

    def find_whole(self) -> "_Piece":
        return self if self.merged is None else self.merged.find_whole()

    @property
    def is_short(self) -> bool:
        return self.count <= STRAY_PACKETS and self.decoded - self.first_decoded <= STRAY_SECONDS

    @property
    def most_delay(self) -> float:
        """Seconds that a packet may wait to be shown, as far as the others show."""
        return BACKWARD_SECONDS + max(2 * self.longest_delay, REORDERED_FRAMES * (self.step or 0.0))

    @property
    def step(self) -> float | None:
        """Seconds from packet to packet, None where that is not known yet."""
        if self.count < STEADY_PACKETS:
            return self.step_before
        return (self.decoded - self.first_decoded) / (self.count - 1)


@dataclass(frozen=True)
class PacketScan:
    """What reading all packets of some streams found.

    end: presentation second, on the rising clock, at which the last packet ends; -inf without packets.
    begin: presentation second of the first packet in file order of whichever stream begins first.
    joints: where, on the rising clock, time stamps start over.
    shifts: by stream, (number of the packet, seconds) pairs: from that packet on, seconds are added.
    last_begin: the latest presentation second at which a packet begins.
    repairs: by stream and number of a packet, seconds to add to its presentation and decoding time: one is damaged.
    strays: how many packets have times that do not fit those around them, both of their times.
    """

    end: float
    begin: float
    joints: tuple[float, ...]
    shifts: dict[Hashable, tuple[tuple[int, float], ...]]
    last_begin: float
    repairs: dict[tuple[Hashable, int], tuple[float, float]] = field(default_factory=dict)
    strays: int = 0

    def find_shift(self, stream: Hashable, number: int) -> float:
        """Seconds that are added to the times of a packet of a stream."""
        return next((shift for first, shift in reversed(self.shifts.get(stream, ())) if number >= first), 0.0)


@dataclass
class _Doubt:
    """A packet that is shown unusually long after, or before, it is decoded."""

    piece: _Piece
    number: int
    time: float
    stop: float
    decoded: float
    usual: float | None  # the delay of the packet before

    @property
    def delay(self) -> float:
        return self.time - self.decoded


def scan_packets(packets: Iterable[tuple[Hashable, float, Packet, int]], joinable: bool) -> PacketScan:
    """Reads packets to the end, decodes nothing; with `joinable`, finds where their time stamps start over.

    `packets`: which stream each is of, the seconds of a unit of its times, and which part of the file it is in.
    """
    pieces: dict[Hashable, list[_Piece]] = {}
    counts: dict[Hashable, int] = {}
    doubts: list[_Doubt] = []
    repairs: dict[tuple[Hashable, int], tuple[float, float]] = {}
    last_begin = -math.inf
    for order, (stream, tick, packet, part) in enumerate(packets):
        number = counts.get(stream, 0)
        counts[stream] = number + 1
        stamp = packet.pts if packet.pts is not None else packet.dts
        own = pieces.setdefault(stream, [])
        if stamp is None:
            if own:
                own[-1].untimed += (packet.duration or 0) * tick
            continue
        time, stop = stamp * tick, (stamp + (packet.duration or 0)) * tick
        stored = packet.dts * tick if packet.dts is not None else time
        decoded, doubtful = _judge_times(own, time, stored) if joinable else (stored, False)
        if decoded != stored:
            repairs[stream, number] = 0.0, decoded - stored
        last_begin = max(last_begin, time)
        shown, ended = (math.inf, -math.inf) if doubtful else (time, stop)  # added by `_find_repairs`
        if not own or (joinable and not _goes_on(own[-1], decoded)):
            if own:
                own[-1].end += own[-1].untimed
            piece = _Piece(stream, part, number, order, shown, ended, decoded, decoded)
            if own:
                piece.longest_delay, piece.step_before = own[-1].longest_delay, own[-1].step
            own.append(piece)
            own[-1].elsewhere = {
                other: (found[-1], found[-1].end, found[-1].decoded)
                for other, found in pieces.items()
                if found and other != stream
            }
        else:
            piece = own[-1]
            piece.begin, piece.end = min(piece.begin, shown), max(piece.end, ended)
            piece.decoded, piece.untimed = decoded, 0.0
            piece.count += 1
        if doubtful:
            doubts.append(_Doubt(own[-1], number, time, stop, decoded, own[-1].delay))
        else:
            own[-1].delay = time - decoded
            own[-1].longest_delay = max(own[-1].longest_delay, time - decoded)
    repairs |= _find_repairs(doubts, counts)
    return _place_pieces({stream: own for stream, own in pieces.items() if own}, last_begin, repairs)


def _goes_on(piece: _Piece, decoded: float) -> bool:
    jump = decoded - piece.decoded
    step = piece.step
    usual = step is None or jump <= max(SHORTEST_PAUSE_SECONDS, STEADY_STEPS * step)
    return -BACKWARD_SECONDS <= jump <= PAUSE_SECONDS and usual


def _judge_times(own: list[_Piece], time: float, decoded: float) -> tuple[float, bool]:
    """When a packet is decoded, in place of a time that is damaged, and whether it is doubtful when it is shown."""
    delay = time - decoded
    last = own[-1] if own else None
    if last is not None and last.step is not None and not -BACKWARD_SECONDS <= delay <= last.most_delay:
        if _goes_on(last, decoded):
            return decoded, True
        if -BACKWARD_SECONDS <= time - last.decoded <= last.longest_delay + PAUSE_SECONDS:
            return last.decoded + (last.step or 0.0), False
    if abs(delay) > REORDER_SECONDS:
        return time, False  # pictures are shown at this one
    return decoded, abs(delay) > USUAL_REORDER_SECONDS


def _find_repairs(doubts: list[_Doubt], counts: dict[Hashable, int]) -> dict[tuple[Hashable, int], tuple[float, float]]:
    """Which doubtful times are damaged, and what to add to them. Adds the packets to their pieces."""
    repairs = {}
    for stream, count in counts.items():
        own = [doubt for doubt in doubts if doubt.piece.stream == stream]
        # Of a slow video all frames wait for long.
        most = statistics.median(doubt.delay for doubt in own) if len(own) > count / 4 else 0.0
        for doubt in own:
            piece, repair = doubt.piece, 0.0
            if abs(doubt.delay - most) > 2 * abs(most) and not 0 < doubt.delay <= piece.most_delay:
                usual = doubt.usual if doubt.usual is not None else piece.delay or 0.0
                repair = max(usual, most) - doubt.delay
                repairs[stream, doubt.number] = repair, 0.0
            piece.begin, piece.end = min(piece.begin, doubt.time + repair), max(piece.end, doubt.stop + repair)
    return repairs


def _place_pieces(
    pieces: dict[Hashable, list[_Piece]], last_begin: float, repairs: dict[tuple[Hashable, int], tuple[float, float]]
) -> PacketScan:
    if not pieces:
        return PacketScan(-math.inf, math.inf, (), {}, -math.inf)
    for stream, own in pieces.items():
        _mark_strays(own, [piece for other, found in pieces.items() if other != stream for piece in found])
    kept = {stream: _merge_pauses(own, stream, pieces) for stream, own in pieces.items()}
    late = [_find_late_start(own) for own in kept.values()]
    begin = min(own[start].begin for own, start in zip(kept.values(), late, strict=True))
    placing = _Placing(kept)
    placing.run()
    shifts = {
        stream: tuple((piece.first, piece.shift) for piece in own)
        for stream, own in kept.items()
        if len(own) > 1 or own[0].shift
    }
    end = max(piece.end + piece.shift for own in kept.values() for piece in own)
    return PacketScan(end, begin, tuple(placing.joints), shifts, last_begin, repairs, placing.strays)


def _mark_strays(own: list[_Piece], others: list[_Piece]) -> None:
    """Marks short pieces after which a stream goes on where it was before them, or where `others` are."""
    base, number = own[0], 1
    while number < len(own):
        stop = number
        while stop < len(own) and own[stop].is_short and not _comes_back(base, own[number:stop], own[stop]):
            stop += 1
        if number < stop < len(own) and _comes_back(base, own[number:stop], own[stop]):
            for piece in own[number:stop]:
                piece.stray = True
            own[stop].base = base
            number = stop
        elif number < len(own) - 1 and others and own[number].is_short:
            piece, jump = own[number], own[number + 1].first_decoded - own[number].decoded
            piece.stray = jump < -BACKWARD_SECONDS and not _is_among(piece, others)
        elif (
            0 < number == len(own) - 1 and own[number].count <= FEW_PACKETS and own[number].part == own[number - 1].part
        ):
            jump = own[number].first_decoded - own[number - 1].decoded
            own[number].stray = not -BACKWARD_SECONDS <= jump <= ABSURD_SECONDS
        base = own[number]
        number += 1


def _is_among(piece: _Piece, others: list[_Piece]) -> bool:
    """Whether another stream is at about the time of this piece, or begins there."""
    times = [reached for _, _, reached in piece.elsewhere.values()] + [other.first_decoded for other in others]
    return any(abs(piece.first_decoded - time) < SAME_START_SECONDS for time in times)


def _comes_back(base: _Piece, strays: list[_Piece], piece: _Piece) -> bool:
    """Whether a piece goes on where `base` ends, in the same part of the file, and those in between are elsewhere."""
    if not strays or piece.part != base.part:
        return False
    first, last = min(stray.first_decoded for stray in strays), max(stray.decoded for stray in strays)
    if base.decoded <= first and last <= piece.first_decoded:
        return False
    gap = STRAY_SECONDS + (sum(stray.count for stray in strays) + 2) * (base.step or 0.0)
    return -BACKWARD_SECONDS <= piece.first_decoded - base.decoded <= gap


def _find_late_start(own: list[_Piece]) -> int:
    """Which piece a stream begins with: the first, unless a few packets are from before zero or have damaged times.

    Writers may store times from before zero as the highest there are.
    """
    if len(own) < 2 or not own[0].is_short or own[0].count > FIRST_PACKETS or own[1].part != own[0].part:
        return 0
    if own[1].first_decoded - own[0].decoded < -ABSURD_SECONDS:
        return 1
    crossing = _find_crossing(own[1])
    if crossing is None:
        alone = not own[1].elsewhere and own[0].count <= FEW_PACKETS and own[1].count > 10 * own[0].count
        return int(alone and own[1].first_decoded < own[0].decoded)
    other, reached = crossing
    fits = abs(own[1].first_decoded - reached) < SAME_START_SECONDS <= abs(own[0].first_decoded - other.first_decoded)
    return int(fits)


def _find_crossing(piece: _Piece) -> tuple[_Piece, float] | None:
    """A piece of another stream that goes on while this one begins, and the decoding time of that moment."""
    for other, _, reached in piece.elsewhere.values():
        if other.decoded - reached >= CROSSING_SECONDS and not other.stray:
            return other.find_whole(), reached
    return None


def _merge_pauses(own: list[_Piece], stream: Hashable, pieces: dict[Hashable, list[_Piece]]) -> list[_Piece]:
    """The pieces of one stream, those joined again between which it only paused."""
    kept: list[_Piece] = []
    others = [found for other, found in pieces.items() if other != stream]
    for number, piece in enumerate(own):
        before = own[number - 1]
        jump = piece.first_decoded - before.decoded if number else 0.0
        stray = piece.stray or piece.base is not None
        pauses = jump <= FORWARD_SECONDS or (piece.part == before.part and not _all_jump(piece, others))
        if number and 0 < jump < ABSURD_SECONDS and not stray and not before.stray and pauses:
            last = kept[-1]
            piece.merged = last
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


@dataclass
class _Recording:
    """begin: seconds as stored; shift: what is added to them; part: of the file in which it begins."""

    begin: float
    shift: float
    part: int


class _Placing:
    """Finds which recording each piece is of, in file order, and so the seconds to add to its times."""

    def __init__(self, kept: dict[Hashable, list[_Piece]]):
        self.kept = kept
        self.recordings = [_Recording(0.0, 0.0, 0)]
        self.joints: list[float] = []
        self.strays = 0
        self._current = dict.fromkeys(kept, 0)  # which recording a stream is in
        self._waiting: list[_Piece] = []  # first pieces of streams that begin a little before the others start over

    def run(self) -> None:
        """Sets the `shift` of all pieces."""
        starts = {stream: _find_late_start(own) for stream, own in self.kept.items()}
        pieces = [(number, piece) for own in self.kept.values() for number, piece in enumerate(own)]
        for number, piece in sorted(pieces, key=lambda pair: pair[1].order):
            if number < starts[piece.stream]:
                following = self.kept[piece.stream][1]
                piece.shift = following.begin - piece.end
            elif number == starts[piece.stream]:
                self._place_first(piece)
            else:
                self._place_next(piece, self.kept[piece.stream][number - 1])
        for piece in self._waiting:
            self._set_recording(piece, piece.recording)

    def _set_recording(self, piece: _Piece, recording: int) -> None:
        piece.recording, piece.shift = recording, self.recordings[recording].shift
        self._current[piece.stream] = recording

    def _assign(self, piece: _Piece, recording: int) -> None:
        """Sets the recording of a piece and of those that wait for it."""
        self._set_recording(piece, recording)
        for other in [other for other in self._waiting if _begin_together(piece, other)]:
            self._waiting.remove(other)
            self._set_recording(other, recording)

    def _find_crossing(self, piece: _Piece) -> tuple[_Piece, float] | None:
        crossing = _find_crossing(piece)
        return crossing if crossing is not None and crossing[0] not in self._waiting else None

    def _place_first(self, piece: _Piece) -> None:
        crossing = self._find_crossing(piece)
        goes_along = any(
            -CROSSING_SECONDS <= piece.first_decoded - reached <= FORWARD_SECONDS and other.part == piece.part
            for other, _, reached in piece.elsewhere.values()
        )
        piece.recording = crossing[0].recording if crossing is not None else len(self.recordings) - 1
        if (
            crossing is None
            and not goes_along
            and any(_is_mostly_after(piece, o) for o in self._find_others_next(piece))
        ):
            self._waiting.append(piece)
        else:
            self._assign(piece, piece.recording)

    def _place_next(self, piece: _Piece, before: _Piece) -> None:
        reached = before.end + before.shift
        crossing = None if piece.stray or piece.base else self._find_crossing(piece)
        if piece.base is not None:
            self._assign(piece, piece.base.find_whole().recording)
        elif crossing is not None and abs(piece.first_decoded - crossing[1]) < SAME_START_SECONDS:
            self._assign(piece, crossing[0].recording)
        elif piece.stray or crossing is not None:
            piece.shift, piece.recording = reached - piece.begin, before.recording
            self.strays += piece.count
        else:
            self._assign(piece, self._find_recording(piece, before, reached))

    def _find_recording(self, piece: _Piece, before: _Piece, reached: float) -> int:
        """Which recording, after the one that its stream was in, a piece is of: perhaps one that begins here."""
        for number in range(len(self.recordings) - 1, self._current[piece.stream], -1):
            found = self.recordings[number]
            if abs(found.begin - piece.begin) < SAME_START_SECONDS and piece.part in (found.part, before.part):
                return number
        others = [*self._find_others_next(piece), *(w for w in self._waiting if _begin_together(piece, w))]
        joint = max([reached, *self._find_ends_of_others(piece)])
        begin = min([piece.begin, *(other.begin for other in others)])
        self.recordings.append(_Recording(piece.begin, joint - begin, piece.part))
        self.joints.append(joint)
        return len(self.recordings) - 1

    def _find_others_next(self, piece: _Piece) -> list[_Piece]:
        """The next pieces of other streams, if they are of the same recording."""
        following = [
            next((other for other in own if other.order > piece.order and not other.stray), None)
            for stream, own in self.kept.items()
            if stream != piece.stream
        ]
        return [other for other in following if other is not None and _begin_together(piece, other)]

    def _find_ends_of_others(self, piece: _Piece) -> list[float]:
        """How far, on the rising clock, other streams come before they start over too."""
        ends = []
        for stream, own in self.kept.items():
            before = [(k, other) for k, other in enumerate(own) if other.order < piece.order]
            if stream == piece.stream or not before or before[-1][1] in self._waiting:
                continue
            number, last = before[-1]
            following = own[number + 1] if number + 1 < len(own) else None
            starts_over = following is not None and _begin_together(piece, following)
            end = last.end if starts_over or stream not in piece.elsewhere else piece.elsewhere[stream][1]
            ends.append(end + last.shift)
        return ends


def _is_mostly_after(piece: _Piece, other: _Piece) -> bool:
    """Whether most of a piece comes in the file after another one, of another stream, begins."""
    there, _, reached = other.elsewhere.get(piece.stream, (None, 0.0, 0.0))
    return there is piece and piece.decoded - reached > reached - piece.first_decoded


def _begin_together(one: _Piece, other: _Piece) -> bool:
    return abs(one.begin - other.begin) < SAME_START_SECONDS and one.part == other.part


class RisingClock:
    """Moves the time stamps of packets, in file order from the beginning of the file, to the rising clock.

    `shifts` and `repairs` are those of `PacketScan`.
    """

    def __init__(
        self,
        shifts: dict[Hashable, tuple[tuple[int, float], ...]],
        repairs: dict[tuple[Hashable, int], tuple[float, float]] | None = None,
    ):
        self._shifts, self._repairs = shifts, repairs or {}
        self._counts: dict[Hashable, int] = {}
        self._places = dict.fromkeys(shifts, 0)

    def place(self, stream: Hashable, packet: Packet) -> None:
        """Changes the `pts` and `dts` of a packet of a stream."""
        number = self._counts.get(stream, 0)
        self._counts[stream] = number + 1
        own, shift = self._shifts.get(stream), 0.0
        if own is not None:
            place = self._places[stream]
            while place + 1 < len(own) and number >= own[place + 1][0]:
                place += 1
            self._places[stream] = place
            shift = own[place][1]
        shown, decoded = self._repairs.get((stream, number), (0.0, 0.0))
        if shift or shown or decoded:
            tick = packet.time_base
            packet.pts = None if packet.pts is None else packet.pts + round((shift + shown) / tick)
            packet.dts = None if packet.dts is None else packet.dts + round((shift + decoded) / tick)

"""Where a file's media begins and ends, whatever its header says."""

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

import av
import av.error
from av.container import InputContainer
from av.stream import Stream as AvStream

from mirasol.errors import BadClip
from mirasol.media.container import (
    ChosenStreams,
    find_index_end,
    get_packet_times,
    is_index_complete,
    is_raw_video,
    open_media,
    read_packets,
)
from mirasol.media.joined.clock import RisingClock
from mirasol.media.joined.parts import Source

# Formats whose headers state the duration; for the others FFmpeg estimates it from the bit rate, so packets are read.
STATED_DURATION = ("mov", "matroska", "avi", "asf", "flv", "wav", "w64", "aiff", "flac")
# Formats whose headers are written by programs that may not know the length yet.
LYING_HEADERS = ("mov", "matroska", "avi", "asf", "flv")
START_TOLERANCE = 1.0  # seconds: beyond encoder delay
LATER_SECONDS = 0.25  # packets that begin later than the header's end by more than this make the header wrong
MOST_REMARKS = 5


@dataclass(frozen=True)
class Span:
    """When a file's media begins and ends, in presentation seconds of the container or, with `shifts`, of its clock.

    zero: where the media timeline begins. measured: the end was found by reading packets, as there is no reliable
    duration in the header. stated: where the header ends the file, if its packets go on for longer. joints: where time
    stamps start over; `shifts` (see `RisingClock`) then moves them to one rising clock. remarks: what else
    begins when, (second, words) pairs. repairs, strays: see `PacketScan`.
    """

    zero: float
    end: float
    measured: bool
    stated: float | None = None
    joints: tuple[float, ...] = ()
    shifts: dict[Hashable, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    remarks: tuple[tuple[float, str], ...] = ()
    repairs: dict[tuple[Hashable, int], tuple[float, float]] = field(default_factory=dict)
    strays: int = 0

    @property
    def seconds(self) -> float:
        return self.end - self.zero

    def make_clock(self) -> RisingClock | None:
        """What moves the times of packets, None if they stay as they are."""
        return RisingClock(self.shifts, self.repairs) if self.shifts or self.repairs else None

    def notes(self) -> list[str]:
        """What the reader has to know about the file's times, one line each."""
        notes = []
        if self.measured:
            notes.append(f"no reliable duration in the header: {self.seconds:.3f} s by reading packets")
        if self.stated is not None:
            notes.append(f"the header says {self.stated - self.zero:.3f} s, but the file holds {self.seconds:.3f} s")
        return notes + self.list_changes()

    def list_changes(self) -> list[str]:
        """Where recordings meet, other streams begin and time stamps are damaged, one line each."""
        notes = []
        if self.joints:
            places = ", ".join(f"{joint - self.zero:.3f}" for joint in self.joints[:5])
            more = f" and {len(self.joints) - 5} more places" if len(self.joints) > 5 else ""
            notes.append(f"time stamps start over at {places} s{more}: joined there on one rising clock")
        replaced = self.strays + len(self.repairs)
        if replaced:
            notes.append(f"{replaced} packets whose times do not fit those around them: timed by their neighbours")
        notes += [f"at {second - self.zero:.3f} s {words}" for second, words in self.remarks[:MOST_REMARKS]]
        if len(self.remarks) > MOST_REMARKS:
            notes.append(f"{len(self.remarks) - MOST_REMARKS} more changes of streams")
        return notes


def find_span(source: Source, until: float = math.inf) -> Span:
    """Where the media timeline begins and ends.

    Zero is the earliest start among the streams that are read; samples of encoder delay, which carry negative times and
    are trimmed away, do not count. The end is what the header says; where it says nothing reliable, or packets follow
    later than that, the end of the last packet. `until`: seconds of the media timeline up to which the file is needed;
    a header that promises as much is believed.

    Raises:
        BadClip: no packet with a time.
    """
    container, chosen = source.container, source.chosen
    zero = min(find_start(stream, container) for stream in chosen.streams)
    end = _find_stated_end(container, chosen, zero)
    if end is not None and end > zero:
        if until > end - zero and _goes_on_after(source, end):
            scan, _ = source.scan()
            if scan.last_begin > end + LATER_SECONDS:
                return Span(zero, scan.end, measured=False, stated=end)
        return Span(zero, end, measured=False)
    scan, remarks = source.scan()
    if scan.repairs or scan.strays or (scan.shifts and abs(zero - scan.begin) > START_TOLERANCE):
        zero = scan.begin  # FFmpeg took the start from another recording, from times before zero, or from damaged ones
    if not math.isfinite(scan.end) or scan.end <= zero:
        raise BadClip(source.path, "contains no media data (cut short?)")
    return Span(
        zero,
        scan.end,
        measured=True,
        joints=scan.joints,
        shifts=scan.shifts,
        remarks=tuple(remarks),
        repairs=scan.repairs,
        strays=scan.strays,
    )


def _goes_on_after(source: Source, end: float) -> bool:
    """Whether packets begin later than the header's end, as far as the index or the packets near that end show."""
    container, chosen = source.container, source.chosen
    kind = container.format.name.split(",")[0]
    if kind not in LYING_HEADERS or container.file is not None:
        return False
    if kind in ("mov", "avi") and all(is_index_complete(stream) for stream in chosen.streams):
        return any(find_index_end(stream) > end + LATER_SECONDS for stream in chosen.streams)
    with open_media(source.path, source.limits) as other:
        for index in (stream.index for stream in chosen.streams):
            stream = other.streams[index]
            try:
                other.seek(math.floor(end / stream.time_base), stream=stream)
            except (av.error.FFmpegError, OSError):
                continue
            for packet in read_packets(other, [stream], []):
                if get_packet_times(packet, float(stream.time_base))[0] > end + LATER_SECONDS:
                    return True
    return False


def find_start(stream: AvStream, container: InputContainer) -> float:
    """When a stream begins, container seconds."""
    if is_raw_video(container):
        return 0.0
    if stream.start_time is not None:
        start = float(stream.start_time * stream.time_base)
    else:
        start = (container.start_time or 0) / av.time_base
    return max(start, 0.0) if stream.type == "audio" else start


def _find_stated_end(container: InputContainer, chosen: ChosenStreams, zero: float) -> float | None:
    if container.format.name.split(",")[0] not in STATED_DURATION or container.duration is None:
        return None
    ends = [_find_stream_end(stream) for stream in chosen.streams]
    if None not in ends:
        return max(ends)
    if abs(zero) > 0.1:
        # Some muxers count the duration from zero, others from the first packet: the header cannot be trusted here.
        return None
    return zero + container.duration / av.time_base


def _find_stream_end(stream: AvStream) -> float | None:
    if stream.duration is None or stream.duration <= 0 or stream.start_time is None:
        return None
    return float((stream.start_time + stream.duration) * stream.time_base)

"""One rising clock for a source whose own may jump, start over or stand still."""

from av.packet import Packet

from mirasol.app.live.chunks import Resume

BACKWARD_SECONDS = 0.5  # decoding times of one stream run backwards by less, if the clock has not jumped
FORWARD_SECONDS = 10.0  # and forwards; streams of one source are not further apart either
SLACK_SECONDS = 1.0  # a gap lasts as long by the source's clock as by the wall's, but for this
SAME_START_SECONDS = 1.0
MOST_STAMPS = 8


class LiveClock:
    """Moves the time stamps of packets so that they never jump.

    A source's own time stamps stay as they are while they run on. A forward jump is a gap where the wall's clock has
    seen the same gap (only of a source that goes on by itself, `live`); any other jump is the clock's, and what follows
    is placed right after what came before, or, after a silence, as much later. Pictures and sound move together.
    """

    def __init__(self, live: bool, resume: Resume | None = None):
        self.live = live
        self.shift = self._shift_before = 0.0
        self.latest: float | None = None  # how far the source has come, on the rising clock
        self.arrived: float | None = None
        self._first_stamps: tuple[float, ...] = ()  # with which connections began
        self._is_first = True
        self.jumps, self.gap_seconds = 0, 0.0
        self.notes: list[str] = []
        self.gaps: list[tuple[float, float]] = []
        self._last: dict[str, float] = {}
        self._silence, self._silence_ended = 0.0, 0.0  # the last long one
        self._resume = resume
        if resume is not None:
            self.shift = self._shift_before = resume.shift
            self.latest, self.arrived = resume.latest, resume.arrived
            self._first_stamps = resume.first_stamps

    def place(self, kind: str, packet: Packet, arrived: float) -> None:
        """Changes the `pts` and `dts` of a packet of a stream of that kind, which came in at that second of the wall's
        clock."""
        tick = float(packet.time_base)
        stamp = packet.dts if packet.dts is not None else packet.pts
        if stamp is None:
            return
        stored = stamp * tick
        self._hear_silence(arrived)
        shift = self._find_shift(kind, stored)
        if self._is_first:
            self._is_first, self._first_stamps = False, (*self._first_stamps[-MOST_STAMPS:], stored)
        placed = stored + shift
        self._last[kind] = placed
        end = placed + (packet.duration or 0) * tick
        self.latest = end if self.latest is None else max(self.latest, end)
        self.arrived = arrived
        if shift:
            moved = round(shift / packet.time_base)
            packet.pts = None if packet.pts is None else packet.pts + moved
            packet.dts = None if packet.dts is None else packet.dts + moved

    def _hear_silence(self, arrived: float) -> None:
        """Notes how long nothing has come. A packet from before may be the first one after it: some are only complete
        when the next one comes."""
        if not self.live or self.arrived is None:
            return
        silence = arrived - self.arrived
        if silence > SLACK_SECONDS:
            self._silence, self._silence_ended = silence, arrived
        elif arrived - self._silence_ended > SLACK_SECONDS:
            self._silence = 0.0

    def _find_shift(self, kind: str, stored: float) -> float:
        if self.latest is None:
            return self.shift
        resume, self._resume = self._resume, None
        starts_over = (
            resume is not None
            and any(abs(stored - first) < SAME_START_SECONDS for first in resume.first_stamps)
            and resume.latest - resume.shift - stored > SAME_START_SECONDS
        )
        last = self._last.get(kind)
        reference, backward = (self.latest, FORWARD_SECONDS) if last is None else (last, BACKWARD_SECONDS)
        # Where the clock has just jumped, the other stream may still send what is older.
        shifts = () if starts_over else {self.shift, self._shift_before}
        fitting = [shift for shift in shifts if -backward <= stored + shift - reference <= FORWARD_SECONDS]
        if not fitting:
            return self._begin_again(stored)
        shift = min(fitting, key=lambda shift: abs(stored + shift - reference))
        self._note_pause(stored + shift)
        return shift

    def _begin_again(self, stored: float) -> float:
        silence = self._silence
        jump = stored + self.shift - self.latest
        self._last.clear()  # the other stream's next packet is as far away
        if self.live and jump > 0 and abs(jump - silence) <= max(SLACK_SECONDS, 0.2 * silence):
            self._add_gap(self.latest, stored + self.shift)
            return self.shift
        pause = silence if silence > SLACK_SECONDS else 0.0
        if pause:
            self._add_gap(self.latest, self.latest + pause)
        self._shift_before, self.shift = self.shift, self.latest + pause - stored
        self.jumps += 1
        self.notes.append(f"the source's clock jumps by {jump:.3f} s: what follows is placed after what came before")
        return self.shift

    def _note_pause(self, placed: float) -> None:
        """Counts a pause of all streams, where the clocks of source and wall have both gone on."""
        if self._silence and placed - self.latest > SLACK_SECONDS:
            self._add_gap(self.latest, placed)

    def _add_gap(self, begin: float, end: float) -> None:
        self.gaps.append((begin, end))
        self.gap_seconds += end - begin
        self._silence = 0.0
        self.notes.append(f"nothing came for {end - begin:.1f} s")

    def make_resume(self, next_chunk: int, zero: float) -> Resume:
        """Where another connection goes on."""
        return Resume(
            next_chunk,
            zero,
            zero if self.latest is None else self.latest,
            self.shift,
            self._first_stamps,
            self.arrived or 0.0,
        )

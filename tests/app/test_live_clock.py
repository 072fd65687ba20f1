"""The rising clock of live sources, packet by packet."""

from dataclasses import dataclass, replace
from fractions import Fraction

import pytest

from mirasol.app.live.clock import LiveClock


@dataclass
class FakePacket:
    """What the clock looks at: time stamps in milliseconds."""

    dts: int | None
    duration: int = 40
    time_base: Fraction = Fraction(1, 1000)

    @property
    def pts(self) -> int | None:
        return self._pts if hasattr(self, "_pts") else self.dts

    @pts.setter
    def pts(self, value: int | None) -> None:
        self._pts = value


def place(clock: LiveClock, stamps, arrivals=None, kind: str = "video") -> list[float]:
    """Where the clock places packets with these seconds, which arrive when their time comes, or when `arrivals` say."""
    placed = []
    for number, stamp in enumerate(stamps):
        packet = FakePacket(round(stamp * 1000))
        clock.place(kind, packet, (stamps if arrivals is None else arrivals)[number])
        placed.append(packet.dts / 1000)
    return placed


def steady(begin: float, end: float) -> list[float]:
    return [begin + 0.04 * k for k in range(round((end - begin) / 0.04))]


def test_time_stamps_that_run_on_stay_as_they_are():
    clock, stamps = LiveClock(live=True), steady(500, 502)
    assert place(clock, stamps) == pytest.approx(stamps)
    assert not clock.notes and not clock.jumps


@pytest.mark.parametrize("jump", [-300.0, -2.0, 300.0])
def test_a_jump_of_one_clock_only_is_taken_out(jump):
    clock, first, then = LiveClock(live=True), steady(500, 502), steady(502, 504)
    place(clock, first)
    assert place(clock, [stamp + jump for stamp in then], then) == pytest.approx(then)
    assert clock.jumps == 1 and not clock.gaps


def test_a_pause_of_both_clocks_is_a_gap():
    for seconds in (3.0, 40.0):
        clock, then = LiveClock(live=True), steady(2 + seconds, 4 + seconds)
        place(clock, steady(0, 2))
        place(clock, [1.97], [2.0], kind="audio")
        assert place(clock, then) == pytest.approx(then)
        assert place(clock, [then[-1]], kind="audio") == pytest.approx([then[-1]])
        assert clock.gaps == [pytest.approx((2.01, 2 + seconds))] and not clock.jumps


def test_a_clock_that_starts_over_after_a_silence_goes_on_that_much_later():
    clock = LiveClock(live=True)
    place(clock, steady(100, 102))
    assert place(clock, steady(0, 1), steady(107, 108)) == pytest.approx(steady(107.04, 108.04), abs=0.05)


def test_both_streams_move_together():
    """The other stream still sends what is older when the clock has jumped."""
    clock, moved = LiveClock(live=True), []
    for stamp in steady(10, 12):
        place(clock, [stamp])
        place(clock, [stamp], kind="audio")
    moved += place(clock, [900.0], [12.0])
    moved += place(clock, [12.0], [12.0], kind="audio")
    moved += place(clock, [900.04], [12.04])
    moved += place(clock, [900.04], [12.04], kind="audio")
    assert moved == pytest.approx([12.0, 12.0, 12.04, 12.04], abs=0.001)
    assert clock.jumps == 1


def test_another_connection_goes_on_or_starts_over():
    clock = LiveClock(live=True)
    place(clock, steady(50, 55), steady(0, 5))
    resume = clock.make_resume(10, 50.0)
    goes_on = LiveClock(live=True, resume=resume)
    assert place(goes_on, steady(57, 58), steady(7, 8)) == pytest.approx(steady(57, 58))
    starts_over = LiveClock(live=True, resume=replace(resume))
    assert place(starts_over, steady(50, 51), steady(7, 8)) == pytest.approx(steady(57.04, 58.04), abs=0.05)


def test_without_time_stamps_nothing_moves():
    clock, packet = LiveClock(live=True), FakePacket(None)
    clock.place("video", packet, 1.0)
    assert packet.dts is None and clock.latest is None

"""Packets in, whole chunks out, in order: each as the offline reader makes it, as soon as it is complete."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from av.packet import Packet

from mirasol.app.live.chunks import REACH_SECONDS, LiveChunk, LiveCounts
from mirasol.app.live.sampling import OpenFrameSampler, OpenWaveform
from mirasol.media.container import get_packet_times
from mirasol.media.timeline import Timeline

AHEAD_SECONDS = 2.0  # beyond the newest packet for which pictures are wanted: no packet reaches that far


@dataclass(frozen=True)
class ChunkPlan:
    """Where chunks begin and end, seconds from where watching begins.

    seconds: of a chunk, if there is no end; edges: all of them, if they are known
    begin: where the first one begins
    """

    seconds: float | None
    edges: tuple[float, ...] | None = None
    begin: float = 0.0

    @property
    def count(self) -> int | None:
        """How many chunks there are; None where nobody knows."""
        return None if self.edges is None else len(self.edges) - 1

    def find_edges(self, number: int) -> tuple[float, float]:
        if self.edges is not None:
            return self.edges[number], self.edges[number + 1]
        return self.begin + number * self.seconds, self.begin + (number + 1) * self.seconds

    def count_until(self, end: float) -> int:
        """How many chunks a source of `end` seconds has: half of one counts, as for files."""
        return self.count if self.edges is not None else max(1, math.floor((end - self.begin) / self.seconds + 0.5))


def take_all(lines: list[str]) -> list[str]:
    """Empties a list to which another thread may add, and returns what was in it."""
    taken = list(lines)
    del lines[: len(taken)]
    return taken


class ChunkAssembler:
    """Makes chunks of what is fed.

    zero: where watching begins, container seconds
    patience: seconds by which one stream may be behind the other
    live: a stream that has been waited for once is not waited for again until it is there
    give: takes each chunk
    """

    def __init__(
        self,
        video: OpenFrameSampler | None,
        audio: OpenWaveform | None,
        plan: ChunkPlan,
        frames_per_chunk: int,
        zero: float,
        patience: float,
        live: bool,
        give: Callable[[LiveChunk], None],
        next_chunk: int = 0,
    ):
        self.video, self.audio, self.plan, self.zero = video, audio, plan, zero
        self.frames_per_chunk, self.patience, self.live, self.give = frames_per_chunk, patience, live, give
        self.next_chunk = self._next_wanted = next_chunk
        self.counts = LiveCounts()
        self.notes: list[str] = []
        self.gaps: list[tuple[float, float]] = []  # in which nothing came, container seconds
        self.arrived = 0.0
        self.has_whole_chunk = False  # since video was left out last
        self._left_out: list[tuple[float, float]] = []  # of video, because decoding is behind; container seconds
        self._newest = -math.inf  # end of the newest packet, container seconds
        self._absent: set[str] = set()
        self._told: set[str] = set()

    @property
    def parts(self) -> dict[str, OpenFrameSampler | OpenWaveform]:
        return {kind: part for kind, part in (("video", self.video), ("audio", self.audio)) if part is not None}

    @property
    def is_complete(self) -> bool:
        """Whether all chunks of a source with an end are given."""
        return self.plan.count is not None and self.next_chunk >= self.plan.count

    def feed(self, kind: str, packet: Packet, arrived: float) -> None:
        """Takes the next packet of a stream, whose times are on the rising clock."""
        begin = self._note_packet(kind, packet, arrived)
        if kind == "video" and self._leaves_out:
            self._left_out[-1] = (self._left_out[-1][0], begin)
        self.parts[kind].feed(packet)
        self._give_complete()

    def leave_out(self, packet: Packet, arrived: float) -> None:
        """Takes the next packet of video, undecoded: chunks are dropped until `feed` gets one."""
        begin = self._note_packet("video", packet, arrived)
        if not self._leaves_out:
            self._left_out.append((begin, math.inf))
            if "lag" not in self._told:
                self._told.add("lag")
                self.notes.append("decoding is slower than the source: chunks are dropped until it has caught up")
        self._left_out[-1] = (min(self._left_out[-1][0], begin), math.inf)
        self.has_whole_chunk = False
        self._give_complete()

    @property
    def _leaves_out(self) -> bool:
        return bool(self._left_out) and self._left_out[-1][1] == math.inf

    def _note_packet(self, kind: str, packet: Packet, arrived: float) -> float:
        """Where the source has come to; returns when the packet begins."""
        self.arrived = arrived
        begin, end = get_packet_times(packet, float(packet.time_base))
        self._newest = max(self._newest, end)
        if end >= self._newest - self.patience:
            self._absent.discard(kind)
        self.counts.packets += 1
        self._want_until(self._newest + AHEAD_SECONDS)
        return begin

    def finish(self, end: float | None = None) -> None:
        """The source has ended, at `end` container seconds, by default with its last packet: gives the rest."""
        end = self._newest if end is None else end
        if not math.isfinite(end):
            return
        count = self.plan.count_until(end - self.zero)
        if self.video is not None:
            self._want_until(math.inf, count)
            self.video.want_only((count - self.next_chunk) * self.frames_per_chunk)
            if self.video.wanted:
                self.video.finish()
        if self.audio is not None:
            self.audio.finish()
        while self.next_chunk < count:
            self._give_next(finished=True, last=self.next_chunk == count - 1)

    def _want_until(self, second: float, count: int | None = None) -> None:
        """Pictures are wanted for all chunks that begin before that container second."""
        most = self.plan.count if count is None else count
        while self.video is not None and (most is None or self._next_wanted < most):
            left, right = self.plan.find_edges(self._next_wanted)
            if self.zero + left > second:
                break
            times = Timeline(left, right, (left, right), self.frames_per_chunk).frame_times[0]
            self.video.want([self.zero + time for time in times])
            self._next_wanted += 1

    def _give_complete(self) -> None:
        while not self.is_complete:
            left, right = self.plan.find_edges(self.next_chunk)
            waiting = self._list_waiting(self.zero + right) - self._absent
            if self._overlaps_left_out(self.zero + left, self.zero + right):
                waiting = set()
            if waiting and self._newest <= self.zero + right + self.patience:
                return
            if waiting:
                self._give_up(waiting, right)
            elif self._newest < self.zero + right:
                return
            self._give_next(finished=False, last=self.plan.count == self.next_chunk + 1)

    def _list_waiting(self, right: float) -> set[str]:
        """Kinds of streams that may still have something for the chunk that ends at that container second."""
        waiting = set()
        if self.video is not None and self.video.num_ready < self.frames_per_chunk:
            waiting.add("video")
        if self.audio is not None and self.audio.reached < right + REACH_SECONDS:
            waiting.add("audio")
        return waiting

    def _overlaps_left_out(self, begin: float, end: float) -> bool:
        return any(first < end and begin < last for first, last in self._left_out)

    def _give_up(self, kinds: set[str], second: float) -> None:
        for kind in kinds - self._told:
            self._told.add(kind)
            self.notes.append(f"at {second:.3f} s: no {kind} for {self.patience:g} s: going on without it")
        if self.live:
            self._absent |= kinds

    def _give_next(self, finished: bool, last: bool = False) -> None:
        """Gives a chunk; of the `last` one, what sounds after it is not heard, as in a file."""
        left, right = self.plan.find_edges(self.next_chunk)
        begin, end = self.zero + left, self.zero + right
        frames, times, has_video = self._take_video(begin, end, finished)
        waveform, waveform_start, has_audio = np.zeros(0, np.float32), begin, False
        if self.audio is not None:
            has_audio = self.audio.has_sound(begin, end)
            waveform, waveform_start = self.audio.take(begin, end, ends=last)
            self.counts.late_samples += self.audio.late_samples
            self.audio.late_samples = 0
        timeline = Timeline(left, right, (left, right), self.frames_per_chunk)
        self.counts.chunks += 1
        self.counts.empty += not (has_video or has_audio)
        chunk = LiveChunk(
            number=self.next_chunk,
            timeline=timeline,
            source_start=begin,
            frames=frames if has_video else frames[:0],
            frame_times=times - self.zero if has_video else times[:0],
            waveform=waveform if has_audio else waveform[:0],
            waveform_start=waveform_start - self.zero,
            has_video=has_video,
            has_audio=has_audio,
            arrived=self.arrived,
            missing="" if has_video or has_audio else "nothing came",
        )
        self.next_chunk += 1
        if self._overlaps_left_out(begin, end):
            chunk = chunk.drop()
            self.counts.undecoded += 1
        else:
            self.has_whole_chunk = True
        self._left_out = [span for span in self._left_out if span[1] > end]
        self.give(chunk)

    def _take_video(self, begin: float, end: float, finished: bool) -> tuple[np.ndarray, np.ndarray, bool]:
        video, count = self.video, self.frames_per_chunk
        if video is None:
            return np.zeros((0, 3, 1, 1), np.uint8), np.zeros(0), False
        decided = video.num_ready >= count
        if not decided:
            video.hold(count)
        shown = video.is_shown_between(begin, end)
        if not finished and not decided:
            shown = shown and video.last_end is not None and begin < video.last_end
        if any(first <= begin and end <= last for first, last in self.gaps):
            shown = False
        frames, times = video.take(count)
        return frames, times, shown and len(frames) > 0

    def break_off(self) -> None:
        """The connection is gone: gives the chunk in progress if more than half of it is there."""
        if not math.isfinite(self._newest):
            return
        left, right = self.plan.find_edges(self.next_chunk)
        for part in self.parts.values():
            if part is self.audio or part.wanted:
                part.finish()
        if self._newest - self.zero >= (left + right) / 2:
            self._give_next(finished=False)

    def list_news(self) -> list[str]:
        """What has happened since the last time, one line each."""
        return take_all(self.notes) + (take_all(self.video.size_changes) if self.video is not None else [])

"""One pass over one window of an open file, and what it found."""

import math
import os

import av.error
import torch
from av.container import InputContainer

from mirasol.errors import BadClip
from mirasol.media.audio import WaveformBuilder
from mirasol.media.clip import AudioCounts, Clip, VideoCounts
from mirasol.media.container import Chosen, Span, missing_bytes, packet_span, packets
from mirasol.media.limits import Limits
from mirasol.media.timeline import Timeline
from mirasol.media.video import FrameSampler

COVER_SECONDS = 0.25  # may be missing at the end of a window before the file counts as cut short
NOTED_SECONDS = 0.010  # streams that begin or end by less than this apart are as good as together
# Decoders need some sound before the first sample that is right (Opus asks for 80 ms), so a seek aims earlier; if it
# lands too late all the same, or where no picture can be decoded alone, it aims earlier still.
SEEK_RETREATS = (0.15, 10.0, 120.0)
INTERLEAVING_SECONDS = 10.0  # how far one stream of a file may run ahead of the other


class Reading:
    """Reads the window of `timeline` from an open container. Times inside are the container's own, in seconds."""

    def __init__(
        self, path: str | os.PathLike, container: InputContainer, chosen: Chosen, span: Span, timeline: Timeline
    ):
        self.path, self.container, self.chosen = path, container, chosen
        self.span, self.timeline = span, timeline
        self.start, self.end = span.zero + timeline.start, span.zero + timeline.end
        self.video: FrameSampler | None = None
        self.audio: WaveformBuilder | None = None
        self.errors: list[str] = []
        self.at_end_of_file = False

    def add_video(self, image_size: int, fit: str, limits: Limits) -> None:
        wanted = [self.span.zero + time for times in self.timeline.frame_times for time in times]
        self.video = FrameSampler(self.path, self.chosen.video, wanted, image_size, fit, limits)

    def add_audio(self, sample_rate: int) -> None:
        last_edge = self.span.zero + self.timeline.edges[-1]
        self.audio = WaveformBuilder(self.chosen.audio, self.start, last_edge, sample_rate)

    @property
    def parts(self) -> list[FrameSampler | WaveformBuilder]:
        return [part for part in (self.video, self.audio) if part is not None]

    @property
    def packets_end(self) -> float:
        return max(part.packets_end for part in self.parts)

    def run(self) -> None:
        """Feeds both streams until they have what they need, or the file has passed the window."""
        parts = {part.stream.index: part for part in self.parts}
        far = self.end + INTERLEAVING_SECONDS
        for packet in packets(self.container, self.chosen.streams, self.errors):
            part = parts[packet.stream_index]
            part.feed(packet)
            if part.latest > far or (part.done and all(part.done for part in parts.values())):
                break
        else:
            self.at_end_of_file = True
        for part in parts.values():
            part.finish()

    def seek(self) -> bool:
        """Goes to where decoding has to begin; False where that cannot be found and the file has to be opened anew."""
        stream = self.chosen.streams[0]
        first = self.start if self.video is None else min(self.start, self.video.wanted[0])
        if first - SEEK_RETREATS[0] <= self.span.zero:
            return True  # the beginning of the file, where it stands
        for retreat in SEEK_RETREATS:
            if first - retreat <= self.span.zero:
                return False
            target = math.floor((first - retreat) / stream.time_base)
            try:
                self.container.seek(target, stream=stream)
                if self._starts_early_enough():
                    self.container.seek(target, stream=stream)
                    return True
            except (av.error.FFmpegError, OSError):
                continue
        return False

    def _starts_early_enough(self) -> bool:
        """Whether what comes next in the file has a keyframe before the first frame and sound before the window."""
        waiting = {stream.index: stream for stream in self.chosen.streams}
        for packet in packets(self.container, self.chosen.streams, []):
            time, _ = packet_span(packet, float(packet.time_base))
            if time > self.start + INTERLEAVING_SECONDS:
                break
            stream = waiting.get(packet.stream_index)
            if stream is None or (stream.type == "video" and not packet.is_keyframe):
                continue
            begins = float((stream.start_time or 0) * stream.time_base)
            if time > max(self.video.wanted[0] if stream.type == "video" else self.start, begins):
                return False
            del waiting[packet.stream_index]
            if not waiting:
                return True
        # A sound track that had ended before is no reason to go further back.
        return self.video is None or self.chosen.video.index not in waiting

    def check(self) -> None:
        """Refuses a window that the file does not hold.

        Raises:
            BadClip: the file ends early, or what it holds does not decode.
        """
        size = os.path.getsize(self.path)
        lost = self.container.format.name.startswith("mov") and any(
            missing_bytes(stream, size, self.start, self.end) for stream in self.chosen.streams
        )
        slack = COVER_SECONDS if self.video is None else max(COVER_SECONDS, 2 * self.video.largest_step)
        short = self.at_end_of_file and self.packets_end < self.end - slack
        single = self.video is not None and self.video.packets_fed == 1 and self.audio is None
        if lost or (short and (self.errors or not single)):
            raise BadClip(self.path, f"cut short: {self._held()}{self._error_words()}")
        for part, name in ((self.video, "video"), (self.audio, "audio")):
            if part is None:
                continue
            decoded = part.last_end if part.last_end is not None else -math.inf
            if part.incomplete and decoded < min(part.packets_end, self.end) - slack and part.packets_end > self.start:
                raise BadClip(self.path, f"its {name} cannot be decoded: {self._decoded(part)}{self._error_words()}")

    def _held(self) -> str:
        held = max(0.0, self.packets_end - self.span.zero)
        return f"holds data for {held:.3f} s, but {self.timeline.start:g} to {self.timeline.end:.3f} s were asked for"

    def _decoded(self, part: FrameSampler | WaveformBuilder) -> str:
        failed = f", {part.counts.packets_failed} packets failed" if part.counts.packets_failed else ""
        if part.last_end is None:
            return f"nothing of {self.timeline.start:g} to {self.timeline.end:.3f} s{failed}"
        return f"only to {part.last_end - self.span.zero:.3f} of {self.timeline.end:.3f} s{failed}"

    def _error_words(self) -> str:
        return f" ({self.errors[0]})" if self.errors else ""

    def notes(self) -> list[str]:
        """One line for every irregularity met in this window."""
        notes = [f"reading stopped early: {error}" for error in self.errors]
        if self.video is not None:
            notes += self._video_notes(self.video)
        if self.audio is not None:
            notes += self._audio_notes(self.audio)
        return notes

    def _video_notes(self, video: FrameSampler) -> list[str]:
        counts = video.counts
        if video.first_time is None:
            return ["video has no frame in this window"]
        notes = []
        late = video.first_time - self.start
        early = sum(time < video.first_time for time in video.wanted)
        if late > NOTED_SECONDS and early:
            notes.append(f"video begins {late * 1000:.0f} ms late: {early} frames show its first frame")
        if not video.cut_off and self.end - video.last_end > NOTED_SECONDS:
            held = sum(time >= video.last_end for time in video.wanted)
            notes.append(
                f"video ends {(self.end - video.last_end) * 1000:.0f} ms early: {held} frames show its last frame"
            )
        repeats = int((video.times[1:] == video.times[:-1]).sum())
        if repeats:
            notes.append(
                f"{repeats} of {len(video.times)} frames repeat the one before: the video has no newer frame then"
            )
        if video.orientation is not None and video.orientation.words != "0 degrees":
            notes.append(f"rotation applied: {video.orientation.words}")
        if video.oblique:
            notes.append("rotation is not a multiple of 90 degrees: the nearest multiple is applied")
        if (video.stream.sample_aspect_ratio or 1) != 1:
            notes.append(f"sample aspect ratio {video.stream.sample_aspect_ratio} applied")
        return notes + _counted(
            (counts.packets_failed, "video packets could not be decoded"),
            (counts.frames_corrupt, "frames decoded with errors, which may spread to those that follow"),
            (counts.frames_out_of_order, "video frames dropped: their time does not follow the one before"),
        )

    def _audio_notes(self, audio: WaveformBuilder) -> list[str]:
        counts = audio.counts
        waveform, begins = audio.result()
        if not len(waveform):
            return ["audio has no sample in this window"]
        notes = []
        late = begins - self.start
        early = min(self.end, audio.end) - (begins + len(waveform) / audio.sample_rate)
        if late > NOTED_SECONDS:
            notes.append(f"audio begins {late * 1000:.0f} ms late")
        if early > NOTED_SECONDS:
            notes.append(f"audio ends {early * 1000:.0f} ms early")
        if counts.gaps:
            notes.append(f"{counts.gaps} gaps in the audio, {counts.gap_seconds * 1000:.0f} ms, are silence")
        if audio.mixed_from:
            notes.append(f"audio of {audio.mixed_from} mixed to one")
        return notes + _counted(
            (counts.overlaps, "audio packets overlap the one before: the later one counts"),
            (counts.jitters, "times the audio's time stamps jumped and came back: taken as continuous"),
            (counts.changes, "changes of the audio format on the way"),
            (counts.packets_failed, "audio packets could not be decoded"),
        )

    def clip(self, image_size: int, sample_rate: int, notes: tuple[str, ...]) -> Clip:
        chunks, zero = self.timeline.num_chunks, self.span.zero
        frames, times = (
            torch.zeros(0, 3, image_size, image_size, dtype=torch.uint8),
            torch.zeros(0, dtype=torch.float64),
        )
        waveform, waveform_start = torch.zeros(0), self.start
        audio_present = video_present = torch.zeros(chunks, dtype=torch.bool)
        if self.video is not None and self.video.first_time is not None:
            frames, times = self.video.frames, self.video.times - zero
            edges = [edge + zero for edge in self.timeline.edges]
            video_present = torch.tensor([self.video.shown_between(*edges[t : t + 2]) for t in range(chunks)])
        if self.audio is not None:
            waveform, waveform_start = self.audio.result()
            audio_present = self.audio.present(self.timeline, zero)
        return Clip(
            frames=frames,
            frame_times=times,
            waveform=waveform,
            waveform_start=waveform_start - zero,
            sample_rate=sample_rate,
            timeline=self.timeline,
            audio_present=audio_present,
            video_present=video_present,
            notes=notes,
            video_counts=self.video.counts if self.video is not None else VideoCounts(),
            audio_counts=self.audio.counts if self.audio is not None else AudioCounts(),
        )


def _counted(*items: tuple[int, str]) -> list[str]:
    return [f"{count} {words}" for count, words in items if count]

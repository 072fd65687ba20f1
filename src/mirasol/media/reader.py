"""Media file → `Clip`: one pass over the file, video and audio together. docs/media.md lists every behaviour."""

import itertools
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import av.error
import numpy as np
from av.container import InputContainer
from av.stream import Stream as AvStream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from mirasol.config.media import FITS
from mirasol.errors import BadClip, UserError
from mirasol.media.audio import WaveformBuilder
from mirasol.media.container import (
    RAW_RATE,
    ChosenStreams,
    find_index_end,
    get_format_name,
    get_packet_times,
    is_index_complete,
    is_raw_video,
    lacks_bytes,
    read_packets,
)
from mirasol.media.decoded import AudioCounts, DecodedWindow, VideoCounts
from mirasol.media.joined.clock import RisingClock
from mirasol.media.joined.parts import Source, open_source
from mirasol.media.limits import DEFAULT_LIMITS, Limits
from mirasol.media.span import Span, find_span
from mirasol.media.timeline import ChunkGrid, Timeline, cut_into_chunks, describe_cut
from mirasol.media.video import FrameSampler, read_orientation

if TYPE_CHECKING:
    from mirasol.media.clip import Clip

COVER_SECONDS = 0.25  # may be missing at the end of a window before the file counts as cut short
NOTED_SECONDS = 0.010  # streams that begin or end by less than this apart are as good as together
# Decoders need some sound before the first sample that is right (Opus asks for 80 ms), so a seek aims earlier; if it
# lands too late all the same, or where no picture can be decoded alone, it aims earlier still.
SEEK_RETREATS = (0.15, 10.0, 120.0)


class Reading:
    """Reads the window of `timeline` from an open container. Times inside are the container's own, in seconds."""

    def __init__(self, source: Source, span: Span, timeline: Timeline):
        self.path, self.source = source.path, source
        self.span, self.timeline = span, timeline
        self.start, self.end = span.zero + timeline.start, span.zero + timeline.end
        self.video: FrameSampler | None = None
        self.audio: WaveformBuilder | None = None
        self.errors: list[str] = []
        self.at_end_of_file = False

    @property
    def container(self) -> InputContainer:
        return self.source.container

    @property
    def chosen(self) -> ChosenStreams:
        return self.source.chosen

    def add_video(self, image_size: int, fit: str, limits: Limits) -> None:
        wanted = [self.span.zero + time for times in self.timeline.frame_times for time in times]
        raw = is_raw_video(self.container)
        self.video = FrameSampler(self.path, self.chosen.video, wanted, image_size, fit, limits, count_frames=raw)

    def add_audio(self, sample_rate: int) -> None:
        last_edge = self.span.zero + self.timeline.edges[-1]
        self.audio = WaveformBuilder(self.chosen.audio, self.start, last_edge, sample_rate, self.span.joints)

    @property
    def parts(self) -> list[FrameSampler | WaveformBuilder]:
        return [part for part in (self.video, self.audio) if part is not None]

    @property
    def packets_end(self) -> float:
        return max(part.packets_end for part in self.parts)

    def run(self) -> None:
        """Feeds both streams until they have what they need, however far apart they are in the file, or to its end."""
        clock = self.span.make_clock()
        for number, (container, chosen) in enumerate(self.source.open_parts()):
            if number:
                self._go_on_with(chosen)
            if self._feed_packets(container, chosen, clock):
                break
        else:
            self.at_end_of_file = True
        for part in self.parts:
            part.finish()

    def _go_on_with(self, chosen: ChosenStreams) -> None:
        if self.video is not None and chosen.video is not None:
            self.video.change_stream(chosen.video)
        if self.audio is not None and chosen.audio is not None:
            self.audio.change_stream(chosen.audio)

    def _feed_packets(self, container: InputContainer, chosen: ChosenStreams, clock: RisingClock | None) -> bool:
        """Feeds the packets of a part of the file; returns whether all is there that is needed."""
        pairs = ((chosen.video, self.video), (chosen.audio, self.audio))
        parts = {stream.index: part for stream, part in pairs if stream is not None and part is not None}
        for packet in read_packets(container, chosen.streams, self.errors, clock):
            part = parts.get(packet.stream_index)
            if part is None:
                continue
            part.feed(packet)
            if part.done and all(part.done for part in self.parts):
                return True
        return False

    def seek(self) -> bool:
        """Goes to where decoding has to begin; False if no such place is found and the file has to be reopened."""
        if self.span.shifts or self.span.repairs or len(self.source.parts) > 1:
            return True  # which time stamps are meant depends on all packets before them: read from the beginning
        if self.container.format.name == "avi" and not all(map(is_index_complete, self.chosen.streams)):
            return True  # FFmpeg 8 miscounts frames after a seek in AVI files with empty ones
        if self.container.format.name == "mpeg" or is_raw_video(self.container):
            return True  # many frames have no time of their own, and FFmpeg guesses others after a seek
        if self.container.format.name == "apng":
            return True  # pictures change those before them, and FFmpeg finds no place to begin at
        stream = self.chosen.streams[0]
        first = self.start if self.video is None else min(self.start, self.video.wanted[0])
        if first - SEEK_RETREATS[0] <= self.span.zero:
            return True  # the beginning of the file, where it is
        for retreat in SEEK_RETREATS:
            if first - retreat <= self.span.zero:
                return False
            target = math.floor((first - retreat) / stream.time_base)
            try:
                self.container.seek(target, stream=stream)
                starts = self._starts_early_enough()
                if starts:
                    self.container.seek(target, stream=stream)
                    return True
                if starts is None:
                    return False
            except (av.error.FFmpegError, OSError):
                continue
        return False

    def _starts_early_enough(self) -> bool | None:
        """Whether what follows in the file has a keyframe before the first frame and sound before the window.

        None if there is no sound in the rest of the file although there may be before: it may all be at the beginning.
        """
        waiting = {stream.index: stream for stream in self.chosen.streams if not self._has_ended(stream)}
        for packet in read_packets(self.container, self.chosen.streams, []):
            stream = waiting.get(packet.stream_index)
            if stream is None or (stream.type == "video" and not packet.is_keyframe):
                continue
            if packet.pts is None:
                return False  # decoding order gives the times, so it has to be known from the beginning
            time, _ = get_packet_times(packet, float(packet.time_base))
            begins = float((stream.start_time or 0) * stream.time_base)
            if time > max(self.video.wanted[0] if stream.type == "video" else self.start, begins):
                return False
            del waiting[packet.stream_index]
            if not waiting:
                return True
        if self.audio is not None and self.chosen.audio.index in waiting:
            return None
        return not waiting

    def _has_ended(self, stream: AvStream) -> bool:
        """Whether the container's index shows that a sound track ends before the window."""
        if stream.type != "audio" or not is_index_complete(stream) or not self.container.format.name.startswith("mov"):
            return False
        return find_index_end(stream) < self.start - SEEK_RETREATS[0]

    def check(self) -> None:
        """Refuses a window that the file does not hold.

        Raises:
            BadClip: the file ends early, or what it holds does not decode.
        """
        size = os.path.getsize(self.path)
        lost = self.container.format.name.startswith("mov") and any(
            lacks_bytes(stream, size, self.start, self.end) for stream in self.chosen.streams
        )
        slack = COVER_SECONDS if self.video is None else max(COVER_SECONDS, 2 * self.video.largest_step)
        short = self.at_end_of_file and self.packets_end < self.end - slack
        single = self.video is not None and self.video.packets_fed == 1 and self.audio is None
        if lost or (short and (self.errors or not single)):
            raise BadClip(self.path, f"cut short: {self._describe_held()}{self._describe_errors()}")
        for part, name in ((self.video, "video"), (self.audio, "audio")):
            if part is None:
                continue
            decoded = part.last_end if part.last_end is not None else -math.inf
            if part.incomplete and decoded < min(part.packets_end, self.end) - slack and part.packets_end > self.start:
                raise BadClip(
                    self.path, f"its {name} cannot be decoded: {self._describe_decoded(part)}{self._describe_errors()}"
                )

    def _describe_held(self) -> str:
        held = max(0.0, self.packets_end - self.span.zero)
        return f"holds data for {held:.3f} s, but {self.timeline.start:g} to {self.timeline.end:.3f} s were requested"

    def _describe_decoded(self, part: FrameSampler | WaveformBuilder) -> str:
        failed = f", {part.counts.packets_failed} packets failed" if part.counts.packets_failed else ""
        if part.last_end is None:
            return f"nothing of {self.timeline.start:g} to {self.timeline.end:.3f} s{failed}"
        return f"only to {part.last_end - self.span.zero:.3f} of {self.timeline.end:.3f} s{failed}"

    def _describe_errors(self) -> str:
        return f" ({self.errors[0]})" if self.errors else ""

    def notes(self) -> list[str]:
        """One line for every irregularity met in this window."""
        notes = [f"reading stopped early: {error}" for error in self.errors]
        if self.video is not None:
            notes += self._list_video_notes(self.video)
        if self.audio is not None:
            notes += self._list_audio_notes(self.audio)
        return notes

    def _list_video_notes(self, video: FrameSampler) -> list[str]:
        counts = video.counts
        if video.first_time is None:
            return ["video has no frame in this window"]
        if video.first_time >= self.end:
            first = video.first_time - self.span.zero
            return [f"video has no frame in this window: its first one, of {first:.3f} s, is shown"]
        notes = []
        late = video.first_time - self.start
        early = sum(time < video.first_time for time in video.wanted)
        if late > NOTED_SECONDS and early:
            notes.append(f"video begins {late * 1000:.0f} ms late: {early} frames show its first frame")
        if not video.cut_off and self.end - video.last_end > NOTED_SECONDS:
            held = sum(time >= video.last_end for time in video.wanted)
            what = f": {held} frames show its last frame" if held else ""
            notes.append(f"video ends {(self.end - video.last_end) * 1000:.0f} ms early{what}")
        repeats = int((video.times[1:] == video.times[:-1]).sum())
        if repeats:
            notes.append(
                f"{repeats} of {len(video.times)} frames repeat the one before: the video has no newer frame then"
            )
        if video.orientation is not None and video.orientation.words != "0 degrees":
            notes.append(f"rotation applied: {video.orientation.words}")
        if video.oblique:
            notes.append("rotation is not a multiple of 90 degrees: the nearest multiple is applied")
        if video.aspect != 1:
            notes.append(f"sample aspect ratio {video.aspect} applied")
        if video.transfer:
            notes.append(
                f"high dynamic range ({video.transfer}) mapped to standard: white is 203 cd/m2, brighter is cut off"
            )
        if counts.frames_interlaced:
            notes.append(f"{counts.frames_interlaced} interlaced frames: both fields are shown in one picture")
        if counts.frames_transparent:
            notes.append(f"{counts.frames_transparent} frames with transparent parts: shown on black")
        if counts.frames_untimed:
            notes.append("the video has no presentation times: frames are timed by the order of decoding")
        return notes + _list_counts(
            (counts.packets_failed, "video packets could not be decoded"),
            (counts.frames_corrupt, "frames decoded with errors, which may spread to those that follow"),
            (counts.frames_out_of_order, "video frames dropped: their time does not follow the one before"),
        )

    def _list_audio_notes(self, audio: WaveformBuilder) -> list[str]:
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
            notes.append(f"audio of {audio.mixed_from} mixed to one{audio.mixing}")
        return notes + _list_counts(
            (counts.overlaps, "audio packets overlap the one before: the later one counts"),
            (counts.jitters, "times the audio's time stamps jumped and came back: taken as continuous"),
            (counts.changes, "changes of the audio format within the window"),
            (counts.packets_failed, "audio packets could not be decoded"),
        )

    def clip(self, image_size: int, sample_rate: int, notes: tuple[str, ...]) -> DecodedWindow:
        chunks, zero = self.timeline.num_chunks, self.span.zero
        frames, times = np.zeros((0, 3, image_size, image_size), np.uint8), np.zeros(0)
        waveform, waveform_start = np.zeros(0, np.float32), self.start
        audio_present = video_present = np.zeros(chunks, bool)
        if self.video is not None and self.video.first_time is not None:
            frames, times = self.video.frames, self.video.times - zero
            edges = [edge + zero for edge in self.timeline.edges]
            video_present = np.array([self.video.is_shown_between(*edges[t : t + 2]) for t in range(chunks)])
        if self.audio is not None:
            waveform, waveform_start = self.audio.result()
            audio_present = self.audio.find_present(self.timeline, zero)
        return DecodedWindow(
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


def _list_counts(*items: tuple[int, str]) -> list[str]:
    return [f"{count} {words}" for count, words in items if count]


END_TOLERANCE = 0.5  # seconds by which a window may reach past the end: annotations are rounded


@dataclass(frozen=True)
class VideoInfo:
    """Facts of the video stream that is read. Sizes in pixels as stored; `display_size` is (width, height) as shown."""

    index: int
    codec: str
    width: int
    height: int
    display_size: tuple[int, int]
    rotation: str
    sample_aspect_ratio: float
    average_rate: float | None


@dataclass(frozen=True)
class AudioInfo:
    """Facts of the audio stream that is read; `sample_rate` in Hz."""

    index: int
    codec: str
    sample_rate: int
    channels: int
    layout: str


@dataclass(frozen=True)
class MediaInfo:
    """What a media file holds.

    `duration` in seconds: from the header, unless it was found by reading packets (`duration_measured`), or the file
    goes on for longer than its header says (`stated` seconds). `changes`: those notes that say where recordings meet,
    other streams begin or time stamps are damaged.
    """

    file: str
    bytes: int
    container: str
    duration: float
    duration_measured: bool
    video: VideoInfo | None
    audio: AudioInfo | None
    num_streams: int
    notes: tuple[str, ...]
    stated: float | None = None
    changes: tuple[str, ...] = ()


def probe_seconds(path: str | os.PathLike, limits: Limits = DEFAULT_LIMITS) -> float:
    """A media file's length in seconds, as `probe_media` has it; nothing is decoded. Raises BadClip."""
    with open_source(path, limits) as source:
        return find_span(source).seconds


def probe_media(path: str | os.PathLike, limits: Limits = DEFAULT_LIMITS) -> MediaInfo:
    """Facts of a media file.

    Decodes one frame (only that shows the rotation); without a reliable duration in the header reads all packets.

    Raises:
        BadClip: the file cannot be used.
    """
    with open_source(path, limits) as source:
        container, chosen = source.container, source.chosen
        span = find_span(source)
        notes = [*source.notes, *span.notes()]
        return MediaInfo(
            file=str(path),
            bytes=os.path.getsize(path),
            container=get_format_name(container),
            duration=span.seconds,
            duration_measured=span.measured,
            video=_read_video_info(container, chosen, path) if chosen.video is not None else None,
            audio=_read_audio_info(chosen) if chosen.audio is not None else None,
            num_streams=len(container.streams),
            notes=tuple(notes),
            stated=None if span.stated is None else span.stated - span.zero,
            changes=(*span.list_changes(), *source.losses),
        )


def _read_video_info(container: InputContainer, chosen: ChosenStreams, path: str | os.PathLike) -> VideoInfo:
    stream = chosen.video
    codec = stream.codec_context
    turn, _ = read_orientation(_decode_first_frame(container, stream, path))
    aspect = float(stream.sample_aspect_ratio or 1) or 1.0
    rate = (codec.framerate or RAW_RATE) if is_raw_video(container) else stream.average_rate
    shown = (round(codec.width * aspect), codec.height)
    return VideoInfo(
        index=stream.index,
        codec="webp" if get_format_name(container) == "webp" else codec.name,
        width=codec.width,
        height=codec.height,
        display_size=shown[::-1] if turn.transpose else shown,
        rotation=turn.words,
        sample_aspect_ratio=aspect,
        average_rate=float(rate) if rate else None,
    )


def _decode_first_frame(container: InputContainer, stream: VideoStream, path: str | os.PathLike) -> VideoFrame:
    for packet in itertools.chain(read_packets(container, [stream], []), [None]):
        try:
            frames = stream.codec_context.decode(packet)
        except av.error.FFmpegError:
            continue  # a later packet may decode
        if frames:
            return frames[0]
    raise BadClip(path, "no frame of its video can be decoded")


def _read_audio_info(chosen: ChosenStreams) -> AudioInfo:
    codec = chosen.audio.codec_context
    return AudioInfo(chosen.audio.index, codec.name, codec.sample_rate, codec.layout.nb_channels, codec.layout.name)


def read_clip(
    path: str | os.PathLike,
    grid: ChunkGrid,
    *,
    image_size: int,
    sample_rate: int = 16_000,
    start: float | None = None,
    end: float | None = None,
    fit: str = "pad",
    limits: Limits = DEFAULT_LIMITS,
    threads: int = 0,
) -> "Clip":
    """Reads a media file, or its window [start, end) seconds, for one chunk grid.

    `image_size`: side of the square frames in pixels; `fit` pads a picture to a square, crops or stretches it.
    `sample_rate`: Hz of the mono waveform. Second 0 is the earliest start of the streams that are read. Reading
    seeks to a window; frames that are not wanted are not kept. `threads`: decoding threads, 0 lets
    FFmpeg choose; 1 is right in loader workers.

    Decodes in this process, which a damaged file may crash: `MirasolFeatureExtractor.read` decodes in another one.

    Raises:
        BadClip: the file cannot be used, or does not hold the window.
        UserError: a setting is impossible.
    """
    from mirasol.media.clip import Clip

    return Clip.from_decoded(
        read_window(
            path,
            grid,
            image_size=image_size,
            sample_rate=sample_rate,
            start=start,
            end=end,
            fit=fit,
            limits=limits,
            threads=threads,
        )
    )


def read_window(
    path: str | os.PathLike,
    grid: ChunkGrid,
    *,
    image_size: int,
    sample_rate: int = 16_000,
    start: float | None = None,
    end: float | None = None,
    fit: str = "pad",
    limits: Limits = DEFAULT_LIMITS,
    threads: int = 0,
) -> DecodedWindow:
    """What `read_clip` makes a `Clip` of; needs no torch."""
    if fit not in FITS:
        raise UserError(f"fit={fit!r}: choose {', '.join(FITS)}")
    if image_size < 1 or sample_rate < 1:
        raise UserError(f"image_size={image_size} and sample_rate={sample_rate} must be positive")
    with open_source(path, limits, threads) as source:
        span = find_span(source, math.inf if end is None else float(end))
        left, right, notes = check_window(path, span, start, end)
        limits.check_seconds(path, right - left)
        timeline = cut_into_chunks(left, right, grid)
        for seek in (True, False):
            reading = Reading(source, span, timeline)
            if "video" in source.kinds:
                reading.add_video(image_size, fit, limits)
            if "audio" in source.kinds:
                reading.add_audio(sample_rate)
            if not seek or reading.seek():
                break
            source.reopen()  # no place to begin inside the file: read it from its beginning
        reading.run()
        reading.check()
        notes = [*source.notes, *span.notes(), *notes, *describe_cut(timeline, grid), *reading.notes()]
        return reading.clip(image_size, sample_rate, tuple(notes))


def check_window(
    path: str | os.PathLike, span: Span, start: float | None, end: float | None
) -> tuple[float, float, list[str]]:
    """The window in seconds of the media timeline, checked against the file's length."""
    length = span.seconds
    left, right = 0.0 if start is None else float(start), length if end is None else float(end)
    if not (math.isfinite(left) and math.isfinite(right)) or left < 0:
        raise BadClip(path, f"window {left:g} to {right:g} s: start and end must be numbers from 0 on")
    if left >= length:
        raise BadClip(path, f"window starts at {left:g} s, but the file lasts {length:.3f} s")
    if right <= left:
        raise BadClip(path, f"window {left:g} to {right:g} s has no length: end must be after start")
    if right > length + END_TOLERANCE:
        raise BadClip(path, f"window ends at {right:g} s, but the file lasts {length:.3f} s")
    if right > length:
        return left, length, [f"window end {right:g} s is past the end: read to {length:.3f} s"]
    return left, right, []

"""Media file → `Clip`: one pass over the file, video and audio together. docs/media.md lists every behaviour."""

import math
import os
from dataclasses import dataclass

import torch
from av.container import InputContainer
from av.stream import Stream as AvStream

from mirasol.errors import BadClip, UserError
from mirasol.media.audio_stream import AudioCounts, WaveformBuilder
from mirasol.media.clip import Clip
from mirasol.media.container import Chosen, Span, choose, find_span, missing_bytes, open_media, packet_time, packets
from mirasol.media.limits import Limits
from mirasol.media.timeline import ChunkGrid, Timeline, cut, cutting_notes
from mirasol.media.video_stream import Fit, FrameSampler, VideoCounts, fitted_size, orientation

END_TOLERANCE = 0.5  # seconds by which a window may reach past the end: annotations are rounded
COVER_TOLERANCE = 0.25  # seconds that may be missing at the end of a window before a file counts as cut short
NOTED_SECONDS = 0.010  # a stream that begins or ends by less than this apart from the other is not worth a note
# Decoders need some sound before the first sample that is right (Opus asks for 80 ms), so a seek aims earlier.
PREROLL_SECONDS = 0.15
SEEK_RETREATS = (PREROLL_SECONDS, 10.0, 120.0)


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
    """What a media file holds. `duration` in seconds, from the header unless `duration_measured`."""

    file: str
    bytes: int
    container: str
    duration: float
    duration_measured: bool
    video: VideoInfo | None
    audio: AudioInfo | None
    num_streams: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ReadCounts:
    """How much work one reading took; none where the clip has no such stream."""

    video: VideoCounts | None
    audio: AudioCounts | None


def probe(path: str | os.PathLike, limits: Limits | None = None) -> MediaInfo:
    """Facts of a media file. Decodes one frame (only it tells the rotation); without a duration in the header reads all
    packets.

    Raises:
        BadClip: the file cannot be used.
    """
    limits = limits or Limits()
    with open_media(path, limits) as container:
        chosen = choose(container, path, limits)
        span = find_span(container, chosen, path, limits)
        notes = [*chosen.notes, *_span_notes(span)]
        return MediaInfo(
            file=str(path),
            bytes=os.path.getsize(path),
            container=container.format.name,
            duration=span.seconds,
            duration_measured=span.measured,
            video=_video_info(container, chosen, path) if chosen.video is not None else None,
            audio=_audio_info(chosen) if chosen.audio is not None else None,
            num_streams=len(container.streams),
            notes=tuple(notes),
        )


def _video_info(container: InputContainer, chosen: Chosen, path: str | os.PathLike) -> VideoInfo:
    stream = chosen.video
    codec = stream.codec_context
    frame = None
    for packet in packets(container, [stream], []):
        frame = next(iter(codec.decode(packet)), None)
        if frame is not None:
            break
    frame = frame or next(iter(codec.decode(None)), None)
    if frame is None:
        raise BadClip(path, "no frame of its video can be decoded")
    turn, _ = orientation(frame)
    aspect = float(stream.sample_aspect_ratio or 1) or 1.0
    shown = (round(codec.width * aspect), codec.height)
    return VideoInfo(
        index=stream.index,
        codec=codec.name,
        width=codec.width,
        height=codec.height,
        display_size=shown[::-1] if turn.transpose else shown,
        rotation=turn.words,
        sample_aspect_ratio=aspect,
        average_rate=float(stream.average_rate) if stream.average_rate else None,
    )


def _audio_info(chosen: Chosen) -> AudioInfo:
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
    fit: Fit = "pad",
    limits: Limits | None = None,
    threads: int = 0,
) -> Clip:
    """Reads a media file, or its window [start, end) seconds, for one chunk grid.

    `image_size`: side of the square frames in pixels; `fit` pads a picture to a square, crops or stretches it.
    `sample_rate`: Hz of the mono waveform. Second 0 is the earliest start of the streams that are read. A window is
    sought, not decoded from the beginning; frames nobody asked for are not kept. `threads`: decoding threads, 0 lets
    FFmpeg choose; 1 is right in loader workers.

    Raises:
        BadClip: the file cannot be used, or does not hold the window.
        UserError: a setting is impossible.
    """
    return read_clip_counted(
        path,
        grid,
        image_size=image_size,
        sample_rate=sample_rate,
        start=start,
        end=end,
        fit=fit,
        limits=limits or Limits(),
        threads=threads,
    )[0]


def read_clip_counted(
    path: str | os.PathLike,
    grid: ChunkGrid,
    *,
    image_size: int,
    sample_rate: int,
    start: float | None,
    end: float | None,
    fit: Fit,
    limits: Limits,
    threads: int,
) -> tuple[Clip, ReadCounts]:
    """`read_clip`, with what it cost."""
    if fit not in ("pad", "crop", "stretch"):
        raise UserError(f"fit={fit!r}: choose pad, crop or stretch")
    if image_size < 1 or sample_rate < 1:
        raise UserError(f"image_size={image_size} and sample_rate={sample_rate} must be positive")
    with open_media(path, limits) as container:
        chosen = choose(container, path, limits)
        span = find_span(container, chosen, path, limits)
        left, right, notes = _window(path, span, start, end)
        limits.check_seconds(path, right - left)
        timeline = cut(left, right, grid)
        for stream in chosen.streams:
            if threads != 1:
                stream.thread_type = "AUTO"
            stream.codec_context.thread_count = threads
        reading = _Reading(path, container, chosen, span, timeline, limits)
        reading.prepare(image_size, fit, sample_rate)
        reading.run()
        reading.check_covered()
        notes = [*chosen.notes, *_span_notes(span), *notes, *cutting_notes(timeline, grid), *reading.notes()]
        return reading.clip(tuple(notes)), reading.counts


def _window(
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
        raise BadClip(path, f"window {left:g} to {right:g} s has no length: end must lie after start")
    if right > length + END_TOLERANCE:
        raise BadClip(path, f"window ends at {right:g} s, but the file lasts {length:.3f} s")
    if right > length:
        return left, length, [f"window end {right:g} s lies past the end: read to {length:.3f} s"] if end else []
    return left, right, []


def _span_notes(span: Span) -> list[str]:
    return [f"no reliable duration in the header: {span.seconds:.3f} s by reading packets"] if span.measured else []


class _Reading:
    """One reading of one window: feeds both streams, then says what was found."""

    def __init__(
        self,
        path: str | os.PathLike,
        container: InputContainer,
        chosen: Chosen,
        span: Span,
        timeline: Timeline,
        limits: Limits,
    ):
        self.path, self.container, self.chosen, self.span = path, container, chosen, span
        self.timeline, self.limits = timeline, limits
        self.errors: list[str] = []
        self.video: FrameSampler | None = None
        self.audio: WaveformBuilder | None = None
        self.last_packet_end = -math.inf
        # Presentation times of the container, where the media timeline starts at span.zero.
        self.start, self.end = span.zero + timeline.start, span.zero + timeline.end

    def prepare(self, image_size: int, fit: Fit, sample_rate: int) -> None:
        if self.chosen.video is not None:
            wanted = [self.span.zero + time for times in self.timeline.frame_times for time in times]
            self.video = FrameSampler(self.path, self.chosen.video, wanted, image_size, fit, self.limits)
        if self.chosen.audio is not None:
            last = self.span.zero + max(self.timeline.edges[-1], self.timeline.start)
            self.audio = WaveformBuilder(self.chosen.audio, self.start, last, sample_rate)

    @property
    def counts(self) -> ReadCounts:
        return ReadCounts(self.video and self.video.counts, self.audio and self.audio.counts)

    def run(self) -> None:
        """One pass from the window's start (or a keyframe before it) until both streams have what they need."""
        self._seek()
        for packet in packets(self.container, self.chosen.streams, self.errors):
            time = packet_time(packet)
            if time is not None:
                self.last_packet_end = max(self.last_packet_end, time + float((packet.duration or 0) * packet.time_base))
            if self.video is not None and packet.stream_index == self.chosen.video.index:
                self.video.feed(packet)
            else:
                self.audio.feed(packet)
            if (self.video is None or self.video.done) and (self.audio is None or self._audio_done(packet)):
                break
        for part in (self.video, self.audio):
            if part is not None:
                part.finish()

    def _audio_done(self, packet) -> bool:
        return self.audio.done

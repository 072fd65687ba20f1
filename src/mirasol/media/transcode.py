"""Re-encodes a media file at the size that training needs: smaller, faster to read, with unchanged times."""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from mirasol.errors import BadClip, UserError
from mirasol.media.audio import WaveformBuilder
from mirasol.media.container import ChosenStreams, read_packets
from mirasol.media.joined.parts import open_source
from mirasol.media.limits import DEFAULT_LIMITS, Limits
from mirasol.media.span import Span, find_span
from mirasol.media.tone_mapping import get_transfer
from mirasol.media.video import (
    FALLBACK_FRAME_SECONDS,
    TIME_TOLERANCE,
    composite_on_black,
    make_alpha_decoder,
    read_orientation,
)

TICK = Fraction(1, 90_000)
ENCODER = "libx264"
# x264's macroblock tree, at pictures of few macroblocks, gives other bytes now and then for the same pictures.
QUALITY = {"preset": "veryfast", "crf": "20", "x264-params": "mbtree=0"}
KEYFRAME_SECONDS = 2  # a window deep in a long file decodes this much for nothing at most
AAC_SAMPLES = 1024  # in a packet
AAC_RATES = (96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000)
AAC_BIT_RATE = 96_000
END_SECONDS = 0.05
_SETTING = re.compile(r"(\d+)(?:@(\d+(?:\.\d+)?))?")


@dataclass(frozen=True)
class Reencoding:
    """size: pixels of the shorter side, larger pictures are scaled down to it; fps: most frames a second, None all."""

    size: int
    fps: float | None = None

    def __post_init__(self):
        if self.size < 16 or self.size % 2:
            raise UserError(f"reencode size {self.size}: must be an even number of pixels from 16 on")
        if self.fps is not None and self.fps <= 0:
            raise UserError(f"reencode frame rate {self.fps:g}: must be positive")

    @classmethod
    def parse(cls, text: str) -> "Reencoding":
        """From `SIZE` or `SIZE@FPS`. Raises UserError."""
        match = _SETTING.fullmatch(text)
        if match is None:
            raise UserError(f"reencode {text}: write SIZE or SIZE@FPS, for example 256 or 256@8")
        return cls(int(match[1]), float(match[2]) if match[2] else None)

    def __str__(self) -> str:
        return f"{self.size}@{self.fps:g}" if self.fps is not None else str(self.size)


def reencode_media(path: str | os.PathLike, target: Path, settings: Reencoding, limits: Limits = DEFAULT_LIMITS) -> str:
    """Re-encodes a media file as mp4. Returns "", or why it is better kept as it is: no video, too long, damaged.

    (Every reading notes damage; re-encoded, the damage would still be there, but no longer noted.)

    The streams are those that are read from the original (`choose_streams`). Pictures: H.264 in square pixels, upright,
    scaled down to `settings.size`, each at its own time; with `settings.fps` the first one of each interval of 1 / fps.
    AAC sound in mp4 or mov is copied packet by packet. Other sound becomes mono AAC (what the model hears), with its
    gaps, and is in memory meanwhile: 12 MB a minute at 48 kHz. Second 0 of the new file is second 0 of the old one, and
    they end at the same time. The same file gives the same bytes with one version of PyAV.

    Raises:
        BadClip: the file cannot be read.
    """
    with open_source(path, limits) as opened:
        source, chosen = opened.container, opened.chosen
        if chosen.video is None and len(opened.parts) == 1:
            return "no video"
        span = find_span(opened)
        if span.seconds > limits.max_seconds:
            return f"longer than {limits.max_seconds:g} s"
        if span.joints:
            return "time stamps start over"
        if span.strays or span.repairs:
            return "damaged: time stamps do not fit those around them"
        if span.remarks or len(opened.parts) > 1 or opened.unread:
            return "its streams change"
        # The unit in which a stream's beginning is written; the usual millisecond would move it by up to half of one.
        unit = {"movie_timescale": str(TICK.denominator)}
        with av.open(str(target), "w", format="mp4", container_options=unit) as out:
            try:
                _Writing(path, source, out, chosen, span, settings, limits).run()
            except _KeptAsItIs as error:
                return str(error)
    return ""


class _KeptAsItIs(Exception):
    """A file that re-encoding would not leave as it is, with the reason."""


class _Writing:
    """One pass over an open file. Times inside are seconds since the file's second 0."""

    def __init__(
        self,
        path: str | os.PathLike,
        source: InputContainer,
        out: OutputContainer,
        chosen: ChosenStreams,
        span: Span,
        settings: Reencoding,
        limits: Limits,
    ):
        self.path, self.source, self.out, self.span = path, source, out, span
        self.chosen, self.settings, self.limits = chosen, settings, limits
        self.decoder = make_alpha_decoder(chosen.video, limits) or chosen.video.codec_context
        self.decoder.thread_count = 1
        self.video: VideoStream | None = None  # of the new file, made for the first picture
        self.reformatter = VideoReformatter()
        self.shape = (0, 0)
        self.held: Packet | None = None  # its duration is known when the next one comes
        self.cell = -1  # which interval of 1 / fps the last picture was taken from
        self.last, self.end = -math.inf, -math.inf
        self.waiting: list[Packet] = []
        rate = chosen.video.average_rate or chosen.video.guessed_rate
        self.usual = 1 / float(rate) if rate else FALLBACK_FRAME_SECONDS
        self.copied = self.builder = None
        if chosen.audio is not None:
            self._begin_audio(chosen.audio)

    def _begin_audio(self, audio: AudioStream) -> None:
        mp4 = self.source.format.name.startswith("mov")
        if mp4 and audio.codec_context.name == "aac" and audio.codec_context.extradata:
            self.copied = audio
            return
        rate = audio.codec_context.sample_rate
        rate = rate if rate in AAC_RATES else 48_000
        self.builder = WaveformBuilder(audio, self.span.zero, self.span.end, rate)

    def run(self) -> None:
        errors: list[str] = []
        copies: list[Packet] = []
        for packet in read_packets(self.source, self.chosen.streams, errors):
            if packet.stream_index == self.chosen.video.index:
                self._decode(packet)
            elif self.builder is not None:
                self.builder.feed(packet)
            elif packet.pts is None or packet.dts is None:
                raise _KeptAsItIs("its sound has packets without times")
            else:
                copies.append(packet)
        self._decode(None)
        if errors:
            raise _KeptAsItIs(f"damaged: cannot be read to its end ({errors[0]})")
        if self.video is None:
            raise BadClip(self.path, "no frame of its video can be decoded")
        self._finish_video()
        self._write(copies)

    def _decode(self, packet: Packet | None) -> None:
        try:
            frames = self.decoder.decode(packet)
        except av.error.FFmpegError as error:
            raise _KeptAsItIs(f"damaged: not all of its video can be decoded ({error.strerror})") from error
        for frame in frames:
            if frame.is_corrupt:
                raise _KeptAsItIs("damaged: frames decode with errors")
            self._raise_if_noted(frame)
            self._take(frame)

    def _raise_if_noted(self, frame: VideoFrame) -> None:
        """Refuses frames that every reading notes: encoded again, they would be as wrong and no longer noted."""
        transfer = get_transfer(frame)
        if transfer:
            raise _KeptAsItIs(f"high dynamic range ({transfer})")
        if frame.interlaced_frame:
            raise _KeptAsItIs("interlaced")
        if frame.pts is None:
            raise _KeptAsItIs("its video has no presentation times")
        if composite_on_black(frame) is not frame:
            raise _KeptAsItIs("transparent")

    def _take(self, frame: VideoFrame) -> None:
        tick = float(self.chosen.video.time_base)
        time = self.last + self.usual if frame.pts is None else frame.pts * tick - self.span.zero
        if not math.isfinite(time):
            time = 0.0
        if time <= self.last:
            raise _KeptAsItIs("the times of its frames do not rise")
        self.last = time
        self.end = max(self.end, time + (frame.duration * tick if frame.duration else self.usual))
        if self.settings.fps is not None:
            cell = math.floor((time + TIME_TOLERANCE) * self.settings.fps)
            if cell == self.cell:
                return
            self.cell = cell
        self._encode(self._scale_down(frame), round(time / TICK))

    def _scale_down(self, frame: VideoFrame) -> VideoFrame:
        """The picture scaled down, in square pixels, upright."""
        self.limits.check_pixels(self.path, frame.width, frame.height)
        turn, _ = read_orientation(frame)
        aspect = float(self.chosen.video.sample_aspect_ratio or 1) or 1.0
        width, height = frame.width * aspect, float(frame.height)
        scale = min(1.0, self.settings.size / min(width, height))
        size = (_round_to_even(width * scale), _round_to_even(height * scale))
        if self.video is not None:
            size = self.shape  # pictures may change their shape within a file, an mp4's do not
        self.shape = size
        way = Interpolation.AREA if size[0] <= frame.width and size[1] <= frame.height else Interpolation.BILINEAR
        small = self.reformatter.reformat(
            frame, *size, "yuv420p", interpolation=way, dst_color_range=ColorRange.MPEG, threads=1
        )
        if turn.words == "0 degrees":
            return small
        turned = VideoFrame(*(size[::-1] if turn.transpose else size), "yuv420p")
        for old, new in zip(small.planes, turned.planes, strict=True):
            stored = np.frombuffer(old, np.uint8).reshape(old.height, old.line_size)[:, : old.width]
            room = np.frombuffer(new, np.uint8).reshape(new.height, new.line_size)
            room[:, : new.width] = turn.apply(stored)
        turned.colorspace, turned.color_range = small.colorspace, small.color_range
        return turned

    def _encode(self, frame: VideoFrame, stamp: int) -> None:
        if self.video is None:
            self.video = self._add_stream(frame)
        frame.pts, frame.time_base, frame.pict_type = stamp, TICK, 0
        self._take_packets(self.video.encode(frame))

    def _add_stream(self, frame: VideoFrame) -> VideoStream:
        fps = 1 / self.usual if self.settings.fps is None else min(self.settings.fps, 1 / self.usual)
        if ENCODER not in av.codecs_available:
            raise UserError(f"re-encoding needs {ENCODER}, which this build of PyAV lacks: install PyAV from PyPI")
        stream = self.out.add_stream(ENCODER, rate=max(1, round(fps)), options=dict(QUALITY))
        context = stream.codec_context
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "yuv420p"
        stream.time_base = context.time_base = TICK
        context.gop_size, context.max_b_frames, context.thread_count = max(1, round(KEYFRAME_SECONDS * fps)), 0, 1
        context.colorspace, context.color_range = frame.colorspace, frame.color_range
        return stream

    def _take_packets(self, made: list[Packet]) -> None:
        for packet in made:
            if self.held is not None:
                self.held.duration = packet.pts - self.held.pts
            self.held = packet
            self.waiting.append(packet)

    def _finish_video(self) -> None:
        self._take_packets(self.video.encode(None))
        end = min(self.end, self.span.seconds)  # a file may say that its last frame is not shown for its full duration
        self.held.duration = max(1, round(end / TICK) - self.held.pts)

    def _write(self, copies: list[Packet]) -> None:
        """All packets by time; of sound, where there is any."""
        sound = []
        if self.copied is not None and copies:
            stream = self.out.add_stream_from_template(self.copied)
            zero = round(self.span.zero / self.copied.time_base)
            for packet in copies:
                packet.pts, packet.dts, packet.stream = packet.pts - zero, packet.dts - zero, stream
            sound = copies
        elif self.builder is not None:
            self.builder.finish()
            sound = self._encode_aac(self.builder)
        for packet in sorted([*self.waiting, *sound], key=lambda p: p.dts * p.time_base):
            self.out.mux(packet)

    def _encode_aac(self, builder: WaveformBuilder) -> list[Packet]:
        if builder.counts.packets_failed:
            raise _KeptAsItIs("damaged: not all of its sound can be decoded")
        if builder.counts.overlaps:
            raise _KeptAsItIs("its sound overlaps")
        runs = list(builder.runs())
        if not runs:
            return []
        rate = builder.sample_rate
        stream = self.out.add_stream("aac", rate=rate, layout="mono")
        stream.bit_rate, stream.time_base = AAC_BIT_RATE, Fraction(1, rate)
        stream.codec_context.open(strict=False)
        # Codecs round a stream's length up to their packets: where the file's end is that close, it stays the end.
        end, stated = runs[-1][0] + len(runs[-1][1]), round(self.span.seconds * rate)
        end = stated if 0 < stated - end < END_SECONDS * rate else end
        made = []
        for position, samples in _cut_into_blocks(runs, end):
            frame = av.AudioFrame.from_ndarray(samples[None], "fltp", "mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, position, Fraction(1, rate)
            made += stream.encode(frame)
        made += stream.encode(None)
        while made and made[-1].pts >= end:
            made.pop()
        if not made:
            return []
        made[-1].duration = end - made[-1].pts
        return made


def _cut_into_blocks(runs: list[tuple[int, np.ndarray]], end: int) -> Iterator[tuple[int, np.ndarray]]:
    """Runs of samples, each at its position, in blocks of AAC's size; a run's last one is filled with silence.

    Where the next run begins within such a block it goes on in it. The last run goes on in silence until `end`.
    """
    merged: list[tuple[int, np.ndarray]] = []
    for position, samples in runs:
        if merged and position < _round_up_to_block(*merged[-1]):
            before, held = merged.pop()
            silence = np.zeros(max(0, position - before - len(held)), np.float32)
            samples, position = np.concatenate([held[: position - before], silence, samples]), before
        merged.append((position, samples))
    for number, (position, samples) in enumerate(merged):
        stop = end if number == len(merged) - 1 else position + len(samples)
        for first in range(0, stop - position, AAC_SAMPLES):
            block = samples[first : first + AAC_SAMPLES]
            yield position + first, np.pad(block, (0, AAC_SAMPLES - len(block)))


def _round_up_to_block(position: int, samples: np.ndarray) -> int:
    """Where the last block of a run ends."""
    return position - -len(samples) // AAC_SAMPLES * AAC_SAMPLES


def _round_to_even(length: float) -> int:
    return max(2, 2 * round(length / 2))

"""What a decoder process does with a live source: one connection at a time, read by a thread, asked for its chunks.

Runs in the process that `mirasol.app.live.reader` starts: media is untrusted, and may end this process.
"""

import contextlib
import dataclasses
import math
import threading
import time
from collections import deque
from collections.abc import Iterator

import av
import av.error
from av.container import InputContainer
from av.packet import Packet

from mirasol.app.live.assembler import ChunkAssembler, ChunkPlan, take_all
from mirasol.app.live.chunks import LiveChunk, LiveCounts, LiveSettings, Progress, Resume
from mirasol.app.live.clock import FORWARD_SECONDS, LiveClock
from mirasol.app.live.lag import DecodingLag
from mirasol.app.live.sampling import OpenFrameSampler, OpenWaveform
from mirasol.app.live.source import PLAYLIST_FORMATS, WIRE_FORMATS, LiveSource
from mirasol.errors import BadClip, UserError
from mirasol.media.container import (
    FORMATS,
    ChosenStreams,
    choose_streams,
    format_error,
    get_packet_times,
    is_raw_video,
    read_packets,
)
from mirasol.media.joined.parts import open_source
from mirasol.media.reader import check_window
from mirasol.media.span import find_span, find_start
from mirasol.media.timeline import ChunkGrid, cut_into_chunks, describe_cut

PROBED_MICROSECONDS = 2_000_000  # of a live source, to learn what its streams are
KEYFRAME_SECONDS = 10.0  # within which a video that is being sent has a picture that can be decoded alone
LIVE_PATIENCE, USUAL_PATIENCE = 1.0, 10.0
UNLIMITED = 10**9


class ChunkQueue:
    """Chunks that wait for the model.

    With `drop`, one more than `most` of them costs the oldest its content; without, it waits for room.
    """

    def __init__(self, most: int, drop: bool):
        self.most, self.drop = most, drop
        self.dropped = 0
        self.changed = threading.Condition()
        self.closed = False
        self._chunks: deque[LiveChunk] = deque()

    def put(self, chunk: LiveChunk) -> None:
        with self.changed:
            if not self.drop:
                self.changed.wait_for(lambda: self.closed or len(self._chunks) < self.most)
            self._chunks.append(chunk)
            full = [place for place, waiting in enumerate(self._chunks) if not waiting.missing]
            if self.drop and len(full) > self.most:
                self._chunks[full[0]] = self._chunks[full[0]].drop()
                self.dropped += 1
            self.changed.notify_all()

    def take(self) -> tuple[LiveChunk, ...]:
        """All that wait; the condition is held by the caller."""
        chunks = tuple(self._chunks)
        self._chunks.clear()
        self.changed.notify_all()
        return chunks

    def __len__(self) -> int:
        return len(self._chunks)


class Connection:
    """A source that is open, and the thread that reads it."""

    def __init__(self, source: LiveSource, settings: LiveSettings, resume: Resume | None, descriptor: int | None):
        self.source, self.settings, self.resume, self.descriptor = source, settings, resume, descriptor
        live = source.is_unstoppable
        paced = source.kind == "file" and not settings.fast
        drop = settings.drop if settings.drop is not None else live or paced
        self.queue = ChunkQueue(settings.most_waiting, drop)
        self.is_live, self.is_paced = live, paced
        self.patience = settings.patience
        if self.patience is None:
            self.patience = LIVE_PATIENCE if live or paced else USUAL_PATIENCE
        self.ended: str | None = None
        self.failure: UserError | None = None
        self.opened = threading.Event()
        self.errors: list[str] = []
        self.notes: list[str] = []
        self.before_keyframe = 0
        self.assembler: ChunkAssembler | None = None
        self.clock = LiveClock(live, resume)
        self.lag = DecodingLag(math.inf)  # until the length of a chunk is known
        self._closing = threading.Event()
        self._told = LiveCounts()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        """Reads the source to its end, or until it breaks off."""
        reason = ""
        try:
            if self.source.kind == "file":
                self._read_file()
            else:
                self._read_stream()
            reason = self.errors[0] if self.errors else "" if not self.is_live else "the source closed the connection"
        except UserError as error:
            self.failure, reason = error, getattr(error, "reason", str(error))
        except av.error.ProtocolNotFoundError:  # no other try helps
            scheme = str(self.source).partition(":")[0]
            reason = f"PyAV's FFmpeg was built without {scheme}: send it as rtsp, rtmp, udp, tcp or http"
            self.failure = UserError(f"{self.source}: {reason}")
        except (av.error.FFmpegError, OSError, ValueError) as error:
            reason = format_error(error)
            self.failure = BadClip(self.source, reason)
        except Exception as error:  # whatever broken media makes of the reader is its own error
            reason = f"the reader failed: {type(error).__name__}: {error}"
            self.failure = BadClip(self.source, reason)
        finally:
            with self.queue.changed:
                self.ended = reason
                self.queue.changed.notify_all()
            self.opened.set()

    # --- a file: the offline reader's own timing ---

    def _read_file(self) -> None:
        settings, path, media = self.settings, self.source.address, self.settings.media
        threads = 0 if settings.fast else 1
        with open_source(path, settings.limits, threads) as source:
            span = find_span(source, math.inf if settings.end is None else settings.end)
            left, right, notes = check_window(path, span, settings.start, settings.end)
            seconds = settings.chunk_seconds or media.chunk_seconds
            number = None if seconds is not None else media.num_chunks
            grid = ChunkGrid(media.frames_per_chunk, seconds, number, UNLIMITED)
            timeline = cut_into_chunks(left, right, grid)
            self.notes += [*source.notes, *span.notes(), *notes, *describe_cut(timeline, grid)]
            untimed = is_raw_video(source.container)
            video, audio = self._make_parts(source.chosen, span.zero, untimed, source.kinds, span.joints)
            plan = ChunkPlan(None, timeline.edges)
            self._make_assembler(video, audio, plan, span.zero)
            self.opened.set()
            clock, began = span.make_clock(), time.monotonic()
            for number, (container, chosen) in enumerate(source.open_parts()):
                if number:
                    self._go_on_with(chosen)
                packets = read_packets(container, chosen.streams, self.errors, clock)
                if self.is_paced:
                    packets = self._pace(packets, began - span.zero - left)
                if not self._feed_packets(packets, chosen):
                    break
            self.notes += [f"reading stopped early: {error}" for error in self.errors]
            self.errors.clear()
            self.assembler.finish(span.zero + right)

    def _go_on_with(self, chosen: ChosenStreams) -> None:
        for kind, part in self.assembler.parts.items():
            stream = getattr(chosen, kind)
            if stream is not None:
                part.change_stream(stream)

    # --- anything else: a clock of its own ---

    def _read_stream(self) -> None:
        settings = self.settings
        with self._open_stream() as container:
            settings.limits.check_streams(self.source, len(container.streams))
            chosen = choose_streams(container, self.source, settings.limits)
            for stream in chosen.streams:
                stream.codec_context.thread_count = 1
            self.notes += [note for note in chosen.notes if self.resume is None]
            zero = self._find_zero(container, chosen)
            self.opened.set()
            packets = read_packets(container, chosen.streams, self.errors)
            self._feed_packets(self._place_packets(container, chosen, packets, zero), chosen)
        if self.assembler is None:
            raise BadClip(self.source, f"nothing came ({self.errors[0]})" if self.errors else "contains no media data")
        if self.errors or self.is_live:
            self.assembler.break_off()
        else:
            self.assembler.finish()

    @contextlib.contextmanager
    def _open_stream(self) -> Iterator[InputContainer]:
        source, settings = self.source, self.settings
        formats = FORMATS if source.kind == "bytes" else f"{FORMATS},{PLAYLIST_FORMATS},{WIRE_FORMATS}"
        options = {"format_whitelist": formats, "protocol_whitelist": source.protocols}
        if source.kind == "camera" or source.format:
            options = {}  # a device, whose name is not an address
        address = f"pipe:{self.descriptor}" if source.kind == "bytes" else source.address
        options |= {"analyzeduration": str(PROBED_MICROSECONDS)} | dict(source.options)
        timeout = None if source.kind == "bytes" else (settings.stall, settings.stall)
        with av.open(
            address,
            format=source.format or None,
            metadata_errors="replace",
            container_options=options,
            options={"max_pixels": str(settings.limits.max_pixels)},
            timeout=timeout,
        ) as container:
            yield container

    def _find_zero(self, container: InputContainer, chosen: ChosenStreams) -> float | None:
        """Where watching begins, container seconds; None for the time of the first packet."""
        if self.resume is not None:
            return self.resume.zero
        starts = [find_start(stream, container) for stream in chosen.streams if stream.start_time is not None]
        return min(starts, default=0.0 if is_raw_video(container) else None)

    def _place_packets(
        self, container: InputContainer, chosen: ChosenStreams, packets: Iterator[Packet], zero: float | None
    ) -> Iterator[Packet]:
        """The packets on a rising clock, from the first one that can be decoded on."""
        kinds = {stream.index: stream.type for stream in chosen.streams}
        raw = is_raw_video(container)
        waits = self.is_live and self.source.kind == "address"  # a camera's pictures need no others
        waited_from = time.monotonic()
        for packet in packets:
            arrived, kind = time.monotonic(), kinds[packet.stream_index]
            if not raw:
                self.clock.place(kind, packet, arrived)
            if self.assembler is None:
                begin = get_packet_times(packet, float(packet.time_base))[0]
                if self.resume is None and (zero is None or (math.isfinite(begin) and begin - zero > FORWARD_SECONDS)):
                    zero = begin if math.isfinite(begin) else 0.0
                self._begin_stream(chosen, zero, raw)
            if kind == "video" and waits:
                if not packet.is_keyframe and arrived - waited_from < KEYFRAME_SECONDS:
                    self.before_keyframe += 1
                    continue
                waits = False
            yield packet

    def _begin_stream(self, chosen: ChosenStreams, zero: float, raw: bool) -> None:
        seconds = self.settings.usual_seconds
        if seconds is None:
            raise UserError(f"{self.source}: has no end, and the checkpoint no length of a chunk: set --chunk-seconds")
        kinds = frozenset(stream.type for stream in chosen.streams)
        video, audio = self._make_parts(chosen, zero, raw, kinds)
        self._make_assembler(video, audio, ChunkPlan(seconds), zero)
        self.assembler.gaps = self.clock.gaps

    # --- both ---

    def _make_parts(
        self,
        chosen: ChosenStreams,
        zero: float,
        untimed: bool,
        kinds: frozenset[str],
        joints: tuple[float, ...] = (),
    ) -> tuple[OpenFrameSampler | None, OpenWaveform | None]:
        media, limits, video, audio = self.settings.media, self.settings.limits, None, None
        if "video" in kinds:
            video = OpenFrameSampler(self.source, chosen.video, media.image_size, media.fit, limits, untimed)
        if "audio" in kinds:
            begin = zero + (self.settings.start or 0.0) if self.source.kind == "file" else zero
            audio = OpenWaveform(chosen.audio, begin, media.sample_rate, joints)
        return video, audio

    def _make_assembler(
        self, video: OpenFrameSampler | None, audio: OpenWaveform | None, plan: ChunkPlan, zero: float
    ) -> None:
        left, right = plan.find_edges(0)
        self.lag.most = self.settings.most_waiting * (right - left) if self.queue.drop else math.inf
        self.assembler = ChunkAssembler(
            video,
            audio,
            plan,
            self.settings.media.frames_per_chunk,
            zero,
            self.patience,
            self.is_live or self.is_paced,
            self.queue.put,
            0 if self.resume is None else self.resume.next_chunk,
        )

    def _pace(self, packets: Iterator[Packet], zero: float) -> Iterator[Packet]:
        """The packets of a file, no sooner than they are due; `zero` is the wall's second of the container's zero."""
        for packet in packets:
            stamp = packet.dts if packet.dts is not None else packet.pts
            if stamp is not None:
                self._closing.wait(max(0.0, zero + float(stamp * packet.time_base) - time.monotonic()))
            yield packet

    def _feed_packets(self, packets: Iterator[Packet], chosen: ChosenStreams) -> bool:
        """Feeds packets; False where no more are needed."""
        kinds = {stream.index: stream.type for stream in chosen.streams}
        for packet in self.lag.follow(packets):
            kind = kinds.get(packet.stream_index)
            if kind is None:
                continue
            if self._closing.is_set():
                return False
            if kind == "video" and self.lag.leaves_out(packet, self.assembler.has_whole_chunk):
                self.assembler.leave_out(packet, time.monotonic())
            else:
                self.assembler.feed(kind, packet, time.monotonic())
            if self.assembler.is_complete:
                return False
        return True

    def poll(self, seconds: float) -> Progress:
        """What has come in; waits for a chunk, or the end, up to that many seconds."""
        with self.queue.changed:
            self.queue.changed.wait_for(lambda: len(self.queue) or self.ended is not None, seconds)
            chunks, ended = self.queue.take(), self.ended
        counts = self._count()
        news = LiveCounts()
        for part in dataclasses.fields(counts):
            setattr(news, part.name, getattr(counts, part.name) - getattr(self._told, part.name))
        self._told = counts
        notes, resume = take_all(self.notes) + take_all(self.clock.notes), self.resume
        if self.assembler is not None:
            notes += self.assembler.list_news()
            resume = self.clock.make_resume(self.assembler.next_chunk, self.assembler.zero)
        arrived = self.assembler.arrived if self.assembler is not None else 0.0
        total = self.assembler.plan.count if self.assembler is not None else None
        return Progress(ended, news, tuple(notes), resume, arrived, total, chunks)

    def _count(self) -> LiveCounts:
        counts = LiveCounts() if self.assembler is None else dataclasses.replace(self.assembler.counts)
        counts.dropped, counts.before_keyframe = self.queue.dropped, self.before_keyframe
        counts.jumps, counts.gap_seconds = self.clock.jumps, self.clock.gap_seconds
        if self.assembler is not None:
            for part in self.assembler.parts.values():
                counts.packets_failed += part.counts.packets_failed
            if self.assembler.video is not None:
                counts.frames = self.assembler.video.counts.frames_converted
        return counts

    def close(self) -> None:
        self._closing.set()
        with self.queue.changed:
            self.queue.closed = True
            self.queue.changed.notify_all()


_connection: Connection | None = None


def open_connection(
    source: LiveSource, settings: LiveSettings, resume: Resume | None, descriptor: int | None, seconds: float
) -> bool:
    """Opens the source and begins to read it; whether it is open after that many seconds, if it is not, ask again.

    Raises:
        UserError: it cannot be opened, or nothing in it can be read.
    """
    global _connection
    if _connection is None:
        _connection = Connection(source, settings, resume, descriptor)
        _connection.thread.start()
    opened = _connection.opened.wait(seconds)
    failure = _connection.failure
    if opened and failure is not None and _connection.assembler is None:
        _connection = None
        raise failure
    return opened


def poll_connection(seconds: float) -> Progress:
    """See `Connection.poll`. A connection that has ended is forgotten once that is said and its chunks are taken."""
    global _connection
    progress = _connection.poll(seconds)
    if progress.ended is not None:
        _connection.close()
        _connection = None
    return progress

"""Opening an untrusted media file: which streams are read, where time begins and ends."""

import contextlib
import math
import os
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.error
import av.logging
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard, Disposition
from av.stream import Stream as AvStream

from mirasol.errors import BadClip
from mirasol.media.formats.animated_webp import decode_animated_webp, is_animated_webp
from mirasol.media.formats.content import OTHER_FORMATS, PAGE, detect_content_kind, has_several_stills
from mirasol.media.isolation.shared import report_progress
from mirasol.media.joined.clock import RisingClock
from mirasol.media.limits import Limits

# Only plain files in formats that hold their own data: playlists and the like name other files, which would then be
# opened too.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,asf,flv,mpegts,mpeg,mpegvideo,"
    "ogg,wav,w64,aiff,flac,mp3,aac,ac3,gif,ivf,mxf,amr,caf,au,wv,eac3,dts,apng,h264,hevc,m4v,obu,mjpeg"
)
CONTAINER_OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
READ_FORMATS = (
    "read are mp4, mov, 3gp, mkv, webm, avi, wmv, flv, ts, mpg, vob, ogg, mxf, ivf, gif, apng, animated webp, raw "
    "h264, hevc, av1, mpeg and mjpeg video, wav, w64, aiff, caf, au, flac, mp3, aac, ac3, eac3, dts, amr and wv files"
)
# Video without a container: packets have no times.
RAW_VIDEO = {
    "h264": "H.264",
    "hevc": "HEVC",
    "obu": "AV1",
    "mpegvideo": "MPEG-1 or 2 video",
    "m4v": "MPEG-4 video",
    "mjpeg": "Motion JPEG",
}
RAW_RATE = 25  # frames a second where the header states none, as FFmpeg assumes
LACKING = {"video": "no video track: answered from sound alone", "audio": "no audio track"}
GENERATE_TIMES = 0x1  # AVFMT_FLAG_GENPTS


@dataclass(frozen=True)
class ChosenStreams:
    """The streams of an open container that are read, and the notes that choosing them gave rise to."""

    video: AvStream | None
    audio: AvStream | None
    notes: tuple[str, ...]

    @property
    def streams(self) -> list[AvStream]:
        return [stream for stream in (self.video, self.audio) if stream is not None]


@dataclass(frozen=True)
class ByteRange:
    """Bytes of a file that are opened as a file of their own; without an end, to the file's."""

    begin: int = 0
    end: int = 0

    def format_url(self, path: str | os.PathLike) -> str:
        """What FFmpeg opens. The prefix keeps a name such as "concat:a|b" a name."""
        file = f"file:{Path(path)}"
        return f"subfile,,start,{self.begin},end,{self.end},,:{file}" if self.begin or self.end else file


WHOLE = ByteRange()


@contextlib.contextmanager
def open_media(path: str | os.PathLike, limits: Limits, place: ByteRange = WHOLE) -> Iterator[InputContainer]:
    """Opens a media file, or a part of it, for reading.

    Raises:
        BadClip: missing, not a file, empty, over a limit, or nothing FFmpeg can read.
    """
    file = Path(path)
    if not file.exists():
        raise BadClip(path, "no such file")
    if not file.is_file():
        raise BadClip(path, "not a file")
    size = file.stat().st_size
    if size == 0:
        raise BadClip(path, "the file is empty")
    limits.check_bytes(path, size)
    with contextlib.ExitStack() as closed_later:
        container = closed_later.enter_context(_open_container(path, limits, place, closed_later))
        if container.format.name == "avi":
            # AVI has no presentation times. PyAV asks FFmpeg to make them up, and under B-frames they run backwards.
            container.flags &= ~GENERATE_TIMES
        if container.format.name == "mjpeg" and has_several_stills(path):
            raise BadClip(path, f"is a {OTHER_FORMATS['jpeg']}, which is not read: {READ_FORMATS}")
        limits.check_streams(path, len(container.streams))
        try:
            yield container
        except av.error.FFmpegError as error:
            raise BadClip(path, f"cannot be decoded ({format_error(error)})") from error


def _open_container(
    path: str | os.PathLike, limits: Limits, place: ByteRange, closed_later: contextlib.ExitStack
) -> InputContainer:
    settings = {
        "metadata_errors": "replace",
        "container_options": CONTAINER_OPTIONS | ({} if place == WHOLE else {"protocol_whitelist": "file,subfile"}),
        "options": {"max_pixels": str(limits.max_pixels)},
    }
    try:
        return av.open(place.format_url(path), **settings)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        with open(path, "rb") as stream:
            beginning = stream.read(512)
        if is_animated_webp(beginning):
            return av.open(closed_later.enter_context(decode_animated_webp(path, limits, report_progress)), **settings)
        raise BadClip(path, _describe_refusal(path, beginning, error)) from error


def _describe_refusal(path: str | os.PathLike, beginning: bytes, error: Exception) -> str:
    """Why a file is not opened: its format where that is known, or FFmpeg's reason."""
    kind = detect_content_kind(beginning)
    if kind == "html":
        return PAGE
    if kind in OTHER_FORMATS:
        return f"is a {OTHER_FORMATS[kind]}, which is not read: {READ_FORMATS}"
    probed = _find_refused_format(path) if isinstance(error, av.error.ArgumentError) else ""
    if probed:
        return f"seems to be a file of FFmpeg's format {probed}, which is not read: {READ_FORMATS}"
    return f"not a media file that can be read, or cut short ({format_error(error)})"


def _find_refused_format(path: str | os.PathLike) -> str:
    """FFmpeg's name of a format outside `FORMATS`, "" where it says none: only its log has it, nothing is opened."""
    if threading.active_count() > 1:
        return ""  # a decoder that another thread closes would wait for ever for its log to be written
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture(local=False) as lines:
            av.open(f"file:{Path(path)}", container_options=dict(CONTAINER_OPTIONS)).close()
    except (av.error.FFmpegError, OSError, ValueError):
        return next((name for _, name, words in lines if words.startswith("Format not on whitelist")), "")
    finally:
        av.logging.set_level(level)
    return ""


def get_format_name(container: InputContainer) -> str:
    """FFmpeg's name of the format of an open file, "webp" for animated WebP."""
    return container.format.name if container.file is None else "webp"


def is_raw_video(container: InputContainer) -> bool:
    """Whether an open file is video without a container, whose frames have no times."""
    return container.format.name in RAW_VIDEO


def choose_streams(
    container: InputContainer, path: str | os.PathLike, limits: Limits, ids: Collection[int] | None = None
) -> ChosenStreams:
    """Picks FFmpeg's best video and audio stream; pictures attached as cover art are not video.

    `ids`: FFmpeg's ids of the streams to choose from, if not from all.

    Raises:
        BadClip: neither video nor audio, a stream without decoder, or pictures over the limit.
    """
    notes: list[str] = []
    covers = [s for s in container.streams.video if Disposition.attached_pic in s.disposition]
    others = [] if ids is None else [stream for stream in container.streams if stream.id not in ids]
    video = _choose_best(container, "video", [*covers, *others], notes)
    audio = _choose_best(container, "audio", others, notes)
    if covers:
        notes.append(f"{len(covers)} attached picture{'s' * (len(covers) > 1)} (cover art) not read as video")
    if video is None and audio is None:
        raise BadClip(path, "contains neither video nor audio")
    if video is None:
        notes.append(LACKING["video"])
    if audio is None:
        notes.append(LACKING["audio"])
    if video is not None and is_raw_video(container) and video.codec_context is not None:
        stated = video.codec_context.framerate
        source = "as its header states" if stated else "which is assumed: its header states no rate"
        words = f"raw {RAW_VIDEO[container.format.name]} has no times: {float(stated or RAW_RATE):g} frames a second"
        notes.append(f"{words}, {source}")
    chosen = ChosenStreams(video, audio, tuple(notes))
    for stream in container.streams:
        if stream not in chosen.streams:
            stream.discard = Discard.all
    for stream in chosen.streams:
        if stream.codec_context is None:
            raise BadClip(path, f"{stream.type} stream {stream.index}: no decoder for its codec")
    if video is not None:
        limits.check_pixels(path, video.codec_context.width, video.codec_context.height)
        # Pictures may grow within a file: the decoder refuses those before it allocates memory for them.
        video.codec_context.options = {"max_pixels": str(limits.max_pixels)}
    return chosen


def _choose_best(container: InputContainer, kind: str, not_these: list[AvStream], notes: list[str]) -> AvStream | None:
    candidates = [s for s in getattr(container.streams, kind) if s not in not_these]
    if not candidates:
        return None
    best = container.streams.best(kind)
    if best not in candidates:
        best = candidates[0]
    if len(candidates) > 1:
        others = ", ".join(str(s.index) for s in candidates if s is not best)
        notes.append(f"{len(candidates)} {kind} streams: stream {best.index} is read, not {others}")
    return best


def is_index_complete(stream: AvStream) -> bool:
    """Whether the container's index has all packets of a stream, not only those of the fragments read so far."""
    return bool(stream.frames) and len(stream.index_entries) >= stream.frames


def find_index_end(stream: AvStream) -> float:
    """Decoding time of the last packet in the container's index, seconds."""
    return stream.index_entries[len(stream.index_entries) - 1].timestamp * float(stream.time_base)


def read_packets(
    container: InputContainer, streams: list[AvStream], errors: list[str], clock: RisingClock | None = None
) -> Iterator[Packet]:
    """Packets with data of the given streams in file order; ends where the file cannot be read further (`errors`)."""
    position = 0 if is_raw_video(container) else None
    kinds = {stream.index: stream.type for stream in streams}
    try:
        for packet in container.demux(streams):
            report_progress()
            if packet.size:
                if position is not None:
                    packet.pts, packet.dts, position = None, position, position + (packet.duration or 0)
                if clock is not None:
                    clock.place(kinds[packet.stream_index], packet)
                yield packet
    except av.error.FFmpegError as error:
        errors.append(format_error(error))
    except IndexError:
        # PyAV 18.1 flushes streams that appeared while reading, too, which its list of streams does not have.
        return


def get_packet_times(packet: Packet, tick: float) -> tuple[float, float]:
    """Presentation times at which a packet begins and ends, seconds; (-inf, -inf) where it has no time.

    `tick` is the stream's time base as a float: asking every packet for its exact fraction took a tenth of a reading.
    """
    stamp = packet.pts if packet.pts is not None else packet.dts
    if stamp is None:
        return -math.inf, -math.inf
    return stamp * tick, (stamp + (packet.duration or 0)) * tick


def lacks_bytes(stream: AvStream, file_size: int, start: float, end: float) -> bool:
    """Whether the container's index places data of [start, end] container seconds beyond the end of the file."""
    time_base: Fraction = stream.time_base
    low, high = math.floor(start / time_base), math.ceil(end / time_base)
    return any(
        entry.pos + entry.size > file_size and low <= entry.timestamp <= high for entry in stream.index_entries or ()
    )


def format_error(error: Exception) -> str:
    """An FFmpeg error in one short line, without its errno and file name."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())

"""Video packets in, the wanted frames out: skips what is not needed, converts only what is kept."""

import bisect
import math
from collections import deque
from dataclasses import dataclass, field
from fractions import Fraction

import av
import av.error
import numpy as np
from av.packet import Packet
from av.sidedata.sidedata import SideDataContainer
from av.sidedata.sidedata import Type as SideDataType
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import Float64, UInt8

from mirasol.errors import BadClip
from mirasol.media.container import get_packet_times
from mirasol.media.decoded import VideoCounts
from mirasol.media.isolation.shared import allocate_array
from mirasol.media.limits import Limits
from mirasol.media.tone_mapping import get_transfer, map_tones

TIME_TOLERANCE = 1e-6  # seconds: time stamps are rationals, wanted times are floats
MAX_SIDE = 16_384  # pixels of a scaled side: only a picture thousands of times longer than high gets there
FALLBACK_FRAME_SECONDS = 0.04
MANY_STAMPS = 256
HELD_BYTES = 64 * 2**20  # of packets that may turn out not to be needed; beyond that they are decoded
# Decoders that leave out frames which no other frame needs, and know for certain which those are.
SKIPS_UNREFERENCED = ("h264",)
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


@dataclass(frozen=True)
class Orientation:
    """How a stored picture has to be turned to be shown: transposed first, then mirrored."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """Turns [height, width] or [height, width, channel]."""
        if self.transpose:
            picture = picture.swapaxes(0, 1)
        return picture[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]

    @property
    def words(self) -> str:
        """Clockwise turn in degrees, or what else it is."""
        names = {
            (False, False, False): "0 degrees",
            (True, False, True): "90 degrees clockwise",
            (False, True, True): "180 degrees",
            (True, True, False): "270 degrees clockwise",
        }
        return names.get((self.transpose, self.flip_rows, self.flip_columns), "mirrored")


UPRIGHT = Orientation()


def read_orientation(frame: VideoFrame) -> tuple[Orientation, bool]:
    """The orientation that a frame's display matrix asks for, and whether the matrix is a multiple of 90 degrees."""
    # Not frame.side_data: the frame would keep it, a cycle that outlives its decoder until the garbage collector
    # comes by, and memory that comes back so late leaves holes in the heap: some 5 kB a clip.
    side_data = SideDataContainer(frame)
    data = side_data.get(SideDataType.DISPLAYMATRIX) if len(side_data) else None
    if data is None:
        return UPRIGHT, True
    # 3x3 of int32, row vectors: shown x = a x + c y, shown y = b x + d y, both axes pointing right and down.
    a, b, _, c, d = np.frombuffer(bytes(data), "<i4")[:5].tolist()
    turned = abs(b) + abs(c) > abs(a) + abs(d)
    small = abs(a) + abs(d) if turned else abs(b) + abs(c)
    exact = small < 0.01 * (abs(a) + abs(b) + abs(c) + abs(d))
    return (Orientation(True, b < 0, c < 0) if turned else Orientation(False, d < 0, a < 0)), exact


def compute_fitted_size(width: float, height: float, size: int, fit: str) -> tuple[int, int]:
    """Width and height in pixels to which a picture of the given shape is scaled before it is padded or cropped.

    `fit`: one of `mirasol.config.media.FITS`.
    """
    if fit == "stretch":
        return size, size
    scale = size / (max(width, height) if fit == "pad" else min(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def make_alpha_decoder(stream: VideoStream, limits: Limits) -> VideoCodecContext | None:
    """A decoder for VP8 or VP9 whose transparency is stored apart; FFmpeg's own decoders leave it out."""
    name = ALPHA_DECODERS.get(stream.codec_context.name)
    tags = {key.lower(): value for key, value in stream.metadata.items()}
    if name is None or tags.get("alpha_mode") != "1" or name not in av.codecs_available:
        return None
    codec = av.CodecContext.create(name, "r")
    codec.extradata = stream.codec_context.extradata
    codec.thread_count = stream.codec_context.thread_count
    codec.options = {"max_pixels": str(limits.max_pixels)}
    return codec


@dataclass
class FrameSampler:
    """Fills `frames` with the frame on show at each of the ascending `wanted` times (container seconds).

    Feed it the packets of one stream in file order, then `finish`. A frame is on show from its presentation time until
    the next one's; before the first frame the first is used. Packets are held back until it is clear that their group
    of pictures is needed: a group that ends before the next wanted time is dropped undecoded. In a group that is
    needed, frames that are neither wanted nor referenced by others are left out where the decoder can. `count_frames`:
    the stream has no times, so each frame begins where the one before it ends. Without a
    `stream`, `change_stream` has to come first.
    """

    file: object
    stream: VideoStream | None
    wanted: list[float]
    size: int
    fit: str
    limits: Limits
    count_frames: bool = False
    frames: UInt8[np.ndarray, "frame 3 height width"] = field(init=False)
    times: Float64[np.ndarray, " frame"] = field(init=False)
    counts: VideoCounts = field(default_factory=VideoCounts)
    first_time: float | None = None
    last_end: float | None = None
    """End of the last frame shown: its presentation time plus its duration."""
    packets_end: float = -math.inf
    """End of the last packet fed, whether it was decoded or not."""
    failed_end: float = -math.inf
    """End of the last packet that failed to decode."""

    def __post_init__(self):
        self.frames = allocate_array((len(self.wanted), 3, self.size, self.size), np.uint8)
        self.times = np.full(len(self.wanted), math.nan)
        self.orientation: Orientation | None = None
        self.oblique = False
        self.transfer = ""  # of high dynamic range: PQ or HLG
        self.cut_off = True  # reading stops while the video goes on; finish() finds out whether it does
        self.largest_step = 0.0  # seconds between packets that follow each other
        self.packets_fed = 0
        self.latest = -math.inf  # presentation time of the last packet fed
        self._held: deque[tuple[Packet, float]] = deque()  # with their presentation times
        self._held_bytes = 0
        self._stamps: list[float] = []  # presentation times of packets fed, ascending
        self._next = 0  # index of the first wanted time without a frame
        self._shown: VideoFrame | None = None
        self._shown_time = -math.inf
        self._shown_aspect = self.aspect = Fraction(1)  # of the frame on show; of the last one drawn that is not square
        self._reformatter = VideoReformatter()
        self._codec: VideoCodecContext | None = None
        if self.stream is not None:
            self._use_stream(self.stream)

    def _use_stream(self, stream: VideoStream) -> None:
        self.stream = stream
        self._tick = float(self.stream.time_base)
        self._decoding_time = math.inf
        self._codec = make_alpha_decoder(self.stream, self.limits) or self.stream.codec_context
        self._may_skip = self._codec.name in SKIPS_UNREFERENCED
        self._skipping = False
        self._aspect = self.stream.sample_aspect_ratio or Fraction(1)
        rate = self.stream.average_rate or self.stream.guessed_rate
        self._usual_seconds = 1 / float(rate) if rate else FALLBACK_FRAME_SECONDS

    def change_stream(self, stream: VideoStream) -> None:
        """Goes on with another stream, of which all packets to come are: the one before has ended."""
        if not self.done:
            self._decode_held(math.inf)
            self._decode(None)
        self._stamps.clear()
        self._use_stream(stream)

    @property
    def done(self) -> bool:
        return self._next == len(self.wanted)

    @property
    def incomplete(self) -> bool:
        """After `finish`: whether nothing was decoded, or what should follow the last frame shown was not."""
        if self.first_time is None:
            return not self.done
        return not self.cut_off and self.failed_end > self.last_end

    def feed(self, packet: Packet) -> None:
        """Takes the next packet; decodes it now, later or never."""
        self.latest, end = get_packet_times(packet, self._tick)
        self.packets_end = max(self.packets_end, end)
        self.packets_fed += 1
        if self.done:
            return
        target = self.wanted[self._next]
        if packet.is_keyframe and packet.pts is not None and self.latest <= target + TIME_TOLERANCE:
            self._drop_group()
        self._held.append((packet, self.latest))
        self._held_bytes += packet.size
        bisect.insort(self._stamps, self.latest)
        if packet.pts is None or packet.dts is None:
            self._may_skip = False
            self._decode_held(math.inf)
            return
        # Every later packet is shown after this one is decoded, so no later group can hold the wanted frame.
        now = packet.dts * self._tick
        self.largest_step = max(self.largest_step, now - self._decoding_time)
        self._decoding_time = now
        if now > target or self._held_bytes > HELD_BYTES:
            self._decode_held(now)

    def finish(self) -> None:
        """End of the stream: decodes what is still held and shows the last frame from then on."""
        if self.done:
            return
        self._decode_held(math.inf)
        if not self.done:
            self._decode(None)
        if self._shown is not None and not self.done:
            self.cut_off = False
            self._keep_until(math.inf)

    def is_shown_between(self, left: float, right: float) -> bool:
        """Whether any frame of the video was on show during [left, right) container seconds."""
        if self.first_time is None:
            return False
        return left < (math.inf if self.cut_off else self.last_end) and right > self.first_time

    def _drop_group(self) -> None:
        if self._held:
            self.counts.packets_skipped += len(self._held)
            self._held.clear()
            self._held_bytes = 0
            self._stamps.clear()
        if self.counts.packets_skipped:
            self._codec.flush_buffers()

    def _decode_held(self, now: float) -> None:
        """Decodes what is held; `now`: every packet to come is shown at that time or later."""
        while self._held and not self.done:
            packet, time = self._held[0]
            if self._may_skip:
                place = bisect.bisect_right(self._stamps, time)
                following = self._stamps[place] if place < len(self._stamps) else math.inf
                if following > now:
                    return  # a frame in between may still come, so it is not known how long this one is on show
                self._skip_unreferenced(not self._is_wanted(time, following))
            self._held.popleft()
            self._held_bytes -= packet.size
            self._decode(packet)
        if len(self._stamps) > MANY_STAMPS:
            oldest = min((time for _, time in self._held), default=now)
            del self._stamps[: bisect.bisect_left(self._stamps, oldest)]

    def _is_wanted(self, time: float, following: float) -> bool:
        """Whether the frame on show from `time` to `following` is the answer to any wanted time."""
        if self._shown is None:
            return True  # the first frame also answers for the time before it
        place = bisect.bisect_left(self.wanted, time - TIME_TOLERANCE)
        return place < len(self.wanted) and self.wanted[place] < following - TIME_TOLERANCE

    def _skip_unreferenced(self, skip: bool) -> None:
        """Tells the decoder whether to leave out the next frame in case no other frame is predicted from it."""
        if skip != self._skipping:
            self._codec.skip_frame = "NONREF" if skip else "DEFAULT"
            self._skipping = skip

    def _decode(self, packet: Packet | None) -> None:
        if self._codec is None:
            return
        try:
            frames = self._codec.decode(packet)
        except av.error.FFmpegError:
            codec = self._codec
            self.limits.check_pixels(self.file, codec.width, codec.height)  # perhaps it was refused for its size
            # What fails before the window is a decoder warming up after a seek.
            end = math.inf if packet is None else get_packet_times(packet, self._tick)[1]
            self.counts.packets_failed += end > self.wanted[0]
            self.failed_end = max(self.failed_end, min(end, self.packets_end))
            return
        for frame in frames:
            self._show(frame)

    def _show(self, frame: VideoFrame) -> None:
        self.counts.frames_decoded += 1
        seconds = frame.duration * self._tick if frame.duration else self._usual_seconds
        stamp = frame.dts if frame.pts is None else frame.pts
        self.counts.frames_untimed += frame.pts is None
        if self.count_frames:
            stamp = 0 if self.last_end is None else round(self.last_end / self._tick)
        time = self._shown_time + self._usual_seconds if stamp is None else stamp * self._tick
        if not math.isfinite(time):
            time = 0.0
        # Also when it is not kept: frames predicted from it carry the damage on.
        self.counts.frames_corrupt += bool(frame.is_corrupt) and time + seconds > self.wanted[0]
        if time <= self._shown_time:
            self.counts.frames_out_of_order += 1
            return
        if self._shown is not None:
            self._keep_until(time)
        if self.first_time is None:
            self.first_time = time
        self._shown, self._shown_time, self.last_end = frame, time, time + seconds
        self._shown_aspect = self._aspect

    def _keep_until(self, time: float) -> None:
        """Gives the frame on show to every wanted moment before `time`."""
        first = self._next
        while not self.done and self.wanted[self._next] < time - TIME_TOLERANCE:
            self._next += 1
        if self._next > first:
            self._draw(self._shown, self.frames[first])
            self.frames[first + 1 : self._next] = self.frames[first]
            self.times[first : self._next] = self._shown_time
            self.counts.frames_converted += 1

    def _draw(self, frame: VideoFrame, square: UInt8[np.ndarray, "3 height width"]) -> None:
        self.limits.check_pixels(self.file, frame.width, frame.height)
        turn, exact = read_orientation(frame)
        self.orientation, self.oblique = turn, self.oblique or not exact
        self.aspect = self._shown_aspect if self._shown_aspect != 1 else self.aspect
        self.transfer = get_transfer(frame) or self.transfer
        self.counts.frames_interlaced += frame.interlaced_frame
        opaque = composite_on_black(frame)
        self.counts.frames_transparent += opaque is not frame
        draw_square(opaque, square, turn, self.fit, self.file, self._reformatter, float(self._shown_aspect))


def draw_square(
    frame: VideoFrame,
    square: UInt8[np.ndarray, "3 height width"],
    turn: Orientation,
    fit: str,
    file: object,
    reformatter: VideoReformatter,
    aspect: float = 1.0,
) -> None:
    """Scales, turns and fits one frame into a black square: centred, cropped where it is larger.

    `aspect`: width of a pixel over its height. Raises BadClip, naming `file`, for a picture too oblong to be cropped.
    """
    size = square.shape[-1]
    width, height = compute_fitted_size(frame.width * aspect, frame.height, size, fit)
    if max(width, height) > MAX_SIDE:
        raise BadClip(file, f"pictures of {frame.width}x{frame.height} are too oblong to be cropped")
    way = Interpolation.AREA if width <= frame.width and height <= frame.height else Interpolation.BILINEAR
    rows, onto_rows = _centre(width if turn.transpose else height, size)
    columns, onto_columns = _centre(height if turn.transpose else width, size)
    transfer = get_transfer(frame)
    # Planes, not interleaved bytes: swscale makes them faster, and the model wants channels first.
    kind, dtype = ("gbrp16le", np.uint16) if transfer else ("gbrp", np.uint8)
    small = reformatter.reformat(frame, width, height, kind, interpolation=way, threads=1)
    planes = [
        np.frombuffer(plane, dtype).reshape(-1, plane.line_size // dtype().itemsize)[:height, :width]
        for plane in small.planes
    ]
    if transfer:
        green, blue, red = planes
        red, green, blue = map_tones(np.stack([red, green, blue]), transfer, frame.color_primaries)
        planes = [green, blue, red]
    for channel, stored in zip((1, 2, 0), planes, strict=True):
        square[channel, onto_rows, onto_columns] = turn.apply(stored)[rows, columns]


def composite_on_black(frame: VideoFrame) -> VideoFrame:
    """A frame without its transparency, as on a black ground; the same frame if nothing of it is transparent."""
    kind = frame.format
    if not (kind.has_palette or any(component.is_alpha for component in kind.components)):
        return frame
    whole = frame.reformat(format="gbrap", threads=1)
    *colours, alpha = (
        np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width].astype(np.uint16)
        for plane in whole.planes
    )
    if alpha.size == 0 or alpha.min() == 255:
        return frame
    opaque = VideoFrame(frame.width, frame.height, "gbrp")
    for plane, colour in zip(opaque.planes, colours, strict=True):
        room = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        room[: frame.height, : frame.width] = (colour * alpha + 127) // 255
    return opaque


def _centre(length: int, size: int) -> tuple[slice, slice]:
    """Which part of `length` pixels is used, and where it is placed in `size`."""
    kept = min(length, size)
    return slice((length - kept) // 2, (length - kept) // 2 + kept), slice(
        (size - kept) // 2, (size - kept) // 2 + kept
    )

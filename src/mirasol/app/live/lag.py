"""How far decoding is behind a source that goes on by itself, and what is therefore left out."""

import math
import time
from collections.abc import Iterable, Iterator

from av.packet import Packet

from mirasol.media.container import get_packet_times

WAIT_SECONDS = 0.02  # who waits this long for a packet has taken all that the source has sent


class DecodingLag:
    """Measures how far decoding is behind, and chooses the packets of video that are not decoded.

    Behind grows by the seconds that a packet's decoding takes, and shrinks by those that the source goes on; where the
    next packet has to be waited for, nothing is behind. Beyond `most` seconds video is left out, from the end of the
    next whole chunk on, until nothing is behind and a picture can be decoded alone. Sound costs little, and is always
    decoded.
    """

    def __init__(self, most: float):
        self.most = most
        self.behind = 0.0  # seconds
        self.is_leaving_out = False

    def follow(self, packets: Iterable[Packet]) -> Iterator[Packet]:
        """The packets, whose times never jump; what is done with one before the next is asked for is its decoding."""
        latest, began, packets = -math.inf, time.monotonic(), iter(packets)
        while True:
            asked = time.monotonic()
            packet = next(packets, None)
            if packet is None:
                return
            end = get_packet_times(packet, float(packet.time_base))[1]
            waited, progress = time.monotonic() - asked, max(0.0, end - latest) if math.isfinite(end) else 0.0
            self.behind = 0.0 if waited > WAIT_SECONDS else max(0.0, self.behind + asked - began - progress)
            latest = max(latest, end) if math.isfinite(end) else latest
            began = time.monotonic()
            yield packet

    def leaves_out(self, packet: Packet, has_whole_chunk: bool) -> bool:
        """Whether this packet of video, the next one, is not decoded.

        has_whole_chunk: a chunk has become complete since video was left out last: however slow decoding is, it
            comes to something
        """
        if self.is_leaving_out:
            self.is_leaving_out = self.behind > 0.0 or not packet.is_keyframe
        else:
            self.is_leaving_out = self.behind > self.most and has_whole_chunk
        return self.is_leaving_out

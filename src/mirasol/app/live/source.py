"""What can be watched, from what a person writes: a file, a camera, an address or a stream of bytes."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mirasol.errors import UserError, quote_text

Kind = Literal["file", "bytes", "camera", "address"]

# What FFmpeg may open on the way to an address. None of it is a file of this machine: a playlist from elsewhere that
# names one is refused.
WEB = "http,https,httpproxy,tcp,tls,crypto"
PROTOCOLS = {
    "http": WEB,
    "https": WEB,
    "rtsp": "rtsp,rtp,udp,tcp,tls",
    "rtsps": "rtsp,rtp,udp,tcp,tls",
    "rtmp": "rtmp,rtmpt,tcp",
    "rtmps": "rtmps,tls,tcp",
    "srt": "srt,udp",
    "udp": "udp",
    "tcp": "tcp",
}
PLAYLIST_FORMATS = "hls"
WIRE_FORMATS = "rtsp,rtp,sdp,rtcp,mpegts,flv,live_flv"
# Sources of a clock of their own: they go on whether or not somebody keeps up.
UNSTOPPABLE = ("rtsp", "rtsps", "rtmp", "rtmps", "srt", "udp", "tcp")
SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
SCREEN = re.compile(r":\d+(\.\d+)?(\+\d+,\d+)?")
EXAMPLES = "give a file, /dev/video0, an address that begins with rtsp://, http://, udp:// or the like, or - for stdin"


@dataclass(frozen=True)
class LiveSource:
    """Something to watch.

    address: what FFmpeg opens; a path of a file; "" for bytes
    format: FFmpeg's name of the input device or format, "" to find out
    options: for FFmpeg
    """

    kind: Kind
    address: str
    format: str = ""
    options: tuple[tuple[str, str], ...] = ()

    @property
    def scheme(self) -> str:
        """Of an address, in lower case; "" of anything else."""
        found = SCHEME.match(self.address) if self.kind == "address" else None
        return found.group(1).lower() if found else ""

    @property
    def is_unstoppable(self) -> bool:
        """Whether the source goes on while nobody reads it, so that its end is a break, and its clock the wall's."""
        return self.kind == "camera" or self.scheme in UNSTOPPABLE

    @property
    def protocols(self) -> str:
        """FFmpeg's protocols that may be used for it."""
        return "pipe" if self.kind == "bytes" else PROTOCOLS.get(self.scheme, "")

    def __str__(self) -> str:
        return hide_password(self.address) if self.address else "standard input"


def hide_password(address: str) -> str:
    """An address that may be shown: without the name and the password in it."""
    return re.sub(r"(?<=://)[^/@]*@", "***@", address)


def find_source(text: str) -> LiveSource:
    """The source that a person means.

    Raises:
        UserError: no such file or device, or an address of an unknown kind.
    """
    if not text.strip():
        raise UserError(f"SOURCE {quote_text(text)}: is empty: {EXAMPLES}")
    if text == "-":
        return LiveSource("bytes", "")
    if (found := SCHEME.match(text)) is not None:
        return _check_address(text, found.group(1).lower())
    if text.startswith("/dev/"):
        return _find_camera(text)
    if SCREEN.fullmatch(text):
        if sys.platform == "darwin":
            return LiveSource("camera", text, "avfoundation", (("framerate", "30"),))
        return LiveSource("camera", text, "x11grab")
    path = Path(text)
    if not path.exists():
        raise UserError(f"{text}: no such file: {EXAMPLES}")
    if not path.is_file():
        raise UserError(f"{text}: not a file: {EXAMPLES}")
    return LiveSource("file", text)


def _check_address(text: str, scheme: str) -> LiveSource:
    if scheme not in PROTOCOLS:
        raise UserError(f"{hide_password(text)}: addresses of {scheme}:// are not read: use {', '.join(PROTOCOLS)}")
    if not text.split("://", 1)[1].strip("/"):
        raise UserError(f"{text}: names no host: write it as {scheme}://host:port/path")
    # Over UDP a firewall takes part of the stream away; RTSP's own connection has all of it.
    options = (("rtsp_transport", "tcp"),) if scheme.startswith("rtsp") else ()
    return LiveSource("address", text, "", options)


def _find_camera(text: str) -> LiveSource:
    device = Path(text)
    if not device.exists():
        found = ", ".join(str(path) for path in sorted(Path("/dev").glob("video*")))
        raise UserError(f"{text}: no such device: this machine has {found or 'no camera (/dev/video*)'}")
    if not device.is_char_device() or not device.name.startswith("video"):
        raise UserError(f"{text}: not a camera: cameras are /dev/video*")
    return LiveSource("camera", text, "v4l2")

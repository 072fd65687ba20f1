"""Media of other machines: only from hosts that the server's owner names, and never from private addresses.

A name is resolved once, every address it has is checked, and the connection goes to the address that was checked, so
that a name which changes between the two gains nothing. Redirects are checked as the first address was.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import SplitResult, urljoin, urlsplit

from mirasol.app.server.messages import MediaPart, check_type, hash_content
from mirasol.app.server.refusals import Refusal
from mirasol.errors import quote_text

PORTS = {"http": 80, "https": 443}
MOST_REDIRECTS = 3
PIECE = 2**16


class _PinnedConnection(http.client.HTTPConnection):
    """A connection to an address that was checked, whatever its name means by now."""

    def __init__(self, host: str, port: int, address: str, timeout: float, context: ssl.SSLContext | None):
        super().__init__(host, port, timeout=timeout)
        self.address, self.context = address, context

    def connect(self) -> None:
        self.sock = socket.create_connection((self.address, self.port), self.timeout)
        if self.context is not None:
            self.sock = self.context.wrap_socket(self.sock, server_hostname=self.host)


def fetch_part(
    url: str, kind: str, allowed: tuple[str, ...], most: int, seconds: float, param: str = "messages"
) -> MediaPart:
    """The content of an http(s) URL as a part of a clip.

    allowed: hosts, `name` for the usual ports or `name:port`. most: bytes. seconds: for all of it.

    Raises:
        Refusal: 400 for another scheme, host or address; 408, 413, 415; 422 where the host does not give the file.
    """
    deadline = time.monotonic() + seconds
    for _ in range(MOST_REDIRECTS + 1):
        parts = check_url(url, allowed, param)
        response, connection = _open(parts, deadline, param)
        with contextlib.closing(connection):
            if response.status in (301, 302, 303, 307, 308):
                url = urljoin(url, response.headers.get("location") or "")
                continue
            if response.status != 200:
                raise Refusal(422, f"{parts.hostname} answered {response.status}", "fetch_failed", param)
            check_type(response.headers.get("content-type") or "application/octet-stream", param)
            content = _read(response, most, deadline, param)
        return MediaPart(kind, hash_content([content]), content)
    raise Refusal(422, f"more than {MOST_REDIRECTS} redirects", "fetch_failed", param)


def check_url(url: str, allowed: tuple[str, ...], param: str) -> SplitResult:
    """The parts of a URL. Raises Refusal (400) unless it is http(s), of an allowed host and without a password."""
    try:
        parts = urlsplit(url)
        port = parts.port
        is_usable = parts.scheme in PORTS and bool(parts.hostname) and url.isascii() and url.isprintable()
    except ValueError:
        parts, is_usable, port = urlsplit(""), False, None
    if not is_usable or " " in url:
        raise Refusal(400, f"{quote_text(url[:200])}: give a data URL, or http(s)", "invalid_url", param)
    if parts.username is not None or parts.password is not None:
        raise Refusal(400, "a URL with a user name or password is not fetched", "invalid_url", param)
    usual = port is None or port == PORTS[parts.scheme]
    names = {f"{parts.hostname}:{port or PORTS[parts.scheme]}", *([parts.hostname] if usual else [])}
    if not names & {name.lower() for name in allowed}:
        host = quote_text(parts.hostname)
        raise Refusal(400, f"{host}: media of this host are not fetched: send a data URL", "host_not_allowed", param)
    return parts


def find_address(host: str, port: int, param: str) -> str:
    """The address to connect to. Raises Refusal: 400 if any of the host's addresses is not public, 422 for no host."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Refusal(422, f"{quote_text(host)}: this host is not found", "fetch_failed", param) from error
    addresses = [entry[4][0] for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise Refusal(400, f"{quote_text(host)}: has an address that is not public", "host_not_allowed", param)
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an address is one of the public Internet, also where it stands for another one inside it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def _open(parts: SplitResult, deadline: float, param: str) -> tuple[http.client.HTTPResponse, _PinnedConnection]:
    host, port = parts.hostname, parts.port or PORTS[parts.scheme]
    context = ssl.create_default_context() if parts.scheme == "https" else None
    address = find_address(host, port, param)
    connection = _PinnedConnection(host, port, address, _left(deadline, param), context)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        # No compression: what arrives is what is counted.
        connection.request("GET", path, headers={"Accept-Encoding": "identity", "User-Agent": "mirasol"})
        return connection.getresponse(), connection
    except (OSError, http.client.HTTPException, ValueError) as error:
        connection.close()
        raise Refusal(422, f"{quote_text(host)}: cannot be fetched", "fetch_failed", param) from error


def _read(response: http.client.HTTPResponse, most: int, deadline: float, param: str) -> bytes:
    content = bytearray()
    try:
        while piece := response.read1(PIECE):
            content += piece
            if len(content) > most:
                raise Refusal(413, f"a file of more than {most} bytes", "too_large", param)
            _left(deadline, param)
    except (OSError, http.client.HTTPException) as error:
        raise Refusal(422, "the connection broke off while the file was fetched", "fetch_failed", param) from error
    if not content:
        raise Refusal(422, "the file is empty", "fetch_failed", param)
    return bytes(content)


def _left(deadline: float, param: str) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise Refusal(408, "fetching the file took too long", "timeout", param)
    return left

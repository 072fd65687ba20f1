"""Requests that no client would send, the same for the same seed: bytes, JSON, media, forms, WebSocket frames."""

import base64
import contextlib
import json
import os
import random
import re
import socket
from typing import Any

ODD_VALUES = [
    None, True, False, 0, -1, 1, 2**63, 10**400, 0.5, 1e308, "", "x", "\x00", "\ud800", "é" * 300, "a" * 5000, [], {},
    [[]], [None], {"type": "text"}, {"url": "x"}, "file:///etc/passwd", "http://127.0.0.1:1/x", "http://[::1]/",
    "data:video/mp4;base64,AAAA", "data:,", "../../../etc/passwd", "file-" + "0" * 32, "tiny",
]  # fmt: skip
ODD_NAMES = ["n", "stream", "stop", "seed", "tools", "messages", "model", "role", "content", "type", "\x00", "a" * 999]
ODD_HEADERS = [
    "content-length: -1", "content-length: 5", "content-length: 99999999999", "transfer-encoding: chunked",
    "transfer-encoding: gzip", "content-encoding: br", "expect: 100-continue", "connection: close", "origin: null",
    "host: a, b", "x: " + "y" * 9000, "content-type: text/xml", "upgrade: websocket", "cookie: \x80\xff",
    "authorization",
]  # fmt: skip
PATHS = [
    "/v1/chat/completions", "/v1/score", "/v1/files", "/v1/files/../../etc/passwd", "/v1/files/%2e%2e%2fpasswd", "/",
    "/v1/models", "/v1/models/%00", "/v1/realtime", "/v1/files/file-" + "a" * 32, "//", "/metrics", "/v1//models", "*",
    "http://other/v1/models", "/v1/files?limit=x",
]  # fmt: skip
EVENTS = ["media.append", "frames.append", "audio.append", "media.end", "question.ask"]


class Fuzzer:
    """Draws requests of one seed, about a clip that may be asked about."""

    def __init__(self, seed: int, clip: bytes, number: str):
        self.draw, self.clip, self.number = random.Random(seed), clip, number

    def make_body(self) -> dict[str, Any]:
        """A request that is right."""
        content = [{"type": "text", "text": "what plays?"}, {"type": "file", "file": {"file_id": self.number}}]
        if self.draw.random() < 0.1:
            url = f"data:video/mp4;base64,{base64.b64encode(self.spoil(self.clip)).decode()}"
            content[1] = {"type": "video_url", "video_url": {"url": url}}
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 2}
        return body | ({"candidates": ["a", "b"]} if self.draw.random() < 0.2 else {})

    def change(self, value: Any, chance: float = 0.12) -> Any:
        """The value with parts of it replaced, renamed, repeated or left out."""
        if self.draw.random() < chance:
            return self.draw.choice(ODD_VALUES)
        if isinstance(value, dict):
            changed = {self.rename(name): self.change(each) for name, each in value.items()}
            return {name: each for name, each in changed.items() if self.draw.random() > 0.03}
        if isinstance(value, list):
            return [self.change(each) for each in value for _ in range(1 + (self.draw.random() < 0.05))]
        return value

    def rename(self, name: str) -> str:
        return self.draw.choice(ODD_NAMES) if self.draw.random() < 0.05 else name

    def spoil(self, content: bytes) -> bytes:
        """The bytes with some of them changed, left out, or others put in."""
        spoilt = bytearray(content)
        for _ in range(self.draw.randint(1, 8)):
            if not spoilt:
                break
            place, length = self.draw.randrange(len(spoilt)), self.draw.randint(1, 40)
            kind = self.draw.randrange(4)
            if kind == 0:
                spoilt[place] = self.draw.randrange(256)
            elif kind == 1:
                del spoilt[place : place + length]
            elif kind == 2:
                spoilt[place:place] = self.draw.randbytes(length)
            else:
                del spoilt[place:]
        return bytes(spoilt)

    def make_json_request(self) -> bytes:
        """A body that was changed, or whose bytes were."""
        body = json.dumps(self.change(self.make_body())).encode()
        if self.draw.random() < 0.3:
            body = self.spoil(body)
        path = "/v1/score" if b"candidates" in body else "/v1/chat/completions"
        return self.wrap(path, body, "application/json")

    def make_form_request(self) -> bytes:
        """An upload whose form or whose file was changed."""
        name = self.draw.choice(["clip.mp4", "../../../tmp/evil", "a\x00b", "x" * 5000, 'q"q', "é"])
        clip = self.spoil(self.clip) if self.draw.random() < 0.2 else self.draw.randbytes(200)
        head = f'content-disposition: form-data; name="file"; filename="{name}"\r\ncontent-type: video/mp4'.encode()
        body = b"--edge\r\n" + head + b"\r\n\r\n" + clip + b"\r\n--edge--\r\n"
        if self.draw.random() < 0.7:
            body = self.spoil(body[:200]) + body[200:]
        return self.wrap("/v1/files", body, "multipart/form-data; boundary=edge")

    def make_wire_request(self) -> bytes:
        """A request with an odd head, cut or spoilt."""
        method = self.draw.choice(["GET", "POST", "DELETE", "PUT", "HEAD", "OPTIONS", "get", "X" * 300, "\x00"])
        headers = self.draw.sample(ODD_HEADERS, self.draw.randint(0, 3))
        lines = [f"{method} {self.draw.choice(PATHS)} HTTP/1.{self.draw.choice('0119')}", "host: localhost", *headers]
        request = "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + self.draw.randbytes(
            self.draw.randint(0, 9)
        )
        return self.spoil(request) if self.draw.random() < 0.5 else request

    def wrap(self, path: str, body: bytes, kind: str) -> bytes:
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\nconnection: close\r\n"
        return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body

    def make_request(self) -> bytes:
        """Any of them."""
        makers = [self.make_json_request, self.make_json_request, self.make_form_request, self.make_wire_request]
        return self.draw.choice(makers)()

    def make_messages(self) -> list[str | bytes]:
        """What a realtime session is sent."""
        messages: list[str | bytes] = []
        for _ in range(self.draw.randint(1, 6)):
            event = {
                "type": self.draw.choice(EVENTS), "media": base64.b64encode(self.spoil(self.clip[:3000])).decode(),
                "audio": "AAAA" * self.draw.randint(1, 90), "rate": 16000, "time": self.draw.choice([0, 0.1, 1, 9]),
                "width": 2, "height": 2, "pixels": "AAAA" * 4, "question": "what plays?", "id": "x",
            }  # fmt: skip
            if event["type"] == "question.ask":
                event = {name: event[name] for name in ("type", "question", "id")}
            text = json.dumps(self.change(event, 0.05))
            messages.append(self.spoil(self.clip[:5000]) if self.draw.random() < 0.2 else text)
        return messages


def send(port: int, request: bytes, seconds: float = 120.0) -> int | None:
    """The status that a request is answered with; None where the connection is closed without one."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        found = b""
        with contextlib.suppress(ConnectionError):
            connection.sendall(request)
            while len(found) < 2**20 and (piece := connection.recv(65536)):
                found += piece
    status = re.match(rb"HTTP/1\.[01] (\d+)", found)
    return int(status[1]) if status else None


def send_frames(port: int, seed: int) -> None:
    """A WebSocket whose frames are bytes at random, once it is open."""
    draw = random.Random(seed)
    key = base64.b64encode(draw.randbytes(16)).decode()
    head = "GET /v1/realtime HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    head += f"sec-websocket-key: {key}\r\nsec-websocket-version: 13\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection, contextlib.suppress(OSError):
        connection.sendall(head.encode())
        connection.recv(4096)
        first = bytes([draw.choice([0x81, 0x82, 0x01, 0x80, 0x88, 0x89, 0xFF]), draw.choice([0x85, 0xFE, 0xFF, 5, 0])])
        connection.sendall(first + draw.randbytes(draw.randint(0, 200)))
        if draw.random() < 0.5:
            connection.recv(4096)


def count_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))

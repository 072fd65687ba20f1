"""Who may ask, how much, how slowly, and how many at a time."""

import base64
import contextlib
import json
import re
import socket
import time

import pytest
from serving import file, serve, text, wait_until

from mirasol.app.server.clips import EncodedClip, LatentMemory
from mirasol.app.server.guard import KEY_PROTOCOL, check_key, check_origin
from mirasol.app.server.refusals import Refusal
from mirasol.app.server.settings import Caps, ServerSettings
from mirasol.errors import UserError

KEY = "a key of many letters"


def raw(served, *pieces: bytes, wait: float = 0.0) -> bytes:
    """What the server answers to bytes on a connection, until it closes it."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        with contextlib.suppress(BrokenPipeError):
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(wait)
        return receive(connection)


def receive(connection: socket.socket) -> bytes:
    """An answer with its body; nothing where the connection is closed."""
    found = b""
    while piece := connection.recv(65536):
        found += piece
        before, end, body = found.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", before)
        if end and length and len(body) >= int(length[1]):
            break
    return found


def head(path: str, *headers: str, method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: localhost", *headers, "", ""]).encode()


def test_without_a_key_only_this_machine_may_ask():
    for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
        assert ServerSettings(host=host).is_local
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(UserError, match="--api-key, or --insecure"):
            ServerSettings(host=host)
        assert not ServerSettings(host=host, api_key=KEY).is_local
        ServerSettings(host=host, insecure=True)
    with pytest.raises(UserError, match="16 characters"):
        ServerSettings(api_key="short")
    with pytest.raises(UserError, match="--max-open 0"):
        Caps(max_open=0)


def test_the_key_is_asked_for(answerer):
    with serve(ServerSettings(api_key=KEY), answerer) as served:
        assert served.client.get("/v1/models").status_code == 200
        for headers in ({"authorization": "Bearer wrong"}, {"authorization": KEY}, {"authorization": "Bearer é"}):
            answer = served.client.get("/v1/models", headers={k: v.encode() for k, v in headers.items()})
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert served.client.get("/metrics", headers={"authorization": ""}).status_code == 401
        assert served.client.get("/healthz", headers={"authorization": ""}).status_code == 200
        # With a key it does not matter by which name the server was called.
        assert served.client.get("/v1/models", headers={"host": "ask.example.org"}).status_code == 200
    check_key({"sec-websocket-protocol": f"realtime, {KEY_PROTOCOL}{KEY}"}, KEY)
    with pytest.raises(Refusal):
        check_key({"sec-websocket-protocol": f"realtime, {KEY_PROTOCOL}{KEY}x"}, KEY)


def test_browsers_are_asked_for_the_key(answerer):
    """As a password, with any name, even with colons in it or in letters of any language."""

    def make_headers(credentials: bytes) -> dict[str, str]:
        return {"authorization": f"Basic {base64.b64encode(credentials).decode()}"}

    for name in ("", "me", "Zoë"):
        check_key(make_headers(f"{name}:{KEY}".encode()), KEY)
    check_key(make_headers(b"me:sixteen: letters:"), "sixteen: letters:")
    for wrong in (KEY.encode(), b"me:" + KEY.encode() + b"x", b"me:", b"\xff:\xff", b""):
        with pytest.raises(Refusal):
            check_key(make_headers(wrong), KEY)
    with pytest.raises(Refusal):
        check_key({"authorization": "Basic $$$"}, KEY)
    with serve(ServerSettings(api_key=KEY), answerer) as served:
        asked = served.client.get("/v1/models", headers={"authorization": ""}).headers["www-authenticate"]
        assert asked.startswith("Basic realm=")
        assert served.client.get("/v1/models", headers=make_headers(f"me:{KEY}".encode())).status_code == 200


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "evil.example"}, "wrong_host"),
        ({"host": "localhost:8000", "origin": "http://evil.example"}, "wrong_origin"),
        ({"host": "localhost:8000", "origin": "null"}, "wrong_origin"),
        ({"host": "localhost:8000", "origin": "http://localhost:9000"}, "wrong_origin"),
        ({"host": "["}, "wrong_host"),
        ({"host": "localhost:8000", "origin": "http://["}, "wrong_origin"),
        ({}, "wrong_host"),
    ],
)
def test_pages_of_other_sites_are_refused(headers, code):
    """Cross-site requests, and names that were made to mean 127.0.0.1."""
    with pytest.raises(Refusal) as refused:
        check_origin(headers, True, ())
    assert (refused.value.status, refused.value.code) == (400, code)


def test_its_own_page_and_its_names_are_not():
    check_origin({"host": "localhost:8000", "origin": "http://localhost:8000"}, True, ())
    check_origin({"host": "[::1]:8000"}, True, ())
    check_origin({"host": "ask.example.org", "origin": "https://ask.example.org"}, True, ("ask.example.org",))


def test_large_and_odd_bodies_are_refused(served):
    limit = served.service.settings.caps.max_body
    for answer, status in [
        (raw(served, head("/v1/score", f"content-length: {limit + 1}")), 413),
        (raw(served, head("/v1/score", "content-length: 99999999999999999999")), 413),
        (raw(served, head("/v1/score", "content-length: 2", "content-encoding: gzip"), b"{}"), 415),
        (raw(served, head("/v1/score", "content-length: x")), 400),
    ]:
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    # Without an announcement the bytes are counted.
    chunk = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
    answer = raw(
        served, head("/v1/score", "transfer-encoding: chunked", "content-type: application/json"), *[chunk] * 9
    )
    assert answer.startswith(b"HTTP/1.1 413 ") and b"exceeds the limit" in answer
    for content, status in [(b"", 400), (b"[" * 10**6, 400), (b'"\xff"', 400), (b"9" * 10**5, 400), (b"[]", 400)]:
        answer = served.client.post("/v1/score", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == status, answer.text
    assert served.client.post("/v1/score", content=b"{}").status_code == 415
    wait_until(lambda: served.service.open == served.service.body_bytes == 0)


def test_slow_requests_are_given_up(served):
    slow = raw(served, head("/v1/score", "content-type: application/json", "content-length: 100"), b"{")
    assert slow.startswith(b"HTTP/1.1 408 ")
    started = head("/v1/score", "content-type: application/json", "content-length: 1000")
    trickled = raw(served, started, *[b" "] * 9, wait=0.3)  # never idle, but not done in time
    assert trickled.startswith(b"HTTP/1.1 408 ")
    assert raw(served, b"POST /v1/score HTT") == b""  # a head that never ends
    assert served.is_fine()


def test_open_requests_are_counted(answerer):
    caps = Caps(max_open=2, max_idle=20.0)
    with serve(ServerSettings(caps=caps), answerer) as served:
        waiting = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(2)]
        for connection in waiting:
            connection.sendall(head("/v1/score", "content-type: application/json", "content-length: 9"))
        wait_until(lambda: served.service.open == 2)
        answer = served.client.get("/v1/models")
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert served.is_fine()
        for connection in waiting:
            connection.close()
        wait_until(lambda: not served.service.open)
        assert served.client.get("/v1/models").status_code == 200


def test_connections_are_counted(answerer):
    with serve(ServerSettings(caps=Caps(max_connections=3)), answerer) as served:
        idle = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(3)]
        wait_until(lambda: len(served.server.server_state.connections) == 3)
        assert raw(served).startswith(b"HTTP/1.1 503 ")
        for connection in idle:
            connection.close()


def test_a_server_that_is_told_to_stop_finishes_what_is_open(answerer, clips):
    """What came before is answered, what comes after is refused, then it ends."""
    with serve(ServerSettings(), answerer) as served:
        number = served.upload(clips[0]).json()["id"]
        wait_until(lambda: not served.service.open)  # the upload's answer comes before its end
        body = json.dumps({"messages": [{"role": "user", "content": [file(number), text("what plays?")]}]}).encode()
        start = head(
            "/v1/chat/completions",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
        )
        with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
            connection.sendall(start)
            wait_until(lambda: served.service.open)
            served.server.handle_exit(15, None)
            assert served.client.get("/v1/models").status_code == 503
            assert served.client.get("/healthz").json() == {"status": "stopping"}
            connection.sendall(body)
            found = receive(connection)
        assert found.startswith(b"HTTP/1.1 200 ")
        folder = served.service.folder
        served.thread.join(30)
        assert not folder.exists()


def test_latents_are_counted_exactly_and_the_oldest_go(served):
    import torch

    from mirasol.model.outputs import MirasolEncoderOutput

    def clip(latents: int) -> EncodedClip:
        encoded = MirasolEncoderOutput(torch.zeros(1, latents, 96), torch.ones(1, latents, dtype=torch.bool))
        return EncodedClip(encoded, 1.0, 1, (), None)

    size = clip(8).nbytes
    assert size == 8 * 96 * 4 + 8
    memory = LatentMemory(3 * size)
    for name in "abc":
        memory.put(name, clip(8))
    memory.get("a")  # used now: b is the oldest
    memory.put("d", clip(8))
    assert [memory.get(name) is not None for name in "abcd"] == [True, False, True, True]
    memory.put("d", clip(16))
    assert memory.nbytes == sum(memory.get(name).nbytes for name in "cd") <= memory.most and len(memory) == 2
    memory.put("e", clip(100))
    assert memory.get("e") is None and len(memory) == 2
    for name in "cd":
        memory.drop(name)
    assert memory.nbytes == 0

"""What untrusted clients and broken helpers do to a server: one answer each, never a 500, nothing left behind."""

import base64
import contextlib
import gc
import json
import os
import random
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from request_fuzzing import Fuzzer, count_open_files, send, send_frames
from serving import file, make_data_url, serve, text, video, wait_until
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from mirasol.app.server import fetching
from mirasol.app.server.fetching import check_url, fetch_part, find_address, is_public
from mirasol.app.server.refusals import Refusal
from mirasol.app.server.settings import Caps, ServerSettings
from mirasol.media.isolation import decoders


def test_names_of_files_are_never_paths(served, clips):
    before = set(Path(served.service.folder.parent).glob("*.mp4"))
    number = served.upload(clips[0], name="../../../tmp/evil\x00.mp4").json()["id"]
    names = [path.name for path in served.service.folder.iterdir()]
    assert all(re.fullmatch(r"file-[0-9a-f]{32}", name) for name in names) and number in names
    assert set(Path(served.service.folder.parent).glob("*.mp4")) == before
    for wrong in ("../" + number, number + "/..", "%2e%2e", "file-" + "Z" * 32, number.upper()):
        assert (
            send(
                served.port, f"GET /v1/files/{wrong} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
            )
            == 404
        )
        assert served.ask([file(wrong), text("what plays?")]).status_code == 404
    assert os.stat(served.service.folder).st_mode & 0o077 == 0
    assert served.client.delete(f"/v1/files/{number}").status_code == 200


def test_bombs_are_refused(answerer, clips, tmp_path):
    """Small files that would be large, and long ones."""
    caps = Caps(max_pixels=10**5, max_seconds=2.0, max_body=10**6, max_stored=2 * 10**5)
    with serve(ServerSettings(caps=caps), answerer) as served:
        Image.new("1", (4000, 4000)).save(tmp_path / "large.png")
        picture = {"type": "image_url", "image_url": {"url": make_data_url(tmp_path / "large.png", "image/png")}}
        answer = served.ask([picture, text("what?")])
        assert answer.status_code == 422 and "4000x4000" in answer.json()["error"]["message"]
        answer = served.ask([video(clips[0]), text("what?")])
        assert answer.status_code == 422 and "exceeds the limit of 2 s" in answer.json()["error"]["message"]
        assert "Python" not in answer.json()["error"]["message"]
        (tmp_path / "full.mp4").write_bytes(bytes(3 * 10**5))
        assert served.upload(tmp_path / "full.mp4").status_code == 413
        many = json.dumps({str(number): None for number in range(50_000)})
        headers = {"content-type": "application/json"}
        assert served.client.post("/v1/score", content=many, headers=headers).status_code == 400
        assert served.service.files.nbytes == 0 and not list(served.service.folder.iterdir())


def test_a_server_whose_decoders_are_killed_keeps_serving(served, clips):
    """One that is killed at work is tried once more; a second time is the file's own affair."""
    done, draw = threading.Event(), random.Random(2)

    def kill() -> None:
        while not done.wait(0.05 + 0.2 * draw.random()):
            for decoder in list(decoders._pool.all):
                if decoder.alive:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(decoder.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        statuses = []
        for number in range(6):  # each another file, so that each is decoded
            statuses.append(served.ask(ask_about_another(clips[0], number)).status_code)
    finally:
        done.set()
        killer.join()
    assert set(statuses) <= {200, 422, 503}
    assert served.ask(ask_about_another(clips[0], 99)).status_code == 200


def ask_about_another(clip: Path, number: int) -> list:
    """A question about the same video with other bytes after its end."""
    free = (16 + number).to_bytes(4, "big") + b"free" + bytes(8 + number)
    data = base64.b64encode(clip.read_bytes() + free).decode()
    return [{"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}, text("what plays?")]


def test_clients_that_leave_cost_nothing_more(served, clips):
    number = served.upload(clips[1]).json()["id"]
    body = {"messages": [{"role": "user", "content": [file(number), text("what plays?")]}], "stream": True}
    before = count_open_files()
    for _ in range(5):
        with served.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200  # and is not read
    wait_until(lambda: served.service.open == 0)
    wait_until(lambda: not served.answerer.run(lambda: len(served.answerer.batch)).result(60))
    assert count_open_files() <= before + 1


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1", "::1", "fe80::1",
     "fc00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "::", "255.255.255.255"],
)  # fmt: skip
def test_private_addresses_are_not_public(address):
    assert not is_public(address)


def test_public_addresses_are():
    assert is_public("93.184.216.34") and is_public("2606:2800:220:1:248:1893:25c8:1946")


@pytest.mark.parametrize(
    "url",
    ["ftp://media.example/a", "http://other.example/a", "http://media.example:81/a", "http://u:p@media.example/a", "http://",
     "http://media.example /a", "http://media.example\n/a", "//media.example/a", "http://media.example.evil/a", "gopher://x"],
)  # fmt: skip
def test_other_addresses_are_not_fetched(url):
    with pytest.raises(Refusal) as refused:
        check_url(url, ("media.example", "media.example:8080"), "messages")
    assert refused.value.status == 400
    assert check_url("http://media.example:8080/a", ("media.example:8080",), "messages")


def test_a_host_with_a_private_address_is_not_asked(monkeypatch):
    found = [(2, 1, 6, "", ("93.184.216.34", 80)), (2, 1, 6, "", ("10.0.0.1", 80))]
    monkeypatch.setattr(fetching.socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(Refusal, match="not public"):
        find_address("media.example", 80, "messages")


def test_files_of_an_allowed_host_are_fetched_from_the_address_that_was_checked(monkeypatch, clips, tmp_path):
    """Its redirects lead to allowed hosts only; what is too large or of another kind is refused."""
    import http.server

    class Host(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/away":
                self.send_response(302)
                self.send_header("location", "http://other.example/clip.mp4")
                self.end_headers()
                return
            if self.path == "/round":
                self.send_response(302)
                self.send_header("location", "/round")
                self.end_headers()
                return
            content = clips[0].read_bytes()
            self.send_response(200)
            self.send_header("content-type", "text/html" if self.path == "/page" else "video/mp4")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=host.serve_forever, daemon=True).start()
    port = host.server_address[1]
    allowed = (f"media.example:{port}",)
    base = f"http://media.example:{port}"
    asked = []
    known = [(2, 1, 6, "", ("127.0.0.1", port))]
    monkeypatch.setattr(fetching.socket, "getaddrinfo", lambda name, *_, **__: (asked.append(name), known)[1])
    with pytest.raises(Refusal, match="not public"):
        fetch_part(f"{base}/clip.mp4", "video", allowed, 10**7, 20.0)
    monkeypatch.setattr(fetching, "is_public", lambda _: True)
    asked.clear()
    assert fetch_part(f"{base}/clip.mp4", "video", allowed, 10**7, 20.0).content == clips[0].read_bytes()
    assert asked[0] == "media.example"
    room = 10**7
    for path, most, status in [("/away", room, 400), ("/round", room, 422), ("/page", room, 415), ("/clip", 99, 413)]:
        with pytest.raises(Refusal) as refused:
            fetch_part(base + path, "video", allowed, most, 20.0)
        assert refused.value.status == status, path
    host.shutdown()
    host.server_close()


def fuzz(served, clip: Path, seed: int, count: int) -> dict[int | None, int]:
    """How often each status was the answer to requests of the seed."""
    number = served.upload(clip).json()["id"]
    content, statuses = clip.read_bytes(), {}

    def ask(place: int) -> int | None:
        fuzzer = Fuzzer(seed * 10**6 + place, content, number)
        if place % 25 == 3:
            send_frames(served.port, place)
            return None
        if place % 25 == 4:
            with (
                contextlib.suppress(WebSocketException, OSError),
                connect(f"ws://127.0.0.1:{served.port}/v1/realtime", close_timeout=5) as session,
            ):
                for message in fuzzer.make_messages():
                    session.send(message)
            return None
        return send(served.port, fuzzer.make_request())

    with ThreadPoolExecutor(4) as pool:
        for status in pool.map(ask, range(count)):
            statuses[status] = statuses.get(status, 0) + 1
    return statuses


ALLOWED = {None, 101, 200, 400, 401, 404, 408, 413, 415, 422, 429, 503}


def check_nothing_is_left(served, files: int, threads: int) -> None:
    wait_until(lambda: served.service.open == served.service.sessions == served.service.body_bytes == 0)
    wait_until(lambda: len(served.server.server_state.connections) <= 1)
    gc.collect()
    assert served.is_fine()
    assert not [line for line in served.lines if line["event"] == "bug"]
    assert count_open_files() <= files + 12 and threading.active_count() <= threads + 8
    stored = {each.path.name for each in served.service.files.list()}
    assert {path.name for path in served.service.folder.iterdir()} == stored


def test_fuzzed_requests_get_an_answer_each(served, clips):
    served.ask([video(clips[2]), text("what plays?")])
    files, threads = count_open_files(), threading.active_count()
    statuses = fuzz(served, clips[2], 1, 120)
    assert set(statuses) <= ALLOWED, statuses
    assert statuses[400] > 20 and statuses.get(200, 0) > 0, statuses
    check_nothing_is_left(served, files, threads)


@pytest.mark.slow
def test_ten_thousand_fuzzed_requests(served, clips):
    """Memory: 64 MiB more after the last nine thousand than after the first would be a leak of 7 kB a request."""
    fuzz(served, clips[2], 2, 1000)
    files, threads = count_open_files(), threading.active_count()
    before = int(Path("/proc/self/statm").read_text().split()[1])
    statuses = fuzz(served, clips[2], 3, 9000)
    assert set(statuses) <= ALLOWED, statuses
    check_nothing_is_left(served, files, threads)
    grown = (int(Path("/proc/self/statm").read_text().split()[1]) - before) * os.sysconf("SC_PAGE_SIZE")
    assert grown < 64 * 2**20, f"{grown / 2**20:.0f} MiB"

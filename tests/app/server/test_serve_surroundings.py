"""Where docs/serving.md puts a server: behind nginx, and in a sandbox like that of its container."""

import getpass
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from serving import serve, text, video
from test_serve_realtime import make_webm
from websockets.sync.client import connect

from mirasol.app.server.running import open_socket
from mirasol.app.server.settings import ServerSettings

REPOSITORY = Path(__file__).parents[3]
PAGE = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
QUESTION = "which shape is seen last?"
KEPT = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")  # what nginx keeps files of

# A file system that cannot be written to but for /tmp, no capabilities, no network but loopback; then the program.
SANDBOX = """
mkdir -p "$1" && mount --rbind / "$1" && mount -o remount,bind,ro "$1" && mount -t tmpfs tmpfs "$1/tmp" || exit 99
ip link set lo up || exit 99
cd "$1/tmp" && exec chroot "$1" setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "${@:2}"
"""
INSIDE = """
import json, os, pathlib, subprocess, sys, urllib.error, urllib.request
os.chdir("/tmp")
try:
    pathlib.Path(sys.argv[1], "written").touch()
    sys.exit("the file system can be written to")
except OSError:
    pass
server = subprocess.Popen([sys.executable, "-m", "mirasol.cli", "serve", "tiny"], stderr=subprocess.PIPE, text=True)
assert "/v1" in server.stderr.readline()
request = urllib.request.Request("http://127.0.0.1:8000/v1/chat/completions", sys.stdin.buffer.read())
request.add_header("content-type", "application/json")
answer = json.load(urllib.request.urlopen(request, timeout=120))["choices"][0]["message"]["content"]
server.terminate()
server.communicate(timeout=60)
print(json.dumps([answer, server.returncode]))
"""


def make_body(clip: Path) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": [video(clip), text(QUESTION)]}]}).encode()


def test_who_connects_before_the_server_runs_waits(answerer):
    """The address is told once it can be connected to."""
    with (
        open_socket("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname(), timeout=5) as early,
    ):
        assert early.getpeername() == listening.getsockname()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="not shown: that a server runs as in its container")
def test_it_runs_read_only_and_without_network(clips, tmp_path, answer_alone):
    command = ["unshare", "--user", "--map-root-user", "--mount", "--net", "bash", "-c", SANDBOX, "bash"]
    inside = [sys.executable, "-c", INSIDE, str(REPOSITORY)]
    environment = {
        "PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "PYTHONPATH": str(REPOSITORY / "src"), "HOME": "/nonexistent",
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": "/tmp", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [*command, str(tmp_path / "root"), *inside], input=make_body(clips[0]), capture_output=True, env=environment
    )
    if done.returncode == 99 or b"unshare" in done.stderr:
        pytest.skip(f"this system lets nobody make the sandbox: {done.stderr.decode()[:200]}")
    assert done.returncode == 0, done.stderr.decode()
    answer, code = json.loads(done.stdout)
    assert answer and code == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nginx") is None, reason="not shown: that the lines for nginx work")
def test_it_answers_behind_nginx(answerer, clips, tmp_path):
    """Its own configuration of the page; a question, one that is streamed, and a session."""
    (location,) = re.findall(r"^location / \{\n.*?^\}\n", PAGE, re.DOTALL | re.MULTILINE)
    with open_socket("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    with serve(ServerSettings(), answerer) as served:
        places = "".join(
            f"{name}_temp_path {tmp_path};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        here = location.replace("127.0.0.1:8000", f"127.0.0.1:{served.port}")
        (tmp_path / "nginx.conf").write_text(
            f"daemon off;\nuser {getpass.getuser()};\npid {tmp_path}/pid;\nerror_log stderr;\nevents {{}}\n"
            f"http {{\naccess_log off;\n{places}server {{\nlisten 127.0.0.1:{port};\n{here}}}\n}}\n"
        )
        with subprocess.Popen(["nginx", "-p", str(tmp_path), "-c", "nginx.conf"], stderr=subprocess.PIPE) as nginx:
            try:
                wait_for_port(port, nginx)
                url = f"http://127.0.0.1:{port}"
                body = json.loads(make_body(clips[0]))
                once = served.client.post(f"{url}/v1/chat/completions", json=body)
                expected = once.json()["choices"][0]["message"]["content"]
                with served.client.stream("POST", f"{url}/v1/chat/completions", json=body | {"stream": True}) as parts:
                    lines = [line[6:] for line in parts.iter_lines() if line.startswith("data: {")]
                said = [
                    choice["delta"].get("content") or "" for line in lines for choice in json.loads(line)["choices"]
                ]
                assert "".join(said) == expected and len(lines) > 1
                with connect(f"ws://127.0.0.1:{port}/v1/realtime") as session:
                    session.send(make_webm(clips[0], tmp_path / "clip.webm"))
                    session.send(json.dumps({"type": "media.end"}))
                    while json.loads(session.recv(timeout=60))["type"] != "media.ended":
                        pass
            finally:
                nginx.terminate()


def wait_for_port(port: int, process: subprocess.Popen) -> None:
    """Until nginx listens; what it says where it ends instead."""
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except ConnectionRefusedError:
            continue
    raise RuntimeError(process.stderr.read().decode())

"""docs/serving.md says what is true: its commands and examples run, its tables are those of the code."""

import contextlib
import dataclasses
import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_serve_realtime import make_webm

from mirasol.app.server.parameters import HARMLESS, NEUTRAL, READ
from mirasol.app.server.settings import Caps, ServerSettings

PAGE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```([\w ]*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
EXAMPLES = [text for language, text in BLOCKS if language == "python"]


@pytest.fixture
def here(clips, tmp_path, monkeypatch) -> Path:
    shutil.copy(clips[0], tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(example: str, served) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(example.replace("127.0.0.1:8000", f"127.0.0.1:{served.port}"), "serving.md", "exec"), {})
    return said.getvalue()


def test_the_client_of_the_page_is_answered(served, here, clips, answer_alone):
    expected = answer_alone(clips[0], "which shape is seen last?").text
    once, streamed, colour = run(EXAMPLES[0], served).splitlines()
    assert once.rpartition(" ")[0] == streamed == expected and colour


def test_the_session_of_the_page_is_answered(served, here, clips):
    make_webm(clips[0], here / "clip.webm")
    *chunks, answer = run(EXAMPLES[1], served).splitlines()
    assert len(chunks) > 9 and float(answer.split()[-1]) > 0


@pytest.mark.skipif(shutil.which("curl") is None, reason="not shown: that the commands of docs/serving.md run")
def test_the_commands_of_the_page_run(served, here):
    (commands,) = [text for language, text in BLOCKS if language == "bash"]
    commands = commands.replace("localhost:8000", f"127.0.0.1:{served.port}")
    done = subprocess.run(["bash", "-ec", commands], capture_output=True, text=True, check=True)
    assert '"object":"chat.completion"' in done.stdout and '"object":"score"' in done.stdout


def test_its_table_of_caps_is_that_of_the_code():
    rows = re.findall(r"^\| `(\w+)` \| ([\d,.]+) \| (.*) \|$", PAGE, re.MULTILINE)
    caps = [
        (field.name, f"{field.default:,}".removesuffix(".0"), field.metadata["help"])
        for field in dataclasses.fields(Caps)
    ]
    assert rows == caps


def test_its_fields_are_those_that_are_read():
    named = set(re.findall(r"`([a-z_]+)`", PAGE.partition("## Realtime")[0]))
    assert READ - {"model", "messages"} <= named | {"stream_options"}
    assert HARMLESS - {"prompt_cache_retention"} <= named and {"n", "tools", "logit_bias"} <= named & set(NEUTRAL)


@pytest.mark.slow
def test_it_runs_under_ray(clips):
    """Two replicas on a local Ray, as the page says."""
    ray = pytest.importorskip("ray", reason="not shown: that docs/serving.md runs under Ray Serve")
    pytest.importorskip("ray.serve")
    import httpx2
    from serving import text, video

    (example,) = [block for language, block in BLOCKS if language == "python ray"]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        exec(compile(example, "serving.md", "exec"), {"__name__": "page"})
        messages = [{"role": "user", "content": [video(clips[0]), text("which shape is seen last?")]}]
        answer = httpx2.post("http://127.0.0.1:8000/v1/chat/completions", json={"messages": messages}, timeout=120)
        assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"]
    finally:
        ray.shutdown()


def test_settings_of_the_page_are_possible():
    for line in re.findall(r"mirasol serve tiny[^`\n]*", PAGE):
        for option in re.findall(r"--[a-z-]+", line):
            name = option.removeprefix("--").replace("-", "_")
            assert name in {field.name for field in dataclasses.fields(Caps)} | {
                "host", "port", "api_key", "server_name", "allow_host", "insecure",
            }  # fmt: skip
    assert ServerSettings().is_local

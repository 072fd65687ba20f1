"""docs/live.md says what is true: its examples run, its numbers are those of the code."""

import re
from pathlib import Path

from live_making import Sender
from test_watch import play, show

from mirasol.app.live import clock, receiver, source
from mirasol.app.live.chunks import LiveSettings
from mirasol.config.media import MediaConfig

PAGE = (Path(__file__).parents[2] / "docs" / "live.md").read_text(encoding="utf-8")


def test_its_example_runs(here, tmp_path, monkeypatch, capsys):
    sender = Sender(str(tmp_path / "clip.mkv"), "matroska")
    sender.send(0, 2, show, play)
    sender.close()
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(compile(example, "docs/live.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[3].startswith("3 1.5 torch.Size([1, 4, 3, 32, 32])")


def test_its_numbers_are_the_defaults():
    settings = LiveSettings(MediaConfig())
    assert f"up to {settings.most_waiting} chunks wait" in PAGE
    assert f"silent for {settings.stall:g} s" in PAGE and f"at most 30, {settings.retries} times" in PAGE
    assert f"behind the other by more than {receiver.LIVE_PATIENCE:g} s" in PAGE
    assert f"more than {receiver.USUAL_PATIENCE:g} s behind" in PAGE
    assert f"{clock.BACKWARD_SECONDS:g} s back or {clock.FORWARD_SECONDS:g} s ahead" in PAGE
    assert all(f"`{scheme}://" in PAGE for scheme in source.UNSTOPPABLE if not scheme.endswith("s"))

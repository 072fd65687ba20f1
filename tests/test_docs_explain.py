"""docs/explain.md says what is true: its example runs, its commands and fields exist."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest

from mirasol.cli.main import main

PAGE = (Path(__file__).parents[1] / "docs" / "explain.md").read_text(encoding="utf-8")


def test_its_example_runs(shapes, tmp_path, monkeypatch):
    clip = sorted((shapes / "clips" / "test").iterdir())[0]
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    said, names = io.StringIO(), {}
    with contextlib.redirect_stdout(said):
        exec(compile(example, "docs/explain.md", "exec"), names)
    found = names["found"]
    layers, tokens, chunks, m = found.cross_attention.shape
    assert f"({layers}, {tokens}, {chunks}, {m})" in said.getvalue()
    assert found.occlusion.passes == 2 * chunks + 3
    assert np.isfinite(found.occlusion.losses).all()


def test_its_commands_have_the_options_it_names():
    helped = io.StringIO()
    with contextlib.redirect_stdout(helped), pytest.raises(SystemExit):
        main(["explain", "--help"])
    options = set(re.findall(r"--[a-z][a-z-]*", PAGE))
    assert options >= {"--chunk", "--figures", "--json", "--answer", "--output"}
    assert {option for option in options if option not in helped.getvalue()} == set()

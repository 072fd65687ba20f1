"""The benchmark of streaming runs, without what only media need."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
WITHOUT = ("av", "jsonargparse", "gradio")


def test_it_runs_quickly_and_without_packages_for_media(tmp_path):
    for name in WITHOUT:
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on a bare machine')\n")
    out = tmp_path / "stream.json"
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY / "src")])
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "stream.py"), "--quick", "--combiner", "ttm"]
    subprocess.run([*command, "--out", str(out)], check=True, env=os.environ | {"PYTHONPATH": path})
    found = json.loads(out.read_text())
    (result,) = found["results"].values()
    assert result["against encoding all"]["ratio"] > 0
    assert result["late against early"]["growth"]["state, MiB"] == 0
    assert found["surroundings"]["commit"] and found["config"] and found["goals"]
    assert "tiny, ttm" in out.with_suffix(".md").read_text()

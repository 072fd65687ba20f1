"""The benchmarks run as commands, write what they promise, and need none of the heavier libraries."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
# Only what torch and transformers bring along is at hand on a bare GPU machine.
BARE = """
import importlib.abc, runpy, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"av", "jsonargparse", "gradio"}:
            raise ImportError(f"{name} is absent here")
sys.meta_path.insert(0, Blocker())
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rsplit("/", 1)[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments: str, bare: bool = False) -> subprocess.CompletedProcess:
    command = [sys.executable, *(["-c", BARE] if bare else []), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)


@pytest.mark.parametrize("name", [path.stem for path in sorted(FOLDER.glob("[a-z]*.py"))])
def test_every_benchmark_has_help(name):
    measures_pyav = name in ("decode", "reading")
    if measures_pyav:
        pytest.importorskip("av")
    done = run(str(FOLDER / f"{name}.py"), "--help", bare=not measures_pyav)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_a_missing_peer_is_one_line_that_says_how_to_install_it(tmp_path):
    done = run(str(FOLDER / "peer.py"), "--peer", str(tmp_path), "--quick")
    if done.returncode == 0:
        pytest.skip("the peer is installed here")
    assert done.stderr.count("\n") == 1 and "pip install" in done.stderr


def test_without_a_peer_the_benchmark_is_skipped_so_that_the_others_run():
    done = run(str(FOLDER / "peer.py"), "--quick", "--items", "tiny-T2")
    assert done.returncode == 0
    assert done.stdout.startswith(("skipped: the peer is missing", "tiny-T2"))


def test_a_training_step_where_only_torch_and_transformers_are(tmp_path):
    out = tmp_path / "step.json"
    options = ["--device", "cpu", "--preset", "tiny", "--precision", "bfloat16", "--quick", "--out", str(out)]
    done = run(str(FOLDER / "train_step.py"), *options, bare=True)
    assert done.returncode == 0, done.stderr
    data = json.loads(out.read_text())
    assert {"cpu", "commit", "torch", "transformers"} <= set(data["surroundings"])
    (row,) = data["rows"]
    assert row["clips_per_second"] > 0 and row["mfu"] > 0 and row["peak_tflops"] > 0
    assert set(row["forward_seconds"]) == {"tubes", "vit", "audio", "combiner", "latent", "reconstruction", "text"}
    assert all(seconds > 0 for seconds in row["forward_seconds"].values())
    assert "tiny" in out.with_suffix(".md").read_text()


@pytest.mark.slow
def test_the_work_of_both_is_equal_within_two_percent(tmp_path):
    folder = os.environ.get("MIRASOL_PEER")
    if not folder:
        pytest.skip("MIRASOL_PEER names no folder with the peer: see benchmarks/peer.py --help")
    out = tmp_path / "peer.json"
    done = run(str(FOLDER / "peer.py"), "--peer", folder, "--quick", "--items", "tiny-T2", "gen-T8", "--out", str(out))
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert abs(results["tiny-T2"]["gflop"]["ratio"] - 1) <= 0.02
    assert results["tiny-T2"]["bfloat16"]["saved_bytes"] > 0
    assert results["gen-T8"]["float32"]["ours"]["ms_per_token"]["median"] > 0


def test_answering_where_only_torch_and_transformers_are(tmp_path):
    out = tmp_path / "generate.json"
    options = ["--device", "cpu", "--preset", "tiny", "--batch", "2", "--chunks", "2", "--quick", "--out", str(out)]
    done = run(str(FOLDER / "generate.py"), *options, bare=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["batch"] == 2 and row["ms_of_a_4_token_answer"] > 0 and row["prefill_ms"] > 0
    assert row["bound_tokens_per_second"] > 0 and row["prefill_floor_ms"] > 0

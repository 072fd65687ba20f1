"""Help and errors of arguments come at once: nothing heavy is imported before the arguments are known to be right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mirasol.cli.main import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[2]
RUN_LIGHT = """
import contextlib, importlib.abc, io, json, sys, traceback

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "av", "numpy", "scipy", "matplotlib", "PIL"):
            raise RuntimeError(f"{name} was imported")

sys.meta_path.insert(0, Blocker())
from mirasol.cli.main import main
report = []
for arguments in json.loads(sys.argv[1]):
    out, error, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            main(arguments)
        except SystemExit as exit:
            code = exit.code
        except Exception:
            code = traceback.format_exc()
    report.append([code, out.getvalue(), error.getvalue()])
print(json.dumps(report))
"""
DEMO = str(REPOSITORY / "recipes" / "demo.yaml")
# Arguments, and words of the one line that refuses them.
REFUSED = [
    (["nonsense"], "nonsense"),
    (["ask"], "checkpoint, file"),
    (["ask", "no-such-folder", "clip.mp4", "what?"], "no-such-folder: no such checkpoint"),
    (["ask", "tiny", "clip.mp4", "what?", "--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
    (["ask", "tiny", "clip.mp4", "what?", "--candidates", "red"], "--candidates 'red': give at least two answers"),
    (["ask", "tiny", "clip.mp4", "what?", "--candidates", "red||blue"], "candidate 2 is empty"),
    (["ask", "tiny", "clip.mp4", "what?", "--candidates", "red|blue| red"], "'red' appears twice"),
    (["evaluate", "tiny"], "data"),
    (["evaluate", "tiny", "data", "--calibrate", "--skip-controls"], "--calibrate needs the controls"),
    (["evaluate", "no-such-folder", "data"], "no-such-folder: no such checkpoint"),
    (["evaluate", "tiny", "data", "--processes", "0"], "--processes 0: must be at least 1"),
    (["train"], "train needs a recipe"),
    (["train", "--config", "no-such.yaml"], "no-such.yaml: no such recipe file"),
    (["train", "--config", DEMO, "--seeed", "3"], "unknown key 'seeed': did you mean 'seed'?"),
    (["plan"], "plan needs a recipe"),
    (["plan", "--config", DEMO, "--mfu", "2"], "--mfu 2.0: must be above 0 and at most 1"),
    (["plan", "--config", DEMO, "--processes", "8"], "--processes 8: set parallel.kind"),
    (["plan", "--config", DEMO, "--optimizer.learning_rte", "1"], "unknown key 'optimizer.learning_rte'"),
    (["score", "nextqa_mc"], "root, predictions"),
    (["compare", "one"], "are required"),
    (["data", "check", "folder"], "root"),
    (["data", "shard", "folder", "a", "b", "--executor", "slurm"], "--executor slurm: choose local or ray"),
    (["demo", "--no-such-option", "1"], "--no-such-option"),
    (["info", "3c"], "unknown preset '3c'"),
    (["info", "tiny", "--frames", "0"], "--frames 0: must be at least 1"),
    (["init", "3c", "out"], "unknown preset '3c'"),
    (["init", "tiny", "out"], "nothing to start from"),
    (["init", "tiny", str(REPOSITORY)], "already exists: give another folder"),
    (["export", "no-such-folder", "out"], "no-such-folder: not the folder of a run"),
    (["export", "no-such-folder", "out", "--best", "--step", "1"], "--step 1 and --best: choose one of the two"),
]


@pytest.fixture(scope="module")
def light() -> dict[str, list]:
    """Exit code, stdout and stderr of every case, in one process that cannot import anything heavy."""
    helps = [["--help"], *([name, "--help"] for name in COMMANDS)]
    cases = [*helps, *(arguments for arguments, _ in REFUSED)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    done = subprocess.run(
        [sys.executable, "-c", RUN_LIGHT, json.dumps(cases)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return {json.dumps(case): report for case, report in zip(cases, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_comes_without_pytorch(light, arguments):
    code, out, error = light[json.dumps(arguments)]
    assert (code, error) == (0, "") and "usage:" in out


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_arguments_are_refused_without_pytorch(light, arguments, message):
    code, out, error = light[json.dumps(arguments)]
    assert (code, out) == (2, ""), code
    assert error.count("\n") == 1 and message in error

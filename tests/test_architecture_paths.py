"""The paths of docs/architecture.md: every named function exists, and a run calls them in that order."""

import re
import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

import mirasol
from mirasol.cli.main import main

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = Path(mirasol.__file__).resolve().parent
PAGE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
PATHS = {section.splitlines()[0]: section for section in PAGE.split("\n## ")[1:]}
STEP = re.compile(r"^\| `([\w/]+\.py)` \| `([\w.]+)` \|", re.MULTILINE)
RECIPE = """
seed: 1
output: {output}
data: {{root: {root}}}
stages:
  questions: {{steps: 1, clips_per_step: 2, questions_per_clip: 2}}
optimizer: {{learning_rate: 1.0e-3}}
validation_clips: 1
samples: 0
device: cpu
"""


def read_steps(path: str) -> list[tuple[str, str]]:
    """(file, function) of each step of a path."""
    return STEP.findall(PATHS[path])


def record_calls(work: Callable[[], None]) -> list[tuple[str, str]]:
    """(file, function) of each call within the package while `work` runs, in this process and all its threads."""
    calls, prefix = [], f"{SOURCE}/"

    def profile(frame, event, _) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(prefix):
            calls.append((code.co_filename.removeprefix(prefix), code.co_qualname))

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return calls


def find_missed_step(steps: list[tuple[str, str]], calls: list[tuple[str, str]]) -> tuple[str, str] | None:
    """The first step that is not called after the step before it; None where all are, in their order."""
    remaining = iter(calls)
    return next((step for step in steps if step not in remaining), None)


@pytest.fixture
def decoding_here(monkeypatch):
    """Files are decoded in this process, where calls can be recorded."""
    from mirasol.media.isolation import decoders as isolation

    def run_isolated(limits, file, function, /, *arguments, **named):
        return function(*arguments, **named)

    run_isolated.__code__ = run_isolated.__code__.replace(
        co_filename=f"{SOURCE}/media/isolation/decoders.py", co_qualname="run_isolated"
    )
    monkeypatch.setattr(isolation, "run_isolated", run_isolated)


@pytest.fixture(scope="module")
def training_calls(shapes, tmp_path_factory) -> list[tuple[str, str]]:
    folder = tmp_path_factory.mktemp("architecture")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(output=folder / "run", root=shapes))
    return record_calls(lambda: main(["train", "--config", str(recipe)]))


def test_a_clip_goes_from_file_to_answer(shapes, decoding_here):
    clip = sorted((shapes / "clips" / "test").iterdir())[0]
    calls = record_calls(lambda: main(["ask", "tiny", str(clip), "which shape is seen last?"]))
    steps = read_steps("One clip, from file to answer")
    assert len(steps) > 25
    assert find_missed_step(steps, calls) is None


def test_a_clip_goes_from_file_to_loss(training_calls):
    steps = read_steps("One clip, from file to loss")
    assert len(steps) > 15
    assert find_missed_step(steps, training_calls) is None


def test_a_learning_rate_goes_from_recipe_to_weights(training_calls):
    steps = read_steps("One learning rate, from recipe to weight update")
    assert len(steps) > 7
    assert find_missed_step(steps, training_calls) is None


def test_a_step_out_of_order_is_found():
    calls = [("a.py", "one"), ("a.py", "two"), ("b.py", "three")]
    assert find_missed_step(calls, calls) is None
    assert find_missed_step([calls[1], calls[0]], calls) == calls[0]
    assert find_missed_step([("a.py", "four")], calls) == ("a.py", "four")

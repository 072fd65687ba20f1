"""`mirasol finetune` from a folder to a report, on a few rendered clips, whatever it scores there."""

import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from mirasol.checkpoint import find_checkpoint
from mirasol.cli.main import main
from mirasol.cli.train import split_overrides
from mirasol.config.recipe_io import load_recipe, recipe_from_dict
from mirasol.errors import Stopped, UserError
from mirasol.finetune import finetune as module
from mirasol.finetune.choices import ClipFacts
from mirasol.finetune.duration import Pace, count_steps_within, describe_time
from mirasol.finetune.finetune import finetune
from mirasol.finetune.settings import Settings
from mirasol.finetune.splits import NAMES
from mirasol.training.trainer import train

KEYS = ("device=cpu", "threads=1", "samples=0", "stages.finetune.clips_per_step=2", "validate_every=2")


def make_folder(shapes, root, count=7):
    """A folder with clips of two classes."""
    for number, file in enumerate(sorted((shapes / "clips").rglob("*.mp4"))[:count]):
        folder = root / ("left", "right side")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / file.name)
    return root


def run(settings) -> tuple[str, str]:
    """The result's folder and what was printed."""
    said = io.StringIO()
    result = finetune(settings, Console(file=said, width=300))
    return result, said.getvalue()


@pytest.fixture(scope="module")
def settings(shapes, untrained, tmp_path_factory):
    home = tmp_path_factory.mktemp("finetune")
    make_folder(shapes, home / "mine")
    return Settings(str(home / "mine"), str(untrained), str(home / "out"), None, 1, KEYS)


@pytest.fixture(scope="module")
def finished(settings):
    """A fine-tuning that was interrupted before its training and during it, then continued. What it printed."""
    patch = pytest.MonkeyPatch()
    said = []
    for name in ("train", "export_run"):
        with patch.context() as patched:
            patched.setattr(module, name, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            console = Console(file=io.StringIO(), width=300)
            with pytest.raises(Stopped, match="run the same command again to continue"):
                finetune(settings, console)
            said.append(console.file.getvalue())
    said.append(run(settings)[1])
    return said


def test_it_prints_what_it_understood_and_chose_once(finished):
    first, second, third = finished
    assert [line.partition(":")[0] for line in first.splitlines() if line[:1].isalpha()][1:6] == [
        "folder", "answers", "clips", "left out", "splits",
    ]  # fmt: skip
    assert "stages.finetune.epochs" in first and "as given (--epochs)" in first
    assert "optimizer.learning_rate" in first and "memory:" in first and "time:" in first
    for later in (second, third):
        assert "continues" in later and "folder:" not in later


def test_it_doubts_a_very_short_training(finished):
    assert re.search(r"^note: \d+ steps are a very short training", finished[2], re.MULTILINE)


def test_it_leaves_a_checkpoint_results_and_a_report(settings, finished):
    out = Path(settings.output)
    results = json.loads((out / "results.json").read_text())
    scores = results["protocols"]["open generation"]
    assert set(scores["controls"]) == {"no_video", "no_audio", "no_media", "shifted_audio"}
    assert scores["metrics"]["All"]["low"] is not None
    assert results["protocols"]["candidate scoring"]["classes"] == 2
    page = (out / "report.html").read_text()
    assert "before" in page and "what is it?" in page and 'http-equiv="refresh"' not in page
    assert (out / "before" / "predictions.jsonl").is_file()
    assert not list(out.rglob("journal.jsonl"))
    assert find_checkpoint(out) == out / "checkpoint"
    table = finished[2]
    assert "before" in table and "difference" in table and "[" in table


def test_the_lines_to_copy_do_what_they_say(settings, finished, tmp_path, capsys, monkeypatch):
    ask, export = (re.search(rf"^mirasol {name} .*$", finished[2], re.MULTILINE)[0] for name in ("ask", "export"))
    monkeypatch.chdir(tmp_path)
    main(shlex.split(ask)[1:])
    assert capsys.readouterr().out.strip()
    main(shlex.split(export)[1:])
    assert list((tmp_path / "shared").glob("*/model.safetensors"))


def test_train_runs_its_recipe_to_the_same_bits(settings, finished, tmp_path):
    file = f"{settings.output}/recipe.yaml"
    recipe = load_recipe(file, [f"output={tmp_path / 'again'}"])
    assert yaml.safe_load(Path(file).read_text())["stages"]["finetune"]["epochs"] == 1
    again = train(recipe, console=Console(file=io.StringIO()))
    first = find_checkpoint(f"{settings.output}/train")
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_the_same_command_leaves_a_finished_one_unchanged(settings, finished):
    report = Path(settings.output) / "report.html"
    before = report.read_text()
    assert "this fine-tuning is finished" in run(settings)[1]
    assert report.read_text() == before


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"epochs": 2}, r"was started with --epochs 1, now it is --epochs 2"),
        ({"epochs": None, "minutes": 3.0}, r"was started with --epochs 1, now it is no --epochs"),
        ({"overrides": (*KEYS, "seed=2")}, r"was started with KEY=VALUE .* now it is KEY=VALUE .* seed=2"),
        ({"start": "tiny"}, r"was started with --from .*, now it is --from tiny"),
    ],
)
def test_other_arguments_are_refused_in_one_line(settings, finished, change, part):
    with pytest.raises(UserError, match=part) as caught:
        finetune(Settings(**{**vars(settings), **change}), Console(file=io.StringIO()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["clip added", "clip changed", "clip moved"])
def test_changed_data_are_refused_in_one_line(settings, finished, change, tmp_path):
    folder = Path(settings.data)
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    clip = sorted((folder / "left").iterdir())[0]
    try:
        if change == "clip added":
            shutil.copy(clip, folder / "left" / "more.mp4")
        elif change == "clip changed":
            clip.write_bytes(clip.read_bytes() + b"more")
        else:
            clip.rename(folder / "right side" / "moved.mp4")
        with pytest.raises(UserError, match="changed since the start of"):
            run(settings)
    finally:
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)


@pytest.mark.parametrize(
    ("settings_of", "part"),
    [
        ({"minutes": 1.0, "epochs": 2}, "give one of them"),
        ({"minutes": 0.0}, "must be above 0"),
        ({"minutes": float("nan")}, "must be above 0"),
        ({"epochs": 0}, "must be at least 1"),
    ],
)
def test_impossible_lengths_are_refused(settings_of, part):
    with pytest.raises(UserError, match=part):
        Settings("mine", "tiny", "out", **settings_of)


def test_a_beginning_that_fails_leaves_nothing_behind(shapes, untrained, tmp_path):
    make_folder(shapes, tmp_path / "mine")
    wrong = Settings(str(tmp_path / "mine"), str(untrained), str(tmp_path / "out"), overrides=("optimizer.rate=1",))
    with pytest.raises(UserError, match=r"unknown key 'optimizer\.rate'"):
        run(wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("minutes", "steps"), [(10, 270), (1, 25), (0.001, 1)])
def test_minutes_become_steps_by_the_time_of_one(minutes, steps):
    stages = {"finetune": {"steps": 1, "clips_per_step": 4}}
    values = {"seed": 0, "output": "out", "data": {"root": "."}, "stages": stages, "validation_clips": 12}
    facts = ClipFacts(40, 6, (1,) * 40, (2.0,), 20, ("clip",), True)
    # A validation of 6 clips takes half of a step of 4: 20 of them take the time of 10 steps.
    assert count_steps_within(60 * minutes, recipe_from_dict(values), facts, Pace(60 / 28)) == steps


@pytest.mark.parametrize("train", [3, 40, 4000])
@pytest.mark.parametrize("encoding", [0.0, 0.1, 5.0])
@pytest.mark.parametrize("minutes", [0.1, 1, 10, 100])
def test_what_encodes_a_clip_once_is_in_the_estimate(train, encoding, minutes):
    """The steps that a time allows take that time, whether or not all clips come up in it."""
    facts = ClipFacts(train, 6, (1,) * train, (2.0,), 20, ("clip",), True)

    def make(steps: int):
        stages = {"finetune": {"steps": steps, "clips_per_step": 4}}
        return recipe_from_dict(
            {"seed": 0, "output": "out", "data": {"root": "."}, "stages": stages, "validation_clips": 12,
             "validate_every": max(1, steps // 20)}
        )  # fmt: skip

    steps = count_steps_within(60 * minutes, make(1), facts, Pace(0.5, encoding))
    seen = min(train, 4 * steps) + (6 if 4 * steps >= train else 0)
    seconds = 0.5 * steps + encoding * seen
    assert seconds <= 60 * minutes or steps == 1
    most = encoding * (seen + 4) + 0.5 * (steps + 1) + 20 * 0.25 + 6 * encoding
    assert most >= 0.9 * 60 * minutes
    text = describe_time(make(steps), facts, 10, Pace(0.5, encoding), 0.0)
    assert ("in the frozen encoders, once" in text) == (encoding > 0)


def test_the_command_prints_the_folder_and_refuses_what_it_cannot_use(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for arguments, part in (
        (["gone"], "gone: no such folder of clips"),
        (["empty"], "no video or sound file"),
        (["empty", "seed"], "seed: give one FOLDER, and keys of the recipe as KEY=VALUE"),
        (["empty", "--from", "nowhere"], "nowhere: no such checkpoint"),
        (["empty", "--optimizer.rate", "1"], "unknown key 'optimizer.rate'"),
    ):
        with pytest.raises(SystemExit):
            main(["finetune", *arguments])
        out, err = capsys.readouterr()
        assert out == "" and part in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_keys_of_the_recipe_may_stand_anywhere_on_the_command_line():
    words = (
        "finetune a=b/mine seed=1 --epochs 3 optimizer.name=adamw --output x=y --data.cache c patience=2 --minutes=4"
    )
    own, keys = split_overrides(words.replace("a=b/mine", "./a=b/mine").split())
    assert own == ["finetune", "./a=b/mine", "--epochs", "3", "--output", "x=y", "--minutes=4"]
    assert keys == ["seed=1", "optimizer.name=adamw", "data.cache=c", "patience=2"]


def test_a_beginning_that_was_cut_off_starts_over_with_whatever_is_there_now(shapes, untrained, tmp_path, monkeypatch):
    make_folder(shapes, tmp_path / "mine", 4)
    first = Settings(str(tmp_path / "mine"), str(untrained), str(tmp_path / "out"), None, 1, KEYS)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_splits", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(Stopped, match="run the same command again to continue"):
            run(first)
    assert (tmp_path / "out" / "finetune.json").is_file()
    make_folder(shapes, tmp_path / "mine", 6)
    other = Settings(**{**vars(first), "epochs": 2})
    with monkeypatch.context() as patch:
        patch.setattr(module, "count_questions", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(Stopped, match="run the same command again to continue"):
            run(other)
    state = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert state["arguments"]["epochs"] == 2
    assert sum(len((tmp_path / "out" / "data" / f"{n}.jsonl").read_text().splitlines()) for n in NAMES) == 6

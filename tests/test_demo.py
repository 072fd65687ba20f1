"""The demo at a size that takes seconds: all its parts run; what it scores is none of these tests' business."""

import json
import pathlib
import re

import pytest
from rich.console import Console

from mirasol import UserError
from mirasol.checkpoint import load_checkpoint
from mirasol.cli.demo import Demo, DemoSettings, find_demo_recipe, run_demo
from mirasol.cli.main import main
from mirasol.data.datasets.folder import read_examples
from mirasol.evaluation.answer import answer_clips

RECIPE = """
seed: 0
output: replaced
data: {root: replaced}
stages:
  slots: {steps: 2, span: segment, clips_per_step: 4, questions_per_clip: 1}
  questions: {steps: 2, clips_per_step: 2, questions_per_clip: 2}
log_every: 1
validate_every: 2
checkpoint_every: 2
validation_clips: 2
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    (folder / "recipe.yaml").write_text(RECIPE)
    return DemoSettings(str(folder / "run"), str(folder / "recipe.yaml"), seed=4, train=6, validation=2, test=2)


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """A demo that was interrupted when it came to evaluate, then started again. Returns its folder and its words."""
    folder = pathlib.Path(settings.output)
    patch = pytest.MonkeyPatch()

    def interrupted(demo, checkpoint):
        raise KeyboardInterrupt

    console = Console(record=True, width=200, quiet=False, file=(tmp_path_factory.mktemp("words") / "out").open("w"))
    with patch.context() as patched:
        patched.setattr(Demo, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_demo(settings, console)
    assert not (folder / "report.html").exists()
    before = {
        name: (folder / name).stat().st_mtime_ns for name in ("data/manifest.json", "train/checkpoint/config.json")
    }
    run_demo(settings, console)
    after = {name: (folder / name).stat().st_mtime_ns for name in before}
    assert before == after, "what was done is not done again"
    return folder, console.export_text()


def test_metrics_have_their_shape(finished):
    folder, _ = finished
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.keys() == {"test", "chance", "controls", "shipped", "seconds"}
    assert metrics["controls"].keys() == {"no_video", "no_audio", "no_media", "shifted_audio"}
    scores = [metrics["test"], metrics["chance"], *metrics["controls"].values()]
    if metrics["shipped"]:
        assert metrics["shipped"].keys() == {"test", "controls"}
        scores += [metrics["shipped"]["test"], *metrics["shipped"]["controls"].values()]
    for score in scores:
        assert score.keys() >= {"accuracy", "by_type"}
        assert score["by_type"].keys() == metrics["test"]["by_type"].keys()
    assert metrics["seconds"]["total"] >= metrics["seconds"]["train"] > 0


def test_it_says_what_it_does_and_where_the_report_lies(finished):
    folder, words = finished
    for part in ("Rendering", "Training", "Evaluating", "Asking", "resuming", "(right: ", str(folder / "report.html")):
        assert part in words


def test_the_report_shows_the_demo(finished):
    folder, _ = finished
    page = (folder / "report.html").read_text()
    assert page.lstrip().startswith("<!doctype html>")
    for words in ("Shapes and sounds", "How it learned", "One clip closely", "shipped weights"):
        assert words in page, words


def test_its_numbers_are_those_of_evaluate_on_the_same_clips(finished, tmp_path, capsys):
    folder, _ = finished
    main(["evaluate", str(folder), str(folder / "data"), "--output", str(tmp_path / "results")])
    capsys.readouterr()
    metrics = json.loads((folder / "metrics.json").read_text())
    results = json.loads((tmp_path / "results" / "results.json").read_text())["protocols"]["open generation"]
    scores = [(metrics["test"], results["metrics"])]
    scores += [(metrics["controls"][name], results["controls"][name]) for name in metrics["controls"]]
    for score, rows in scores:
        assert (score["accuracy"], score["n"]) == (rows["All"]["value"], rows["All"]["n"])
        assert score["by_type"] == {name: row["value"] for name, row in rows.items() if name != "All"}
    assert metrics["chance"]["accuracy"] == pytest.approx(results["baselines"]["chance"]["value"], rel=1e-12)
    page = (tmp_path / "results" / "report.html").read_text()
    assert "How it learned" in page, "the run's log is found next to its checkpoint"


def test_a_finished_demo_is_not_touched_again(finished, settings):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError, match="--output"):
        run_demo(settings, Console(quiet=True))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def changed(settings, **values):
    return DemoSettings(**{**vars(settings), **values})


def test_an_interrupted_demo_is_not_mixed_with_another(finished, settings, tmp_path):
    (tmp_path / "demo.json").write_text((finished[0] / "demo.json").read_text())
    with pytest.raises(UserError, match="seed=4"):
        run_demo(changed(settings, output=str(tmp_path), seed=5), Console(quiet=True))


def test_a_folder_of_something_else_is_left_alone(settings, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not a demo folder"):
        run_demo(changed(settings, output=str(tmp_path)), Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_missing_recipe_makes_no_folder(settings, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        run_demo(changed(settings, output=str(tmp_path / "new"), recipe="nowhere.yaml"), Console(quiet=True))
    assert not (tmp_path / "new").exists()


def test_the_packages_own_recipe_is_found_from_anywhere(settings, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(Demo, "run", lambda demo: begun.append(demo.recipe))
    monkeypatch.chdir(tmp_path)
    run_demo(changed(settings, output="here", recipe=None), Console(quiet=True))
    repository = pathlib.Path(__file__).resolve().parent.parent
    assert find_demo_recipe().read_bytes() == (repository / "recipes" / "demo.yaml").read_bytes()
    assert begun[0].output == str(pathlib.Path("here/train"))


def test_an_installation_without_the_recipe_says_which_option_helps(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("mirasol.cli.demo.importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(UserError, match="--recipe"):
        run_demo(changed(settings, output=str(tmp_path / "new"), recipe=None), Console(quiet=True))
    assert not (tmp_path / "new").exists()


def test_it_asks_about_one_clip_and_shows_what_was_answered(finished, settings):
    folder, words = finished
    [asked] = re.findall(r'^mirasol ask (\S+) (\S+) "(.*)"\n(.*)$', words, re.MULTILINE)
    checkpoint, file, prompt, streamed = asked
    loaded = load_checkpoint(checkpoint)
    extractor = loaded.processor.feature_extractor
    media = pathlib.Path(file).relative_to(folder / "data")
    prompts = [e.prompt for e in read_examples(folder / "data", "test") if e.media == media.as_posix()]
    [answers] = answer_clips(loaded.model, loaded.processor, [extractor.tensors(extractor.read(file))], [prompts])
    assert (prompt, streamed.strip()) == (prompts[0], answers[0].text)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert f"  {prompt}  {answer.text}".rstrip() in words

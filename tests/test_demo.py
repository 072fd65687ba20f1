"""The demo at a size that takes seconds: all its parts run; what it scores is none of these tests' business."""

import html.parser
import io
import json
import pathlib
import re
import shlex

import pytest
from rich.console import Console

from mirasol import UserError
from mirasol.checkpoint import find_checkpoint, load_checkpoint
from mirasol.cli.demo import (
    DemoSettings,
    ScratchDemo,
    find_demo_recipe,
    run_demo,
    run_scratch_demo,
)
from mirasol.cli.main import main
from mirasol.data.datasets.folder import read_examples
from mirasol.errors import Stopped
from mirasol.evaluation.answer import answer_clips
from mirasol.finetune import finetune as finetune_module
from mirasol.finetune import page as page_module

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
    return DemoSettings(
        str(folder / "run"), str(folder / "recipe.yaml"), seed=4, train=6, validation=2, test=2, scratch=True
    )


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """A demo that was interrupted when it came to evaluate, then started again. Returns its folder and its words."""
    folder = pathlib.Path(settings.output)
    patch = pytest.MonkeyPatch()

    def interrupted(demo, checkpoint):
        raise KeyboardInterrupt

    console = Console(record=True, width=200, quiet=False, file=(tmp_path_factory.mktemp("words") / "out").open("w"))
    with patch.context() as patched:
        patched.setattr(ScratchDemo, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_scratch_demo(settings, console)
    assert not (folder / "metrics.json").exists()
    before = {
        name: (folder / name).stat().st_mtime_ns for name in ("data/manifest.json", "train/checkpoint/config.json")
    }
    run_scratch_demo(settings, console)
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
        run_scratch_demo(settings, Console(quiet=True))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def changed(settings, **values):
    return DemoSettings(**{**vars(settings), **values})


def test_an_interrupted_demo_is_not_mixed_with_another(finished, settings, tmp_path):
    (tmp_path / "demo.json").write_text((finished[0] / "demo.json").read_text())
    with pytest.raises(UserError, match="seed=4"):
        run_scratch_demo(changed(settings, output=str(tmp_path), seed=5), Console(quiet=True))


def test_a_folder_of_something_else_is_left_alone(settings, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not a demo folder"):
        run_scratch_demo(changed(settings, output=str(tmp_path)), Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_missing_recipe_makes_no_folder(settings, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        run_scratch_demo(changed(settings, output=str(tmp_path / "new"), recipe="nowhere.yaml"), Console(quiet=True))
    assert not (tmp_path / "new").exists()


def test_the_packages_own_recipe_is_found_from_anywhere(settings, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(ScratchDemo, "run", lambda demo: begun.append(demo.recipe))
    monkeypatch.chdir(tmp_path)
    run_scratch_demo(changed(settings, output="here", recipe=None), Console(quiet=True))
    repository = pathlib.Path(__file__).resolve().parent.parent
    assert find_demo_recipe().read_bytes() == (repository / "recipes" / "demo.yaml").read_bytes()
    assert begun[0].output == str(pathlib.Path("here/train"))


def test_an_installation_without_the_recipe_says_which_option_helps(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("mirasol.cli.demo.importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(UserError, match="--recipe"):
        run_scratch_demo(changed(settings, output=str(tmp_path / "new"), recipe=None), Console(quiet=True))
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


QUICK = (
    "stages.finetune.steps=2",
    "stages.finetune.clips_per_step=2",
    "stages.finetune.questions_per_clip=2",
    "validate_every=1",
    "samples=0",
    "device=cpu",
    "threads=1",
)


class Watched:
    """Every page that is written, in order."""

    def __init__(self, monkeypatch):
        self.pages = []
        write = page_module.write_file_atomically

        def keep(file, text):
            self.pages.append(text)
            write(file, text)

        monkeypatch.setattr(page_module, "write_file_atomically", keep)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A demo that was interrupted while it trained, then started again: folder, words, pages of both attempts."""
    folder = tmp_path_factory.mktemp("tuned") / "demo"
    settings = DemoSettings(str(folder), None, seed=4, train=6, validation=2, test=2, changes=QUICK)
    said, patch = io.StringIO(), pytest.MonkeyPatch()
    console = Console(file=said, width=300)
    with patch.context() as patched:
        watched = Watched(patched)
        with patch.context() as stopping:
            stopping.setattr(finetune_module, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(Stopped, match="run the same command again to continue"):
                run_demo(settings, console)
        first = len(watched.pages)
        assert (folder / "report.html").read_text() == watched.pages[-1]
        rendered = (folder / "signs" / "manifest.json").stat().st_mtime_ns
        run_demo(settings, console)
    assert (folder / "signs" / "manifest.json").stat().st_mtime_ns == rendered, "what was done is not done again"
    return settings, folder, said.getvalue(), watched.pages[:first], watched.pages[first:]


def list_states(page: str) -> dict[str, str]:
    return dict(re.findall(r"<li[^>]*>(.*): (pending|running|done)</li>", page))


def test_the_report_exists_from_the_start_and_names_what_is_pending(tuned):
    *_, first, second = tuned
    for pages in (first, second):
        states = [list_states(page) for page in pages]
        assert len(states[0]) == 8 and states[0]["the machine"] == "running"
        assert list(states[0].values()).count("pending") == 7
        done = [list(state.values()).count("done") for state in states]
        assert done == sorted(done)
        for page, state in zip(pages, states, strict=True):
            check_html(page)
            assert 'http-equiv="refresh"' in page
            assert page.count("<p>Pending.</p>") == list(state.values()).count("pending")
    assert list_states(first[-1])["training"] == "running"
    assert any("steps, text loss" in page for page in second)


class Balanced(html.parser.HTMLParser):
    """Raises AssertionError where tags do not close in order."""

    VOID = frozenset({"meta", "img", "br", "link", "hr", "input", "col", "path", "use", "rect", "line", "circle"})

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def check_html(page: str) -> None:
    assert page.lstrip().startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    parser = Balanced()
    parser.feed(re.sub(r"<(svg|style|script).*?</\\1>", "", page, flags=re.DOTALL))
    assert not parser.open


def test_the_finished_report_no_longer_reads_itself_again(tuned):
    _, folder, *_ = tuned
    page = (folder / "report.html").read_text()
    assert page.lstrip().startswith("<!doctype html>")
    assert 'http-equiv="refresh"' not in page
    for words in ("Signs and signals", "before", "How it learned", "One clip closely", "GFLOP/s"):
        assert words in page, words


def test_it_prints_the_command_that_does_the_same(tuned, capsys, monkeypatch):
    _, folder, words, *_ = tuned
    [line] = set(re.findall(r"^mirasol finetune .*$", words, re.MULTILINE))
    assert line.split()[2] == str(folder / "signs")
    main(shlex.split(line)[1:])
    assert "this fine-tuning is finished" in capsys.readouterr().err


def test_its_metrics_are_those_of_the_fine_tuning(tuned):
    _, folder, words, *_ = tuned
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.keys() == {"before", "after", "chance", "controls", "seconds", "machine"}
    assert metrics["controls"].keys() == {"no_video", "no_audio", "no_media", "shifted_audio"}
    assert metrics["before"]["n"] == metrics["after"]["n"] > 0
    assert metrics["machine"]["gflops"] > 0
    assert f"{metrics['after']['accuracy']:.1%} of {metrics['after']['n']} questions right" in words
    assert find_checkpoint(folder) == folder / "finetuned" / "checkpoint"


def test_a_finished_fine_tuning_demo_is_not_touched_again(tuned):
    settings, folder, *_ = tuned
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError, match="already has a finished demo"):
        run_demo(settings, Console(quiet=True))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_demo_from_scratch_does_not_continue_as_a_fine_tuning(finished, tmp_path):
    (tmp_path / "demo.json").write_text((finished[0] / "demo.json").read_text())
    settings = DemoSettings(str(tmp_path), None, seed=4, train=6, validation=2, test=2, changes=QUICK)
    with pytest.raises(UserError, match="started with"):
        run_demo(settings, Console(quiet=True))


@pytest.mark.parametrize("option", [["--recipe", "mine.yaml"], ["--figures", "png"]])
def test_options_of_the_demo_from_scratch_are_refused_without_it(tmp_path, option, capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--output", str(tmp_path / "new"), *option])
    assert "has no effect without --scratch" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()

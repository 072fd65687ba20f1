import copy
import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.registry import read_dataset
from mirasol.evaluation.answer import AnswerSettings
from mirasol.evaluation.baselines import read_training_examples
from mirasol.evaluation.controls import CONTROLS
from mirasol.evaluation.evaluate import evaluate_dataset
from mirasol.evaluation.metrics import OPEN, JudgedAnswer
from mirasol.evaluation.one_clip import choose_clip, examine_clip, examine_evaluated_clip
from mirasol.evaluation.report import ReportExtras, choose_examples, find_most_confused, write_report

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects tags and text; fails where tags do not close in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.found, self.words = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def log_lines():
    """A log as training writes it: two stages, one validation."""
    for step in range(1, 21):
        losses = {"text_loss": 2.0 / step, "latent_loss": 0.1, "video_loss": 0.05}
        yield {"kind": "train", "step": step, "stage": "slots" if step < 11 else "questions", "loss": 1.0, **losses}
    by_type = {name: {"accuracy": 0.5, "text_loss": 1.0, "rows": 4} for name in ("sight", "bound")}
    part = {"text_loss": 1.0, "latent_loss": 0.1, "video_loss": 0.05, "accuracy": 0.5, "by_type": by_type}
    segment = {**part, "by_type": {"describe": {"accuracy": 0.9, "text_loss": 0.1, "rows": 4}}}
    yield {"kind": "validation", "step": 20, "clip": part, "segment": segment}


@pytest.fixture(scope="module")
def evaluation(loaded, shapes):
    dataset = read_dataset("folder", shapes, "test")
    settings = AnswerSettings(shapes, tuple(CONTROLS), score_candidates=False)
    return evaluate_dataset(loaded, dataset, settings, known=read_training_examples(dataset, DatasetOptions()))


@pytest.fixture(scope="module")
def one_clip(loaded, evaluation):
    return examine_evaluated_clip(loaded, evaluation)


@pytest.fixture(scope="module")
def extras(evaluation, one_clip):
    """Everything that a report can show."""
    return ReportExtras(
        title="Shapes", lead="A model.", log=list(log_lines()), others={"shipped weights": evaluation},
        one_clip=one_clip, facts={"train clips": "6"}, training_seconds=130.0, recipe={"seed": 0},
    )  # fmt: skip


@pytest.fixture(scope="module")
def render(loaded, evaluation, tmp_path_factory):
    """Writes a report and returns its page."""

    def render(extras=None, evaluation=evaluation):
        folder = tmp_path_factory.mktemp("report")
        assert write_report(folder, loaded, evaluation, extras) == ["report.html"]
        return (folder / "report.html").read_text()

    return render


def change_judged(evaluation, **changes):
    """The evaluation with the first question, or its answer, changed."""
    scores = evaluation.protocols[OPEN]
    predicted = changes.pop("predicted", scores.judged[0].predicted)
    example = dataclasses.replace(scores.judged[0].example, **changes)
    judged = (JudgedAnswer(example, predicted, 0.0),)
    return dataclasses.replace(evaluation, protocols={OPEN: dataclasses.replace(scores, judged=judged)})


def test_the_page_is_complete_and_asks_nothing_of_the_network(render, extras):
    html = render(extras)
    page = Page(html)
    for tag, attributes in page.found:
        assert tag not in ("script", "link", "iframe"), tag
        assert attributes.get("src", "data:").startswith("data:")
    assert all(url.startswith(("data:", "#")) for url in re.findall(r"url\(([^)]*)", html))
    assert "http" not in re.sub(r"data:[^)\"]*", "", html)


def test_it_shows_what_a_report_has_to_show(render, extras, evaluation, one_clip):
    page = Page(render(extras))
    for word in ("Shapes", "A model.", "Text", "Latent", "Video", "chance", "train blind", "shipped weights", "6",
                 *(name.replace("_", " ") for name in CONTROLS)):  # fmt: skip
        assert word in page.text, word
    scores = evaluation.protocols[OPEN]
    for name, estimate in scores.metrics.items():
        assert name in page.text
        assert f"{100 * estimate.value:.2f}" in page.text
    for item in one_clip.judged:
        assert item.example.prompt in page.text
    classes = [attributes.get("class", "").split() for _, attributes in page.found]
    chunks = len(one_clip.edges) - 1
    assert sum("film" in names for names in classes) == 2 * chunks - 1, "every chunk seen, all but the first expected"
    assert sum("look" in names for names in classes) == chunks * len(one_clip.judged)
    charts = sum("chart" in names for names in classes)
    assert charts in (5, 6), "scores, three losses, learning, and lengths where clips differ"


def test_a_report_of_the_evaluation_alone_has_no_curves_and_no_clip(render, evaluation):
    page = Page(render())
    assert f"{evaluation.dataset.root.name}, test" in page.text
    assert "How it learned" not in page.text and "One clip closely" not in page.text
    assert "shipped weights" not in page.text


def test_nothing_that_was_asked_or_answered_becomes_markup(render, evaluation):
    hostile = "<script>alert(1)</script>\"'"
    changed = change_judged(evaluation, prompt=hostile, media=hostile, target=hostile, predicted=hostile)
    changed = dataclasses.replace(changed, controls={OPEN: {}})
    page = Page(render(evaluation=changed))
    assert all(tag != "script" for tag, _ in page.found)
    assert hostile in page.text


@pytest.mark.parametrize(("predicted", "shown"), [("", "(empty answer)"), (None, "(no answer)"), ("red", "red")])
def test_an_answer_without_text_is_shown_in_words(render, evaluation, predicted, shown):
    changed = change_judged(evaluation, predicted=predicted, target="blue")
    [judged] = changed.protocols[OPEN].judged
    assert judged.shown_answer == shown
    assert find_most_confused([judged]) == [("blue", shown, 1)]
    assert shown in Page(render(evaluation=dataclasses.replace(changed, controls={OPEN: {}}))).text


def test_a_clip_of_one_chunk_without_video_or_audio_can_be_shown(render, extras, one_clip):
    changed = dataclasses.replace(
        one_clip, edges=(0.0, 0.5), frames=None, spectrogram=None,
        reconstruction=one_clip.reconstruction[:0], attention=np.ones((len(one_clip.judged), 1)),
    )  # fmt: skip
    text = Page(render(dataclasses.replace(extras, one_clip=changed))).text
    assert "no video" in text
    assert "no audio" in text


def test_a_reconstruction_of_the_chunk_itself_is_shown_for_every_chunk(render, extras, one_clip, loaded, shapes):
    """With a target of fewer frames, each picture stands for several."""
    config = copy.deepcopy(loaded.model.config)
    config.reconstruction = dataclasses.replace(config.reconstruction, step="same", frames=1, patch=(1, 8, 8))
    model = type(loaded.model)(config).eval()
    clip = loaded.processor.feature_extractor.read(shapes / one_clip.media)
    changed = examine_clip(dataclasses.replace(loaded, model=model), clip, one_clip.media, one_clip.judged)
    assert changed.reconstruction.shape[:2] == changed.frames.shape[:2]
    assert (changed.reconstruction == changed.reconstruction[:, :1]).all()
    log = [{**line, "audio_loss": 0.5} if line["kind"] == "train" else line for line in extras.log]
    page = Page(render(dataclasses.replace(extras, one_clip=changed, log=log)))
    classes = [attributes.get("class", "").split() for _, attributes in page.found]
    assert sum("film" in names for names in classes) == 2 * len(changed.frames)
    assert "reconstructed" in page.text and "expected" not in page.text and "Audio" in page.text


def test_the_figures_of_the_page_are_written_for_papers(loaded, evaluation, extras, tmp_path):
    names = write_report(tmp_path, loaded, evaluation, extras, "pdf")
    assert names[-1] == "report.html"
    assert {f"figures/{name}.pdf" for name in ("open-generation-scores", "loss-text", "learning", "one-clip")} <= {
        *names
    }
    assert all((tmp_path / name).read_bytes().startswith(b"%PDF") for name in names[:-1])


def test_one_clip_is_the_clip(one_clip, shapes, loaded):
    clip = loaded.processor.feature_extractor.read(shapes / one_clip.media)
    tensors = loaded.processor.feature_extractor.tensors(clip)
    assert one_clip.edges == clip.timeline.edges
    assert np.array_equal(one_clip.frames[2, 1], tensors["video"][2, 1].permute(1, 2, 0).numpy())
    assert len(one_clip.reconstruction) == len(one_clip.frames) - 1
    assert np.allclose(one_clip.attention.sum(1), 1, atol=1e-5)


def test_a_clip_that_is_gone_is_not_shown(loaded, evaluation):
    assert examine_evaluated_clip(loaded, change_judged(evaluation, media="gone.mp4")) is None


def test_examples_come_from_different_videos_and_cover_several_types(evaluation):
    judged = evaluation.protocols[OPEN].judged
    chosen = choose_examples(judged, count=2)
    assert len({item.example.video_name for item in chosen}) == 2
    assert len({item.example.question_type for item in chosen}) == 2
    assert len(choose_examples(judged)) == len({item.example.video_name for item in judged})


def test_the_most_varied_clip_is_chosen(evaluation):
    judged = evaluation.protocols[OPEN].judged
    chosen = choose_clip(judged)
    assert len({item.example.media for item in chosen}) == 1
    types = {}
    for item in judged:
        types.setdefault(item.example.media, set()).add(item.example.question_type)
    assert len(types[chosen[0].example.media]) == max(map(len, types.values()))
    assert choose_clip([]) == []

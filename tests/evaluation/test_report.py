import copy
import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mirasol.evaluation.exhibit import look_closely, most_telling
from mirasol.evaluation.metrics import Answered, blind
from mirasol.evaluation.protocol import evaluate_with_controls
from mirasol.evaluation.report import ReportData, render_report, sample_answers

VOID = {"meta", "img", "br", "line"}


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
def results(loaded, clips, shapes):
    return evaluate_with_controls(loaded.model, loaded.processor, clips, shapes)


@pytest.fixture(scope="module")
def exhibit(loaded, results, shapes):
    media = most_telling(results.test.answers)
    clip = loaded.processor.feature_extractor.read(shapes / media)
    answered = [item for item in results.test.answers if item.example.media == media]
    return look_closely(loaded.model, loaded.processor, clip, media, answered)


@pytest.fixture(scope="module")
def data(results, exhibit):
    scores = {name: control.to_dict() for name, control in results.controls.items()}
    shipped = {"test": results.test.to_dict(), "controls": scores}
    metrics = {
        "test": results.test.to_dict(), "chance": results.chance.to_dict(), "controls": scores, "shipped": shipped,
        "seconds": {"data": 3.0, "train": 130.0, "total": 133.0},
    }  # fmt: skip
    asked = [item.example for item in results.test.answers]
    clips = {"train": 6, "validation": 2, "test": 3}
    surroundings = {"versions": {"torch": "2"}, "hardware": {"cores": 2, "gpu": None}, "commit": None}
    return ReportData(
        metrics, blind(asked, asked), list(log_lines()), results.test.answers, exhibit, clips, (), surroundings, {}
    )


def test_the_page_is_whole_and_asks_nothing_of_the_network(data):
    html = render_report(data)
    page = Page(html)
    for tag, attributes in page.found:
        assert tag not in ("script", "link", "iframe"), tag
        assert attributes.get("src", "data:").startswith("data:")
    assert all(url.startswith("data:") for url in re.findall(r"url\(([^)]*)", html))
    assert "http" not in re.sub(r"data:[^)\"]*", "", html)


def test_it_shows_what_a_report_has_to_show(data):
    page = Page(render_report(data))
    for word in ("Text", "Latent", "Video", "chance", "no video", "no audio", "neither", "audio shifted", "shipped"):
        assert word in page.text, word
    for question_type in data.metrics["test"]["by_type"]:
        assert question_type in page.text
    for item in data.exhibit.answered:
        assert item.example.prompt in page.text
    classes = [attributes.get("class", "").split() for _, attributes in page.found]
    chunks = len(data.exhibit.edges) - 1
    assert sum("film" in names for names in classes) == 2 * chunks - 1, "every chunk seen, all but the first expected"
    assert sum("look" in names for names in classes) == chunks * len(data.exhibit.answered)
    assert sum("chart" in names for names in classes) == 4


def test_nothing_that_was_asked_or_answered_becomes_markup(data):
    item = data.answered[0]
    hostile = "<script>alert(1)</script>\"'"
    example = dataclasses.replace(item.example, prompt=hostile, media=hostile, target=hostile)
    page = Page(render_report(dataclasses.replace(data, answered=[Answered(example, hostile)])))
    assert all(tag != "script" for tag, _ in page.found)
    assert hostile in page.text


def test_it_does_without_shipped_weights_and_controls(data):
    metrics = {**data.metrics, "shipped": None, "controls": {}}
    assert "shipped weights" not in Page(render_report(dataclasses.replace(data, metrics=metrics))).text


def test_a_clip_of_one_chunk_without_video_or_audio_can_be_shown(data):
    exhibit = dataclasses.replace(
        data.exhibit, edges=(0.0, 0.5), frames=None, spectrogram=None,
        reconstruction=data.exhibit.reconstruction[:0], attention=np.ones((len(data.exhibit.answered), 1)),
    )  # fmt: skip
    text = Page(render_report(dataclasses.replace(data, exhibit=exhibit))).text
    assert "no video" in text
    assert "no audio" in text


def test_a_reconstruction_of_the_chunk_itself_is_shown_for_every_chunk(data, loaded, shapes):
    """With a target of fewer frames, each picture stands for several."""
    config = copy.deepcopy(loaded.model.config)
    config.reconstruction = dataclasses.replace(config.reconstruction, step="same", frames=1, patch=(1, 8, 8))
    model = type(loaded.model)(config).eval()
    clip = loaded.processor.feature_extractor.read(shapes / data.exhibit.media)
    exhibit = look_closely(model, loaded.processor, clip, data.exhibit.media, data.exhibit.answered)
    assert exhibit.reconstruction.shape[:2] == exhibit.frames.shape[:2]
    assert (exhibit.reconstruction == exhibit.reconstruction[:, :1]).all()
    log = [{**line, "audio_loss": 0.5} if line["kind"] == "train" else line for line in data.log]
    log = [{**line, "clip": {**line["clip"], "audio_loss": 0.5}} if "clip" in line else line for line in log]
    page = Page(render_report(dataclasses.replace(data, exhibit=exhibit, log=log)))
    classes = [attributes.get("class", "").split() for _, attributes in page.found]
    assert sum("film" in names for names in classes) == 2 * len(exhibit.frames)
    assert sum("chart" in names for names in classes) == 5
    assert "reconstructed" in page.text and "expected" not in page.text and "Audio" in page.text


def test_the_exhibit_is_the_clip(exhibit, shapes, loaded):
    clip = loaded.processor.feature_extractor.read(shapes / exhibit.media)
    tensors = loaded.processor.feature_extractor.tensors(clip)
    assert exhibit.edges == clip.timeline.edges
    assert np.array_equal(exhibit.frames[2, 1], tensors["video"][2, 1].permute(1, 2, 0).numpy())
    assert len(exhibit.reconstruction) == len(exhibit.frames) - 1
    assert np.allclose(exhibit.attention.sum(1), 1, atol=1e-5)


def test_samples_show_both_verdicts_and_come_from_all_over(data):
    answered = [Answered(item.example, item.example.target if k % 2 else "") for k, item in enumerate(data.answered)]
    for group in sample_answers(answered, ["sight", "count"], each=1):
        assert all(item.right for item in group["right"])
        assert not any(item.right for item in group["wrong"])
        assert group["asked"] >= len(group["right"]) + len(group["wrong"]) > 0


def test_the_most_telling_clip_has_most_types(results):
    media = most_telling(results.test.answers)
    types = {name: set() for name in {item.example.media for item in results.test.answers}}
    for item in results.test.answers:
        types[item.example.media].add(item.example.question_type)
    assert len(types[media]) == max(map(len, types.values()))

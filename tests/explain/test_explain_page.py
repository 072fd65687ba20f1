"""The page, the figures and the command show the numbers that `explain` returns."""

import dataclasses
import html
import json
import re
import warnings

import numpy as np
import pytest
from explaining import QUESTION, TEXTS, make_clip, make_model
from matplotlib.backends.backend_agg import FigureCanvasAgg
from untrained import only_stream

from mirasol.cli.main import main
from mirasol.errors import UserError
from mirasol.evaluation.figures import apply_style, write_figures
from mirasol.explain import explain
from mirasol.explain.describe import describe_explanation, find_chunk, list_in_words
from mirasol.explain.figures import draw_figures
from mirasol.explain.page import render_page
from mirasol.explain.pictures import lay_over, spread_over_frames, spread_over_spectrogram, trace_waveform


def explain_clip(name, **settings):
    model, processor = make_model(name)
    return explain(model, processor, make_clip(**settings), QUESTION, answer="a red circle")


def render(explanation, chunk=0):
    return render_page(explanation, chunk, file="a & b.mp4", checkpoint="tiny")


def read_titles(page, name):
    """Numbers that the cells of a row have as their titles, by chunk."""
    found = re.findall(rf'title="{re.escape(html.escape(name))}, chunk (\d+): ([^"]+)"', page)
    return {int(chunk): value for chunk, value in found}


@pytest.mark.parametrize("name", ["transformer", "cls", "ttm", "late", "concat"])
def test_page_json_and_figures_have_the_same_numbers(name):
    explanation = explain_clip(name, chunks=4, gaps=True)
    record, page = describe_explanation(explanation, 2), render(explanation, 2)
    own = json.loads(re.search(r'id="numbers">(.*?)</script>', page, re.DOTALL)[1])
    assert own == json.loads(json.dumps(record))

    attention = explanation.cross_attention.mean(axis=0).sum(axis=2)
    np.testing.assert_allclose([token["attention"] for token in record["tokens"]], attention, atol=1e-5)
    for token in record["tokens"]:
        titles = read_titles(page, f"cross-attention of {token['text']}")
        assert list(map(float, titles.values())) == token["attention"]
    tubes = len(explanation.tubes)
    mean = explanation.reading.rollout[2].mean(axis=0)
    np.testing.assert_allclose(record["reads"]["rollout"]["picture"], mean[:, :tubes].sum(axis=1), atol=1e-5)
    np.testing.assert_allclose(record["reads"]["rollout"]["sound"], mean[:, tubes:].sum(axis=1), atol=1e-5)
    titles = read_titles(page, "share of pictures")
    assert titles.keys() == {1, 2, 3, 4}
    shown = read_titles(page, "log-likelihood lost without the picture")
    expected = record["mattered"]["loss_without_picture"]
    assert [None if shown[place + 1] == "none" else float(shown[place + 1]) for place in range(4)] == expected
    assert expected[1] is None and record["mattered"]["loss_without_sound"][3] is None
    np.testing.assert_allclose(
        [value for value in expected if value is not None], explanation.occlusion.losses[0][[0, 2, 3]], atol=1e-5
    )

    figures = draw_figures(explanation, 2)
    assert figures.keys() == {"timeline", "combiner"} | ({"memory"} if name == "ttm" else set())
    drawn = figures["timeline"].axes[3].images[0].get_array()
    np.testing.assert_allclose(drawn, attention, atol=1e-5)
    drawn = figures["combiner"].axes[2].images[0].get_array()
    np.testing.assert_allclose(drawn.sum() + record["reads"]["rollout"]["own"], 1, atol=1e-3)
    if name == "ttm":
        drawn = figures["memory"].axes[0].images[0].get_array()
        np.testing.assert_allclose(drawn[:, :-1], explanation.reading.memory.content.mean(axis=1), atol=1e-5)


def test_a_token_that_comes_twice_is_drawn_twice():
    model, processor = make_model("transformer")
    explanation = explain(model, processor, make_clip(), QUESTION, answer="a red circle a red circle")
    assert len(set(explanation.tokens)) < len(explanation.tokens)
    drawn = draw_figures(explanation, 0)["timeline"].axes[3].images[0].get_array()
    np.testing.assert_allclose(drawn, explanation.cross_attention.mean(axis=0).sum(axis=2), atol=1e-5)


@pytest.mark.parametrize("chunks", [1, 3, 16, 24, 45, 60])
def test_numbers_and_frames_fit_into_their_columns(chunks):
    for figure in draw_figures(explain_clip("transformer", chunks=chunks), 0).values():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        assert figure.get_figheight() < 10
        for axes in figure.axes:
            column = axes.get_window_extent().width / chunks
            ticks = [label for label in axes.get_xticklabels() if label.get_text().isdecimal()]
            widths = [text.get_window_extent(canvas.get_renderer()).width for text in (*axes.texts, *ticks)]
            assert max(widths, default=0) <= column * (3 if ticks and chunks > 32 else 1)


def test_dollars_in_a_question_are_no_mathematics():
    model, processor = make_model("transformer")
    figures = draw_figures(explain(model, processor, make_clip(), "$\\frac$ or $6?", answer="$\\frac$"), 0)
    for figure in figures.values():
        FigureCanvasAgg(figure).draw()  # raised for a formula that is none


def test_letters_that_no_font_has_are_named_once(tmp_path):
    """Other warnings pass."""
    explanation = dataclasses.replace(explain_clip("concat", chunks=2), prompt="\u0b95 or \u0b95 $?")
    with pytest.warns(UserWarning, match="no installed font has '\u0b95'") as warned:
        write_figures(tmp_path / "figures", draw_figures(explanation, 0), "png")
    assert len(warned) == 1
    with pytest.warns(DeprecationWarning, match="another"), apply_style():
        warnings.warn("another", DeprecationWarning, stacklevel=1)


def test_a_last_chunk_says_why_nothing_is_expected_after_it():
    explanation = explain_clip("transformer", chunks=3)
    for chunk in range(3):
        said = [line for line in list_in_words(describe_explanation(explanation, chunk)) if "is the last one" in line]
        assert len(said) == (chunk == 2)
        assert ("expected and seen" in render(explanation, chunk)) == (chunk < 2)


def test_an_unlikely_answer_has_a_probability():
    model, processor = make_model("transformer")
    record = describe_explanation(explain(model, processor, make_clip(), QUESTION, answer=" ".join(TEXTS)), 0)
    assert 0 < record["probability"] == pytest.approx(np.exp(record["log_likelihood"]), rel=1e-3) and (
        record["probability"] < 1e-5
    )
    assert "probability 0)" not in list_in_words(record)[0]


def test_no_chunk_matters_most_where_none_matters():
    explanation = explain_clip("transformer", chunks=3)
    for least, decisive in ((0.02, 2), (0.001, None)):
        losses = np.array([[-1.0, least, np.nan], [-0.5, -0.2, -0.1]])
        changed = dataclasses.replace(explanation, occlusion=make_occlusion(explanation.occlusion, losses))
        assert describe_explanation(changed, 1)["mattered"]["decisive_chunk"] == decisive
        assert ("mattered most" in render(changed, 1)) == (decisive is not None)


@pytest.mark.parametrize("name", ["transformer", "perceiver", "ttm"])
@pytest.mark.parametrize("settings", [{"audio": False}, {"video": False}, {"gaps": True}, {}], ids=str)
def test_what_stands_for_something_missing_is_told_apart(name, settings):
    explanation = explain_clip(name, chunks=3, **settings)
    record = describe_explanation(explanation, 2)
    shares = record["reads"]["rollout"]
    there = [(chunk["picture"], chunk["sound"]) for chunk in record["chunks"]]
    missing = sum(
        share
        for (picture, sound), seen, heard in zip(there, shares["picture"], shares["sound"], strict=True)
        for share in ([] if picture else [seen]) + ([] if sound else [heard])
    )
    assert shares["missing"] == pytest.approx(missing, abs=1e-4) and (missing > 0) == bool(settings)
    told = any("stands for what is missing" in line for line in list_in_words(record))
    assert told == (shares["missing"] >= 0.005)


def make_occlusion(before, losses):
    """An occlusion of those losses."""
    return dataclasses.replace(
        before,
        without_picture=before.complete - losses[0],
        without_sound=before.complete - losses[1],
    )


def test_frames_straight_to_the_decoder_are_explained_as_what_they_are():
    """Neither Combiner nor latent model: each feature that the decoder attends to is one tube or patch of one chunk."""
    model, processor = make_model("concat", latent="none")
    explanation = explain(model, processor, make_clip(chunks=3, gaps=True), QUESTION, answer="a red circle")
    features = len(explanation.tubes) + len(explanation.patches)
    assert explanation.cross_attention.shape[2:] == (3, features)
    np.testing.assert_allclose(explanation.cross_attention.sum(axis=(2, 3)), 1, atol=1e-5)
    for chunk in range(3):
        np.testing.assert_array_equal(explanation.reading.rollout[chunk][:, chunk], np.eye(features))
    assert "There is no Combiner" in render(explanation, 1) and draw_figures(explanation, 1)


@pytest.mark.parametrize("settings", [{"audio": False}, {"video": False}, {"chunks": 1}], ids=str)
def test_a_page_needs_no_other_file_whatever_is_missing(settings):
    explanation = explain_clip("transformer", **settings)
    chunk = explanation.find_decisive_chunk()
    page = render(explanation, chunk)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "a &amp; b.mp4" in page
    assert page.count("<div") == page.count("</div>")
    assert ("no sound" in page) == (settings.get("audio") is False)
    assert ("no<br>picture" in page) == (settings.get("video") is False)
    assert draw_figures(explanation, chunk)


def test_what_is_spread_over_a_picture_is_what_was_read_of_it():
    explanation = explain_clip("transformer", chunks=3)
    mean = explanation.reading.rollout[2].mean(axis=0)
    tubes = len(explanation.tubes)
    frames, sound = spread_over_frames(explanation, mean), spread_over_spectrogram(explanation, mean)
    assert frames.shape == (3, 4, 32, 32) and sound.shape == (3, 16, 64)
    np.testing.assert_allclose(frames.sum(axis=(1, 2, 3)), mean[:, :tubes].sum(axis=1), atol=1e-5)
    np.testing.assert_allclose(sound.sum(axis=(1, 2)), mean[:, tubes:].sum(axis=1), atol=1e-5)
    only = np.zeros_like(mean)
    only[1, 12] = 1  # the last 2D patch: the lower right quarter of the first frame
    heat = spread_over_frames(explanation, only)
    assert heat[1, 0, 16:, 16:].min() > 0 and heat.sum() == pytest.approx(1) == heat[1, 0, 16:, 16:].sum()
    coloured = lay_over(np.full((32, 32), 0.5, np.float32), heat[1, 0])
    assert (coloured[:16, :, 0] == coloured[:16, :, 2]).all() and (coloured[16:, 16:, 0] > coloured[16:, 16:, 2]).all()


def test_the_waveform_is_drawn_where_it_sounds():
    explanation = explain_clip("concat", chunks=4)
    quiet = np.zeros_like(explanation.waveform)
    quiet[8_000:16_000] = 0.5  # the second half second of two
    object.__setattr__(explanation, "waveform", quiet)
    ends = trace_waveform(explanation, 8)
    np.testing.assert_array_equal(ends[:, 1], [0, 0, 0.5, 0.5, 0, 0, 0, 0])


def test_a_chunk_that_the_clip_does_not_have_is_refused():
    explanation = explain_clip("concat", chunks=2)
    assert find_chunk(explanation, 2) == 1
    assert find_chunk(explanation, None) == explanation.find_decisive_chunk()
    for number in (0, 3, -1):
        with pytest.raises(UserError, match="1 to 2"):
            find_chunk(explanation, number)


@pytest.fixture
def clip(shapes):
    return sorted((shapes / "clips" / "test").iterdir())[0]


def run(*arguments):
    main(["explain", *map(str, arguments)])


def test_the_command_writes_page_and_figures_and_prints_the_same_numbers(untrained, clip, tmp_path, capsys):
    page = tmp_path / "new" / "page.html"
    run(untrained, clip, QUESTION, "--output", page, "--figures", "png", "--json", "--chunk", 2, "--end", 2)
    record = json.loads(capsys.readouterr().out)
    text = page.read_text(encoding="utf-8")
    own = json.loads(re.search(r'id="numbers">(.*?)</script>', text, re.DOTALL)[1])
    for account in ("rollout", "last_layer"):  # the command alone has single tubes and patches of each feature
        for feature in record["reads"][account]["by_feature"]:
            tubes, patches = np.array(feature.pop("tubes")), np.array(feature.pop("patches"))
            assert tubes.shape == (4, len(record["boxes"]["tubes"]))
            np.testing.assert_allclose(tubes.sum(axis=1), feature["picture"], atol=2e-4)
            np.testing.assert_allclose(patches.sum(axis=1), feature["sound"], atol=2e-4)
    for kind, numbers in (("tubes", 6), ("patches", 4)):
        assert np.array(record["boxes"][kind]).shape[1:] == (numbers,)
    assert np.array(record["boxes"]["frame_times"]).shape == (4, 4)
    assert own == {key: value for key, value in record.items() if key not in ("file", "checkpoint")}
    assert record["reads"]["chunk"] == 2 and len(record["chunks"]) == 4
    pictures = sorted(file.name for file in (tmp_path / "new" / "page-figures").iterdir())
    assert pictures == ["combiner.png", "timeline.png"]

    before = page.read_bytes()
    silent = only_stream("video", clip, tmp_path / "silent.mp4")
    refused = {
        "already exists": (untrained, clip, QUESTION, "--output", page),
        "already exists: give another folder": (
            *(untrained, clip, QUESTION, "--output", page.with_name("page.htm"), "--figures", "pdf"),
        ),
        "no such": (untrained, tmp_path / "none.mp4", QUESTION, "--output", tmp_path / "a.html"),
        "is empty": (untrained, clip, "  ", "--output", tmp_path / "a.html"),
        "--answer": (untrained, clip, QUESTION, "--answer", "", "--output", tmp_path / "a.html"),
        "chunks 1 to 4": (*(untrained, silent, QUESTION, "--chunk", 5, "--end", 2, "--output", tmp_path / "a.html"),),
        "checkpoint": (tmp_path, clip, QUESTION, "--output", tmp_path / "a.html"),
        "ends in .html": (untrained, clip, QUESTION, "--output", tmp_path / "a.json"),
        "--figures svg": (untrained, clip, QUESTION, "--figures", "svg", "--output", tmp_path / "a.html"),
    }
    for words, arguments in refused.items():
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        assert stopped.value.code == 2
        said = capsys.readouterr()
        assert words in said.err.splitlines()[-1].lower() or words in said.err.splitlines()[-1]
        assert len(said.err.strip().splitlines()) <= 2  # a note about the file, and the error
        assert not (tmp_path / "a.html").exists()
    assert page.read_bytes() == before

    run(untrained, silent, QUESTION, "--output", tmp_path / "silent.html", "--end", 1)
    said = capsys.readouterr().out
    assert "no sound to take away" in said and "written: " in said

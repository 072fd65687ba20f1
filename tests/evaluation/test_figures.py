"""Figures: what is drawn where, in the colours of the page, and as files."""

import base64
import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from mirasol import UserError
from mirasol.evaluation.figures import (
    COLOURS,
    Curve,
    ScoreBar,
    check_figure_format,
    convert_to_svg,
    draw_confusion,
    draw_curves,
    draw_learning,
    draw_scores,
    find_validation_accuracy,
    make_picture_url,
    map_to_colours,
    smooth_points,
    spread_apart,
    write_figures,
)

BARS = [
    ScoreBar("<sight>", 0.8, 0.7, 0.9, "c0", {"chance": 0.25}, {"no video": 0.3, "no audio": 0.75}),
    ScoreBar("All", 0.6, None, None, "soft", {"chance": 0.2}, {"no video": None, "no audio": 0.5}),
]


def open_picture(url):
    kind, _, data = url.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_a_picture_survives_the_data_url():
    pixels = np.random.default_rng(0).integers(0, 256, (17, 23, 3), dtype=np.uint8)
    assert np.array_equal(open_picture(make_picture_url(pixels)), pixels)
    assert open_picture(make_picture_url(pixels, largest=40)).shape == (17, 23, 3), "never made larger"
    assert open_picture(make_picture_url(np.zeros((100, 300, 3), np.uint8), largest=50)).shape == (50, 150, 3)


def test_colours_grow_brighter_with_the_value_and_take_any_range():
    brightness = map_to_colours(np.linspace(-3, 5, 50)[None]).astype(int).sum(-1)[0]
    assert (np.diff(brightness) >= 0).all()
    assert brightness[0] < 100 < 400 < brightness[-1]
    assert map_to_colours(np.zeros((2, 2))).shape == (2, 2, 3)


def test_an_svg_follows_the_page_and_refers_to_nothing_else():
    svg = convert_to_svg(draw_scores(BARS), "scores & more")
    parsed = ElementTree.fromstring(svg)  # well-formed
    assert parsed[0].text == "scores & more"
    assert not [value for value in COLOURS.values() if value in svg], "every colour of the page is a variable"
    assert "var(--c0)" in svg and "var(--ink)" in svg and "font-family: inherit" in svg
    assert "http" not in svg and "<style" not in svg
    references = set(re.findall(r"""(?:href="#|url\(#)([^)"]+)""", svg))
    assert references <= set(re.findall(r'\bid="([^"]+)"', svg))
    words = {text.text for text in parsed.iter("text")}
    assert {"<sight>", "80.0 %", "60.0 %", "95 % interval", "chance", "no video", "no audio"} <= words


def test_bars_end_at_their_values_and_markers_stand_at_theirs():
    axes = draw_scores(BARS).axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [1, 1, 0.8, 0.6], "two tracks, then a bar for each number"
    points = [float(line.get_xdata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
    assert points == [0.3, 0.75, 0.5], "a control without a number has no marker"


def test_a_chart_draws_every_point_and_marks_the_stages():
    curve = Curve("<loss> & co", [(0, 5.0), (50, 1.0), (100, 0.2)], "accent")
    figure = draw_curves([curve], (4, 2), marks={0: "first", 50: "<second>"}, end_labels=True)
    axes = figure.axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0, 5.0], [50, 1.0], [100, 0.2]]
    words = {text.text for text in ElementTree.fromstring(convert_to_svg(figure, "")).iter("text")}
    assert {" first", " <second>"} <= words or {"first", "<second>"} <= words


def test_a_long_curve_is_thinned():
    points = [(step, 1.0) for step in range(100_000)]
    assert len(draw_curves([Curve("loss", points, "accent")], (4, 2)).axes[0].lines[0].get_xdata()) <= 1_500


def test_labels_at_the_ends_do_not_overlap():
    places = spread_apart([0.97, 0.975, 0.98, 0.99, 1.0], gap=0.05)
    assert min(np.diff(places)) >= 0.05 - 1e-9
    assert places[-1] <= 1
    assert spread_apart([0.1, 0.5], gap=0.05) == [0.1, 0.5], "those with room stay"
    assert spread_apart([], 0.1) == []


def test_a_chart_of_nothing_is_a_chart():
    assert convert_to_svg(draw_curves([Curve("none", [], "ink")], (3, 2), end_labels=True), "").startswith("<svg")
    assert convert_to_svg(draw_scores([]), "").startswith("<svg")
    assert draw_learning([], {}) is None


def test_smoothing_keeps_length_and_mean_of_a_straight_line():
    points = [(k, 2.0 * k) for k in range(100)]
    smooth = smooth_points(points)
    assert len(smooth) == 100
    assert smooth[50] == pytest.approx((50, 100.0))
    assert smooth_points([(1, 3.0)]) == [(1, 3.0)]


def test_validation_accuracy_is_read_from_logs_of_any_version_and_of_several_data_sets():
    part = {"accuracy": 0.5, "by_type": {"sight": {"accuracy": 0.5}}}
    other = {"accuracy": 0.9, "by_type": {"describe": {"accuracy": 0.9}}}
    line = {"kind": "validation", "step": 3, "clip": part}
    for name in ("segment", "slot"):
        assert find_validation_accuracy({**line, name: other}) == {"sight": 0.5, "describe": 0.9}
    several = {"kind": "validation", "step": 3, "a_clip": part, "b_segment": part}
    assert find_validation_accuracy(several) == {"a: sight": 0.5, "b: sight": 0.5}
    assert find_validation_accuracy({"kind": "train", "step": 3}) == {}


def test_a_confusion_shows_each_count():
    svg = convert_to_svg(draw_confusion(np.array([[3, 1], [0, 2]]), ["dog & cat", "rain"]), "")
    words = [text.text for text in ElementTree.fromstring(svg).iter("text")]
    assert {"3", "1", "2", "dog & cat", "rain"} <= set(words)


def test_figures_are_written_as_files(tmp_path):
    files = write_figures(tmp_path / "figures", {"Open generation, scores": draw_scores(BARS)}, "pdf")
    assert files == [tmp_path / "figures" / "open-generation-scores.pdf"]
    content = files[0].read_bytes()
    assert content.startswith(b"%PDF") and b"/FontFile2" in content, "fonts are embedded"
    write_figures(tmp_path / "again", {"Open generation, scores": draw_scores(BARS)}, "pdf")
    assert (tmp_path / "again" / files[0].name).read_bytes() == content, "the same numbers give the same file"
    [png] = write_figures(tmp_path / "figures", {"scores": draw_scores(BARS)}, "png")
    assert Image.open(png).width > 1_500
    with pytest.raises(UserError, match="--figures svg: choose pdf or png"):
        check_figure_format("svg")


def test_matplotlib_is_imported_where_something_is_drawn_and_not_before():
    code = (
        "import sys\nimport mirasol.evaluation.report, mirasol.evaluation.one_clip, mirasol.training.validation\n"
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

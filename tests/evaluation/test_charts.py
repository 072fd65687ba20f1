import base64
import io
import xml.etree.ElementTree as ElementTree

import av
import numpy as np
import pytest

from mirasol.evaluation.charts import Frame, Line, heat, line_chart, png_url, smoothed, ticks


def test_a_picture_survives_the_data_url():
    pixels = np.random.default_rng(0).integers(0, 256, (17, 23, 3), dtype=np.uint8)
    kind, _, data = png_url(pixels).partition(",")
    assert kind == "data:image/png;base64"
    with av.open(io.BytesIO(base64.b64decode(data))) as picture:
        [frame] = picture.decode(video=0)
    assert np.array_equal(frame.to_ndarray(format="rgb24"), pixels)


def test_heat_grows_brighter_with_the_value_and_takes_any_range():
    brightness = heat(np.linspace(-3, 5, 50)[None]).astype(int).sum(-1)[0]
    assert (np.diff(brightness) >= 0).all()
    assert brightness[0] < 100 < 600 < brightness[-1]
    assert heat(np.zeros((2, 2))).shape == (2, 2, 3)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.037), (0, 1600), (-2, 7), (0.2, 0.9)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high, 4)
    assert 2 <= len(found) <= 9
    assert low <= found[0] <= found[-1] <= high
    assert np.allclose(np.diff(found), found[1] - found[0])


def texts(svg):
    return [element for element in ElementTree.fromstring(svg).iter() if element.tag == "text"]


def test_a_chart_draws_every_point_inside_its_frame():
    line = Line("<loss> & co", [(0, 5.0), (50, 1.0), (100, 0.2)], "c0")
    svg = line_chart([line], Frame(300, 200), marks={0: "first", 50: "<second>"})
    [curve] = [element for element in ElementTree.fromstring(svg).iter() if element.tag == "polyline"]
    points = [tuple(map(float, point.split(","))) for point in curve.attrib["points"].split()]
    assert len(points) == 3
    assert all(44 <= x <= 286 and 20 <= y <= 172 for x, y in points)
    assert points[0][1] < points[1][1] < points[2][1], "larger is higher"
    assert {"first", "<second>"} <= {text.text for text in texts(svg)}


def test_labels_at_the_ends_do_not_overlap():
    lines = [Line(f"line {k}", [(0, 0.0), (10, 0.001 * k)], f"c{k}") for k in range(8)]
    svg = line_chart(lines, Frame(600, 240, right=120), y_range=(0, 1), direct_labels=True)
    heights = sorted(float(text.attrib["y"]) for text in texts(svg) if "label" in text.attrib["class"])
    assert len(heights) == 8
    assert min(np.diff(heights)) >= 14.9
    assert heights[-1] <= 240


def test_a_chart_of_nothing_is_a_chart():
    svg = ElementTree.fromstring(line_chart([Line("none", [], "c0")], Frame(300, 200), direct_labels=True))
    assert svg.tag.endswith("svg")


def test_smoothing_keeps_length_and_mean_of_a_straight_line():
    points = [(k, 2.0 * k) for k in range(100)]
    result = smoothed(points)
    assert len(result) == 100
    assert result[50] == pytest.approx((50, 100.0))

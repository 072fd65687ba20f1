"""Streamed rows: answers are those about whole clips, what they take is written down, kills do not matter."""

import csv
import dataclasses
import io
import json
import shutil

import pytest
import yaml

from mirasol.ablation import run
from mirasol.ablation.execute import make_runs, run_here
from mirasol.ablation.plan import write_suite
from mirasol.ablation.report import write_result
from mirasol.ablation.result import collect_result
from mirasol.ablation.runs import Run, SuiteRuns
from mirasol.ablation.sections import list_ages
from mirasol.ablation.streaming import stream_run
from mirasol.ablation.suite import read_suite
from mirasol.errors import UserError


@pytest.fixture
def copied(finished_suite, tmp_path):
    """The finished suite in a folder of its own."""
    shutil.copytree(finished_suite.parent, tmp_path / "copy")
    return tmp_path / "copy"


def set_stream(folder, stream, output="output") -> SuiteRuns:
    file = folder / "suite" / "two_rows.yaml"
    values = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**values, "stream": stream}, sort_keys=False))
    return SuiteRuns(read_suite(file), folder / output)


def stream(one: Run, **settings):
    """What a run of the finished suite gives when it is streamed so."""
    asked = {**one.asked, "stream": {"clips": None, "chunks": None, "window": None, **settings}}
    return stream_run(dataclasses.replace(one, asked=asked), None, "cpu")


@pytest.fixture
def finished(copied) -> Run:
    return SuiteRuns(read_suite(copied / "suite" / "two_rows.yaml"), copied / "output").list_rows()[0]


def test_streamed_answers_are_those_about_the_whole_clip(finished):
    found = stream(finished, clips=3)
    whole = json.loads((finished.folder / "answers.json").read_text())
    assert found["streams"] == 3 == len(set(found["video"])) and found["same"] == len(found["id"]) > 3
    value = dict(zip(whole["id"], whole["value"], strict=True))
    assert found["value"] == [value[id] for id in found["id"]]
    lengths = dict(zip(found["video"], found["place"], strict=True)).values()
    assert found["end"]["chunks"] == pytest.approx(sum(lengths) / 3)


def test_a_long_stream_asks_at_every_end_of_a_clip_and_a_window_bounds_its_state(finished):
    found = stream(finished, chunks=70, window="clip")
    first = found["place"][0]
    assert found["streams"] == 1 and found["window"] == first and found["same"] is None
    places = sorted(set(found["place"]))
    assert places == list(dict.fromkeys(found["place"])) and places[-1] <= 70 < places[-1] + 13
    clips = [found["video"][found["place"].index(place)] for place in places]
    assert len(set(clips)) == 3 and clips[:3] == clips[3:6]  # again and again
    points = {point["chunks"]: point for point in found["points"]}
    assert list(points) == [16, 32, 64, 70] and found["end"] == points[70]
    assert points[16]["state"] == points[64]["state"] and set(points[16]["state"]) == {"combiner", "latent", "latents"}
    assert all(point["milliseconds"] > 0 and point["process"] > 2**20 for point in points.values())
    free = {point["chunks"]: point["state"] for point in stream(finished, chunks=70)["points"]}
    assert sum(free[64].values()) > sum(free[32].values()) > sum(points[64]["state"].values())


def test_a_run_that_was_killed_before_its_stream_goes_on_with_that_alone(copied, monkeypatch):
    runs = set_stream(copied, {"clips": 2})
    with pytest.raises(UserError, match="evaluation stream"):
        _ = runs.list_rows()[0].finished
    for one in runs.list_rows():
        (one.folder / "identity.json").write_text(json.dumps(one.identity))
        (one.folder / "done.json").unlink()
    shutil.rmtree(runs.shared / "rows")
    monkeypatch.setattr(run, "_evaluate", lambda one: pytest.fail("evaluated again"))
    before = {one.name: (one.folder / "answers.json").read_bytes() for one in runs.list_rows()}
    make_runs(runs.list_left(runs.list_rows()), run_here, lambda name, facts: None)
    for one in runs.list_rows():
        assert one.finished and json.loads((one.folder / "stream.json").read_text())["streams"] == 2
        assert (one.folder / "answers.json").read_bytes() == before[one.name]
    monkeypatch.setattr(run, "stream_run", lambda *given: pytest.fail("streamed again"))
    make_runs(runs.list_left(runs.list_rows()), run_here, lambda name, facts: pytest.fail(name))
    write_suite(runs, {})
    check_stream_of_result(runs)


def check_stream_of_result(runs: SuiteRuns) -> None:
    """The result has what the runs wrote, in every form."""
    result = collect_result(runs.output)
    names = write_result(runs.output, result)
    written = [json.loads((one.folder / "stream.json").read_text()) for one in runs.list_rows(rows=["heavy"])]
    heavy = result.rows[1].stream
    assert heavy.streams == 2 and heavy.same == 1 and len(heavy.by_place) == 1
    [spread] = heavy.by_place.values()
    assert spread.by_seed == pytest.approx([sum(one["value"]) / len(one["value"]) for one in written])
    kept = [sum(one["end"]["state"].values()) for one in written]
    assert sum(heavy.end["state"].values()) == pytest.approx(sum(kept) / 2)
    again = json.loads((runs.output / "results.json").read_text())["rows"][1]["stream"]
    assert again["end"] == heavy.end and again["points"] == list(heavy.points)
    assert "stream.csv" in names
    rows = list(csv.DictReader(io.StringIO((runs.output / "stream.csv").read_text())))
    assert len(rows) == 2 * len(heavy.points)
    page, text, latex, markdown = (
        (runs.output / name).read_text() for name in ("report.html", "table.txt", "table.tex", "table.md")
    )
    assert page.count("<svg") == 2 and "<h2>Streaming</h2>" in page  # so few chunks make no curve
    assert "Streaming" in text and latex.count(r"\begin{tabular}") == 2 and "latent model" in markdown


def test_ages_are_a_table_and_a_figure(finished, copied):
    """Types that all are ages become a curve; where one is not, there is none."""
    output = copied / "output"
    assert list_ages(collect_result(output)) == []
    for file in output.glob("runs/*/*/answers.json"):
        answers = json.loads(file.read_text())
        answers["type"] = [f"age {4 ** (place % 3)}" for place in range(len(answers["type"]))]
        file.write_text(json.dumps(answers))
    result = collect_result(output)
    assert list_ages(result) == [1, 4, 16]
    assert {"ages.csv", "results.json"} <= set(write_result(output, result))
    rows = list(csv.DictReader(io.StringIO((output / "ages.csv").read_text())))
    assert [(row["row"], row["age"]) for row in rows] == [(r, a) for r in ("plain", "heavy") for a in ("1", "4", "16")]
    assert float(rows[4]["mean"]) == pytest.approx(result.rows[1].by_type["age 4"].mean, abs=1e-5)
    page, text = (output / "report.html").read_text(), (output / "table.txt").read_text()
    assert page.count("<svg") == 3 and "Accuracy over age" in page and "16 chunks ago" in text and "1 chunk ago" in text


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ({}, "set exactly one of the two"),
        ({"clips": 2, "chunks": 3}, "set exactly one of the two"),
        ({"clips": 0}, "stream.clips=0: give a whole number"),
        ({"chunks": 1.5}, "stream.chunks=1.5"),
        ({"chunks": 9, "window": "chunk"}, "stream.window='chunk'"),
        ({"clips": 2, "windows": 3}, "unknown key 'windows': did you mean 'window'"),
    ],
)
def test_odd_streams_are_refused_in_one_line(suite_file, suite_values, stream, message):
    suite_file.write_text(yaml.safe_dump({**suite_values, "stream": stream}))
    with pytest.raises(UserError) as raised:
        read_suite(suite_file)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    closed = {"stream": {"clips": 1}, "metric": {"protocol": "candidates"}}
    suite_file.write_text(yaml.safe_dump({**suite_values, **closed}))
    with pytest.raises(UserError, match="streams are asked openly"):
        read_suite(suite_file)


def test_a_suite_without_streams_has_the_identities_that_it_had(suite_file, tmp_path):
    [one, *_] = SuiteRuns(read_suite(suite_file), tmp_path / "output").list_rows()
    assert set(one.identity["evaluation"]) == {"split", "protocol", "question_types", "control"}

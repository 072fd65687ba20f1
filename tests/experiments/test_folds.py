"""An experiment with folds: trained and scored fold by fold, resumed, refused on other data, and its table."""

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_recordings import CLASSES, make_esc10, write_wav
from made_once import make_once
from media_making import tone

from mirasol.cli.main import main
from mirasol.experiments.baselines import score_baselines
from mirasol.experiments.table import compute_mean_interval, summarise

# The smallest model that trains, for two steps.
SMALL = [
    *(
        f"model.overrides.{part}={{depth: 1, width: 32, hidden: 32, heads: 1, head_width: 32}}"
        for part in ("vit", "audio.adapter", "combiner.stack", "latent.stack", "reconstruction.stack", "text.stack")
    ),
    "stages.classes.steps=2",
    "stages.classes.clips_per_step=4",
    "optimizer.warmup_steps=1",
    "model.overrides.chunking.chunk_seconds=0.5",
    "stages.classes.augment.time_shift=0",
]


def run(data: Path, output: Path, *more: str) -> None:
    main(["experiment", "esc10", "--data", str(data), "--output", str(output), "--from", "scratch", *more, *SMALL])


@pytest.fixture(scope="session")
def sounds(tmp_path_factory) -> Path:
    return make_once(tmp_path_factory, "esc10", lambda folder: make_esc10(folder, folds=2) and None)


@pytest.fixture(scope="session")
def finished(sounds, tmp_path_factory) -> Path:
    return make_once(tmp_path_factory, "esc10-experiment", lambda folder: run(sounds, folder))


def test_the_table_says_what_each_fold_says(finished):
    record = json.loads((finished / "results.json").read_text())
    table = (finished / "table.txt").read_text()
    assert [result["group"] for result in record["groups"]] == ["1", "2"]
    rows = {row["name"]: row for row in record["rows"]}
    # Low and high tones: two clips each of the other fold are enough for a forest.
    assert rows["random forest"]["accuracy"] == rows["logistic regression"]["accuracy"] == 1.0
    assert rows["human listeners (published)"]["accuracy"] == 0.957
    for name in ("scratch", "random forest"):
        each = [np.mean(result[name]["right"]) for result in record["groups"]]
        assert rows[name]["each"] == pytest.approx(each) and rows[name]["accuracy"] == pytest.approx(np.mean(each))
        assert name in table
    assert [len(result["scratch"]["right"]) for result in record["groups"]] == [5, 4]
    assert "without sound" in table and "torch" in table
    assert f"Baselines: scikit-learn {importlib.metadata.version('scikit-learn')}, seed 0." in table


def test_training_and_test_clips_of_a_fold_are_what_its_tables_say(finished, sounds):
    for group, other in (("1", "2"), ("2", "1")):
        folder = finished / "folds" / group / "data"
        files = {
            split: [json.loads(line)["file"] for line in (folder / f"{split}.jsonl").read_text().splitlines()]
            for split in ("train", "test")
        }
        assert {Path(file).name[0] for file in files["test"]} == {group}
        assert {Path(file).name[0] for file in files["train"]} == {other}
        assert all((sounds / file).stat().st_size for file in files["train"] + files["test"])


def test_baselines_can_be_had_alone(sounds, tmp_path, finished):
    main(["experiment", "esc10", "--data", str(sounds), "--output", str(tmp_path / "out"), "--from", "none", *SMALL])
    alone, record = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "out", finished))
    assert [row for row in record["rows"] if row["name"] != "scratch"] == alone["rows"]
    assert not list((tmp_path / "out" / "folds").rglob("train"))


@pytest.mark.parametrize("order", ["12", "21"])
def test_folds_done_one_after_the_other_are_the_table_of_all(sounds, tmp_path, order):
    command = ["experiment", "esc10", "--data", str(sounds), "--from", "none", *SMALL]
    main([*command, "--output", str(tmp_path / "at once")])
    for group in order:
        main([*command, "--output", str(tmp_path / "each"), "--groups", group])
        told = f"Not done: fold {order[1]}." in (tmp_path / "each" / "table.txt").read_text()
        assert told == (group == order[0])
    names = ("results.json", "table.txt")
    assert all((tmp_path / "each" / name).read_text() == (tmp_path / "at once" / name).read_text() for name in names)


@pytest.mark.parametrize("name", ["baselines.json", "scratch/fold.json"])
@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"{"])
def test_damaged_folds_are_one_line(finished, sounds, tmp_path, capsys, name, content):
    copied = Path(shutil.copytree(finished, tmp_path / "copied"))
    (copied / "folds" / "1" / name).write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        run(sounds, copied)
    assert ended.value.code == 2 and f"{name}: is damaged" in capsys.readouterr().err


def test_again_nothing_is_done_twice_and_the_table_is_the_same(finished, sounds, tmp_path, monkeypatch):
    before = (finished / "results.json").read_bytes()
    monkeypatch.setattr("mirasol.experiments.folds.train", None)
    monkeypatch.setattr("mirasol.experiments.folds.score_baselines", None)
    run(sounds, finished)
    assert (finished / "results.json").read_bytes() == before


def test_other_keys_and_other_recordings_are_refused(finished, sounds, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(sounds, finished, "seed=1")
    assert ended.value.code == 2 and "was started with overrides" in capsys.readouterr().err
    more = Path(shutil.copytree(sounds, tmp_path / "more"))
    write_wav(more / CLASSES[0] / "1-999-A.wav", tone(0.5, 8_000)[0], 8_000)
    copied = Path(shutil.copytree(finished, tmp_path / "copied"))
    marker = copied / "experiment.json"
    marker.write_text(marker.read_text().replace(str(sounds.resolve()), str(more.resolve())))
    with pytest.raises(SystemExit) as ended:
        run(more, copied)
    assert ended.value.code == 2 and "data changed since it was started" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["esc11"], "experiment esc11: choose esc10, fsdd, seen_heard"),
        (["esc10", "--groups", "9"], "--groups 9: the data has no such group: choose 1, 2"),
        (["esc10", "--tune"], "--tune: needs three groups, the data has 2"),
        (["esc10", "stages.classes.step=3"], "unknown key 'stages.classes.step'"),
        (["esc10", "--from", "nowhere/at/all"], "nowhere/at/all"),
        (["esc10", "--from", "none,tiny"], "--from none,tiny: name scratch or a checkpoint"),
        (["seen_heard", "--from", "none"], "--from none: name scratch or a checkpoint"),
        (["seen_heard", "--tune"], "seen_heard has one split of its own"),
    ],
)
def test_wrong_arguments_end_in_one_line_and_leave_nothing(sounds, tmp_path, capsys, arguments, line):
    with pytest.raises(SystemExit) as ended:
        main(["experiment", *arguments, "--data", str(sounds), "--output", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and line in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_scikit_learn_one_line_says_what_to_install(sounds, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit) as ended:
        run(sounds, tmp_path / "out")
    assert ended.value.code == 2 and "pip install 'mirasol[experiments]'" in capsys.readouterr().err


def test_baselines_are_the_same_each_time_and_fail_on_noise():
    rng = np.random.default_rng(0)
    labels = ["a", "b"] * 30
    signal, noise = np.arange(60)[:, None] % 2 + rng.normal(0, 0.1, (60, 4)), rng.normal(0, 1, (60, 4))
    for values, least, most in ((signal, 1.0, 1.0), (noise, 0.2, 0.8)):
        parts = (values[:40], labels[:40]), (values[40:], labels[40:])
        first = score_baselines(*parts)
        assert first == score_baselines(*parts)
        assert all(least <= np.mean(right) <= most for right in first.values())


def test_the_interval_over_folds_holds_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(3)
    intervals = [compute_mean_interval(rng.normal(0.7, 0.05, 5))[1:] for _ in range(400)]
    held = [low <= 0.7 <= high for low, high in intervals]
    assert 0.92 <= np.mean(held) <= 0.98
    assert compute_mean_interval([0.5]) == (0.5, None, None)


def test_a_difference_is_paired_by_folds():
    # Folds differ by much, the two by a tenth in each of them: the difference has no spread.
    results = [
        {"group": str(k), "random forest": {"right": [True] * k + [False] * (10 - k)}}
        | {"scratch": {"right": [True] * (k + 1) + [False] * (9 - k)}}
        for k in (2, 5, 8)
    ]
    rows = {row.name: row for row in summarise(results, {})}
    assert rows["scratch"].difference == pytest.approx((0.1, 0.1, 0.1))
    assert rows["scratch"].high - rows["scratch"].low > 0.5

"""A checkpoint on a data set: the same numbers whatever batches, processes and interruptions; everything counted."""

import csv
import dataclasses
import errno
import json
import math
import re
import shutil

import pytest

from mirasol import UserError
from mirasol.cli.main import main
from mirasol.data.datasets.folder import read_examples
from mirasol.data.datasets.registry import read_dataset
from mirasol.evaluation.answer import AnswerSettings
from mirasol.evaluation.compare import compare_results
from mirasol.evaluation.evaluate import evaluate_dataset, hash_checkpoint, score_file, write_evaluation
from mirasol.evaluation.journal import Journal
from mirasol.evaluation.metrics import CANDIDATES, OPEN, Estimate, collect_columns
from mirasol.evaluation.report import (
    compute_accuracy_by_length,
    count_confusions,
    describe_row,
    find_most_confused,
    format_length,
    write_report,
)
from mirasol.media.timeline import ChunkGrid


@pytest.fixture(scope="module")
def multiple_choice(shapes, tmp_path_factory):
    """The test clips as NExT-QA has its own; one of five videos is not there, one is no video."""
    root = tmp_path_factory.mktemp("next") / "data"
    root.mkdir()
    examples = read_examples(shapes, "test")
    clips = sorted({example.media for example in examples})
    columns = ("video", "frame_count", "width", "height", "question", "answer", "qid", "type", "a0", "a1", "a2", "a3",
               "a4")  # fmt: skip
    with (root / "test.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(columns)
        for place in range(len(clips) + 2):
            for qid, kind in enumerate(("CW", "TN", "TP")[: 1 + place]):
                table.writerow([place, 9, 9, 9, "what is seen", qid, qid, kind, "red", "blue", "low", "a bell", "two"])
    for place, media in enumerate(clips):
        shutil.copy(shapes / media, root / f"{place}.mp4")
    (root / f"{len(clips) + 1}.mp4").write_bytes(b"<html>not a film</html>")
    return root


@pytest.fixture(scope="module")
def dataset(multiple_choice):
    return read_dataset("nextqa_mc", multiple_choice, "test")


@pytest.fixture(scope="module")
def settings(dataset):
    return AnswerSettings(dataset.root, controls=("no_media",), max_new_tokens=4)


@pytest.fixture(scope="module")
def evaluated(loaded, dataset, settings):
    return evaluate_dataset(loaded, dataset, settings)


def test_every_annotated_question_is_accounted_for(evaluated):
    counts = evaluated.record["counts"]
    assert counts == {
        "n_annotated": 12, "n_found": 9, "n_usable": 6, "n_evaluated": 6,
        "reasons": {"missing media": 3, "unreadable clip": 3},
    }  # fmt: skip
    assert counts["n_annotated"] == counts["n_evaluated"] + sum(counts["reasons"].values())
    [lost] = evaluated.record["unusable_clips"]
    assert (lost["questions"], lost["reason"]) == (3, "an HTML page: its download failed")


def test_a_result_states_what_could_make_it_differ(evaluated, loaded, tmp_path):
    record = evaluated.record
    assert {"mirasol", "python", "torch", "transformers", "numpy", "PyAV"} == record["versions"].keys()
    settings, media = record["settings"], loaded.model.config.media_settings()
    assert (settings["device"], settings["max_new_tokens"], settings["controls"]) == ("cpu", 4, ["no_media"])
    assert all(settings[name] == media[name] for name in ("frames_per_chunk", "chunk_seconds", "image_size"))
    assert record["data"]["prompt"] == "what is seen"
    folder = tmp_path / "checkpoint"
    shutil.copytree(loaded.folder, folder)
    assert record["checkpoint"]["sha256"] == hash_checkpoint(folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert record["checkpoint"]["sha256"] != hash_checkpoint(folder)


def test_the_screen_is_not_flooded(untrained, multiple_choice, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(multiple_choice, root)
    with (root / "test.csv").open("a") as rows:
        rows.write("".join(f"9{n},9,9,9,what,0,0,CW,a,b,c,d,e\n" for n in range(30)))
    main(["evaluate", str(untrained), "nextqa_mc", str(root), "--skip-controls", "--max-new-tokens", "2"])
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("no media file of") == 20
    assert "missing media: 11 more: run `mirasol data check DATASET ROOT --json` for the full list" in told


def test_both_protocols_are_stated_beside_their_numbers(evaluated):
    protocols = evaluated.record["protocols"]
    assert list(protocols) == [OPEN, CANDIDATES]
    assert protocols[OPEN]["normalisation"] == "light"
    assert all(protocol["how"] for protocol in protocols.values())
    for protocol in protocols.values():
        assert protocol["metrics"]["Acc"]["n"] == 6
        assert protocol["metrics"]["Bef&Aft"]["n"] == 3
        assert protocol["controls"]["no_media"].keys() == protocol["metrics"].keys()
    headline = protocols[CANDIDATES]
    assert headline["headline_over_annotated"] == pytest.approx(headline["metrics"]["Acc"]["value"] * 6 / 12)
    assert json.loads(json.dumps(evaluated.record)) == evaluated.record


def test_no_readable_clip_is_a_result_too(loaded, shapes, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(shapes, root)
    for file in (root / "clips" / "test").iterdir():
        file.write_bytes(b"not a film")
    found = evaluate_dataset(loaded, read_dataset("folder", root, "test"), AnswerSettings(root))
    assert found.record["counts"]["n_evaluated"] == 0 < found.record["counts"]["reasons"]["unreadable clip"]
    assert found.protocols[OPEN].headline_estimate.value is None
    assert "unreadable clip" in found.format_table()
    write_report(tmp_path, loaded, found)
    assert "Clips that could not be read" in (tmp_path / "report.html").read_text()


def test_the_table_has_a_row_for_each_number_and_a_column_for_each_control(evaluated):
    table = evaluated.format_table().split("\n\n")[1].splitlines()
    assert table[1].split() == ["95", "%", "no"]
    assert table[2].split() == ["score", "interval", "n", "chance", "media"]
    assert table[-1].startswith("baselines over all questions: majority ")
    controlled = evaluated.controls[CANDIDATES]["no_media"].metrics
    for line, (name, estimate) in zip(table[3:-1], controlled.items(), strict=True):
        assert line.split()[0] == name
        assert line.split()[-1] == ("-" if estimate.value is None else f"{100 * estimate.value:.2f}")


def test_numbers_do_not_depend_on_the_batch(loaded, dataset, settings, evaluated):
    single = evaluate_dataset(loaded, dataset, dataclasses.replace(settings, clips_per_batch=1, threads=3))
    assert single.record == evaluated.record
    assert single.predictions == evaluated.predictions, "scores to the last digit"


@pytest.mark.slow
def test_numbers_do_not_depend_on_the_number_of_processes(loaded, dataset, settings, evaluated):
    helped = evaluate_dataset(loaded, dataset, dataclasses.replace(settings, clips_per_batch=1), processes=2)
    assert helped.record == evaluated.record
    assert helped.predictions == evaluated.predictions


def test_an_interrupted_evaluation_goes_on_to_the_same_numbers(
    loaded, dataset, settings, evaluated, tmp_path, monkeypatch
):
    alone = dataclasses.replace(settings, clips_per_batch=1)
    journal = tmp_path / "journal.jsonl"

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_dataset(loaded, dataset, alone, journal, progress=stop)
    assert len(journal.read_bytes().splitlines()) == 1 + 2
    journal.write_bytes(journal.read_bytes()[:-9])  # the machine went down while the second clip was written
    asked = []
    ended = evaluate_dataset(loaded, dataset, alone, journal, progress=lambda done, total: asked.append(total))
    assert ended.record == evaluated.record
    assert ended.predictions == evaluated.predictions
    assert asked[0] == 3, "of four clips one was answered"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len({tuple(line["clip"]) for line in lines[1:]}) == len(lines) - 1 == 4


def test_the_journal_of_another_evaluation_is_not_gone_on_with(loaded, dataset, settings, tmp_path):
    evaluate_dataset(loaded, dataset, settings, tmp_path / "journal.jsonl")
    with pytest.raises(UserError, match="settings"):
        evaluate_dataset(loaded, dataset, dataclasses.replace(settings, max_new_tokens=5), tmp_path / "journal.jsonl")


def test_a_journal_is_gone_on_with_where_the_training_split_came_later(loaded, dataset, settings, tmp_path):
    evaluate_dataset(loaded, dataset, settings, tmp_path / "journal.jsonl")
    known = (dataset.annotated, "9 examples of train.jsonl")
    found = evaluate_dataset(loaded, dataset, settings, tmp_path / "journal.jsonl", known=known)
    assert found.record["train_baselines"] == "9 examples of train.jsonl"
    assert "train blind" in found.protocols[OPEN].baselines


def test_two_processes_do_not_write_one_journal(tmp_path):
    with (
        Journal.open(tmp_path / "j", {"a": 1}),
        pytest.raises(UserError, match="another evaluation"),
        Journal.open(tmp_path / "j", {"a": 1}),
    ):
        pass


def test_a_disk_without_locks_is_a_warning(tmp_path, monkeypatch):
    def no_locks(stream, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match="this disk has no locks"), Journal.open(tmp_path / "j", {"a": 1}) as journal:
        journal.append([{"clip": 1}])
    assert len((tmp_path / "j").read_text().splitlines()) == 2


def test_a_damaged_journal_is_told(tmp_path):
    (tmp_path / "j").write_bytes(b'{"a": 1}\n{"clip"\n{"clip": []}\n')
    with pytest.raises(UserError, match="line 2"), Journal.open(tmp_path / "j", {"a": 1}):
        pass


def test_written_predictions_score_as_the_result_says(evaluated, dataset, tmp_path):
    names = write_evaluation(tmp_path, evaluated)
    assert names == ["predictions.jsonl", "predictions.candidates.jsonl", "predictions.official.json", "results.json"]
    protocols = json.loads((tmp_path / "results.json").read_text())["protocols"]
    # Questions without a prediction count as wrong there: six of all twelve.
    for name, protocol, form in (
        ("predictions.jsonl", OPEN, "light"),
        ("predictions.candidates.jsonl", CANDIDATES, "none"),
        ("predictions.official.json", CANDIDATES, "none"),
    ):
        found = score_file(dataset, tmp_path / name, form)
        assert found.protocol == protocol
        assert found.metrics["Acc"].value == pytest.approx(protocols[protocol]["headline_over_annotated"])
    assert compare_results(tmp_path, tmp_path).rows["All"].difference == 0


def test_a_prompt_that_is_too_long_is_counted(loaded, multiple_choice, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(multiple_choice, root)
    text = (root / "test.csv").read_text().replace("what is seen", "what is seen " * 4000, 1)
    (root / "test.csv").write_text(text)
    dataset = read_dataset("nextqa_mc", root, "test")
    found = evaluate_dataset(loaded, dataset, AnswerSettings(root, max_new_tokens=2))
    assert found.record["counts"]["reasons"]["text too long"] == 1
    assert found.record["counts"]["n_usable"] == 5


def test_the_command_writes_results_and_a_report_of_its_own(untrained, multiple_choice, tmp_path, capsys):
    output = tmp_path / "results"
    arguments = ["evaluate", str(untrained), "nextqa_mc", str(multiple_choice), "--output", str(output)]
    main([*arguments, "--skip-controls", "--max-new-tokens", "4"])
    out, err = capsys.readouterr()
    assert "Bef&Aft" in out and "missing media 3" in out
    assert "4.mp4" in err
    page = (output / "report.html").read_text()
    assert "http://" not in page and "https://" not in page
    assert page.count("data:image/png") >= 3
    assert "Wrong, open generation: 6, 3 of them shown" in page and "Wrong, candidate scoring: " in page
    assert re.search(r"[\d.]+( to [\d.]+)? s( or more)? \(\d+( to \d+)? chunks?\), n = \d", page), "lengths in seconds"
    assert not (output / "journal.jsonl").exists()
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"already exists and is complete: its results are in {output / 'results.json'}" in capsys.readouterr().err


def test_a_report_that_was_not_finished_is_made_by_the_same_command(untrained, multiple_choice, tmp_path, monkeypatch):
    output = tmp_path / "results"
    arguments = ["evaluate", str(untrained), "nextqa_mc", str(multiple_choice), "--output", str(output)]
    arguments += ["--skip-controls", "--max-new-tokens", "2"]

    def broken(*_):
        raise RuntimeError("no report")

    with monkeypatch.context() as patched:
        patched.setattr("mirasol.evaluation.report.write_report", broken)
        with pytest.raises(RuntimeError):
            main(arguments)
    before = (output / "results.json").read_text()  # what hours were spent on is there all the same
    with monkeypatch.context() as patched:
        patched.setattr("mirasol.evaluation.answer._answer_batch", broken)  # nothing is asked again
        main(arguments)
    assert (output / "results.json").read_text() == before
    assert (output / "report.html").is_file() and not (output / "journal.jsonl").exists()


def test_a_report_takes_numbers_without_an_upper_end(loaded, evaluated, tmp_path):
    scored = evaluated.protocols[CANDIDATES]
    metrics = {**scored.metrics, "d-prime": Estimate(2.5, 0.75, None, 6), "AUC": Estimate(None, None, None, 6)}
    changed = {**evaluated.protocols, CANDIDATES: dataclasses.replace(scored, metrics=metrics)}
    write_report(tmp_path, loaded, dataclasses.replace(evaluated, protocols=changed))
    assert "d-prime" in (tmp_path / "report.html").read_text()


def test_a_report_takes_names_of_files_that_are_not_utf8(loaded, evaluated, tmp_path):
    scored = evaluated.protocols[OPEN]
    strange = [dataclasses.replace(item, example=dataclasses.replace(item.example, media="caf\udce9.mp4"))
               for item in scored.judged]  # fmt: skip
    changed = {OPEN: dataclasses.replace(scored, judged=tuple(strange))}
    write_report(tmp_path, loaded, dataclasses.replace(evaluated, protocols=changed))
    assert "caf?.mp4" in (tmp_path / "report.html").read_text()


def test_still_images_are_no_clips_to_ask_about(loaded, shapes, tmp_path):
    shutil.copy(next((shapes / "clips" / "test").iterdir()), tmp_path / "a.mp4")
    (tmp_path / "b.png").write_bytes(b"\x89PNG")
    (tmp_path / "test.csv").write_text("file,prompt,target\na.mp4,what?,red\nb.png,what?,red\n")
    found = evaluate_dataset(
        loaded, read_dataset("folder", tmp_path, "test"), AnswerSettings(tmp_path, max_new_tokens=2)
    )
    assert found.record["counts"]["reasons"] == {"still image": 1}
    (tmp_path / "test.csv").write_text("file,prompt,target\nb.png,what?,red\n")
    with pytest.raises(UserError, match=r"no usable example in split 'test' of folder: still image 1"):
        evaluate_dataset(loaded, read_dataset("folder", tmp_path, "test"), AnswerSettings(tmp_path))


def test_lengths_are_told_in_seconds_where_chunks_have_one():
    grid = ChunkGrid(4, chunk_seconds=0.5, max_chunks=20)
    assert format_length(4, 9, grid) == "2 to 4.5 s (4 to 9 chunks)"
    assert format_length(1, 1, grid) == "0.5 s (1 chunk)"
    assert format_length(10, 20, grid) == "5 to 10 s or more (10 to 20 chunks)"
    assert format_length(16, 16, ChunkGrid(4, num_chunks=16)) == "16 chunks"


def test_where_nothing_is_left_to_ask_the_first_problem_is_reported(loaded, tmp_path):
    (tmp_path / "test.csv").write_text("clip,question,answer\na.mp4,what?,red\n")
    with pytest.raises(UserError, match=r"test.csv, line 1.*wrong header: expected file,prompt.*found clip,question"):
        read_dataset("folder", tmp_path, "test")
    (tmp_path / "test.csv").write_text("file,prompt,target\na.mp4,what?,red\n")
    with pytest.raises(UserError, match=r"a.mp4: no media file of 'a.mp4' was found; asked for in test.csv, line 2"):
        evaluate_dataset(loaded, read_dataset("folder", tmp_path, "test"), AnswerSettings(tmp_path))


def test_options_of_data_sets_are_refused_for_a_folder(untrained, shapes, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", str(untrained), str(shapes), "--pattern", "{id}"])
    assert "folder does not have this option" in capsys.readouterr().err


def test_your_own_folder_is_a_source_too(loaded, shapes):
    dataset = read_dataset("folder", shapes, "test")
    found = evaluate_dataset(loaded, dataset, AnswerSettings(shapes, max_new_tokens=2))
    assert found.record["protocols"][OPEN]["normalisation"] == "folded"
    assert found.record["counts"]["n_evaluated"] == len(dataset.annotated)


@pytest.fixture
def classes(shapes, tmp_path):
    """Three clips of VGG-Sound, with four classes."""
    root = tmp_path / "vggsound"
    root.mkdir()
    names = ("dog barking", "rain, thunder", "bell", "wind")
    (root / "stat.csv").write_text("".join(f'"{name}",9,x\n' for name in names))
    rows = []
    for place, media in enumerate(sorted({example.media for example in read_examples(shapes, "test")})):
        shutil.copy(shapes / media, root / f"-_abcdefgh{place}_000007.mp4")
        rows.append(f'-_abcdefgh{place}_000007.mp4,"{names[place]}"\n')
    (root / "test.csv").write_text("".join(rows))
    return root


def test_a_set_of_classes_is_scored_and_shown_as_one(untrained, classes, tmp_path, capsys):
    output = tmp_path / "results"
    main(["evaluate", str(untrained), "vggsound", str(classes), "--output", str(output), "--max-new-tokens", "2"])
    capsys.readouterr()
    record = json.loads((output / "results.json").read_text())
    assert (record["data"]["classes"], record["data"]["prompt"]) == (4, "what is the sound?")
    found = record["protocols"][CANDIDATES]
    assert list(found["metrics"]) == ["top-1", "top-5", "mean class accuracy", "mAP", "AUC", "d-prime"]
    assert found["headline"] == "top-1"
    assert found["metrics"]["top-5"]["value"] == 1
    assert found["baselines"]["chance"]["value"] == 0.25
    assert found["controls"].keys() == {"no_video", "no_audio", "no_media", "shifted_audio"}
    page = (output / "report.html").read_text()
    assert "Confusion of classes" in page and "rain, thunder" in page
    assert "shifted audio" in page and "mAP" in page and "map," not in page
    dataset = read_dataset("vggsound", classes, "test")
    again = score_file(dataset, output / "predictions.candidates.jsonl").to_dict()["metrics"]
    assert again == found["metrics"], "also mAP and AUC: the written scores are those that were scored"
    for line in (output / "predictions.candidates.jsonl").read_text().splitlines():
        assert sum(math.exp(score) for score in json.loads(line)["scores"]) == pytest.approx(1)


def test_a_split_without_published_answers_gives_predictions_alone(loaded, classes, tmp_path):
    name = "EPIC_Sounds_recognition_test_timestamps.csv"
    header = "annotation_id,participant_id,video_id,start_timestamp,stop_timestamp,start_sample,stop_sample\n"
    (classes / name).write_text(header + "P01_11_0,P01,P01_11,00:00:00.000,00:00:01.000,0,24000\n")
    shutil.copy(next(classes.glob("*.mp4")), classes / "P01_11.MP4")
    found = evaluate_dataset(
        loaded, read_dataset("epic_sounds", classes, "test"), AnswerSettings(classes, max_new_tokens=2)
    )
    counts = found.record["counts"]
    assert (counts["n_usable"], counts["n_evaluated"]) == (1, 0)
    assert counts["reasons"] == {"no published answer": 1}
    assert found.protocols[OPEN].metrics["All"].value is None
    (tmp_path / "out").mkdir()
    write_evaluation(tmp_path / "out", found)
    write_report(tmp_path / "out", loaded, found)
    [line] = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert json.loads(line)["right"] is None
    assert found.format_table()


def test_plots_contain_every_question(evaluated, loaded):
    scores = evaluated.protocols[CANDIDATES]
    judged, grid = scores.judged, loaded.processor.feature_extractor.grid
    bars = compute_accuracy_by_length(judged, evaluated.chunks, grid)
    counts = [int(bar.name.rpartition("n = ")[2]) for bar in bars]
    assert sum(counts) == len(judged)
    right = sum(item.value for item in judged)
    assert sum(count * bar.value for count, bar in zip(counts, bars, strict=True)) == pytest.approx(right)
    assert sum(times for *_, times in find_most_confused(judged)) == sum(not item.right for item in judged)
    matrix, names = count_confusions(judged, ("red", "blue", "low", "a bell", "two", "never"))
    assert matrix.sum() == len(judged) and matrix.trace() == right
    assert "never" not in names, "classes that neither occur nor are chosen are left out"
    assert count_confusions(judged, ()) is None
    assert count_confusions(judged, [f"class {n}" for n in range(700)] + ["red"]) is None


def test_a_row_of_the_report_has_the_score_under_every_control(evaluated):
    scores, controls = evaluated.protocols[CANDIDATES], evaluated.controls[CANDIDATES]
    columns = collect_columns(scores, controls)
    assert {"chance", "majority", "no media"} == columns.keys()
    row = describe_row("Bef&Aft", scores.metrics["Bef&Aft"], columns)
    assert row["n"] == 3
    assert [cell["share"] for cell in row["others"]][-1] == controls["no_media"].metrics["Bef&Aft"].value
    assert row["others"][0]["text"] == "20.00", "chance among five options"

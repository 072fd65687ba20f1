"""Runs: resumed == uninterrupted, bit for bit, and every way in which a run refuses to begin or go on."""

import errno
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mirasol import MirasolForConditionalGeneration, MirasolOutput, MirasolProcessor
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.errors import BadClip, UserError
from mirasol.training.checkpoint import Checkpoints
from mirasol.training.checkpoint_io import ShardWriter
from mirasol.training.export import export_run
from mirasol.training.logging import RunLog, read_metrics
from mirasol.training.measures import NonFiniteLoss, feature_spread
from mirasol.training.run_folder import RunFolder
from mirasol.training.trainer import train

MEASURED = ("clips_per_second", "data_wait", "seconds")


@pytest.fixture(autouse=True)
def _threads_as_they_were():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(values, console, **options) -> Path:
    return train(recipe_from_dict(values), console=console, **options)


def comparable_metrics(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in read_metrics(folder / "metrics.jsonl")]


def test_a_run_killed_in_the_middle_of_a_checkpoint_resumes_bit_identically(values, console, finished_once, trainings):
    """With AdamW; `test_nothing_lost.py` kills runs with Muon."""
    killed = trainings.start(values, fault="kill_while_saving", step=6, at="data")
    assert killed.wait() == -signal.SIGKILL, killed.text
    output = Path(values["output"])
    assert not (output / "checkpoint").exists()
    assert Checkpoints(output / "checkpoints", 2).list_steps() == [2, 4], "an unfinished checkpoint counts as none"
    assert max(line["step"] for line in read_metrics(output / "metrics.jsonl")) >= 6

    resumed = run(values, console, resume=True)
    for name in ("checkpoint/model.safetensors", "checkpoints/step-00000008/shard-00000.bin"):
        assert (output / name).read_bytes() == (finished_once / name).read_bytes()
    assert comparable_metrics(output) == comparable_metrics(finished_once)
    assert resumed == output / "checkpoint"


def weights_of(checkpoint: Path) -> bytes:
    return (checkpoint / "model.safetensors").read_bytes()


def test_workers_do_not_change_the_weights(values, console, finished_once):
    assert weights_of(run({**values, "workers": 2}, console)) == weights_of(finished_once / "checkpoint")


def test_the_callers_random_state_does_not_change_the_weights_and_the_seed_does(
    values, tmp_path, console, finished_once
):
    torch.manual_seed(2)
    same = run({**values, "validate_every": 1}, console)
    assert weights_of(same) == weights_of(finished_once / "checkpoint")
    values["stages"]["questions"]["steps"] = 1
    other, third = (run({**values, "output": str(tmp_path / str(k)), "seed": k}, console) for k in (3, 4))
    assert weights_of(other) != weights_of(third)


def test_a_run_that_reconstructs_audio_logs_its_loss(values, console):
    values["stages"]["questions"]["steps"] = 1
    overrides = values["model"]["overrides"]
    reconstruction = {**overrides.get("reconstruction", {}), "audio": True, "step": "same"}
    values["model"]["overrides"] = {**overrides, "reconstruction": reconstruction}
    run(values, console)
    lines = read_metrics(Path(values["output"]) / "metrics.jsonl")
    assert all(line["audio_loss"] > 0 for line in lines if line["kind"] == "train")
    assert all(line["clip"]["audio_loss"] > 0 for line in lines if line["kind"] == "validation")


@pytest.mark.parametrize(("loss", "why"), [("audio", "reconstructs no audio"), ("contrastive", "no contrastive loss")])
def test_the_weight_of_a_loss_that_is_not_there_is_refused(values, console, loss, why):
    values["stages"]["slots"]["loss_weights"] = {loss: 2.0}
    with pytest.raises(UserError, match=rf"stages\.slots\.loss_weights\.{loss}=2\.0 has no effect: .*{why}"):
        run(values, console)


def test_a_finished_run_leaves_what_it_should(finished_once, data_root, examples):
    folder, checkpoint = finished_once, finished_once / "checkpoint"
    metrics = read_metrics(folder / "metrics.jsonl")
    steps = [line for line in metrics if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["stage"] for line in steps] == ["slots"] * 3 + ["questions"] * 5
    for line in steps:
        assert {"loss", "text_loss", "latent_loss", "video_loss", "gradient_norm", "learning_rate", *MEASURED} <= set(
            line
        )
        assert -1 <= line["x_cosine"] <= 1
        assert line["x_std"] > 0
        assert 0 <= line["data_wait"] <= 1
    validations = [line for line in metrics if line["kind"] == "validation"]
    assert [line["step"] for line in validations] == [4, 8]
    assert "hearing" in validations[0]["clip"]["by_type"]
    assert list((folder / "tensorboard").glob("events*"))
    assert Checkpoints(folder / "checkpoints", 2).list_steps() == [6, 8]
    assert (folder / "bad_clips.jsonl").read_text() == ""
    recorded = json.loads((folder / "run.json").read_text())
    assert recorded["versions"]["torch"] == torch.__version__
    assert {"manifest.json", "train.jsonl", "validation.jsonl"} == set(recorded["data"])

    model, processor = (
        MirasolForConditionalGeneration.from_pretrained(checkpoint),
        MirasolProcessor.from_pretrained(checkpoint),
    )
    batch = processor([data_root / examples[0].media], [examples[0].prompt])
    answer = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert answer.shape[0] == 1


def test_training_lowers_the_loss(values, console):
    values["stages"] = {"all": {"steps": 30, "clips_per_step": 5, "questions_per_clip": 8}}
    values.update(validate_every=30, checkpoint_every=30)
    run(values, console)
    losses = [
        line["text_loss"] for line in read_metrics(Path(values["output"]) / "metrics.jsonl") if line["kind"] == "train"
    ]
    assert losses[-1] < 0.8 * losses[0]


def test_an_output_with_a_run_is_refused_and_left_alone(values, console, finished_run):
    before = {path: path.stat().st_mtime_ns for path in Path(values["output"]).rglob("*")}
    with pytest.raises(UserError, match="already contains a run"):
        run(values, console)
    assert before == {path: path.stat().st_mtime_ns for path in Path(values["output"]).rglob("*")}
    assert run(values, console, resume=True) == Path(values["output"]) / "checkpoint"


def test_resuming_with_a_changed_recipe_is_refused_by_key(values, console, finished_run):
    shutil.rmtree(finished_run / "checkpoint")
    values["optimizer"]["weight_decay"] = 0.3
    with pytest.raises(UserError, match=r"changed recipe: optimizer\.weight_decay"):
        run(values, console, resume=True)
    del values["optimizer"]["weight_decay"]
    values["keep_last"] = 1
    run(values, console, resume=True)


@pytest.mark.parametrize(
    ("name", "said"),
    [("run.json", r"run\.json: is damaged"), ("recipe.yaml", r"recipe\.yaml: .* this file is of type NoneType")],
)
def test_a_run_whose_records_are_damaged_is_refused_in_one_line(values, console, tmp_path, name, said):
    values["stages"] = {"slots": {"steps": 1, "span": "segment", "clips_per_step": 2, "questions_per_clip": 1}}
    folder = run(values, console).parent
    shutil.rmtree(folder / "checkpoint")
    (folder / name).write_text("")
    for work in (lambda: run(values, console, resume=True), lambda: export_run(folder, tmp_path / "out")):
        with pytest.raises(UserError, match=said) as caught:
            work()
        assert "\n" not in str(caught.value)


def test_resuming_with_changed_data_is_refused(values, console, data_root, tmp_path):
    values["stages"]["questions"]["steps"] = 1
    values["data"]["root"] = str(shutil.copytree(data_root, tmp_path / "data"))
    run(values, console)
    shutil.rmtree(Path(values["output"]) / "checkpoint")
    rows = (tmp_path / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data" / "train.jsonl").write_text("".join(rows[:-1]))
    with pytest.raises(UserError, match=r"train\.jsonl changed"):
        run(values, console, resume=True)


def test_resume_without_a_run_starts_one(values, console):
    values["stages"]["questions"]["steps"] = 1
    assert (run(values, console, resume=True) / "model.safetensors").is_file()


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_samples(values, console, monkeypatch):
    forward = MirasolForConditionalGeneration.forward
    passes = []

    def poisoned(self, **inputs):
        output = forward(self, **inputs)
        if self.training:
            passes.append(1)
            if len(passes) == 5:
                output.text_loss = output.text_loss * float("nan")
                output.loss = output.loss * float("nan")
        return output

    stepped = []
    monkeypatch.setattr(MirasolForConditionalGeneration, "forward", poisoned)
    monkeypatch.setattr("mirasol.training.optim.Optimizer.step", lambda self: stepped.append(1))
    with pytest.raises(NonFiniteLoss, match=r"step 5: loss=nan.*samples: train-\d+-q\d+") as caught:
        run(values, console)
    assert "\n" not in str(caught.value)
    assert len(stepped) == 4
    assert (Path(values["output"]) / "error.txt").read_text().strip() == str(caught.value)
    assert Checkpoints(Path(values["output"]) / "checkpoints", 2).list_steps() == [2, 4]


def test_a_full_disk_that_the_log_meets_first_is_told_with_what_is_left(values, console, monkeypatch):
    write, log = ShardWriter.write_data, RunLog.log_step

    def writing(self, *arguments):
        if "step-00000004" in self.folder.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *arguments)

    def logging(self, step, *arguments):
        if step == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        log(self, step, *arguments)

    monkeypatch.setattr(ShardWriter, "write_data", writing)
    monkeypatch.setattr(RunLog, "log_step", logging)
    monkeypatch.setattr(Checkpoints, "poll", lambda self: None)  # the log is the first, whichever thread is faster
    with pytest.raises(UserError, match=r"No space left on device.*step-00000002 is complete: continue with") as caught:
        run(values, console)
    assert (Path(values["output"]) / "error.txt").read_text().strip() == str(caught.value)


def test_a_gradient_that_is_not_finite_stops_before_the_step(values, console, monkeypatch):
    stepped = []
    monkeypatch.setattr("mirasol.training.optim.Optimizer.step", lambda self: stepped.append(1))
    monkeypatch.setattr("mirasol.training.optim.Optimizer.clip_gradients", lambda self: float("inf"))
    with pytest.raises(NonFiniteLoss, match="step 1: gradient_norm=inf"):
        run(values, console)
    assert not stepped


@pytest.fixture
def broken_data(data_root, tmp_path):
    """The data set with one training clip that is text."""
    root = shutil.copytree(data_root, tmp_path / "broken")
    (root / "clips" / "train" / "train-000001.mp4").write_text("no video")
    return root


def test_a_bad_clip_stops_the_run_or_is_left_out_and_listed(values, console, broken_data):
    values["data"].update(root=str(broken_data), on_bad_clip="error")
    listed = Path(values["output"]) / "bad_clips.jsonl"
    with pytest.raises(BadClip, match=r"train-000001\.mp4: "):
        run(values, console)
    assert [json.loads(line)["media"] for line in listed.read_text().splitlines()] == ["clips/train/train-000001.mp4"]

    values["data"]["on_bad_clip"] = "skip"
    run(values, console)
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert {row["media"] for row in rows} == {"clips/train/train-000001.mp4"}
    assert any(row["start"] is None for row in rows)
    assert any(row["start"] is not None for row in rows)
    assert all(row["reason"] for row in rows)
    assert "left out" in console.file.getvalue()


def test_a_clip_that_cannot_be_read_for_a_while_does_not_end_a_run(values, console, data_root, tmp_path):
    values["stages"]["questions"]["steps"] = 1
    root = shutil.copytree(data_root, tmp_path / "data")
    clip = root / "clips" / "train" / "train-000001.mp4"
    values["data"].update(root=str(root), cache=None)
    first = run(values, console)
    weights = (first / "model.safetensors").read_bytes()
    shutil.rmtree(first)
    clip.rename(tmp_path / "away.mp4")
    with pytest.raises(BadClip, match="no such file"):
        run(values, console, resume=True)
    (tmp_path / "away.mp4").rename(clip)
    assert (run(values, console, resume=True) / "model.safetensors").read_bytes() == weights


def test_a_processor_of_no_known_run_is_not_used(values, console, finished_run):
    for name in ("recipe.yaml", "run.json", "metrics.jsonl", "tensorboard", "checkpoints", "checkpoint"):
        path = finished_run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for resume, said in ((False, "already contains a run"), (True, r"lost its recipe\.yaml")):
        with pytest.raises(UserError, match=said):
            run(values, console, resume=resume)


@pytest.mark.parametrize("name", ["shard-00000.bin", ".metadata", "state.json"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(values, console, finished_run, name):
    weights = weights_of(finished_run / "checkpoint")
    shutil.rmtree(finished_run / "checkpoint")
    damaged = finished_run / "checkpoints" / "step-00000008"
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[: len(content) // 2])
    assert (run(values, console, resume=True) / "model.safetensors").read_bytes() == weights
    assert "warning" in console.file.getvalue()
    assert f"{damaged} is damaged" in console.file.getvalue()
    assert Checkpoints(finished_run / "checkpoints", 2).list_steps() == [6, 8]


def test_with_all_checkpoints_damaged_nothing_begins_anew(values, console, finished_run):
    shutil.rmtree(finished_run / "checkpoint")
    for shard in (finished_run / "checkpoints").glob("*/shard-00000.bin"):
        shard.write_bytes(b"")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        run(values, console, resume=True)


def test_a_second_process_is_kept_out_of_a_run(values, console, finished_run):
    shutil.rmtree(finished_run / "checkpoint")
    other = RunFolder(recipe_from_dict(values), resume=True)
    with other, pytest.raises(UserError, match="another process is training into this folder"):
        run(values, console, resume=True)
    assert run(values, console, resume=True) == finished_run / "checkpoint"


def test_of_two_processes_that_begin_a_run_one_is_kept_out(values):
    with RunFolder(recipe_from_dict(values), True) as one, RunFolder(recipe_from_dict(values), True) as other:
        one.start([])
        with pytest.raises(UserError, match="another process is training into this folder"):
            other.start([])


def test_on_a_disk_without_locks_a_run_says_so_on_one_line_and_goes_on(values, console, monkeypatch):
    values["stages"]["questions"]["steps"] = 1

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    checkpoint = run(values, console)
    shutil.rmtree(checkpoint)
    run(values, console, resume=True)
    told = [line for line in console.file.getvalue().splitlines() if "locks" in line]
    line = f"warning: {values['output']}: this disk has no locks: nothing prevents a second run from writing here"
    assert told == [line, line], "at its begin, and when it goes on"


def test_the_line_a_run_stopped_with_goes_when_it_goes_on(values, console, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("mirasol.training.optim.Optimizer.clip_gradients", lambda self: float("inf"))
        with pytest.raises(NonFiniteLoss):
            run(values, console)
    assert (Path(values["output"]) / "error.txt").is_file()
    run(values, console, resume=True)
    assert not (Path(values["output"]) / "error.txt").exists()


def test_without_a_validation_split_a_run_does_not_validate(values, console):
    values["stages"]["questions"]["steps"] = 1
    values["data"]["validation_split"] = None
    checkpoint = run(values, console)
    assert {line["kind"] for line in read_metrics(checkpoint.parent / "metrics.jsonl")} == {"train"}
    assert "validation.jsonl" not in json.loads((checkpoint.parent / "run.json").read_text())["data"]


def test_tensorboard_shows_what_metrics_jsonl_says(finished_once):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = finished_once
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    steps = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    losses = ("loss", "text_loss", "latent_loss", "video_loss")
    for name in (*losses, "gradient_norm", "learning_rate", "clips_per_second", "data_wait"):
        shown = board.Scalars(f"train/{name}")
        assert [point.step for point in shown] == [line["step"] for line in steps]
        assert [point.value for point in shown] == pytest.approx([line[name] for line in steps], rel=1e-5)
    assert [point.step for point in board.Scalars("validation_clip/accuracy")] == [4, 8]


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_written(values, console, data_root, tmp_path):
    root = shutil.copytree(data_root, tmp_path / "data")
    row = {"id": "long", "file": "clips/train/train-000000.mp4", "prompt": "why " * 200, "target": "so"}
    with (root / "train.jsonl").open("a") as rows:
        rows.write(json.dumps(row) + "\n")
    values["data"]["root"] = str(root)
    with pytest.raises(UserError, match="max_text_length=64.*why why"):
        run(values, console)
    assert not Path(values["output"]).exists()


def test_training_goes_on_from_a_checkpoint(values, console, finished_once):
    # A run's folder stands for its checkpoint, as everywhere.
    values["model"] = {"init": str(finished_once)}
    del values["tokenizer"]
    values["stages"] = {"more": {"steps": 1, "clips_per_step": 2, "questions_per_clip": 2}}
    second = run(values, console)
    one, two = (
        MirasolForConditionalGeneration.from_pretrained(folder).state_dict()
        for folder in (finished_once / "checkpoint", second)
    )
    assert one.keys() == two.keys()
    assert any(not torch.equal(one[name], two[name]) for name in one)
    torch.testing.assert_close(one, two, rtol=0, atol=0.01)


def test_a_checkpoint_that_lacks_weights_is_not_gone_on_from(values, console, finished_run, tmp_path):
    first = finished_run / "checkpoint"
    weights = load_file(first / "model.safetensors")
    del weights["text.norm.bias"]
    save_file(weights, first / "model.safetensors", metadata={"format": "pt"})
    values.update(output=str(tmp_path / "second"), model={"init": str(first)}, tokenizer={})
    with pytest.raises(UserError, match=r"lacks 1 weight \(text\.norm\.bias\)"):
        run(values, console)
    values["model"]["init"] = str(tmp_path)
    with pytest.raises(UserError, match="not a checkpoint"):
        run(values, console)
    assert not (tmp_path / "second").exists()


def test_bf16_trains(values, console):
    values["stages"]["questions"]["steps"] = 1
    values["precision"] = "bf16"
    assert run(values, console).is_dir()


def test_spread_tells_collapsed_features_from_different_ones():
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    same = torch.ones(3, 2, 4, 8)
    same[1, 1] = 100.0
    collapsed = feature_spread(MirasolOutput(combined=same), mask)
    assert collapsed["x_cosine"] == pytest.approx(1.0)
    assert collapsed["x_std"] == pytest.approx(0.0)
    different = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    apart = feature_spread(MirasolOutput(combined=different), mask)
    assert apart["x_cosine"] < 0.9
    assert apart["x_std"] > 0.05

"""Trainings that are killed, asked to stop, or lose a helper, in real processes: they go on to the same bits, or end
with a word about what happened."""

import os
import random
import signal
from pathlib import Path

import pytest
from faults import NO_NAMESPACES
from trainings import elsewhere, finished

from mirasol.config.recipe_io import recipe_from_dict
from mirasol.data.clip_cache import ClipCache
from mirasol.data.sampler import BatchPlan
from mirasol.training.checkpoint import Checkpoints


def uninterrupted(trainings, values):
    """What a run leaves when nothing happens to it."""
    training = trainings.start(elsewhere(values, "whole"))
    assert training.wait() == 0, training.text
    return finished(elsewhere(values, "whole"))


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 0), ("SIGUSR1", 0), ("SIGINT", 130)])
def test_a_signal_saves_the_step_at_hand_and_the_run_goes_on_to_the_same_bits(
    trainings, values, finished_once, name, code
):
    values["checkpoint_every"] = 100
    # After step 4 one of them is at the boundary of an epoch: all 5 clips were seen once.
    values["stages"]["questions"]["clips_per_step"] = 5 if name == "SIGTERM" else 3
    stopped = trainings.start(values, fault="signal_after", step=3, name=name)
    assert stopped.wait() == code, stopped.text
    output = values["output"]
    assert stopped.text.splitlines()[-1] == (
        f"mirasol: {output}: stopped by {name} after step 4 of 8, which is saved: continue with --resume"
    )
    assert not (Path(output) / "checkpoint").exists()
    resumed = trainings.start(values)
    assert resumed.wait() == 0, resumed.text
    expected = uninterrupted(trainings, values) if name == "SIGTERM" else finished({"output": finished_once})
    assert finished(values) == expected


def kills(seed: int) -> list[dict]:
    """Ten ways to kill a run, each from where the one before left it: at random moments of a step, and in between in
    the middle of the checkpoints that are then written (every second step, in a thread beside the training)."""
    draw = random.Random(seed)
    moments = [{"fault": "kill_at_random", "steps": draw.randrange(4), "share": draw.random()} for _ in range(6)]
    saves = [{"fault": "kill_while_saving", "at": at} for at in ("data", "metadata", "name", "removal")]
    mixed = [*moments, *saves]
    draw.shuffle(mixed)
    return mixed


def newest(values) -> int:
    return max(Checkpoints(Path(values["output"]) / "checkpoints", 2).list_steps(), default=0)


def test_a_run_killed_ten_times_ends_in_the_same_bits(trainings, values):
    values["stages"] = {
        "slots": {"steps": 6, "span": "segment", "clips_per_step": 4, "questions_per_clip": 1},
        "questions": {
            "steps": 30, "clips_per_step": 3, "questions_per_clip": 2, "drop_audio": 0.3, "drop_video": 0.4,
            "type_weights": {"hearing": 3.0, "story": 2.0},
        },
    }  # fmt: skip
    values["optimizer"]["name"] = "muon"
    values.update(validate_every=6, keep_best="clip.text_loss", samples=1)
    for kill in kills(seed=1):
        if "at" in kill:
            # Three saves on there is one to remove, or else at the next: the best stays.
            kill["step"] = newest(values) + (6 if kill["at"] == "removal" else 2)
        killed = trainings.start(values, **kill)
        assert killed.wait() == -signal.SIGKILL, (kill, killed.text)
        assert "damaged" not in killed.text, "a checkpoint that is not whole has no name yet, or no longer"
    assert 0 < newest(values) < 36
    last = trainings.start(values)
    assert last.wait() == 0, last.text
    assert "damaged" not in last.text
    assert finished(values) == uninterrupted(trainings, values)
    shards = [Path(v["output"]) / "checkpoints" / "step-00000036" for v in (values, elsewhere(values, "whole"))]
    assert (shards[0] / "shard-00000.bin").read_bytes() == (shards[1] / "shard-00000.bin").read_bytes()
    assert not [path for path in (shards[0].parent).iterdir() if path.name.startswith(".")], "no leftovers"


def test_a_run_killed_amid_the_parts_of_a_step_ends_in_the_same_bits(trainings, values):
    values["stages"] = {"questions": {"steps": 5, "clips_per_step": 4, "questions_per_clip": 2}}
    values.update(accumulation=2, validate_every=100, checkpoint_every=1)
    killed = trainings.start(values, fault="kill_after_part", step=3, part=0)
    assert killed.wait() == -signal.SIGKILL, killed.text
    assert newest(values) in (2, 3), "the third may still have been on its way"
    last = trainings.start(values)
    assert last.wait() == 0, last.text
    assert finished(values) == uninterrupted(trainings, values)


def test_a_disk_that_is_full_leaves_the_last_checkpoint_good_and_says_so(trainings, values, tmp_path):
    # A checkpoint of this model takes 2.5 MB: the first one fits, the second does not.
    values["data"]["validation_split"] = None
    small, kept = elsewhere(values, "small"), elsewhere(values, "kept")
    full = trainings.start(small, fault="small_disk", folder=small["output"], size="4m", keep=kept["output"])
    code = full.wait()
    if code == NO_NAMESPACES:
        pytest.skip("a disk of its own can be had only where users may make namespaces and mount in them")
    assert code == 2, full.text
    line = full.text.splitlines()[-1]
    assert "No space left on device" in line
    assert f"{small['output']}/checkpoints/step-00000002 is complete: continue with --resume" in line
    assert sorted(path.name for path in Path(kept["output"], "checkpoints").iterdir()) == ["step-00000002"]
    resumed = trainings.start(kept)
    assert resumed.wait() == 0, resumed.text
    assert finished(kept) == uninterrupted(trainings, values)


def test_a_signal_before_the_first_step_ends_the_run_which_can_begin_again(trainings, values):
    stopped = trainings.start(values, fault="signal_while_decoding", name="SIGTERM")
    assert stopped.wait() == 0, stopped.text
    assert "stopped by SIGTERM before the first step" in stopped.text.splitlines()[-1]
    assert "Traceback" not in stopped.text
    assert trainings.start(values).wait() == 0


def test_a_signal_in_the_last_step_changes_nothing(trainings, values):
    ended = trainings.start(values, fault="signal_after", step=7, name="SIGTERM")
    assert ended.wait() == 0
    assert "stopped" not in ended.text
    assert (Path(values["output"]) / "checkpoint").is_dir()


def test_a_second_signal_does_not_wait(trainings, values):
    ended = trainings.start(values, fault="signals_without_end", name="SIGINT")
    assert ended.wait() == 130
    assert "stopped at once by a second SIGINT" in ended.text.splitlines()[-1]


def first_clip_of(values, step: int) -> tuple[Path, str]:
    """The cache's file and the medium of the first clip that step `step` (from 0) trains on."""
    from mirasol import MirasolConfig
    from mirasol.data.datasets.folder import read_examples

    recipe = recipe_from_dict(values)
    examples = read_examples(Path(recipe.data.root), "train")
    clip = BatchPlan(recipe, examples).batch(step).clips[0]
    settings = MirasolConfig.preset(recipe.model.preset, **recipe.model.overrides).media_settings()
    cache = ClipCache(Path(recipe.data.cache), Path(recipe.data.root), settings)
    return cache.file((clip.media, None, None)), clip.media


@pytest.fixture
def hanging(values, tmp_path, trainings) -> tuple[dict, str]:
    """A recipe with a worker that will read without end at the clip whose medium is returned: the clip's tensors are
    a pipe that nobody writes to."""
    cache = tmp_path / "cache"
    values["data"]["cache"] = str(cache)
    values["stages"] = {"questions": {"steps": 8, "clips_per_step": 1, "questions_per_clip": 2}}
    values["validate_every"] = 100
    assert trainings.start(elsewhere(values, "filled")).wait() == 0
    file, medium = first_clip_of(values, 3)
    file.unlink()
    os.mkfifo(file)
    return {**values, "workers": 1}, medium


@pytest.mark.parametrize(
    ("do", "what"), [("limit", "no batch within batch_seconds=0.5"), ("kill", "a worker that loads clips died")]
)
def test_a_worker_that_hangs_or_dies_ends_the_run_and_is_named_with_its_clip(trainings, hanging, do, what):
    values, medium = hanging
    ended = trainings.start(values, fault="when_a_worker_hangs", do=do)
    assert ended.wait() == 2, ended.text
    line = ended.text.splitlines()[-1]
    assert what in line
    assert f"step 4, {medium}" in line
    assert (Path(values["output"]) / "error.txt").read_text().strip() in line

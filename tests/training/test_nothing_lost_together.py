"""Trainings of two processes, of which one is killed, asked to stop, or meets a loss that is no number."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load
from torch.testing import assert_close
from trainings import elsewhere, finished

from mirasol.training.checkpoint import Checkpoints


@pytest.fixture
def shared(values):
    """A recipe for two processes, without noise: each process draws its own."""
    model = json.loads(json.dumps(values["model"]["overrides"]).replace('"dropout": 0.1', '"dropout": 0.0'))
    model["latent"]["mask_ratio"] = 0.0
    values["model"]["overrides"] = model
    values["stages"] = {"questions": {"steps": 8, "clips_per_step": 4, "questions_per_clip": 2}}
    values["parallel"] = {"kind": "ddp"}
    return values


def ended_well(trainings) -> None:
    codes = [training.wait() for training in trainings]
    assert codes == [0] * len(codes), [training.text for training in trainings]


def saved(values) -> list[int]:
    return Checkpoints(Path(values["output"]) / "checkpoints", 2).list_steps()


def copied(values, name: str):
    """A copy of the run so far."""
    copy = elsewhere(values, name)
    shutil.copytree(values["output"], copy["output"])
    return copy


def effective(weights):
    """All weights but the keys' biases. Softmax takes what they add away again: their gradients are rounding errors
    alone, which Adam scales up to its learning rate."""
    keys = {name: value for name, value in weights.items() if name.endswith("key_value.bias")}
    values = {name: bias[len(bias) // 2 :] for name, bias in keys.items()}
    return {**weights, **values}


def assert_same(values, expected) -> None:
    """The run ended in the same weights and losses as another, to 1e-5."""
    (weights, lines), (expected_weights, expected_lines) = finished(values), expected
    assert_close(effective(load(weights)), effective(load(expected_weights)), rtol=1e-5, atol=1e-5)
    losses, wanted = ([line["loss"] for line in some if line["kind"] == "train"] for some in (lines, expected_lines))
    assert len(losses) == 8
    assert losses == pytest.approx(wanted, rel=1e-5)


def test_a_run_goes_on_after_a_kill_with_as_many_processes_or_another_number(trainings, shared):
    whole = elsewhere(shared, "whole")
    ended_well(trainings.start_together(whole))
    # Amid the sixth step: saving after the fourth waits until the checkpoint of the second is there.
    first, second = trainings.start_together(shared, "kill_at_random", steps=4, share=0.5)
    assert second.wait() == -signal.SIGKILL, second.text
    assert first.wait() == 2, first.text
    assert "process 0 of 2: another process has ended" in first.text.splitlines()[-1]
    assert saved(shared)[-1] < 8
    fewer = copied(shared, "fewer")
    ended_well(trainings.start_together(shared))
    assert finished(shared) == finished(whole)
    ended_well([trainings.start(fewer)])
    assert_same(fewer, finished(whole))

    more = elsewhere(shared, "more")
    alone = trainings.start(more, fault="kill_at_random", steps=4, share=0.5)
    assert alone.wait() == -signal.SIGKILL
    ended_well(trainings.start_together(more))
    assert_same(more, finished(whole))


def test_a_signal_to_one_process_stops_all_after_the_same_step(trainings, shared):
    shared["parallel"] = {"kind": "fsdp"}
    started = trainings.start_together(shared, "signal_after", step=3, name="SIGTERM")
    ended_well(started)
    (step,) = [step for step in saved(shared) if step % 2] or [saved(shared)[-1]]
    told = f"stopped by SIGTERM after step {step} of 8, which is saved"
    assert [told in training.text for training in started] == [True, False]
    assert step in (4, 5), "the processes agree in the step at hand or the one after"


@pytest.mark.parametrize(
    ("fault", "at_rank"), [({"fault": "signal_after", "step": 4}, 1), ({"fault": "signal_while_decoding"}, 0)]
)
def test_a_process_that_stands_still_ends_the_others_within_the_limit(trainings, shared, fault, at_rank):
    """Amid the steps, and before the first one, when the first process decodes and the other waits for it."""
    shared.update(batch_seconds=8, process_seconds=12)
    started = trainings.start_together(shared, name="SIGSTOP", at_rank=at_rank, **fault)
    frozen, living = started[at_rank], started[1 - at_rank]
    code = living.wait()
    frozen.send(signal.SIGKILL)
    assert frozen.wait() == -signal.SIGKILL, frozen.text
    assert code == 2, living.text
    told = f"process {1 - at_rank} of 2: another process gave no answer within process_seconds=12"
    assert told in living.text.splitlines()[-1]
    assert "Traceback" not in living.text
    if at_rank == 1:
        assert told in (Path(shared["output"]) / "error.txt").read_text()
        assert saved(shared), "what was saved before is there"


def test_a_loss_that_is_no_number_on_one_process_stops_all_before_the_step(trainings, shared):
    started = trainings.start_together(shared, "loss_that_is_no_number", step=4)
    assert [training.wait() for training in started] == [2, 2], [training.text for training in started]
    assert ["step 5: " in training.text for training in started] == [True, False]
    facts = json.loads((Path(shared["output"]) / "bad_step.json").read_text())
    assert facts["step"] == 5
    assert len(facts["samples"]) == 4 * 2, "of both processes"
    assert saved(shared) == [2, 4]

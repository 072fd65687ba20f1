"""Checkpoints: what was saved comes back to the bit, whatever happens beside; what is damaged is noticed and named."""

import shutil

import pytest
import torch

from mirasol.errors import UserError
from mirasol.training.checkpoint import Checkpoints
from mirasol.training.checkpoint_io import DamagedFile

STATE = {"fingerprint": "same"}


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    weights = {
        "matrix": torch.randn(5, 3, generator=generator),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "number": torch.tensor(3.0),
        "none": torch.empty(0, 4),
        "counts": torch.arange(6),
    }
    return {"model": weights, "optimizer": {f"{name}.step": value.clone() for name, value in weights.items()}}


def blank(tensors):
    return {part: {name: torch.zeros_like(value) for name, value in given.items()} for part, given in tensors.items()}


def same(one, other) -> bool:
    return all(torch.equal(one[part][name], other[part][name]) for part in one for name in one[part])


@pytest.fixture
def saved(tmp_path):
    checkpoints, tensors = Checkpoints(tmp_path / "checkpoints", 2), some_tensors()
    for step in (1, 2):
        checkpoints.save(step, tensors, STATE)
    checkpoints.wait()
    return checkpoints, tensors


def test_a_checkpoint_holds_the_tensors_as_they_were_when_it_was_asked_for(tmp_path):
    checkpoints, tensors = Checkpoints(tmp_path / "checkpoints", 3), some_tensors()
    wanted = []
    for step in (5, 6, 7):
        checkpoints.save(step, tensors, {**STATE, "seconds": step / 2})
        wanted.append({part: {name: value.clone() for name, value in given.items()} for part, given in tensors.items()})
        tensors["model"]["matrix"] += 1.0
    checkpoints.wait()
    for step, before in zip((5, 6, 7), wanted, strict=True):
        found = blank(tensors)
        assert checkpoints.load(step, found, "same") == {"step": step, "seconds": step / 2, **STATE}
        assert same(found, before)


def test_a_later_checkpoint_may_have_other_tensors(saved):
    checkpoints, tensors = saved
    tensors["model"]["matrix"] = torch.randn(2, 2)
    tensors["optimizer"]["new"] = tensors["optimizer"].pop("half.step").float()
    checkpoints.save(3, tensors, STATE)
    checkpoints.wait()
    found = blank(tensors)
    checkpoints.load(3, found, "same")
    assert same(found, tensors)


def test_only_the_newest_are_kept(saved):
    checkpoints, tensors = saved
    checkpoints.save(4, tensors, STATE)
    checkpoints.wait()
    assert checkpoints.list_steps() == [2, 4]
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000002", "step-00000004"]


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("shard-00000.bin", lambda file: file.unlink(), "shard-00000.bin is missing"),
        ("shard-00000.bin", cut, "shard-00000.bin is cut short"),
        ("shard-00000.bin", flip, "shard-00000.bin was changed"),
        (".metadata", lambda file: file.unlink(), ".metadata is missing"),
        (".metadata", cut, ".metadata is damaged"),
        ("state.json", lambda file: file.unlink(), "state.json cannot be read"),
        ("state.json", cut, "state.json cannot be read"),
    ],
)
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_taken(saved, name, damage, said):
    checkpoints, tensors = saved
    damage(checkpoints.path(2) / name)
    with pytest.raises(DamagedFile, match=said):
        checkpoints.load(2, blank(tensors))
    found, warnings = blank(tensors), []
    assert checkpoints.load_newest(found, "same", warnings.append)["step"] == 1
    assert same(found, tensors)
    (warning,) = warnings
    assert f"{checkpoints.path(2)} is damaged" in warning
    assert said in warning


def test_metadata_that_would_run_code_does_not(saved, tmp_path):
    import pickle

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    checkpoints, tensors = saved
    (checkpoints.path(2) / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DamagedFile):
        checkpoints.load(2, blank(tensors))
    assert not (tmp_path / "ran").exists()


def test_tensors_that_do_not_fit_are_refused(saved):
    checkpoints, tensors = saved
    with pytest.raises(UserError, match="belongs to another recipe"):
        checkpoints.load(2, blank(tensors), "another")
    more = blank(tensors)
    more["model"]["extra"] = torch.zeros(2)
    with pytest.raises(UserError, match=r"lacks model\.extra"):
        checkpoints.load(2, more)
    other = blank(tensors)
    other["model"]["matrix"] = torch.zeros(3, 5)
    with pytest.raises(UserError, match=r"model\.matrix has shape \[5, 3\], the model's \[3, 5\]"):
        checkpoints.load(2, other)


def test_a_checkpoint_that_cannot_be_written_leaves_those_before_and_is_told(saved, monkeypatch):
    checkpoints, tensors = saved

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mirasol.training.checkpoint_io.os.fsync", full)
    checkpoints.save(3, tensors, STATE)
    with pytest.raises(UserError, match=r"could not be written \(.*No space left.*step-00000002 is complete") as caught:
        checkpoints.wait()
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000001", "step-00000002"]


def test_without_any_checkpoint_a_run_begins(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    assert checkpoints.load_newest(some_tensors(), "same", print) == {"step": 0}


def test_with_all_of_them_damaged_it_does_not(saved):
    checkpoints, tensors = saved
    shutil.rmtree(checkpoints.path(1))
    cut(checkpoints.path(2) / "shard-00000.bin")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoints.load_newest(blank(tensors), "same", lambda message: None)

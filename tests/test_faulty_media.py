"""Files that crash, stall or flood the decoder, through every command that reads media: each costs itself alone."""

import json
import re
import shutil
from pathlib import Path

import decoder_faults as faults
import pytest

from mirasol.cli.main import main
from mirasol.data.loader import StepBatches
from mirasol.media.isolation import decoders as isolation
from mirasol.media.limits import DEFAULT_LIMITS

IDLE_SECONDS, MEMORY = 1.0, 2**28
REASONS = {
    "crash.mp4": "the decoder crashed: SIGSEGV",
    "hang.mp4": "the decoder made no progress for 1 s",
    "allocate.mp4": "decoding it takes more than 256 MiB of memory",
    "fail.mp4": "the reader failed: IndexError: tuple index out of range",
}


@pytest.fixture(autouse=True)
def faulty_decoders(monkeypatch):
    """All decoders of the test have faults, those of loading processes too."""
    before = DEFAULT_LIMITS.max_idle_seconds, DEFAULT_LIMITS.max_memory
    pool = isolation._Pool()
    monkeypatch.setattr(isolation, "_pool", pool)
    monkeypatch.setattr(isolation, "format_decoder_program", isolation.format_decoder_program)
    faults.install_faults(IDLE_SECONDS, MEMORY)
    carried = faults.FaultsToInstall(IDLE_SECONDS, MEMORY)
    monkeypatch.setattr(StepBatches, "__getstate__", lambda self: {**vars(self), "faults": carried})
    yield
    pool.close()
    object.__setattr__(DEFAULT_LIMITS, "max_idle_seconds", before[0])
    object.__setattr__(DEFAULT_LIMITS, "max_memory", before[1])


@pytest.fixture
def root(shapes, tmp_path) -> Path:
    """A data set of which two clips are good and four are not."""
    root = tmp_path / "data"
    root.mkdir()
    good, *_ = sorted((shapes / "clips" / "test").iterdir())
    names = ["good0.mp4", *REASONS, "good1.mp4"]
    for name in names:
        shutil.copy(good, root / name)
        with (root / name).open("ab") as file:  # no two files are the same
            file.write(b"\0\0\0\x10free" + name.encode()[:8].ljust(8))
    rows = [{"file": name, "prompt": "what colour?", "target": "red"} for name in names]
    for split in ("train", "test"):
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = {"file": "good1.mp4", "prompt": "what colour is it?", "target": "red"}
    (root / "validation.jsonl").write_text(json.dumps(row) + "\n")
    return root


def refuse(capsys, *arguments: object) -> str:
    """The one line that a command ends with, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    _, error = capsys.readouterr()
    assert stop.value.code == 2
    return error.splitlines()[-1]


@pytest.mark.parametrize("name", REASONS)
def test_ask_ends_with_one_line(root, untrained, capsys, name):
    line = refuse(capsys, "ask", untrained, root / name, "what colour?")
    assert line.startswith(f"mirasol: {root / name}: {REASONS[name]}")


def test_evaluate_leaves_them_out(root, untrained, capsys):
    main(["evaluate", str(untrained), str(root), "--json", "--skip-controls"])
    found = json.loads(capsys.readouterr().out)
    unusable = {clip["media"]: clip["reason"] for clip in found["unusable_clips"]}
    assert unusable.keys() == REASONS.keys()
    assert all(unusable[name].startswith(reason) for name, reason in REASONS.items())


def test_data_check_lists_them(root, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", "folder", str(root), "--split", "train", "--json"])
    assert stop.value.code == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    found = {p["file"]: p["message"] for p in problems if p["kind"] == "undecodable"}
    assert found.keys() == REASONS.keys()
    assert all(found[name].startswith(reason) for name, reason in REASONS.items())


@pytest.mark.parametrize("more", [[], ["--reencode", "32"]])
def test_data_shard_leaves_them_out_or_names_the_first(root, tmp_path, capsys, more):
    words = ["--split", "train", "--processes", "1", *more]
    line = refuse(capsys, "data", "shard", "folder", root, tmp_path / "a", *words)
    assert re.search(rf"crash\.mp4: {REASONS['crash.mp4']}", line)
    main(["data", "shard", "folder", str(root), str(tmp_path / "b"), "--on-bad-clip", "skip", *words])
    [manifest] = (tmp_path / "b").glob("*.json")
    entry = json.loads(manifest.read_text())["splits"]["train"]
    lost = {problem["file"]: problem["message"] for problem in entry["problems"]}
    assert entry["clips"] == 2
    assert lost.keys() == REASONS.keys()
    assert all(lost[name].startswith(reason) for name, reason in REASONS.items())


def write_recipe(root: Path, tmp_path: Path, name: str, workers: int, **data: object) -> Path:
    recipe = {
        "seed": 1,
        "workers": workers,
        "output": str(tmp_path / name),
        "data": {"root": str(root), **data},
        "stages": {"questions": {"steps": 3, "clips_per_step": 3, "questions_per_clip": 1}},
        "log_every": 1,
        "validation_clips": 1,
    }
    file = tmp_path / f"{name}.yaml"
    file.write_text(json.dumps(recipe))
    return file


@pytest.mark.parametrize(("decode", "workers"), [("before", 0), ("ahead", 0), ("ahead", 2)])
def test_training_goes_on_without_them_or_names_the_first(root, tmp_path, capsys, decode, workers):
    main(["train", "--config", str(write_recipe(root, tmp_path, "skip", workers, decode=decode, on_bad_clip="skip"))])
    listed = [json.loads(line) for line in (tmp_path / "skip" / "bad_clips.jsonl").read_text().splitlines()]
    found = {bad["media"]: bad["reason"] for bad in listed}
    assert found.keys() <= REASONS.keys()
    assert found.keys() == REASONS.keys() or decode == "ahead"  # ahead, those that come up
    assert len(found) > 1
    assert all(reason.startswith(REASONS[name]) for name, reason in found.items())
    assert (tmp_path / "skip" / "checkpoint" / "model.safetensors").is_file()
    recipe = write_recipe(root, tmp_path, "error", workers, decode=decode, on_bad_clip="error")
    line = refuse(capsys, "train", "--config", recipe)
    assert any(f"{name}: {reason}" in line for name, reason in REASONS.items()), line

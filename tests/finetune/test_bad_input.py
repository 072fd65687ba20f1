"""Folders that no one wishes for: each ends as one line with nothing lost or left behind, or as a model and a
remark."""

import io
import json
import shutil
import struct
import wave
from pathlib import Path

import pytest
from media_making import Audio, tone, write_media
from rich.console import Console
from untrained import only_stream

from mirasol.cli.main import main
from mirasol.errors import Stopped
from mirasol.finetune import finetune as module
from mirasol.finetune import survey
from mirasol.finetune.finetune import finetune
from mirasol.finetune.settings import Settings

READ = survey.read_headers
KEYS = ("device=cpu", "threads=1", "samples=0", "stages.finetune.clips_per_step=2")


def make_classes(files: list[Path], root: Path) -> Path:
    """A folder with these clips in two classes."""
    for number, file in enumerate(files):
        folder = root / ("left", "right")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / f"{number}{file.suffix}")
    return root


@pytest.fixture
def clips(shapes) -> list[Path]:
    return sorted((shapes / "clips").rglob("*.mp4"))


def make_folder(kind: str, clips: list[Path], root: Path) -> Path:
    root.mkdir()
    if kind == "no media":
        (root / "readme.md").write_text("soon")
        (root / "labels.csv").write_text("file,target\n")
    elif kind == "labels without files":
        (root / "labels.csv").write_text("file,target\na.mp4,bell\nb.mp4,drum\n")
        shutil.copy(clips[0], root / "other.mp4")
    elif kind == "one clip":
        make_classes(clips[:1], root)
    elif kind == "one class":
        for clip in clips[:4]:
            (root / "left").mkdir(exist_ok=True)
            shutil.copy(clip, root / "left" / clip.name)
    elif kind == "no labels":
        for clip in clips[:4]:
            shutil.copy(clip, root / clip.name)
    return root


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("no media", "no video or sound file"),
        ("labels without files", "no label has a clip, the first problem: "),
        ("one clip", "one class only"),
        ("one class", "one class only, 'left', in 4 clips"),
        ("no labels", "4 clips without labels"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line_and_leaves_nothing(kind, part, clips, tmp_path, capsys):
    root = make_folder(kind, clips, tmp_path / "mine")
    before = sorted(root.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(["finetune", str(root), "--output", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.count("\n") == 1 and part in err
    assert not (tmp_path / "out").exists() and sorted(root.rglob("*")) == before


def run(root: Path, start: Path, out: Path) -> str:
    """What an epoch on the folder prints; its result has to be there."""
    console = Console(file=io.StringIO(), width=300)
    finetune(Settings(str(root), str(start), str(out), None, 1, KEYS), console)
    assert json.loads((out / "results.json").read_text())["protocols"]
    assert (out / "report.html").is_file() and (out / "checkpoint" / "model.safetensors").is_file()
    return console.file.getvalue()


@pytest.mark.slow
def test_clips_without_any_sound_train_with_a_remark(clips, untrained, tmp_path):
    silent = [only_stream("video", clip, tmp_path / "silent" / f"{n}.mkv") for n, clip in enumerate(clips[:7])]
    said = run(make_classes(silent, tmp_path / "mine"), untrained, tmp_path / "out")
    assert "note:     no clip has sound" in said


@pytest.mark.slow
def test_silence_trains_with_a_remark(untrained, tmp_path):
    files = []
    for number in range(6):
        file = tmp_path / f"{number}.wav"
        write_media(file, Audio([(0.0, tone(1.0 + number / 10, 8000) * 0)], rate=8000, codec="pcm_s16le"))
        files.append(file)
    said = run(make_classes(files, tmp_path / "mine"), untrained, tmp_path / "out")
    assert "clips that were decoded is silence" in said


def write_wav(file: Path, frames: int, number: int, rate: int = 8000) -> None:
    """A file of sound whose bytes no other number's has."""
    with wave.open(str(file), "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(rate)
        written.writeframes(struct.pack("<i", number) + bytes(2 * frames - 4))


@pytest.mark.slow
def test_clips_of_a_tenth_of_a_second_and_of_three_hours_train_together(untrained, tmp_path):
    for number in range(7):
        (tmp_path / "mine" / ("left", "right")[number % 2]).mkdir(parents=True, exist_ok=True)
        frames = 3 * 3600 * 8000 if number == 3 else 800
        write_wav(tmp_path / "mine" / ("left", "right")[number % 2] / f"{number}.wav", frames, number)
    said = run(tmp_path / "mine", untrained, tmp_path / "out")
    assert "0.1 s and of 1.08e+04 s together" in said


@pytest.mark.slow
def test_of_100_000_clips_a_sample_is_opened_before_the_training_begins(untrained, tmp_path, monkeypatch):
    """Minutes, most of them for writing the files. Stops where the training would begin, with the time it will take."""
    for number in range(100_000):
        folder = tmp_path / "mine" / f"class {number % 20}"
        if number < 20:
            folder.mkdir(parents=True)
        write_wav(folder / f"{number}.wav", 80, number)
    opened = []
    monkeypatch.setattr(
        survey, "read_headers", lambda root, media, *rest: opened.extend(media) or READ(root, media, *rest)
    )
    monkeypatch.setattr(module, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    console = Console(file=io.StringIO(), width=300)
    with pytest.raises(Stopped):
        finetune(Settings(str(tmp_path / "mine"), str(untrained), str(tmp_path / "out"), None, 1, KEYS), console)
    said = console.file.getvalue()
    assert "in 100,000 files" in said and "time: " in said
    assert 0 < len(opened) <= 2000
    assert (tmp_path / "out" / "recipe.yaml").is_file()

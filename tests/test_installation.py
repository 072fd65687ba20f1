"""The package works where the repository is not: what the wheel contains, and what an environment with nothing else of
Mirasol can do."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from made_once import make_once

REPOSITORY = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The package's wheel, built from a copy of the sources: a build leaves folders beside them."""

    def build(folder: Path) -> None:
        copy, made = folder / "source", folder / "wheel"
        copy.mkdir(parents=True)
        made.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(REPOSITORY / name, copy)
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(REPOSITORY / "recipes", copy / "recipes", ignore=ignored)
        shutil.copytree(REPOSITORY / "src", copy / "src", symlinks=True, ignore=ignored)
        run([sys.executable, "-c", BUILD, made], copy)

    return next((make_once(tmp_path_factory, "wheel", build) / "wheel").glob("*.whl"))


def run(words: list, folder: Path, **more: str) -> subprocess.CompletedProcess:
    """A command in a folder, without this process's path to the sources. Fails with what it said."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more
    done = subprocess.run([*map(str, words)], cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_wheel_has_everything_that_the_source_has(wheel):
    """Weights, templates and recipes too; nothing but source in Python, nothing of the tests."""
    package = REPOSITORY / "src" / "mirasol"
    wanted = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    wanted |= {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "recipes").rglob("*.yaml")}
    wanted = {name for name in wanted if "__pycache__" not in name}
    found = set(zipfile.ZipFile(wheel).namelist())
    inside = {name.removeprefix("mirasol/") for name in found if name.startswith("mirasol/")}
    assert inside == wanted
    others = {name.split("/")[0] for name in found if not name.startswith("mirasol/")}
    assert len(others) == 1 and others.pop().endswith(".dist-info")


@pytest.fixture
def environment(wheel, tmp_path) -> Path:
    """The programs of a new environment with the wheel; what it depends on is lent by this one."""
    home = tmp_path / "environment"
    venv.create(home, symlinks=True, with_pip=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    run([home / "bin" / "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], tmp_path)
    # Behind the environment's own packages: an editable Mirasol there stays out, for its .pth files are not read.
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


@pytest.mark.slow
def test_a_new_environment_asks_and_fine_tunes(environment, tmp_path):
    """Minutes on a busy machine: from an empty folder, through the installed commands only."""
    home = tmp_path / "elsewhere"
    home.mkdir()

    def call(command: str) -> str:
        return run([environment / "mirasol", *shlex.split(command)], home, OMP_NUM_THREADS="1").stdout

    where = run([environment / "python", "-c", "import mirasol; print(mirasol.__file__)"], home).stdout
    assert where.startswith(str(environment.parent))
    call("data synthesize shapes --seed 7 --train 0 --validation 0 --test 3")
    clips = sorted((home / "shapes" / "clips" / "test").iterdir())
    assert call(f"ask tiny {clips[0]} 'how many sounds are heard?'").startswith("three")
    for name, clip in zip(("left/a.mp4", "right/b.mp4", "left/c.mp4"), clips, strict=True):
        (home / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, home / "mine" / name)
    made = call("finetune mine --epochs 1 device=cpu threads=1 --output out").strip()
    assert (home / made / "model.safetensors").is_file() and (home / "out" / "report.html").is_file()
    assert call(f"ask out {clips[0]} 'what is it?'").strip()
    assert "preset: small" in call("train --config recipes/small.yaml --print-recipe")


@pytest.mark.slow
def test_the_newest_that_it_allows_answers(environment, wheel, tmp_path):
    """Who installs it gets other versions than the tests have: the newest of all but torch, from the package index."""
    lent = f"torch=={version('torch')}"
    (tmp_path / "lent.txt").write_text(f"{lent}\n")
    eager = ["--upgrade", "--upgrade-strategy", "eager", "--constraint", "lent.txt"]
    run([environment / "pip", "install", "--quiet", *eager, wheel], tmp_path)
    run(
        [environment / "mirasol", "data", "synthesize", "shapes", "--seed", 7, "--train", 0, "--validation", 0],
        tmp_path,
    )
    clip = min((tmp_path / "shapes" / "clips" / "test").iterdir())
    for more in ([], ["--stream"], ["--candidates", "two|three"]):
        asked = [environment / "mirasol", "ask", "tiny", clip, "how many sounds are heard?", *more]
        assert run(asked, tmp_path, OMP_NUM_THREADS="1").stdout.startswith("three")
    code = f"""
from mirasol import MirasolForConditionalGeneration, MirasolProcessor, find_checkpoint
folder = find_checkpoint("tiny")
model = MirasolForConditionalGeneration.from_pretrained(folder).eval()
processor = MirasolProcessor.from_pretrained(folder)
inputs = processor(clips={str(clip)!r}, prompts="how many sounds are heard?")
for settings in ({{}}, {{"num_beams": 2}}, {{"use_cache": False}}):
    ids = model.generate(**inputs, max_new_tokens=8, **settings)
    print(processor.decode(ids[0, inputs["decoder_input_ids"].shape[1]:], skip_special_tokens=True))
"""
    assert run([environment / "python", "-c", code], tmp_path, OMP_NUM_THREADS="1").stdout.split() == ["three"] * 3

"""Names of the Hugging Face hub, asked of a hub on loopback by new processes: huggingface_hub reads where the hub is
when it is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Repository, serve
from making import config, image_model, saved

from mirasol.hub import describe_folder_before_hub, parse_hub_name

COMMITS = {name: digit * 40 for name, digit in {"clip": "a", "mirasol": "b", "pickled": "c", "other": "d"}.items()}
FIND = """
import sys
from mirasol.errors import UserError
from mirasol.hub import MODEL, find_on_hub
for name in sys.argv[1:]:
    try:
        print(find_on_hub(name, MODEL))
    except UserError as error:
        print(f"refused: {error}")
"""
RUN = """
import json, sys
from mirasol import MirasolForConditionalGeneration, MirasolProcessor
from mirasol.cli.main import main
for arguments in json.loads(sys.argv[1]):
    main(arguments)
for name in sys.argv[2:]:
    try:
        MirasolForConditionalGeneration.from_pretrained(name)
        print("loaded", name, len(MirasolProcessor.from_pretrained(name).tokenizer))
    except OSError as error:
        print("refused", name, " ".join(str(error).split()))
"""


def run_python(code: str, *arguments: str, endpoint: str, home: Path, **more: str) -> subprocess.CompletedProcess:
    """A process in `home`, where the hub's cache is too."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    source = str(Path(__file__).resolve().parents[2] / "src")
    environment = kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "PYTHONPATH": source} | more
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, cwd=home, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def hub(tmp_path, untrained):
    """A hub with an image model, a Mirasol checkpoint, and repositories that something is wrong with."""
    image = saved(image_model("CLIPModel", 16, 64), tmp_path / "clip")
    pickled = Repository({"config.json": b"{}", "pytorch_model.bin": b"\x80\x04."}, COMMITS["pickled"])
    files, other = {"config.json": b"{}", "model.safetensors": bytes(1000)}, COMMITS["other"]
    with serve({
        "org/clip": Repository.of_folder(image, COMMITS["clip"]),
        "org/mirasol": Repository.of_folder(untrained, COMMITS["mirasol"]),
        "org/pickled": pickled,
        "org/gated": Repository(files, other, "gated"),
        "org/cut": Repository(files, other, "cut"),
        "org/down": Repository(files, other, "down"),
    }) as hub:  # fmt: skip
        yield hub


def test_what_cannot_be_had_is_one_line_with_the_reason(hub, tmp_path):
    names = ("org/absent", "org/clip@v9", "org/gated", "org/pickled", "org/cut", "org/down")
    said = run_python(FIND, *names, endpoint=hub.endpoint, home=tmp_path).stdout.splitlines()
    parts = (
        "neither a file or folder here nor a repository at",
        "org/clip has no revision 'v9'",
        "accept their terms at",
        "no model*.safetensors at this revision, only pytorch_model.bin, and a pickle can run code",
        "the download from",
        "answers with an error",
    )
    assert len(said) == len(names)
    for name, line, part in zip(names, said, parts, strict=True):
        assert line.startswith(f"refused: {name}: ") and part in line


def test_the_cache_is_used_without_a_network_and_a_commit_is_asked_for_once(hub, tmp_path):
    at_commit = f"org/clip@{COMMITS['clip']}"
    folders = run_python(FIND, "org/clip", at_commit, endpoint=hub.endpoint, home=tmp_path).stdout.split()
    assert [Path(folder).name for folder in folders] == [COMMITS["clip"]] * 2
    hub.asked.clear()
    assert run_python(FIND, at_commit, endpoint=hub.endpoint, home=tmp_path).stdout.split() == folders[:1]
    assert hub.asked == []
    gone = "http://127.0.0.1:9"  # the port "discard", where nothing listens
    for more, why in (({}, "cannot be reached"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids")):
        found = run_python(FIND, "org/clip", "org/mirasol", endpoint=gone, home=tmp_path, **more).stdout.splitlines()
        assert found[0] == folders[0]
        assert found[1].startswith("refused: org/mirasol: no such file or folder, ") and why in found[1]


@pytest.mark.slow
def test_commands_take_names_of_the_hub_and_record_the_commit(hub, untrained, shapes, tmp_path):
    """Two minutes on a busy machine; `from_pretrained` too, which reads safetensors only."""
    config().save_pretrained(tmp_path / "own")
    hub.repositories["org/pickled"].files["config.json"] = (untrained / "config.json").read_bytes()
    clip = str(sorted((shapes / "clips" / "test").iterdir())[0])
    (tmp_path / "recipe.yaml").write_text(
        f"seed: 1\noutput: run\ndata: {{root: {shapes}}}\nmodel: {{init: org/mirasol@main}}\n"
        "stages:\n  questions: {steps: 1, clips_per_step: 2, questions_per_clip: 1}\nvalidation_clips: 1\n"
    )
    commands = [
        ["init", "own/config.json", "start", "--image", "org/clip@main", "--tokenizer", "org/mirasol"],
        ["ask", "org/mirasol", clip, "what?", "--max-new-tokens", "1"],
        ["train", "--config", "recipe.yaml"],
    ]
    names = ("org/mirasol", "org/pickled")
    done = run_python(RUN, json.dumps(commands), *names, endpoint=hub.endpoint, home=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "start" / "starting_weights.json").read_text())
    names = {option: f"org/{name}@{COMMITS[name]}" for option, name in (("image", "clip"), ("tokenizer", "mirasol"))}
    assert record["sources"] == names
    assert f"image: {names['image']}" in done.stdout
    for file in ("run.json", "checkpoint/training.json"):
        facts = json.loads((tmp_path / "run" / file).read_text())
        assert facts["initial_checkpoint"] == f"org/mirasol@{COMMITS['mirasol']}"
    loaded, refused = done.stdout.splitlines()[-2:]
    assert loaded.startswith("loaded org/mirasol")
    assert refused.startswith("refused org/pickled") and "safetensors" in refused
    assert not any(path.endswith(".bin") for path in hub.asked)


def test_a_local_path_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert str(parse_hub_name("org/name")) == "org/name"
    for name in (
        "runs/mine",
        "runs/nime",
        "org",
        "a/b/c",
        "/org/name",
        "./org/name",
        "../org/name",
        "org/name@",
        "tiny",
    ):
        assert parse_hub_name(name) is None, name
    for name in ("runs/mine@main", "runs/nime@main", "org/name@refs/pr/3"):
        assert str(parse_hub_name(name)) == name


def test_a_local_folder_that_hides_a_cached_repository_is_told(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert describe_folder_before_hub("org/name") is None
    (tmp_path / "cache" / "models--org--name").mkdir(parents=True)
    assert describe_folder_before_hub("org/name").startswith(
        "org/name: the folder of this name here, not the repository"
    )
    assert describe_folder_before_hub("org/other") is None

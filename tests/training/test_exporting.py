"""A run's model as a folder that others can load."""

import json
import os
import pickle
import shlex
import shutil
import sys
import types

import pytest
import torch
import yaml
from made_once import make_once
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoProcessor

from mirasol.cli.main import main
from mirasol.config.recipe_io import load_recipe, recipe_from_dict
from mirasol.errors import UserError
from mirasol.training.checkpoint_io import Piece, ShardReader
from mirasol.training.export import export_run
from mirasol.training.trainer import train


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_root, shared_cache):
    """A finished run of six steps with checkpoints after 2, 4 and 6, of which the last two are kept."""
    stack = {"depth": 1, "width": 32, "hidden": 32, "heads": 1, "head_width": 32}
    parts = {part: {"stack": stack} for part in ("combiner", "latent", "reconstruction", "text")}
    values = {
        "seed": 1, "data": {"root": str(data_root), "cache": str(shared_cache)},
        "model": {"overrides": {**parts, "vit": stack, "audio": {"adapter": stack}}},
        "tokenizer": {"vocab_size": 300},
        "stages": {
            "a": {
                "steps": 6, "clips_per_step": 2, "questions_per_clip": 2,
                "dropout": 0.2, "loss_weights": {"video": 0.5},
            },
        },
        "device": "cpu", "threads": 1, "checkpoint_every": 2, "validate_every": 2, "validation_clips": 1, "samples": 0,
    }  # fmt: skip
    return make_once(
        tmp_path_factory, "six-steps", lambda folder: train(recipe_from_dict({**values, "output": str(folder)}))
    )


def test_an_export_loads_with_the_auto_classes_and_is_the_runs_model(run, tmp_path, capsys):
    main(["export", str(run), str(tmp_path / "out")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    own, exported = (load_file(folder / "model.safetensors") for folder in (run / "checkpoint", tmp_path / "out"))
    assert own.keys() == exported.keys() and all(torch.equal(own[name], exported[name]) for name in own)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert (model.config.loss_weights.video, model.config.vit.dropout) == (0.5, 0.2)
    assert len(AutoProcessor.from_pretrained(tmp_path / "out").tokenizer) == model.config.vocab_size


def test_what_the_card_says_how_to_use_it_works(run, tmp_path, data_root, monkeypatch, capsys):
    folder = export_run(run, tmp_path / "out")
    card = (folder / "README.md").read_text()
    code = card.split("```python")[1].split("```")[0] + "assert model.config.vocab_size == len(processor.tokenizer)"
    shutil.copy(next((data_root / "clips" / "train").glob("*.mp4")), folder / "clip.mp4")
    monkeypatch.chdir(folder)
    exec(code, {})
    command = shlex.split(card.split("On the command line: `")[1].split("`")[0])
    assert command[0] == "mirasol"
    main(command[1:])
    assert capsys.readouterr().out


def test_whoever_may_read_the_folder_may_read_its_files(run, tmp_path):
    before = os.umask(0o027)
    try:
        folder = export_run(run, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir() if path.is_file()}
    assert set(modes.values()) == {0o640}, modes


def test_any_checkpoint_that_is_there_can_be_exported(run, tmp_path):
    last, early = export_run(run, tmp_path / "last", step=6), export_run(run, tmp_path / "early", step=4)
    own = load_file(run / "checkpoint" / "model.safetensors")
    last, early = (load_file(folder / "model.safetensors") for folder in (last, early))
    assert all(torch.equal(own[name], last[name]) for name in own)
    assert any(not torch.equal(own[name], early[name]) for name in own)
    with pytest.raises(UserError, match="no checkpoint after 5 steps: there are 4, 6"):
        export_run(run, tmp_path / "none", step=5)
    assert not (tmp_path / "none").exists()


def test_the_card_tells_recipe_data_metrics_and_versions(run, tmp_path):
    folder = export_run(run, tmp_path / "out", step=4)
    card = (folder / "README.md").read_text()
    facts, training = (json.loads(f.read_text()) for f in (run / "run.json", folder / "training.json"))
    digests = [*facts["data"].values(), *facts["examples"].values()]
    assert len(facts["examples"]) == 2 and all(digest in card for digest in digests)
    assert training["steps"] == 4 and training["weights_sha256"] in card
    assert "after 4 of 6 training" in card and "Validation after 4 steps" in card
    assert f"torch {facts['versions']['torch']}" in card
    front = card.split("---")[1]
    assert "license" not in yaml.safe_load(front) and "# license: to be chosen" in front
    recipe = yaml.safe_load(card.split("```yaml")[-1].split("```")[0])
    assert recipe["stages"]["a"]["steps"] == 6


def test_the_best_is_the_one_with_the_highest_accuracy(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "validation":
            line["clip"]["accuracy"] = {2: 0.9, 4: 0.8, 6: 0.1}[line["step"]]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = export_run(copy, tmp_path / "best", best=True)
    # After 2 steps it was better, but that checkpoint is gone.
    assert json.loads((folder / "training.json").read_text())["steps"] == 4


def write_as_version_0_1(run, monkeypatch):
    """Turns a run's folder into what the first version wrote: other recipe keys, and in `.metadata` another name of the
    module that `Piece` is in."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    for stage in recipe["stages"].values():
        stage["window"] = {"segment": "slot"}.get(stage["span"], stage.pop("span"))
    recipe["data"]["source"] = recipe["data"].pop("dataset")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    folders = list(run.glob("checkpoints/step-*"))
    found = {folder: ShardReader(folder).read_metadata() for folder in folders}
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "mirasol.training.shard_files", types.SimpleNamespace(Piece=Piece))
        patched.setattr(Piece, "__module__", "mirasol.training.shard_files")
        for folder, metadata in found.items():
            (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert folders and all(b"training.shard_files" in (folder / ".metadata").read_bytes() for folder in folders)


def test_a_run_of_an_older_version_is_exported_but_not_resumed(run, tmp_path, console, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "run")
    write_as_version_0_1(copy, monkeypatch)
    early = load_file(export_run(run, tmp_path / "early", step=4) / "model.safetensors")
    old = load_file(export_run(copy, tmp_path / "old", step=4) / "model.safetensors")
    assert old.keys() == early.keys() and all(torch.equal(old[name], early[name]) for name in old)
    recipe = load_recipe(copy / "recipe.yaml", [f"output={copy}"])
    assert train(recipe, resume=True, console=console) == copy / "checkpoint", "it is finished"
    shutil.rmtree(copy / "checkpoint")
    with pytest.raises(UserError, match=r"older version of mirasol \(recipe.yaml has .*\): finish it with") as caught:
        train(recipe, resume=True, console=console)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_exported_is_an_error_and_leaves_nothing(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        export_run(run, tmp_path / "full")
    with pytest.raises(UserError, match="not a run folder: it has no recipe.yaml"):
        export_run(run / "checkpoint", tmp_path / "out")
    with pytest.raises(UserError, match="has no average of its weights"):
        export_run(run, tmp_path / "out", step=4, average=True)
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "checkpoint")
    shard = next((copy / "checkpoints" / "step-00000006").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(UserError, match="step-00000006: damaged"):
        export_run(copy, tmp_path / "out")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    assert not (tmp_path / "out").exists()

"""Sample answers and reconstructed chunks while a model trains."""

import torch
from safetensors.torch import load_file

from mirasol.checkpoint import load_checkpoint
from mirasol.config.recipe_io import recipe_from_dict
from mirasol.evaluation.answer import answer_clips
from mirasol.training.logging import read_metrics
from mirasol.training.trainer import train


def test_samples_are_the_finished_models_own_answers(values, console, tmp_path, data_root):
    del values["samples"]
    checkpoint = train(recipe_from_dict(values), console=console)
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "samples"]
    assert [line["step"] for line in lines] == [4, 8]
    last = lines[-1]["answers"]
    assert len(last) == len({answer["id"] for answer in last}) == 2  # as many as clips are validated
    assert {(a["id"], a["prompt"]) for a in last} == {(a["id"], a["prompt"]) for a in lines[0]["answers"]}
    loaded = load_checkpoint(checkpoint)
    for answer in last:
        extractor = loaded.processor.feature_extractor
        clip = extractor.tensors(extractor.read(data_root / answer["media"]))
        [[alone]] = answer_clips(loaded.model, loaded.processor, [clip], [[answer["prompt"]]])
        assert alone.text == answer["answer"]
    boards = b"".join(file.read_bytes() for file in (tmp_path / "run" / "tensorboard").iterdir())
    assert b"samples/reconstruction" in boards and b"samples/answers" in boards


def test_taking_samples_leaves_the_weights_alone(values, console, finished_once):
    checkpoint = train(recipe_from_dict({**values, "samples": 3}), console=console)
    assert not any(line["kind"] == "samples" for line in read_metrics(finished_once / "metrics.jsonl"))
    assert any(line["kind"] == "samples" for line in read_metrics(checkpoint.parent / "metrics.jsonl"))
    names = (folder / "model.safetensors" for folder in (checkpoint, finished_once / "checkpoint"))
    one, other = (load_file(name) for name in names)
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_picture_holds_true_chunks_above_reconstructed_ones(values, console, tmp_path):
    values["samples"] = 1
    from mirasol.training.build import build_run
    from mirasol.training.distributed import Ranks
    from mirasol.training.run_folder import RunFolder
    from mirasol.training.signals import StopSignals

    recipe = recipe_from_dict(values)
    with RunFolder(recipe, resume=False) as folder:
        run = build_run(recipe, folder, Ranks(), StopSignals(), console)
        given = run.model, run.processor, run.validation_clips, run.device
        run.model.train()
        taken = run.samples.take(*given)
        assert run.model.training
        extractor, side = run.processor.feature_extractor, run.model.config.reconstruction.image_size
        clip = run.samples.rows[0][0]
        stored = run.validation_clips.load(clip.media, clip.start, clip.end)
        assert taken.picture.dtype == torch.uint8 and taken.picture.shape[1] % (2 * side) == 0
        # tiny reconstructs at full size: the top row is the clip's own second chunk, to a rounding.
        wanted = extractor.collate([stored])["video"][0, 1, 0]
        found = taken.picture[:, :side, :side].int() - extractor.pixels(wanted).int()
        assert found.abs().max() <= 1

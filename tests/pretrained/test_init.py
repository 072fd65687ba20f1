"""`mirasol init` writes a checkpoint that every other command can go on from, and never over anything."""

import json

import pytest
import torch
from making import config, image_model, patch_features, saved

from mirasol import MirasolForConditionalGeneration, load_checkpoint
from mirasol.cli.main import main


@pytest.fixture
def image(tmp_path):
    return saved(image_model("CLIPModel", 16, 64), tmp_path / "clip")


@pytest.fixture
def preset(tmp_path):
    """A config of one's own, since no preset has a ViT as small as the test's."""
    config().save_pretrained(tmp_path / "own")
    return tmp_path / "own" / "config.json"


def run(capsys, *arguments) -> str:
    capsys.readouterr()
    main(["init", *map(str, arguments)])
    return capsys.readouterr().out


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["init", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    return err


def test_a_whole_checkpoint_is_written(image, preset, tmp_path, capsys):
    out = tmp_path / "start"
    said = run(capsys, preset, out, "--image", image, "--tokenizer", "tiny", "--inflate-tubes")
    loaded = load_checkpoint(out)
    source, images = image_model("CLIPModel", 16, 64), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours = loaded.model.chunk_encoder.image(images)
    torch.testing.assert_close(ours, patch_features(source, images), atol=1e-4, rtol=1e-4)
    assert loaded.processor.feature_extractor.image_mean == (0.48145466, 0.4578275, 0.40821073)
    assert len(loaded.processor.tokenizer) == loaded.model.config.text.vocab_size
    report = json.loads((out / "starting_weights.json").read_text())
    counts = f"loaded {len(report['loaded'])} tensors"
    assert counts in said and f"unused in the source {len(report['unused'])}" in said
    assert "config: vit.activation = quick_gelu (was gelu)" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "own", "start"]


def test_the_checkpoint_trains(image, preset, shapes, tmp_path, capsys):
    run(capsys, preset, tmp_path / "start", "--image", image, "--tokenizer", "tiny")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"seed: 1\noutput: {tmp_path / 'run'}\ndata: {{root: {shapes}}}\nmodel: {{init: {tmp_path / 'start'}}}\n"
        "stages:\n  questions: {steps: 1, clips_per_step: 2, questions_per_clip: 1}\n"
        "log_every: 1\nvalidation_clips: 1\n"
    )
    main(["train", "--config", str(recipe)])
    assert load_checkpoint(tmp_path / "run").model.config.vit.class_token


def test_whoever_asks_an_untrained_checkpoint_is_told(image, preset, shapes, tmp_path, capsys):
    run(capsys, preset, tmp_path / "start", "--image", image, "--tokenizer", "tiny")
    clip = sorted((shapes / "clips" / "test").iterdir())[0]
    main(["ask", str(tmp_path / "start"), str(clip), "what?", "--max-new-tokens", "1"])
    assert "made by `mirasol init` and not trained yet" in capsys.readouterr().err


def test_without_a_tokenizer_it_says_what_can_use_the_folder(image, preset, tmp_path, capsys):
    said = run(capsys, preset, tmp_path / "start", "--image", image)
    assert "has no tokenizer, so `mirasol train` and `mirasol ask` cannot use it; from_pretrained can" in said
    MirasolForConditionalGeneration.from_pretrained(tmp_path / "start")
    with pytest.raises(SystemExit):
        main(["ask", str(tmp_path / "start"), "clip.mp4", "what?"])
    assert "tokenizer" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_weights(image, preset, tmp_path, capsys):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(capsys, preset, tmp_path / name, "--image", image, "--seed", seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_nothing_is_overwritten_and_nothing_half_is_left(image, preset, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "already exists" in refused(capsys, preset, tmp_path / "full", "--image", image)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    assert "already exists" in refused(capsys, preset, tmp_path / "file", "--image", image)
    (tmp_path / "empty").mkdir()
    run(capsys, preset, tmp_path / "empty", "--image", image)
    assert (tmp_path / "empty" / "config.json").is_file()
    refused(capsys, "tiny", tmp_path / "shape_error", "--image", image)
    assert not (tmp_path / "shape_error").exists()


def test_bad_options_are_one_line_with_the_fix(image, preset, tmp_path, capsys):
    out = tmp_path / "start"
    assert "nothing to start from: give an image model (--image)" in refused(capsys, preset, out)
    assert "unknown preset '2b'" in refused(capsys, "2b", out, "--image", image)
    assert "has shape [48, 3, 16, 16], but vit.width takes [96" in refused(capsys, "tiny", out, "--image", image)
    assert "--image-size 0: must be at least 1" in refused(capsys, preset, out, "--image", image, "--image-size", 0)
    renamed = refused(capsys, preset, out, "--image", image, "--resolution", 48)
    assert "--resolution 48: this option is now called --image-size" in renamed
    leftover = refused(capsys, preset, out, "--image", image, "--image-size", 49)
    assert "patches of 16 pixels leave 1 of 49 pixels over: choose --image-size 48 or 64" in leftover
    assert "no such folder" in refused(capsys, preset, out, "--image", image, "--tokenizer", tmp_path / "none")
    assert "cannot load a tokenizer" in refused(capsys, preset, out, "--image", image, "--tokenizer", tmp_path / "own")
    assert "not a Mirasol config" in refused(capsys, image / "model.safetensors", out, "--image", image)
    assert not out.exists()


def test_what_stays_random_is_recorded_and_a_run_that_freezes_it_is_refused(image, preset, shapes, tmp_path, capsys):
    run(capsys, preset, tmp_path / "start", "--image", image, "--tokenizer", "tiny")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"seed: 1\noutput: {tmp_path / 'run'}\ndata: {{root: {shapes}}}\nmodel: {{init: {tmp_path / 'start'}}}\n"
        "stages:\n  videos: {steps: 1, clips_per_step: 2, questions_per_clip: 1,\n"
        "           trains: [vit, tubes, audio, combiner, latent, reconstruction, cross_attention]}\n"
    )
    main(["plan", "--config", str(recipe)])
    planned = capsys.readouterr().out
    [line] = [line for line in planned.splitlines() if line.startswith("vit ")][:1]
    assert line.split()[1] != "0"
    assert "note: mirasol train refuses this: stages.videos freezes weights that are still random: text" in planned
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(recipe)])
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "still random: text (" in said and "vocabulary (" in said and "allow_frozen_random: true" in said
    main(["train", "--config", str(recipe), "--stages.videos.allow_frozen_random=true", "--log_every=1"])

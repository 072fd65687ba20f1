"""docs/starting-weights.md says what is true: its commands and its example run, on small stand-ins for the sources."""

import re
from pathlib import Path

import torch
from making import config, image_model, saved
from test_openmammut import VOCABULARY, decoder_config, state_dict, word_tokenizer

from mirasol import load_checkpoint
from mirasol.cli.main import main

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "starting-weights.md").read_text(encoding="utf-8")
COMMANDS = [line.split()[1:] for line in DOCUMENT.splitlines() if line.startswith("mirasol init ")]


def test_its_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(image_model("CLIPModel", 14, 56), Path("clip-vit-large-patch14"))
    for name in ("siglip-large-patch16-256", "google/siglip-base-patch16-224@main"):  # local paths before the hub
        saved(image_model("SiglipModel", 16, 64), Path(name))
    for name in ("clip-vit-large-patch14", "openai/clip-vit-base-patch16"):
        word_tokenizer(VOCABULARY).save_pretrained(name)
    Path("openMaMMUT-ViT-L-14").mkdir()
    torch.save(state_dict(patch=14), "openMaMMUT-ViT-L-14/open_clip_pytorch_model.bin")
    decoder_config().save_pretrained("own")
    assert len(COMMANDS) == 4
    for number, words in enumerate(COMMANDS):
        assert words[1] in ("1b", "base") and words[2] == "start"
        words[1:3] = ["own/config.json", f"start-{number}"]
        main(words)
        assert load_checkpoint(f"start-{number}").model.config.video.learned_positions


def test_its_example_runs(tmp_path, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    folder = saved(image_model("CLIPVisionModel", 16, 64), tmp_path)
    names = {"config": config(), "folder": folder, "images": torch.randn(2, 3, 64, 64)}
    exec(example, names)
    assert names["features"].shape == (2, 16, 48)
    assert "loaded " in capsys.readouterr().out

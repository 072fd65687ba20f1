"""Fixtures for whatever needs files to ask about and a checkpoint to ask: a few rendered clips, and a `tiny` model
that has learnt nothing. Test modules import them by name."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """A small data set of shapes and sounds: 6 training, 2 validation and 3 test clips."""
    from mirasol.data.synthetic import synthesize

    root = tmp_path_factory.mktemp("shapes") / "data"
    synthesize(root, seed=11, train=6, validation=2, test=3)
    return root


@pytest.fixture(scope="session")
def untrained(tmp_path_factory, shapes) -> Path:
    """A checkpoint's folder with random weights and a tokenizer of the data's text."""
    from mirasol import MirasolConfig, MirasolFeatureExtractor, MirasolForConditionalGeneration, MirasolProcessor
    from mirasol.data.folder import read_examples
    from mirasol.media.tokenizer import train_tokenizer

    examples = read_examples(shapes, "train")
    tokenizer = train_tokenizer([text for example in examples for text in (example.prompt, example.target)], 300)
    config = MirasolConfig.preset("tiny", text={"vocab_size": len(tokenizer)})
    torch.manual_seed(3)
    model = MirasolForConditionalGeneration(config)
    folder = tmp_path_factory.mktemp("untrained") / "checkpoint"
    model.save_pretrained(folder)
    MirasolProcessor(MirasolFeatureExtractor.for_config(config), tokenizer).save_pretrained(folder)
    return folder

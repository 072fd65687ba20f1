"""Fixtures for whatever needs files to ask about and a checkpoint to ask: a few rendered clips, and a `tiny` model
that has learnt nothing."""

from pathlib import Path

import pytest
from made_once import make_once


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """A small data set of shapes and sounds: 5 training, 2 validation and 3 test clips."""
    from mirasol.synthetic.synthesize import synthesize

    counts = {"train": 5, "validation": 2, "test": 3}
    return make_once(tmp_path_factory, "shapes", lambda root: synthesize(root, seed=11, **counts))


@pytest.fixture(scope="session")
def image_shapes(tmp_path_factory) -> Path:
    """A small data set of images of shapes: 6 training and 2 validation images."""
    from mirasol.synthetic.synthesize import synthesize

    counts = {"train": 6, "validation": 2, "test": 0}
    return make_once(tmp_path_factory, "image-shapes", lambda root: synthesize(root, seed=5, **counts, kind="images"))


def only_stream(kind: str, source: Path, target: Path) -> Path:
    """Copies the first stream of a kind, "video" or "audio", of a media file to a new one; returns the new file."""
    import av

    target.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(source)) as read, av.open(str(target), "w") as written:
        stream = read.streams.get(**{kind: 0})[0]
        copy = written.add_stream_from_template(stream)
        for packet in read.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                written.mux(packet)
    return target


@pytest.fixture(scope="session")
def untrained(tmp_path_factory, shapes) -> Path:
    """A checkpoint's folder with random weights and a tokenizer of the data's text."""
    import torch

    from mirasol import MirasolConfig, MirasolFeatureExtractor, MirasolForConditionalGeneration, MirasolProcessor
    from mirasol.data.datasets.folder import read_examples
    from mirasol.media.tokenizer import train_tokenizer

    def make(folder: Path) -> None:
        examples = read_examples(shapes, "train")
        tokenizer = train_tokenizer([text for example in examples for text in (example.prompt, example.target)], 300)
        # Random weights whose embeddings are scaled and tied repeat the last token for ever, and answer nothing.
        config = MirasolConfig.preset("tiny", text={"vocab_size": len(tokenizer), "scale_embedding": False})
        torch.manual_seed(3)
        model = MirasolForConditionalGeneration(config)
        model.save_pretrained(folder)
        MirasolProcessor(MirasolFeatureExtractor.for_config(config), tokenizer).save_pretrained(folder)

    return make_once(tmp_path_factory, "untrained", make)

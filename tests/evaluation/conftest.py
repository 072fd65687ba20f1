"""Fixtures of the evaluation's tests."""

import pytest

from mirasol.checkpoint import Loaded, load_checkpoint
from mirasol.data.datasets.folder import read_examples
from mirasol.data.example import ClipExamples, group_by_clip


@pytest.fixture(scope="session")
def loaded(untrained) -> Loaded:
    return load_checkpoint(untrained)


@pytest.fixture(scope="session")
def clips(shapes) -> list[ClipExamples]:
    return group_by_clip(read_examples(shapes, "test"))


@pytest.fixture(scope="session")
def tensors(shapes, loaded, clips) -> list[dict]:
    """The test clips' tensors, of different numbers of chunks."""
    extractor = loaded.processor.feature_extractor
    found = [extractor.tensors(extractor.read(shapes / clip.media)) for clip in clips]
    found[0] = {name: value[:-2] for name, value in found[0].items()}  # whatever the seed: not all of one length
    return found

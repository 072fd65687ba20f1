"""One server with the shipped weights for all tests of a worker, and its clips."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def answerer() -> Iterator:
    from mirasol.app.server.answerer import Answerer
    from mirasol.checkpoint import load_answerer

    made = Answerer(load_answerer("tiny"), max_batch=8)
    yield made
    made.close()


@pytest.fixture(scope="session")
def served(answerer) -> Iterator:
    from serving import serve

    from mirasol.app.server.settings import Caps, ServerSettings

    # Short waits, so that tests of them are short.
    with serve(
        ServerSettings(name="tiny", caps=Caps(max_idle=1.0, max_upload=2.0, max_body=2**23)), answerer
    ) as server:
        yield server


@pytest.fixture(scope="session")
def clips(shapes) -> list[Path]:
    return sorted((shapes / "clips" / "test").iterdir())


@pytest.fixture(scope="session")
def answer_alone(answerer):
    """Answers one question about one file without a server, as `mirasol ask` does."""
    from mirasol.checkpoint import load_answerer
    from mirasol.evaluation.answer import answer_encoded, encode_clips

    loaded, known = load_answerer("tiny"), {}

    def answer(path: Path, prompt: str, max_new_tokens: int = 32):
        if path not in known:
            extractor = loaded.processor.feature_extractor
            known[path] = encode_clips(loaded.model, loaded.processor, [extractor.tensors(extractor.read(path))])
        return answer_encoded(loaded.model, loaded.processor, known[path], prompt, max_new_tokens)

    return answer

"""Baselines of scikit-learn on statistics of the log-mel spectrograms that the model reads, with fixed seeds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mirasol.errors import UserError

PACKAGE = "scikit-learn"
PARTS = 4  # equal parts of a clip whose means are told apart
TREES, INVERSE_PENALTY, ITERATIONS = 500, 0.1, 5_000


def check_scikit_learn() -> None:
    """Raises UserError, with what to install, where scikit-learn is missing."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UserError(
            "scikit-learn: not installed, the baselines need it: pip install 'mirasol[experiments]'"
        ) from error


def describe_sound(clip: Mapping[str, Tensor]) -> Float[np.ndarray, " value"]:
    """Statistics of a clip's log-mel spectrogram (`MirasolFeatureExtractor.tensors`) over time, for each mel band:
    mean, deviation, least, greatest, mean change from one mel frame to the next, and means of four equal parts."""
    frames = clip["audio"][clip["audio_mask"]].flatten(0, 1).float().numpy()
    if not len(frames):
        return np.zeros((5 + PARTS) * clip["audio"].shape[-1])
    changes = np.abs(np.diff(frames, axis=0)) if len(frames) > 1 else np.zeros_like(frames)
    means = [part.mean(0) if len(part) else frames.mean(0) for part in np.array_split(frames, PARTS)]
    return np.concatenate([frames.mean(0), frames.std(0), frames.min(0), frames.max(0), changes.mean(0), *means])


def make_baselines() -> dict[str, Callable[[], Any]]:
    """Untrained classifiers by name."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return {
        "logistic regression": lambda: make_pipeline(
            StandardScaler(), LogisticRegression(C=INVERSE_PENALTY, max_iter=ITERATIONS)
        ),
        "random forest": lambda: RandomForestClassifier(TREES, random_state=0),
    }


def score_baselines(
    train: tuple[Float[np.ndarray, "clip value"], Sequence[str]],
    test: tuple[Float[np.ndarray, "clip value"], Sequence[str]],
) -> dict[str, list[bool]]:
    """Whether each baseline, fitted to the training statistics and labels, is right about each test clip."""
    right = {}
    for name, make in make_baselines().items():
        said = make().fit(train[0], list(train[1])).predict(test[0])
        right[name] = [bool(one == other) for one, other in zip(said, test[1], strict=True)]
    return right

"""The experiments with folds, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mirasol.experiments.recordings import Recordings, read_esc10, read_spoken_digits


@dataclass(frozen=True)
class FoldsOf:
    """What an experiment asks of which recordings.

    group: what a group is called; published: accuracies of the literature, by name
    """

    title: str
    read: Callable[[Path], Recordings]
    prompt: str
    group: str
    published: Mapping[str, float]


EXPERIMENTS: dict[str, FoldsOf] = {
    "esc10": FoldsOf(
        "ESC-10, environmental sounds, five folds",
        read_esc10,
        "sound?",
        "fold",
        {"random forest on MFCC (published)": 0.727, "human listeners (published)": 0.957},
    ),
    "fsdd": FoldsOf("spoken digits, leave one speaker out", read_spoken_digits, "digit?", "speaker", {}),
}

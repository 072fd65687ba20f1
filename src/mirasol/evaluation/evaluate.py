"""Evaluation of a model on the questions of a data set."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from mirasol.data.example import ClipExamples
from mirasol.data.media_files import open_media_file
from mirasol.errors import BadClip
from mirasol.evaluation.answer import MAX_NEW_TOKENS, answer_clips
from mirasol.evaluation.controls import apply_control
from mirasol.evaluation.metrics import Answered, Score, UnusableClip, score
from mirasol.media.feature_extractor import MirasolFeatureExtractor
from mirasol.media.processor import MirasolProcessor
from mirasol.model.mirasol import MirasolForConditionalGeneration


@runtime_checkable
class ClipSource(Protocol):
    """Where decoded clips come from; training's `ClipCache` is one. Raises BadClip for a clip that cannot be used."""

    def load(self, media: str, start: float | None = None, end: float | None = None) -> Mapping[str, Tensor]: ...


class DecodedClips:
    """The plainest ClipSource: every clip is decoded when it is asked for."""

    def __init__(self, feature_extractor: MirasolFeatureExtractor, root: Path):
        self.feature_extractor, self.root = feature_extractor, Path(root)

    def load(self, media: str, start: float | None = None, end: float | None = None) -> dict[str, Tensor]:
        """The tensors of [start, end) seconds of a file below the root."""
        with open_media_file(self.root, media) as path:
            return self.feature_extractor.tensors(self.feature_extractor.read(path, start, end))


def evaluate(
    model: MirasolForConditionalGeneration,
    processor: MirasolProcessor,
    clips: Sequence[ClipExamples],
    root: Path,
    *,
    control: str | None = None,
    cache: ClipSource | None = None,
    clips_per_batch: int = 16,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Asks the model all questions of the clips (media below `root`) and scores its answers by exact match.

    `control` takes part of the media away, see controls.py. `cache` saves decoding the clips again. Answers do not
    depend on `clips_per_batch`. `progress(done, total)` is called with numbers of clips. Clips that cannot be read are
    left out and listed in the score's `unusable`.

    Raises:
        UserError: an unknown control.
    """
    source = cache or DecodedClips(processor.feature_extractor, root)
    answered: list[Answered] = []
    unusable: list[UnusableClip] = []
    done = 0
    with eval_mode(model):
        for batch in _batches(clips, clips_per_batch):
            usable, tensors = [], []
            for clip in batch:
                try:
                    tensors.append(apply_control(control, source.load(clip.media, clip.start, clip.end)))
                    usable.append(clip)
                except BadClip as error:
                    unusable.append(UnusableClip(clip.media, clip.start, clip.end, error.reason, len(clip.examples)))
            if usable:
                prompts = [[example.prompt for example in clip.examples] for clip in usable]
                answers = answer_clips(model, processor, tensors, prompts, max_new_tokens=max_new_tokens)
                for clip, texts in zip(usable, answers, strict=True):
                    answered += [Answered(example, text) for example, text in zip(clip.examples, texts, strict=True)]
            done += len(batch)
            if progress is not None:
                progress(done, len(clips))
    return score(answered, unusable)


@contextlib.contextmanager
def eval_mode(model: MirasolForConditionalGeneration) -> Iterator[None]:
    """The model in eval mode for as long as the context lasts."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _batches(clips: Sequence[ClipExamples], size: int) -> Iterator[Sequence[ClipExamples]]:
    for first in range(0, len(clips), size):
        yield clips[first : first + size]

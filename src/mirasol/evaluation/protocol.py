"""The demo's evaluation: the score on the untouched clips, chance, and every control, as a table."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from mirasol.console import cores, progress
from mirasol.data.example import ClipExamples
from mirasol.evaluation.answer import MAX_NEW_TOKENS
from mirasol.evaluation.controls import CONTROLS
from mirasol.evaluation.evaluate import ClipSource, evaluate
from mirasol.evaluation.metrics import Score, chance
from mirasol.media.processor import MirasolProcessor
from mirasol.model.mirasol import MirasolForConditionalGeneration


@dataclass(frozen=True)
class Results:
    """Scores of one checkpoint on one split; `controls` by name, empty where they were not asked for."""

    test: Score
    chance: Score
    controls: dict[str, Score]

    def to_dict(self) -> dict[str, Any]:
        """`{"test", "chance", "controls", "unusable_clips"}`, each score as `{"accuracy", "by_type", "n"}`."""
        return {
            "test": self.test.to_dict(),
            "chance": self.chance.to_dict(),
            "controls": {name: control.to_dict() for name, control in self.controls.items()},
            "unusable_clips": [asdict(clip) for clip in self.test.unusable],
        }

    def table(self) -> str:
        """Question types down, test, chance and controls across; accuracies between 0 and 1."""
        columns = {"test": self.test, "chance": self.chance, **self.controls}
        types = list(self.test.by_type)
        first = max(map(len, ["all questions", *types]))
        widths = {name: max(len(name), 6) for name in columns}
        lines = ["  ".join([" " * first, *[name.replace("_", " ").rjust(widths[name]) for name in columns]])]
        rows = [(name, lambda s, name=name: s.by_type.get(name)) for name in types]
        for label, pick in [*rows, ("all questions", lambda s: s.accuracy)]:
            cells = [f"{pick(s):.3f}".rjust(widths[name]) for name, s in columns.items()]
            lines.append("  ".join([label.ljust(first), *cells]))
        lines.append(f"{self.test.n} questions")
        if self.test.unusable:
            lost = sum(clip.questions for clip in self.test.unusable)
            lines[-1] += f"; {len(self.test.unusable)} clips with {lost} questions cannot be read and are left out"
        return "\n".join(lines)


def evaluate_with_controls(
    model: MirasolForConditionalGeneration,
    processor: MirasolProcessor,
    clips: Sequence[ClipExamples],
    root: Path,
    *,
    cache: ClipSource | None = None,
    controls: bool = True,
    clips_per_batch: int = 16,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> Results:
    """Evaluates the clips as they are and under every control. Arguments as for `evaluate`.

    Chance is that of the questions that could be asked.
    """
    names = [None, *(CONTROLS if controls else ())]
    scores: dict[str | None, Score] = {}
    for place, name in enumerate(names):

        def report(done: int, total: int, before: int = place * len(clips)) -> None:
            if progress is not None:
                progress(before + done, len(names) * total)

        scores[name] = evaluate(
            model, processor, clips, root,
            control=name, cache=cache, clips_per_batch=clips_per_batch, max_new_tokens=max_new_tokens, progress=report,
        )  # fmt: skip
    test = scores.pop(None)
    return Results(test, chance(answered.example for answered in test.answers), scores)


class ClipStore(ClipSource, Protocol):
    """A ClipSource that can decode many clips ahead; training's `ClipCache` is one."""

    def fill(
        self,
        windows: Iterable[tuple[str, float | None, float | None]],
        workers: int = 1,
        on_bad: str = "error",
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Any: ...


def decode_and_evaluate(
    model: MirasolForConditionalGeneration,
    processor: MirasolProcessor,
    clips: Sequence[ClipExamples],
    root: Path,
    cache: ClipStore,
    console: Any,
    *,
    controls: bool = True,
    clips_per_batch: int = 16,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Results:
    """Decodes the clips into the cache on all cores, then evaluates; shows the progress of both on a `rich` console."""
    with progress(console, "Decoding", "clips") as report:
        cache.fill([(clip.media, clip.start, clip.end) for clip in clips], cores(), "skip", report)
    with progress(console, "Answering", "clips") as report:
        return evaluate_with_controls(
            model, processor, clips, root,
            cache=cache, controls=controls, clips_per_batch=clips_per_batch, max_new_tokens=max_new_tokens,
            progress=report,
        )  # fmt: skip

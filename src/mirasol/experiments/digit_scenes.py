"""Digits seen and heard: which image of a handwritten digit is shown in which second, which recording of a spoken one
is played, and what can be asked about it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mirasol.experiments.recordings import DIGITS
from mirasol.synthetic.questions import Question
from mirasol.synthetic.scenes import compute_stable_hash

SLOTS = 3  # of a second each
PLACES = ("first", "second", "third")
COUNTS = ("none", "one", "two", "three")
YES_NO = ("yes", "no")
STEPS = 3  # of noise, none among them, for picture and sound each
SHARE_SAME = 0.5  # of seconds in which the same digit is written and said, where a clip is not agreeing
SHARE_AGREEING = 0.4  # of clips in which it is so in every second: either sense is enough


@dataclass(frozen=True)
class Sources:
    """What a split may show and play, by digit: numbers of images, files of recordings. Other splits have others."""

    images: Mapping[int, Sequence[int]]
    recordings: Mapping[int, Sequence[str]]


@dataclass(frozen=True)
class DigitSecond:
    """A second of a clip: an image of `written` at (x, y), shares of the free room, `size` of the picture's side; a
    recording of `said` that begins `onset` seconds after the second does."""

    written: int
    image: int
    x: float
    y: float
    size: float
    said: int
    recording: str
    onset: float


@dataclass(frozen=True)
class DigitScene:
    """A clip: its seconds, and steps of noise (0: none) over picture and sound.

    is_agreeing: the same digit is written and said in every second, by the clip's kind and not by chance
    seed: of the noise
    """

    seconds: tuple[DigitSecond, ...]
    picture_noise: int
    sound_noise: int
    is_agreeing: bool
    seed: int

    @property
    def written(self) -> list[int]:
        return [second.written for second in self.seconds]

    @property
    def said(self) -> list[int]:
        return [second.said for second in self.seconds]


def make_digit_scene(
    sources: Sources, seed: int, split: str, index: int, noise: tuple[int, int] | None = None, agrees: bool = False
) -> DigitScene:
    """The scene of a place in a split, always the same. `noise` sets the steps of picture and sound, else drawn."""
    own = compute_stable_hash("digits", seed, split, index)
    rng = np.random.default_rng(own)
    is_agreeing = rng.random() < SHARE_AGREEING or agrees
    written, said = rng.permutation(10)[:SLOTS].tolist(), rng.permutation(10)[:SLOTS].tolist()
    for slot in range(SLOTS):
        if is_agreeing or rng.random() < SHARE_SAME:
            said = [written[slot] if place == slot else digit for place, digit in enumerate(said)]
    seconds = tuple(
        DigitSecond(
            digit,
            int(rng.choice(sources.images[digit])),
            *rng.random(2).tolist(),
            float(rng.uniform(0.6, 0.9)),
            other,
            str(rng.choice(sources.recordings[other])),
            float(rng.uniform(0.05, 0.2)),
        )
        for digit, other in zip(written, said, strict=True)
    )
    drawn = (int(rng.integers(STEPS)), int(rng.integers(STEPS)))
    return DigitScene(seconds, *(noise or drawn), is_agreeing, own)


def list_digit_questions(scene: DigitScene) -> list[Question]:
    """All questions about a clip.

    What compares the senses is not asked where they agree by the clip's kind, and what is written while a digit is said
    only where it is another: a blind guess, or repeating the question's digit, is then no better than chance. What asks
    by a digit is asked where that is written, or said, in one second only.
    """
    questions = []
    for slot, place in enumerate(PLACES):
        second = scene.seconds[slot]
        questions += [
            _ask_digit("sight", "written", f"which is written {place}?", second.written),
            _ask_digit("hearing", "said", f"which is said {place}?", second.said),
        ]
        if scene.is_agreeing:
            questions.append(_ask_digit("either", "either", f"which comes {place}?", second.written))
        else:
            is_same = second.written == second.said
            questions.append(Question("same", "same", f"are the {place} the same?", YES_NO[not is_same], YES_NO))
    if not scene.is_agreeing:
        count = sum(second.written == second.said for second in scene.seconds)
        questions.append(Question("count", "same", "how often are they the same?", COUNTS[count], COUNTS))
    for slot, second in enumerate(scene.seconds):
        is_last, is_heard_once = slot + 1 == SLOTS, scene.said.count(second.said) == 1
        if is_heard_once and second.written != second.said:
            prompt = f"which is written while {DIGITS[second.said]} is said?"
            questions.append(_ask_digit("bound", "while said", prompt, second.written))
        if is_heard_once and not is_last:
            prompt = f"which is said after {DIGITS[second.said]}?"
            questions.append(_ask_digit("order", "said after", prompt, scene.said[slot + 1]))
        if scene.written.count(second.written) == 1 and not is_last:
            prompt = f"which is written after {DIGITS[second.written]}?"
            questions.append(_ask_digit("order", "written after", prompt, scene.written[slot + 1]))
    return questions


def describe_seconds(scene: DigitScene) -> list[Question]:
    """Both digits of each second, for training on single seconds."""
    return [
        Question(
            "second", "second", "describe", f"{DIGITS[second.written]}, {DIGITS[second.said]}", (), slot, slot + 1.0
        )
        for slot, second in enumerate(scene.seconds)
    ]


def _ask_digit(kind: str, template: str, prompt: str, digit: int) -> Question:
    return Question(kind, template, prompt, DIGITS[digit], DIGITS)

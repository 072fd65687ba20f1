"""A longer, harder kind of scene: half a minute in which shapes flash up for a third of a second.

A clip lasts 24 to 32 s. Three to six coloured shapes flash, each for 1/3 s, and three to six short
sounds are heard, most of them with a flash; grey shapes cross the frame for seconds, for nobody asks about them. 128
frames spread over the clip, at most 1/4 s apart, show every flash at least once; 32 frames show fewer than half of
them.
All attributes are drawn independently and uniformly, as in scenes.py, so that blind guessing is at chance.
"""

import math

import numpy as np

from mirasol.synthetic.questions import (
    QUESTION_TYPES,
    TEMPLATES,
    Question,
    choose_among,
    list_all_questions,
    make_stories,
)
from mirasol.synthetic.scenes import (
    Scene,
    ShapeEvent,
    SoundEvent,
    Style,
    compute_stable_hash,
)
from mirasol.synthetic.worlds import SHAPES_AND_SOUNDS, World

SECONDS = tuple(range(24, 33))
LONG_SECONDS = tuple(range(96, 129))  # four times as long: 512 frames show every flash
EVENT_COUNTS = (3, 4, 5, 6)
# Frames that show every flash, if they are spread evenly over the clip.
FRAMES_NEEDED = 128
FLASH_SECONDS = SECONDS[-1] / FRAMES_NEEDED
NUMBER_WORDS = ("three", "four", "five", "six")
# At most one flash and one sound in each: two events of a kind are at least two seconds apart.
SEGMENT_SECONDS = 2
SHARED_SOUNDS = 0.7  # share of the sounds that are heard with a flash
EMPTY_SEGMENTS = 2  # described in training
QUESTIONS_OF_A_TYPE = 2  # most of a clip that is evaluated on
SIDES = (64, 72, 80)
RATES = (8, 12)
_NAMES = {
    "sight": ("colour of shape", "shape of colour"),
    "hearing": ("first sound", "last sound", "sound of pitch", "pitch of sound"),
    "bound": ("sound during shape", "colour during sound", "shape during sound"),
    "order": ("sound beside sound", "colour beside colour", "shape beside shape", "colour beside shape",
              "shape beside colour"),
    "range": ("colour change", "first and last sound", "first and last shape"),
}  # fmt: skip
ASKED = {kind: {name: TEMPLATES[kind][name] for name in names} for kind, names in _NAMES.items()}


def make_long_flash_scene(seed: int, world: World = SHAPES_AND_SOUNDS) -> Scene:
    """A scene four times as long, with as many events."""
    return make_flash_scene(seed, world, LONG_SECONDS)


def make_flash_scene(seed: int, world: World = SHAPES_AND_SOUNDS, lengths: tuple[int, ...] = SECONDS) -> Scene:
    """The scene of a seed in a world: pure and deterministic. `lengths`: seconds to draw from, which are its slots."""
    rng = np.random.default_rng(seed)
    seconds = _pick(rng, lengths)
    # Counts come first and know nothing of the length, which must not tell them.
    flashes, sounds = (_pick(rng, EVENT_COUNTS) for _ in range(2))
    flash_slots = _draw_apart(rng, seconds, flashes, ())
    sound_slots = _draw_apart(rng, seconds, sounds, flash_slots)
    style = _draw_style(rng, seconds)
    return Scene(
        seed=seed,
        slots=seconds,
        shapes=tuple(_draw_flash(rng, slot, style.frame_rate, world) for slot in flash_slots),
        sounds=tuple(_draw_sound(rng, slot, world) for slot in sound_slots),
        style=style,
        world=world,
        distractors=tuple(_draw_distractor(rng, seconds, world) for _ in range(int(rng.integers(2, 5)))),
    )


def _pick(rng: np.random.Generator, options: tuple):
    return options[int(rng.integers(len(options)))]


def _draw_apart(rng: np.random.Generator, slots: int, count: int, liked: tuple[int, ...] | list[int]) -> list[int]:
    """`count` slots at least two apart, in order; those of `liked` come first with the chance `SHARED_SOUNDS`."""
    while True:
        drawn: list[int] = []
        for slot in rng.permutation(slots).tolist():
            wanted = [one for one in liked if one not in drawn]
            if wanted and rng.uniform() < SHARED_SOUNDS:
                slot = _pick(rng, tuple(wanted))
            if all(abs(slot - other) >= SEGMENT_SECONDS for other in drawn):
                drawn.append(slot)
            if len(drawn) == count:
                return sorted(drawn)


def _draw_flash(rng: np.random.Generator, slot: int, rate: int, world: World) -> ShapeEvent:
    """A shape that stands still for so many whole frames of the file that they last `FLASH_SECONDS`, and one more."""
    frames = math.ceil(FLASH_SECONDS * rate) + 1
    first = slot * rate + int(rng.integers(1, rate - frames))
    return ShapeEvent(
        slot=slot,
        shape=_pick(rng, tuple(world.shapes)),
        colour=_pick(rng, tuple(world.colours)),
        motion=_pick(rng, tuple(world.motions)),
        onset=(first - 0.5) / rate,
        offset=(first + frames - 0.5) / rate,
        size=rng.uniform(0.45, 0.6),
        travel=0.0,
        along=rng.uniform(),
        across=rng.uniform(),
        tint=tuple(int(value) for value in rng.integers(-14, 15, size=3)),
    )


def _draw_distractor(rng: np.random.Generator, seconds: int, world: World) -> ShapeEvent:
    """A grey shape that crosses part of the frame in three to eight seconds."""
    lasts = rng.uniform(3, 8)
    onset = rng.uniform(0, seconds - lasts)
    return ShapeEvent(
        slot=int(onset),
        shape=_pick(rng, tuple(world.shapes)),
        colour="",  # grey, which has no name in the world
        motion=_pick(rng, tuple(world.motions)),
        onset=onset,
        offset=onset + lasts,
        size=rng.uniform(0.3, 0.5),
        travel=rng.uniform(0.2, 0.45),
        along=rng.uniform(),
        across=rng.uniform(),
        tint=(int(rng.integers(-30, 31)),) * 3,
    )


def _draw_sound(rng: np.random.Generator, slot: int, world: World) -> SoundEvent:
    onset = slot + rng.uniform(0.05, 0.2)
    return SoundEvent(
        slot=slot,
        timbre=_pick(rng, tuple(world.timbres)),
        pitch=_pick(rng, world.pitches),
        onset=onset,
        offset=onset + rng.uniform(0.6, 0.75),
        loudness=rng.uniform(0.35, 0.75),
        detune=2.0 ** rng.uniform(-2 / 12, 2 / 12),
        noise_seed=int(rng.integers(2**31)),
    )


def _draw_style(rng: np.random.Generator, seconds: int) -> Style:
    angle, speed = rng.uniform(0, 2 * math.pi), rng.uniform(0.02, 0.08)
    return Style(
        width=_pick(rng, SIDES),
        height=_pick(rng, SIDES),
        frame_rate=_pick(rng, RATES),
        sample_rate=16000,
        channels=1,
        background=tuple(int(value) for value in rng.integers(18, 48, size=3)),
        texture=rng.uniform(4, 14),
        flicker=rng.uniform(0, 0.06),
        grain=int(rng.integers(0, 5)),
        dot=(rng.uniform(), rng.uniform(), speed * math.cos(angle), speed * math.sin(angle)),
        dot_radius=rng.uniform(0.025, 0.045),
        noise_bed=rng.uniform(0.001, 0.006),
        hum=rng.uniform(0, 0.012),
        hum_frequency=_pick(rng, (50.0, 60.0)),
        clicks=tuple(np.sort(rng.uniform(0, seconds, size=int(rng.integers(0, 12)))).tolist()),
        click_level=rng.uniform(0.01, 0.04),
        noise_seed=int(rng.integers(2**31)),
    )


def list_flash_questions(scene: Scene, seed: int, split: str, index: int) -> list[Question]:
    """All questions that are written for a clip: training clips also get stories and descriptions of segments."""
    rng = np.random.default_rng(compute_stable_hash("flashes", seed, split, index))
    valid = [*list_all_questions(scene, ASKED), *_ask_counts(scene)]
    if split != "train":
        return choose_among(valid, rng, dict.fromkeys(QUESTION_TYPES, QUESTIONS_OF_A_TYPE))
    stories = [story for story in make_stories(scene) if story.template in ("shapes", "colours", "sounds")]
    return choose_among(valid, rng, None) + stories + _describe_segments(scene, rng)


def _ask_counts(scene: Scene) -> list[Question]:
    """How many flashes and how many sounds: whoever misses one is wrong."""
    shapes, sounds = (NUMBER_WORDS[len(events) - EVENT_COUNTS[0]] for events in (scene.shapes, scene.sounds))
    return [
        Question("count", "count shapes", "how many shapes appear?", shapes, NUMBER_WORDS),
        Question("count", "count sounds", "how many sounds are heard?", sounds, NUMBER_WORDS),
    ]


def _describe_segments(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Training only: what is seen and heard in every two full seconds where something happens, and in some where
    nothing does: "red circle , low bell"."""
    texts = {}
    for first in range(0, scene.slots - SEGMENT_SECONDS + 1, SEGMENT_SECONDS):
        slots = range(first, first + SEGMENT_SECONDS)
        seen = [f"{event.colour} {event.shape}" for event in scene.shapes if event.slot in slots]
        heard = [f"{event.pitch} {event.timbre}" for event in scene.sounds if event.slot in slots]
        texts[first] = f"{' '.join(seen) or 'nothing'} , {' '.join(heard) or 'silence'}"
    empty = [first for first, text in texts.items() if text == "nothing , silence"]
    left_out = set(rng.permutation(empty)[EMPTY_SEGMENTS:].tolist())
    return [
        Question("describe", "describe", "describe this", text, (), float(first), float(first + SEGMENT_SECONDS))
        for first, text in texts.items()
        if first not in left_out
    ]

"""Scenes of shapes and sounds: what happens when, as plain numbers, drawn from a seed.

A scene lasts a whole number of one-second slots. A slot holds at most one shape event and at most one sound event. All
attributes of all events are drawn independently and uniformly, with replacement: no attribute tells anything about
another, which is what keeps a blind guesser at chance (see questions.py).
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mirasol.synthetic.worlds import SHAPES_AND_SOUNDS, World

SLOT_SECONDS = 1.0
SLOT_COUNTS = (4, 5, 6)
MAX_EVENTS = 4
SPLITS = ("train", "validation", "test")

# Onset and offset of an event, in seconds from the edge of its slot. Never zero, so that two equal events in
# neighbouring slots are two events to the eye and the ear.
EDGE_JITTER = (0.02, 0.08)

_FRAME_SIDES = (96, 104, 112, 120, 128, 136, 144)
# Not all square, but never so long that a shape gets lost once the frame is fitted into a square.
FRAME_SIZES = tuple((w, h) for w in _FRAME_SIDES for h in _FRAME_SIDES if max(w, h) <= 1.34 * min(w, h))
FRAME_RATES = (12, 15, 16, 24)
SAMPLE_RATES = (16000, 22050, 44100, 48000)

_SPLIT_BUCKETS = 12
_BUCKET_OF_SPLIT = {"validation": (0,), "test": (1,), "train": tuple(range(2, _SPLIT_BUCKETS))}


@dataclass(frozen=True)
class ShapeEvent:
    """A shape that crosses part of the frame during one slot. Times in seconds of the scene."""

    slot: int
    shape: str
    colour: str
    motion: str
    onset: float
    offset: float
    size: float  # diameter, as a fraction of the frame's shorter side
    travel: float  # way covered, as a fraction of the frame's side along the motion
    along: float  # 0..1: where on the free part of the axis of motion the way begins
    across: float  # 0..1: position on the other axis
    tint: tuple[int, int, int]  # added to the colour's RGB


@dataclass(frozen=True)
class SoundEvent:
    """A sound that fills one slot. Times in seconds of the scene."""

    slot: int
    timbre: str
    pitch: str
    onset: float
    offset: float
    loudness: float  # peak amplitude, 0..1
    detune: float  # factor on the base frequency
    noise_seed: int  # the drum's noise


@dataclass(frozen=True)
class Style:
    """Everything about a scene that no question asks for: format, background and distractors of both streams."""

    width: int
    height: int
    frame_rate: int
    sample_rate: int
    channels: int
    background: tuple[int, int, int]  # mean RGB of the dark background
    texture: float  # amplitude of its texture, in RGB steps
    flicker: float  # relative change of brightness from frame to frame
    grain: int  # amplitude of per-frame noise, in RGB steps
    dot: tuple[float, float, float, float]  # grey dot: x, y (fractions of the frame), vx, vy (fractions a second)
    dot_radius: float  # fraction of the shorter side
    noise_bed: float  # amplitude of the audio's noise bed
    hum: float  # amplitude of mains-like hum
    hum_frequency: float  # Hz
    clicks: tuple[float, ...]  # times of low clicks, in seconds
    click_level: float  # amplitude
    noise_seed: int


@dataclass(frozen=True)
class Scene:
    """`slots` seconds of shape events and sound events, each sorted by slot; nobody asks about `distractors`."""

    seed: int
    slots: int
    shapes: tuple[ShapeEvent, ...]
    sounds: tuple[SoundEvent, ...]
    style: Style
    world: World = SHAPES_AND_SOUNDS
    distractors: tuple[ShapeEvent, ...] = ()

    @property
    def seconds(self) -> float:
        return self.slots * SLOT_SECONDS

    def find_shape(self, slot: int) -> ShapeEvent | None:
        """The shape event of a slot, or None."""
        return next((event for event in self.shapes if event.slot == slot), None)

    def find_sound(self, slot: int) -> SoundEvent | None:
        """The sound event of a slot, or None."""
        return next((event for event in self.sounds if event.slot == slot), None)

    def signature(self) -> tuple:
        """All that is named in questions: two scenes with one signature have the same answers to everything."""
        shapes = tuple((event.slot, event.shape, event.colour, event.motion) for event in self.shapes)
        return self.slots, shapes, tuple((event.slot, event.timbre, event.pitch) for event in self.sounds)


def compute_stable_hash(*parts: object) -> int:
    """A 63-bit number that depends on the parts alone: not on the process, the machine or Python's hash seed."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_scene(seed: int, world: World = SHAPES_AND_SOUNDS) -> Scene:
    """The scene of a seed in a world: pure and deterministic."""
    rng = np.random.default_rng(seed)
    slots = _pick(rng, SLOT_COUNTS)
    # Counts come first and know nothing of the number of slots: the length of a clip must not tell the count.
    shape_count, sound_count = (int(count) for count in rng.integers(1, MAX_EVENTS + 1, size=2))
    shape_slots = sorted(rng.permutation(slots)[:shape_count].tolist())
    sound_slots = _draw_sound_slots(rng, slots, shape_slots, sound_count)
    style = _draw_style(rng, slots)
    return Scene(
        seed=seed,
        slots=slots,
        shapes=tuple(_draw_shape_event(rng, slot, world) for slot in shape_slots),
        sounds=tuple(_draw_sound_event(rng, slot, world) for slot in sound_slots),
        style=style,
        world=world,
    )


def make_split_scene(
    seed: int,
    split: str,
    index: int,
    world: World = SHAPES_AND_SOUNDS,
    make: Callable[[int, World], Scene] = make_scene,
) -> Scene:
    """Scene `index` of a split, `make` of a seed. Splits never share a scene, whatever the seeds of the two data sets.

    The hash of a scene's signature decides which split may hold it; scenes that belong elsewhere are drawn again.
    """
    for attempt in range(10_000):
        scene = make(compute_stable_hash(seed, split, index, attempt), world)
        if compute_stable_hash("split", scene.signature()) % _SPLIT_BUCKETS in _BUCKET_OF_SPLIT[split]:
            return scene
    raise AssertionError(f"no scene for {split} {index} of seed {seed} in 10,000 draws")


def _pick(rng: np.random.Generator, options: tuple):
    return options[int(rng.integers(len(options)))]


def _draw_sound_slots(rng: np.random.Generator, slots: int, shape_slots: list[int], count: int) -> list[int]:
    """Slots of the sounds: drawn towards the slots of shapes, so that many events share a slot, but not all."""
    keys = rng.random(slots)
    keys[shape_slots] += 0.35
    return sorted(np.argsort(-keys)[:count].tolist())


def _draw_shape_event(rng: np.random.Generator, slot: int, world: World) -> ShapeEvent:
    late, early = rng.uniform(*EDGE_JITTER, size=2).tolist()
    return ShapeEvent(
        slot=slot,
        shape=_pick(rng, tuple(world.shapes)),
        colour=_pick(rng, tuple(world.colours)),
        motion=_pick(rng, tuple(world.motions)),
        onset=slot * SLOT_SECONDS + late,
        offset=(slot + 1) * SLOT_SECONDS - early,
        size=rng.uniform(0.36, 0.46),
        travel=rng.uniform(0.32, 0.5),
        along=rng.uniform(),
        across=rng.uniform(),
        tint=tuple(int(value) for value in rng.integers(-14, 15, size=3)),
    )


def _draw_sound_event(rng: np.random.Generator, slot: int, world: World) -> SoundEvent:
    late, early = rng.uniform(*EDGE_JITTER, size=2).tolist()
    return SoundEvent(
        slot=slot,
        timbre=_pick(rng, tuple(world.timbres)),
        pitch=_pick(rng, world.pitches),
        onset=slot * SLOT_SECONDS + late,
        offset=(slot + 1) * SLOT_SECONDS - early,
        loudness=rng.uniform(0.35, 0.75),
        detune=2.0 ** rng.uniform(-2 / 12, 2 / 12),
        noise_seed=int(rng.integers(2**31)),
    )


def _draw_style(rng: np.random.Generator, slots: int) -> Style:
    width, height = _pick(rng, FRAME_SIZES)
    angle = rng.uniform(0, 2 * math.pi)
    speed = rng.uniform(0.05, 0.15)
    return Style(
        width=width,
        height=height,
        frame_rate=_pick(rng, FRAME_RATES),
        sample_rate=_pick(rng, SAMPLE_RATES),
        channels=int(rng.integers(1, 3)),
        background=tuple(int(value) for value in rng.integers(18, 48, size=3)),
        texture=rng.uniform(4, 14),
        flicker=rng.uniform(0, 0.06),
        grain=int(rng.integers(0, 5)),
        dot=(rng.uniform(), rng.uniform(), speed * math.cos(angle), speed * math.sin(angle)),
        dot_radius=rng.uniform(0.025, 0.045),
        noise_bed=rng.uniform(0.001, 0.006),
        hum=rng.uniform(0, 0.012),
        hum_frequency=_pick(rng, (50.0, 60.0)),
        clicks=tuple(np.sort(rng.uniform(0, slots * SLOT_SECONDS, size=int(rng.integers(0, 6)))).tolist()),
        click_level=rng.uniform(0.01, 0.04),
        noise_seed=int(rng.integers(2**31)),
    )

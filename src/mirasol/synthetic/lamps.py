"""A kind of scene for memories: four lamps, each of which lights up once, so many chunks before the end.

A clip is a row of chunks of a quarter of a second. In its four corners are four lamps, each with a shape of its own.
Each lights up for one chunk in one colour, and its colour is asked for at the end of the clip. The distance from that
chunk to the last one is the age of what is asked about. In other chunks lamps light up grey and short sounds are heard,
for nobody asks about them. What is seen is easy, so that what a model gets wrong it has not kept.

Colours are drawn independently of each other, of lamps and of ages: blind guessing is at chance, one of four.
"""

import math

import numpy as np

from mirasol.synthetic.questions import IMAGE_PROMPT, Question
from mirasol.synthetic.scenes import Scene, ShapeEvent, SoundEvent, Style
from mirasol.synthetic.worlds import SHAPES_AND_SOUNDS, World

CHUNK_SECONDS = 0.25
CHUNKS_A_SECOND = round(1 / CHUNK_SECONDS)
# What is asked about in the test: four of these ages in every clip, in chunks.
AGES = (1, 4, 16, 64, 256)
CHUNKS = 260  # of those clips, and of some others: the first whole second above the largest age
SHORT_CHUNKS = tuple(range(8, 33, CHUNKS_A_SECOND))
SHARE_OF_SHORT = 0.75  # of clips for training and validation
SHORT, LONG = "short", "long"  # question types of these
GREY_SHARE, SOUND_SHARE = 0.3, 0.15  # of the chunks
SIDE = 32  # pixels
SIZE = 0.45  # of the frame: a lamp fills its quarter
_CORNERS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))  # along, across


def make_lamp_scene(seed: int, world: World = SHAPES_AND_SOUNDS, test: bool = True) -> Scene:
    """The scene of a seed in a world: pure and deterministic.

    Scenes for training are short or as long as those of the test, and their ages are any from 1 on, small ones as often
    as large ones on a logarithmic scale.
    """
    rng = np.random.default_rng(seed)
    chunks = CHUNKS
    if not test and rng.uniform() < SHARE_OF_SHORT:
        chunks = _pick(rng, SHORT_CHUNKS)
    ages = rng.permutation(AGES)[: len(_CORNERS)].tolist() if test else _draw_ages(rng, chunks)
    lit = {chunks - 1 - age: lamp for lamp, age in enumerate(ages)}
    dark = [chunk for chunk in range(chunks) if chunk not in lit]
    colours = [_pick(rng, tuple(world.colours)) for _ in _CORNERS]
    return Scene(
        seed=seed,
        slots=chunks // CHUNKS_A_SECOND,
        shapes=tuple(_light(rng, world, chunk, lit[chunk], colours[lit[chunk]]) for chunk in sorted(lit)),
        sounds=tuple(_draw_sound(rng, world, chunk) for chunk in range(chunks) if rng.uniform() < SOUND_SHARE),
        style=_draw_style(rng),
        world=world,
        distractors=tuple(
            _light(rng, world, chunk, int(rng.integers(len(_CORNERS))), "")
            for chunk in dark
            if rng.uniform() < GREY_SHARE
        ),
    )


def _pick(rng: np.random.Generator, options: tuple):
    return options[int(rng.integers(len(options)))]


def _draw_ages(rng: np.random.Generator, chunks: int) -> list[int]:
    """As many different ages as there are lamps, from 1 to chunks - 1."""
    ages: list[int] = []
    while len(ages) < len(_CORNERS):
        age = int(math.exp(rng.uniform(0, math.log(chunks))))
        if age not in ages:
            ages.append(age)
    return ages


def _light(rng: np.random.Generator, world: World, chunk: int, lamp: int, colour: str) -> ShapeEvent:
    """A lamp that is on in one chunk; without a colour it is grey."""
    along, across = _CORNERS[lamp]
    tint = rng.integers(-14, 15, size=3) if colour else (int(rng.integers(-30, 31)),) * 3
    return ShapeEvent(
        slot=chunk,
        shape=tuple(world.shapes)[lamp],
        colour=colour,
        motion=next(iter(world.motions)),  # by no way at all
        onset=(chunk - 0.5) * CHUNK_SECONDS,  # so that the chunk's only frame is within, whatever the rounding
        offset=(chunk + 0.5) * CHUNK_SECONDS,
        size=SIZE,
        travel=0.0,
        along=along,
        across=across,
        tint=tuple(int(value) for value in tint),
    )


def _draw_sound(rng: np.random.Generator, world: World, chunk: int) -> SoundEvent:
    onset = chunk * CHUNK_SECONDS + rng.uniform(0.01, 0.03)
    return SoundEvent(
        slot=chunk,
        timbre=_pick(rng, tuple(world.timbres)),
        pitch=_pick(rng, world.pitches),
        onset=onset,
        offset=onset + rng.uniform(0.18, 0.2),
        loudness=rng.uniform(0.35, 0.75),
        detune=2.0 ** rng.uniform(-2 / 12, 2 / 12),
        noise_seed=int(rng.integers(2**31)),
    )


def _draw_style(rng: np.random.Generator) -> Style:
    angle = rng.uniform(0, 2 * math.pi)
    return Style(
        width=SIDE,
        height=SIDE,
        frame_rate=CHUNKS_A_SECOND,
        sample_rate=16000,
        channels=1,
        background=tuple(int(value) for value in rng.integers(18, 48, size=3)),
        texture=rng.uniform(4, 14),
        flicker=rng.uniform(0, 0.06),
        grain=int(rng.integers(0, 5)),
        dot=(rng.uniform(), rng.uniform(), 0.05 * math.cos(angle), 0.05 * math.sin(angle)),
        dot_radius=rng.uniform(0.025, 0.045),
        noise_bed=rng.uniform(0.001, 0.006),
        hum=rng.uniform(0, 0.012),
        hum_frequency=_pick(rng, (50.0, 60.0)),
        clicks=(),
        click_level=0.0,
        noise_seed=int(rng.integers(2**31)),
    )


def find_age(scene: Scene, event: ShapeEvent) -> int:
    """How many chunks before the last one a lamp is on."""
    return scene.slots * CHUNKS_A_SECOND - 1 - event.slot


def list_lamp_questions(scene: Scene, split: str) -> list[Question]:
    """The colour of each lamp. The type says how old the memory is; in training and validation, how long the clip.

    Short training clips also get descriptions of single chunks.
    """
    kinds = {event: f"age {find_age(scene, event)}" for event in scene.shapes}
    if split != "test":
        kinds = dict.fromkeys(kinds, LONG if scene.slots * CHUNKS_A_SECOND == CHUNKS else SHORT)
    asked = [
        Question(kind, "colour of lamp", _ask(event), event.colour, tuple(scene.world.colours))
        for event, kind in kinds.items()
    ]
    return asked + (_describe_chunks(scene) if split == "train" and SHORT in kinds.values() else [])


def _describe_chunks(scene: Scene) -> list[Question]:
    """For pretraining: which lamp is on, and in which colour, and of as many other chunks that none is."""
    lit = {event.slot: event for event in scene.shapes}
    dark = [chunk for chunk in range(scene.slots * CHUNKS_A_SECOND) if chunk not in lit][: len(lit)]
    texts = [(chunk, IMAGE_PROMPT, "nothing") for chunk in dark]
    for chunk, event in lit.items():
        texts += [(chunk, IMAGE_PROMPT, f"{event.colour} {event.shape}"), (chunk, _ask(event), event.colour)]
    return [
        Question("describe", "describe", prompt, text, (), chunk * CHUNK_SECONDS, (chunk + 1) * CHUNK_SECONDS)
        for chunk, prompt, text in sorted(texts)
    ]


def _ask(event: ShapeEvent) -> str:
    return f"what colour is the {event.shape}?"

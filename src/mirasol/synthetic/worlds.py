"""Worlds: what may be seen and heard in a scene, how it looks and sounds, and how it is asked about.

All worlds have one structure (slots, events, question types); they share no word for what is seen and heard. The
shipped weights know the first one only, so that the second one shows what fine-tuning does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mirasol.errors import UserError
from mirasol.synthetic import looks, voices
from mirasol.synthetic.looks import Motion, Outline
from mirasol.synthetic.voices import Voice


@dataclass(frozen=True)
class Timbre:
    """A kind of sound: its voice, and the base frequency in Hz of each of the world's pitches."""

    voice: Voice
    hz: tuple[float, float]


@dataclass(frozen=True)
class World:
    """What scenes are made of. Orders count: what a seed draws is a place in them.

    name: for the command line; title: of the data set
    shapes, colours (RGB), motions, timbres: by the words that name them; pitches: words for the lower and the higher
    motion_question: what {thing} does; mover_question: what does {motion}
    """

    name: str
    title: str
    shapes: Mapping[str, Outline] = field(hash=False)
    colours: Mapping[str, tuple[int, int, int]] = field(hash=False)
    motions: Mapping[str, Motion] = field(hash=False)
    timbres: Mapping[str, Timbre] = field(hash=False)
    pitches: tuple[str, str]
    motion_question: str
    mover_question: str

    def find_hz(self, timbre: str, pitch: str) -> float:
        """The base frequency of a sound."""
        return self.timbres[timbre].hz[self.pitches.index(pitch)]


# The world of the shipped weights. Low and high are two octaves apart.
SHAPES_AND_SOUNDS = World(
    name="shapes",
    title="shapes and sounds",
    shapes={
        "circle": looks.outline_circle,
        "square": looks.outline_square,
        "triangle": looks.outline_triangle,
        "cross": looks.outline_cross,
    },
    colours={"red": (215, 45, 40), "green": (45, 180, 65), "blue": (50, 80, 230), "yellow": (232, 208, 45)},
    motions={"left": looks.move_left, "right": looks.move_right, "up": looks.move_up, "down": looks.move_down},
    timbres={
        "bell": Timbre(voices.voice_bell, (330.0, 1320.0)),
        "buzz": Timbre(voices.voice_buzz, (110.0, 440.0)),
        "whistle": Timbre(voices.voice_whistle, (520.0, 2080.0)),
        # Noise has no sharp pitch: three octaves, to be as clear as two are for a tone.
        "drum": Timbre(voices.voice_drum, (200.0, 1600.0)),
    },
    pitches=("low", "high"),
    motion_question="which way does the {thing} move?",
    mover_question="what shape moves {motion}?",
)

# The demo's world, which the shipped weights have not seen.
SIGNS_AND_SIGNALS = World(
    name="signs",
    title="signs and signals",
    shapes={
        "star": looks.outline_star,
        "ring": looks.outline_ring,
        "moon": looks.outline_moon,
        "arrow": looks.outline_arrow,
    },
    colours={"white": (232, 232, 232), "orange": (240, 130, 20), "purple": (150, 50, 205), "cyan": (40, 205, 215)},
    motions={"growing": looks.grow, "shrinking": looks.shrink, "swinging": looks.swing, "hopping": looks.hop},
    timbres={
        "siren": Timbre(voices.voice_siren, (400.0, 1600.0)),
        "organ": Timbre(voices.voice_organ, (130.0, 520.0)),
        "beep": Timbre(voices.voice_beep, (700.0, 2800.0)),
        "rattle": Timbre(voices.voice_rattle, (300.0, 2400.0)),
    },
    pitches=("deep", "bright"),
    motion_question="what is the {thing} doing?",
    mover_question="what shape is {motion}?",
)

WORLDS = {world.name: world for world in (SHAPES_AND_SOUNDS, SIGNS_AND_SIGNALS)}


def find_world(name: str) -> World:
    """The world of a name. Raises UserError for an unknown one."""
    if name not in WORLDS:
        raise UserError(f"world={name!r}: choose {' or '.join(WORLDS)}")
    return WORLDS[name]

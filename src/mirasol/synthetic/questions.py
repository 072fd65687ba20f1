"""Questions about a scene, each with its answer and the answers a blind guesser has to choose from.

A template is asked only where its premise holds for exactly one event ("what colour is the circle?" needs exactly one
circle), and every premise is blind to the answer: it treats all candidates alike. Because scenes draw all attributes
independently and uniformly, answers are then uniform over the candidates, whatever prompt and length of the clip.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from mirasol.media.inputs.conversation import join_turns
from mirasol.synthetic.scenes import MAX_EVENTS, SLOT_SECONDS, Scene

QUESTION_TYPES = ("sight", "hearing", "bound", "order", "count", "range")
NUMBER_WORDS = ("one", "two", "three", "four")
DESCRIBE_PROMPT = "describe this second"
# Pretraining data: what texts go with videos, with sounds and with pictures (see `synthetic.KINDS`).
CAPTION_PROMPT, CLASSES_PROMPT, IMAGE_PROMPT = "describe the shapes", "describe the sounds", "describe this"

# A question set for evaluation asks at most so many of each type. Bound questions need events that share a slot and are
# rarer: two where there are two makes about one per clip, as for the other types.
EVALUATION_CAPS = {"sight": 1, "hearing": 1, "bound": 2, "order": 1, "count": 1, "range": 1}
TRAINING_CAP = 16
CONVERSATIONS, MOST_TURNS = 4, 4  # of a training clip; questions of a conversation


@dataclass(frozen=True)
class Question:
    """One prompt about a scene. `start` and `end` in seconds; None means the whole clip."""

    question_type: str
    template: str
    prompt: str
    target: str
    candidates: tuple[str, ...] = ()
    start: float | None = None
    end: float | None = None


Parts = tuple[str, str, tuple[str, ...]]  # prompt, target, candidates
Template = Callable[[Scene], Iterator[Parts]]


def _find_unique(values: list[str]) -> list[tuple[int, str]]:
    """(position, value) of the values that occur exactly once."""
    return [(position, value) for position, value in enumerate(values) if values.count(value) == 1]


def _list_ordered_pairs(values: Iterable[str], joint: str) -> tuple[str, ...]:
    return tuple(f"{first} {joint} {last}" for first, last in itertools.product(values, repeat=2))


def _list_others(values: Iterable[str], one: str) -> tuple[str, ...]:
    return tuple(value for value in values if value != one)


# Sight: one shape is named by something that only it has; another of its attributes is asked.


def _ask_colour_of_shape(scene: Scene) -> Iterator[Parts]:
    for position, shape in _find_unique([event.shape for event in scene.shapes]):
        yield f"what colour is the {shape}?", scene.shapes[position].colour, tuple(scene.world.colours)


def _ask_shape_of_colour(scene: Scene) -> Iterator[Parts]:
    for position, colour in _find_unique([event.colour for event in scene.shapes]):
        yield f"what shape is {colour}?", scene.shapes[position].shape, tuple(scene.world.shapes)


def _ask_motion_of_colour(scene: Scene) -> Iterator[Parts]:
    for position, colour in _find_unique([event.colour for event in scene.shapes]):
        prompt = scene.world.motion_question.format(thing=f"{colour} shape")
        yield prompt, scene.shapes[position].motion, tuple(scene.world.motions)


def _ask_motion_of_shape(scene: Scene) -> Iterator[Parts]:
    for position, shape in _find_unique([event.shape for event in scene.shapes]):
        yield scene.world.motion_question.format(thing=shape), scene.shapes[position].motion, tuple(scene.world.motions)


def _ask_shape_of_motion(scene: Scene) -> Iterator[Parts]:
    for position, motion in _find_unique([event.motion for event in scene.shapes]):
        yield scene.world.mover_question.format(motion=motion), scene.shapes[position].shape, tuple(scene.world.shapes)


# Hearing


def _ask_pitch_of_sound(scene: Scene) -> Iterator[Parts]:
    for position, timbre in _find_unique([event.timbre for event in scene.sounds]):
        yield f"is the {timbre} {' or '.join(scene.world.pitches)}?", scene.sounds[position].pitch, scene.world.pitches


def _ask_sound_of_pitch(scene: Scene) -> Iterator[Parts]:
    for position, pitch in _find_unique([event.pitch for event in scene.sounds]):
        yield f"which sound is {pitch}?", scene.sounds[position].timbre, tuple(scene.world.timbres)


def _ask_first_sound(scene: Scene) -> Iterator[Parts]:
    yield "which sound is heard first?", scene.sounds[0].timbre, tuple(scene.world.timbres)


def _ask_last_sound(scene: Scene) -> Iterator[Parts]:
    yield "which sound is heard last?", scene.sounds[-1].timbre, tuple(scene.world.timbres)


def _ask_pitch_of_first(scene: Scene) -> Iterator[Parts]:
    yield f"is the first sound {' or '.join(scene.world.pitches)}?", scene.sounds[0].pitch, scene.world.pitches


# Bound: sight and hearing of one and the same moment. The answer has to be unique in the whole clip and not the only
# event of its kind: then no shift of the sound against the video by whole slots leaves the answer as it was.


def _find_shared_slots(scene: Scene) -> list[tuple[int, int]]:
    """(position of the shape, position of the sound) for each slot that has both."""
    sounds = {event.slot: position for position, event in enumerate(scene.sounds)}
    return [(position, sounds[event.slot]) for position, event in enumerate(scene.shapes) if event.slot in sounds]


def _find_sounds_during(scene: Scene, names: list[str]) -> Iterator[tuple[str, str]]:
    """(name of the shape event, timbre) where both occur once in the clip and another sound exists."""
    timbres = [event.timbre for event in scene.sounds]
    for shape, sound in _find_shared_slots(scene):
        if len(timbres) > 1 and names.count(names[shape]) == 1 and timbres.count(timbres[sound]) == 1:
            yield names[shape], timbres[sound]


def _ask_sound_during_object(scene: Scene) -> Iterator[Parts]:
    for name, timbre in _find_sounds_during(scene, [f"{event.colour} {event.shape}" for event in scene.shapes]):
        yield f"which sound plays while the {name} is visible?", timbre, tuple(scene.world.timbres)


def _ask_sound_during_shape(scene: Scene) -> Iterator[Parts]:
    for name, timbre in _find_sounds_during(scene, [event.shape for event in scene.shapes]):
        yield f"which sound plays while the {name} is visible?", timbre, tuple(scene.world.timbres)


def _find_sight_during_sound(scene: Scene, sights: list[str]) -> Iterator[tuple[str, str]]:
    """(timbre, what is seen meanwhile) where both occur once in the clip and another shape exists."""
    timbres = [event.timbre for event in scene.sounds]
    for shape, sound in _find_shared_slots(scene):
        if len(sights) > 1 and sights.count(sights[shape]) == 1 and timbres.count(timbres[sound]) == 1:
            yield timbres[sound], sights[shape]


def _ask_colour_during_sound(scene: Scene) -> Iterator[Parts]:
    for timbre, colour in _find_sight_during_sound(scene, [event.colour for event in scene.shapes]):
        yield f"what colour is seen while the {timbre} plays?", colour, tuple(scene.world.colours)


def _ask_shape_during_sound(scene: Scene) -> Iterator[Parts]:
    for timbre, shape in _find_sight_during_sound(scene, [event.shape for event in scene.shapes]):
        yield f"which shape is seen while the {timbre} plays?", shape, tuple(scene.world.shapes)


# Order: what comes after or before an event that occurs once. It cannot be equal to its neighbour: three candidates,
# or four where the event is named by one attribute and another one is asked.


def _find_neighbours(values: list[str]) -> Iterator[tuple[str, str, int]]:
    """("after" or "before", value that occurs once, position of its neighbour on that side)."""
    for position, value in _find_unique(values):
        for word, other in (("after", position + 1), ("before", position - 1)):
            if 0 <= other < len(values):
                yield word, value, other


def _ask_sound_next_to_sound(scene: Scene) -> Iterator[Parts]:
    timbres = [event.timbre for event in scene.sounds]
    for word, timbre, other in _find_neighbours(timbres):
        yield f"which sound comes {word} the {timbre}?", timbres[other], _list_others(scene.world.timbres, timbre)


def _ask_colour_next_to_colour(scene: Scene) -> Iterator[Parts]:
    colours = [event.colour for event in scene.shapes]
    for word, colour, other in _find_neighbours(colours):
        yield f"which colour comes {word} {colour}?", colours[other], _list_others(scene.world.colours, colour)


def _ask_shape_next_to_shape(scene: Scene) -> Iterator[Parts]:
    shapes = [event.shape for event in scene.shapes]
    for word, shape, other in _find_neighbours(shapes):
        yield f"what shape comes {word} the {shape}?", shapes[other], _list_others(scene.world.shapes, shape)


def _ask_colour_next_to_shape(scene: Scene) -> Iterator[Parts]:
    for word, shape, other in _find_neighbours([event.shape for event in scene.shapes]):
        yield f"what colour comes {word} the {shape}?", scene.shapes[other].colour, tuple(scene.world.colours)


def _ask_shape_next_to_colour(scene: Scene) -> Iterator[Parts]:
    for word, colour, other in _find_neighbours([event.colour for event in scene.shapes]):
        yield f"what shape comes {word} the {colour} one?", scene.shapes[other].shape, tuple(scene.world.shapes)


# Count


def _ask_count_of_shapes(scene: Scene) -> Iterator[Parts]:
    yield "how many shapes appear?", NUMBER_WORDS[len(scene.shapes) - 1], NUMBER_WORDS[:MAX_EVENTS]


def _ask_count_of_sounds(scene: Scene) -> Iterator[Parts]:
    yield "how many sounds are heard?", NUMBER_WORDS[len(scene.sounds) - 1], NUMBER_WORDS[:MAX_EVENTS]


# Range: the first event of the clip against its last.


def _ask_colour_change(scene: Scene) -> Iterator[Parts]:
    if len(scene.shapes) > 1:
        target = f"{scene.shapes[0].colour} to {scene.shapes[-1].colour}"
        yield "how does the colour change from first to last?", target, _list_ordered_pairs(scene.world.colours, "to")


def _ask_pitch_change(scene: Scene) -> Iterator[Parts]:
    if len(scene.sounds) > 1:
        target = f"{scene.sounds[0].pitch} to {scene.sounds[-1].pitch}"
        yield "how does the pitch change from first to last?", target, _list_ordered_pairs(scene.world.pitches, "to")


def _ask_first_and_last_sound(scene: Scene) -> Iterator[Parts]:
    if len(scene.sounds) > 1:
        target = f"{scene.sounds[0].timbre} then {scene.sounds[-1].timbre}"
        yield "which sound is first and which is last?", target, _list_ordered_pairs(scene.world.timbres, "then")


def _ask_first_and_last_shape(scene: Scene) -> Iterator[Parts]:
    if len(scene.shapes) > 1:
        target = f"{scene.shapes[0].shape} then {scene.shapes[-1].shape}"
        yield "which shape is first and which is last?", target, _list_ordered_pairs(scene.world.shapes, "then")


TEMPLATES: dict[str, dict[str, Template]] = {
    "sight": {
        "colour of shape": _ask_colour_of_shape,
        "shape of colour": _ask_shape_of_colour,
        "motion of colour": _ask_motion_of_colour,
        "motion of shape": _ask_motion_of_shape,
        "shape of motion": _ask_shape_of_motion,
    },
    "hearing": {
        "pitch of sound": _ask_pitch_of_sound,
        "sound of pitch": _ask_sound_of_pitch,
        "first sound": _ask_first_sound,
        "last sound": _ask_last_sound,
        "pitch of first": _ask_pitch_of_first,
    },
    "bound": {
        "sound during object": _ask_sound_during_object,
        "sound during shape": _ask_sound_during_shape,
        "colour during sound": _ask_colour_during_sound,
        "shape during sound": _ask_shape_during_sound,
    },
    "order": {
        # Names of templates determine what a seed draws (`_draw_spread` sorts them): they never change.
        "sound beside sound": _ask_sound_next_to_sound,
        "colour beside colour": _ask_colour_next_to_colour,
        "shape beside shape": _ask_shape_next_to_shape,
        "colour beside shape": _ask_colour_next_to_shape,
        "shape beside colour": _ask_shape_next_to_colour,
    },
    "count": {"count shapes": _ask_count_of_shapes, "count sounds": _ask_count_of_sounds},
    "range": {
        "colour change": _ask_colour_change,
        "pitch change": _ask_pitch_change,
        "first and last sound": _ask_first_and_last_sound,
        "first and last shape": _ask_first_and_last_shape,
    },
}


def list_all_questions(scene: Scene, asked: Mapping[str, Mapping[str, Template]] = TEMPLATES) -> list[Question]:
    """Every question that may be asked about a scene, type by type."""
    return [
        Question(question_type, name, prompt, target, candidates)
        for question_type, templates in asked.items()
        for name, template in templates.items()
        for prompt, target, candidates in template(scene)
    ]


def choose_questions(scene: Scene, rng: np.random.Generator, *, training: bool) -> list[Question]:
    """A question set for a scene.

    For training up to 16 questions of all kinds; for evaluation few of each type (`EVALUATION_CAPS`), so that the types
    come out about equally often over many clips. Within a type the template is drawn before the question, so that
    templates that hold for many events do not crowd out the others.
    """
    return choose_among(list_all_questions(scene), rng, None if training else EVALUATION_CAPS)


def choose_among(valid: list[Question], rng: np.random.Generator, caps: Mapping[str, int] | None) -> list[Question]:
    """The question set among all valid questions of a scene; `caps` by type for evaluation, None for training."""
    training = caps is None
    chosen = []
    for question_type in QUESTION_TYPES:
        mine = [question for question in valid if question.question_type == question_type]
        chosen += _draw_spread(mine, TRAINING_CAP if caps is None else caps[question_type], rng)
    if training and len(chosen) > TRAINING_CAP:
        # The count questions always stay: dropping them where much happens would tell that the count is low.
        kept = [question for question in chosen if question.question_type == "count"]
        rest = [question for question in chosen if question.question_type != "count"]
        drawn = sorted(rng.permutation(len(rest))[: TRAINING_CAP - len(kept)].tolist())
        chosen = [rest[position] for position in drawn] + kept
    return chosen


def _draw_spread(valid: list[Question], count: int, rng: np.random.Generator) -> list[Question]:
    """Draws `count` questions: template after template in random order, a random question of each, then round again."""
    by_template: dict[str, list[Question]] = {}
    for position in rng.permutation(len(valid)).tolist():
        by_template.setdefault(valid[position].template, []).append(valid[position])
    names = [sorted(by_template)[position] for position in rng.permutation(len(by_template)).tolist()]
    drawn = []
    while len(drawn) < count and any(by_template.values()):
        drawn += [by_template[name].pop() for name in names if by_template[name]]
    return drawn[:count]


def make_stories(scene: Scene) -> list[Question]:
    """Training only: everything of one kind in order, e.g. "list the colours in order" → "red blue green"."""
    lists = {
        "shapes": [event.shape for event in scene.shapes],
        "colours": [event.colour for event in scene.shapes],
        "motions": [event.motion for event in scene.shapes],
        "sounds": [event.timbre for event in scene.sounds],
        "pitches": [event.pitch for event in scene.sounds],
    }
    return [Question("story", name, f"list the {name} in order", " ".join(words)) for name, words in lists.items()]


def make_pairs(scene: Scene) -> list[Question]:
    """Training only, of whole clips: each shape (colour) in order with the sound of its moment, e.g. "list the shapes
    with their sounds" → "circle bell square nothing"."""
    heard = {event.slot: event.timbre for event in scene.sounds}
    lists = {
        "shapes": [(event.shape, heard.get(event.slot, "nothing")) for event in scene.shapes],
        "colours": [(event.colour, heard.get(event.slot, "nothing")) for event in scene.shapes],
    }
    return [
        Question("pairs", name, f"list the {name} with their sounds", " ".join(itertools.chain(*pairs)))
        for name, pairs in lists.items()
    ]


def make_conversations(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Training only: questions after one to three others of the clip with their answers."""
    valid = list_all_questions(scene)
    conversations = []
    for _ in range(CONVERSATIONS):
        *earlier, last = _draw_spread(valid, int(rng.integers(2, MOST_TURNS + 1)), rng)
        prompt = join_turns([(question.prompt, question.target) for question in earlier], last.prompt)
        conversations.append(Question("conversation", last.template, prompt, last.target, last.candidates))
    return conversations


def describe_slots(scene: Scene) -> list[Question]:
    """Training only: what is seen and heard in each slot where something happens, about the window of that slot."""
    slots = sorted({event.slot for event in (*scene.shapes, *scene.sounds)})
    return [_describe_slot(scene, slot) for slot in slots]


def _describe_slot(scene: Scene, slot: int) -> Question:
    shape, sound = scene.find_shape(slot), scene.find_sound(slot)
    seen = f"{shape.colour} {shape.shape} {shape.motion}" if shape else "nothing"
    heard = f"{sound.pitch} {sound.timbre}" if sound else "silence"
    start = slot * SLOT_SECONDS
    return Question("describe", "describe", DESCRIBE_PROMPT, f"{seen} , {heard}", (), start, start + SLOT_SECONDS)


def make_captions(scene: Scene) -> list[Question]:
    """What is seen: "red circle left , blue cross up", of the whole clip and of each slot with a shape."""
    texts = {event.slot: f"{event.colour} {event.shape} {event.motion}" for event in scene.shapes}
    return _make_for_clip_and_slots("caption", CAPTION_PROMPT, texts)


def make_sound_classes(scene: Scene) -> list[Question]:
    """The class names of what is heard, "low bell , high drum", of the whole clip and of each slot with a sound."""
    texts = {event.slot: f"{event.pitch} {event.timbre}" for event in scene.sounds}
    return _make_for_clip_and_slots("classes", CLASSES_PROMPT, texts)


def _make_for_clip_and_slots(question_type: str, prompt: str, texts: dict[int, str]) -> list[Question]:
    whole = Question(question_type, question_type, prompt, " , ".join(texts.values()))
    return [whole] + [
        Question(question_type, question_type, prompt, text, (), slot * SLOT_SECONDS, (slot + 1) * SLOT_SECONDS)
        for slot, text in texts.items()
    ]


def make_image_caption(scene: Scene, slot: int) -> Question:
    """The text of a still of a slot; like captions of real pictures it also names what the still cannot show."""
    return Question("image", "image", IMAGE_PROMPT, _describe_slot(scene, slot).target)

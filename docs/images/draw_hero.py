"""Draws the first picture of README.md: a rendered clip, its sound, and what the shipped weights answer about it.

python docs/images/draw_hero.py docs/images/hero.png

The clip is a test scene of a seed used nowhere else, the first with enough happening in it. The answers are those of
`tiny`, right or wrong.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from mirasol import MirasolFeatureExtractor
from mirasol.checkpoint import load_checkpoint
from mirasol.evaluation.answer import answer_clips
from mirasol.synthetic.questions import Question, list_all_questions
from mirasol.synthetic.render import write_clip
from mirasol.synthetic.scenes import Scene, make_split_scene

SEED = 20261126
SHAPES, SOUNDS = 4, 4  # shown and heard in the scene
FRAMES, SIDE = 10, 160  # of the filmstrip; pixels of a frame
INK, SOFT, GOOD, BAD, CARD = "#1d1c1a", "#6d6a62", "#2d7a4d", "#b3382f", "#f4f2ec"
SOURCES = {"sight": "seen", "hearing": "heard", "order": "in order", "bound": "seen and heard together",
           "count": "counted", "range": "over the clip"}  # fmt: skip


def choose_scene() -> Scene:
    """The first scene of the seed with enough events, a question of every type among them."""
    for index in range(10_000):
        scene = make_split_scene(SEED, "test", index)
        types = {question.question_type for question in list_all_questions(scene)}
        if len(scene.shapes) == SHAPES and len(scene.sounds) == SOUNDS and types >= SOURCES.keys():
            return scene
    raise AssertionError("no scene with that many events")


def choose_questions(scene: Scene) -> list[Question]:
    """One question of each type; of those that need both streams two."""
    chosen = []
    for question_type, count in (("sight", 1), ("hearing", 1), ("order", 1), ("bound", 2), ("range", 1)):
        mine = [question for question in list_all_questions(scene) if question.question_type == question_type]
        templates = dict.fromkeys(question.template for question in mine)
        firsts = [next(question for question in mine if question.template == template) for template in templates]
        chosen += firsts[-count:]
    return chosen


@torch.no_grad()
def read_and_answer(path: Path, prompts: list[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Frames [FRAMES, SIDE, SIDE, 3], the spectrogram [mel, time], and the answers of `tiny`."""
    loaded = load_checkpoint("tiny")
    extractor = loaded.processor.feature_extractor
    tensors = extractor.tensors(extractor.read(path))
    [answers] = answer_clips(loaded.model, loaded.processor, [tensors], [prompts])
    large = MirasolFeatureExtractor(image_size=SIDE, frames_per_chunk=2, chunk_seconds=0.5)
    frames = large.tensors(large.read(path))["video"].flatten(0, 1)
    places = np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)
    return (
        frames[places].permute(0, 2, 3, 1).numpy(),
        tensors["audio"].flatten(0, 1).float().T.numpy(),
        [answer.text for answer in answers],
    )


def draw_clip(figure: Figure, frames: np.ndarray, sound: np.ndarray, seconds: float) -> None:
    """The filmstrip and, below it on the same axis of time, the spectrogram."""
    left, width, gap = 0.07, 0.915, 0.004
    each = (width - gap * (FRAMES - 1)) / FRAMES
    height = each * figure.get_figwidth() / figure.get_figheight()
    top = 0.975 - height
    for place, frame in enumerate(frames):
        axes = figure.add_axes((left + place * (each + gap), top, each, height))
        axes.imshow(frame, interpolation="lanczos")
        axes.set_axis_off()
    axes = figure.add_axes((left, top - 0.225, width, 0.21))
    axes.imshow(sound, origin="lower", aspect="auto", cmap="inferno", extent=(0, seconds, 0, 1), vmin=-1, vmax=0.5)
    axes.set_yticks([])
    axes.set_xticks(np.arange(0, seconds + 0.1), [f"{second:g} s" for second in np.arange(0, seconds + 0.1)])
    axes.tick_params(length=0, colors=SOFT, labelsize=10)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.text(left - 0.01, top + height / 2, "video", ha="right", va="center", color=INK, size=13, weight="bold")
    figure.text(left - 0.01, top - 0.12, "sound", ha="right", va="center", color=INK, size=13, weight="bold")


def draw_answers(figure: Figure, questions: list[Question], answers: list[str]) -> None:
    """Two columns of cards: the question, where its answer is found, and the model's answer."""
    for place, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        column, row = divmod(place, 3)
        x, y = 0.07 + column * 0.4625, 0.312 - row * 0.147
        card = FancyBboxPatch((x, y), 0.4525, 0.13, boxstyle="round,pad=0,rounding_size=0.008", facecolor=CARD,
                              edgecolor="none", transform=figure.transFigure, mutation_aspect=2)  # fmt: skip
        figure.add_artist(card)
        right = answer == question.target
        figure.text(x + 0.012, y + 0.09, question.prompt, va="center", color=INK, size=13)
        figure.text(x + 0.44, y + 0.04, SOURCES[question.question_type], ha="right", va="center", color=SOFT, size=10)
        words = answer if right else f"{answer} (right: {question.target})"
        colour = GOOD if right else BAD
        figure.text(x + 0.012, y + 0.04, words, va="center", color=colour, size=14, weight="bold")
    for height, words, colour in ((0.402, "question", INK), (0.352, "answer", GOOD)):
        figure.text(0.06, height, words, ha="right", va="center", color=colour, size=10, weight="bold")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    scene = choose_scene()
    questions = choose_questions(scene)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_clip(scene, path)
        frames, sound, answers = read_and_answer(path, [question.prompt for question in questions])
    figure = Figure(figsize=(12, 5.1), facecolor="white")
    draw_clip(figure, frames, sound, scene.seconds)
    draw_answers(figure, questions, answers)
    figure.savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    main()

"""Digits seen and heard on disk: mp4 files of handwritten digits (scikit-learn's) and spoken ones (recordings of the
user's), with their questions."""

import functools
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, UInt8

from mirasol.errors import UserError
from mirasol.experiments.digit_scenes import (
    STEPS,
    DigitScene,
    DigitSecond,
    Sources,
    describe_seconds,
    list_digit_questions,
    make_digit_scene,
)
from mirasol.experiments.recordings import DIGITS, Recordings
from mirasol.files import write_folder_atomically
from mirasol.media.reader import read_clip
from mirasol.media.timeline import ChunkGrid
from mirasol.synthetic.questions import Question
from mirasol.synthetic.render import write_mp4

SPLITS = ("train", "validation", "test")
GRID = "grid"
SIDE, FRAME_RATE, SAMPLE_RATE = 64, 8, 16_000
INK, PAPER = 215.0, 20.0
LOUDNESS = 0.1  # root of the mean square of a spoken digit
LONGEST_SECONDS = 0.8  # of a recording: longer ones do not fit their second
# Standard deviations of the noise: of pixels (0 to 255), which stays the same for a second, and of samples, relative to
# the loudness of the digit (1 is 0 dB, 3 is -9.5 dB).
PICTURE_NOISE = (0.0, 90.0, 180.0)
SOUND_NOISE = (0.0, 1.0, 3.0)
# The images come in the order of their writers, who are not named: blocks of this order share few.
IMAGE_BLOCKS = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}

Progress = Callable[[int, int], None]


@functools.cache
def load_images() -> tuple[UInt8[np.ndarray, "image 8 8"], tuple[int, ...]]:
    """The handwritten digits that come with scikit-learn (UCI), from 0 to 16, and which digit each is."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images.astype(np.uint8), tuple(int(digit) for digit in found.target)


def choose_sources(found: Recordings) -> dict[str, Sources]:
    """Images and recordings of each split; the last speaker by name is the test's, the one before the validation's.

    Raises:
        UserError: fewer than three speakers, or one who does not say every digit briefly enough.
    """
    if len(found.groups) < 3:
        raise UserError(f"{found.root}: {len(found.groups)} speakers: seen_heard needs three, one of them for the test")
    speakers = {"train": found.groups[:-2], "validation": found.groups[-2:-1], "test": found.groups[-1:]}
    _, digits = load_images()
    sources = {}
    for split, own in speakers.items():
        low, high = (round(share * len(digits)) for share in IMAGE_BLOCKS[split])
        images: dict[int, list[int]] = defaultdict(list)
        for image in range(low, high):
            images[digits[image]].append(image)
        recordings: dict[int, list[str]] = defaultdict(list)
        for clip in found.clips:
            if clip.group in own and len(read_sound(found.root / clip.file)) <= LONGEST_SECONDS * SAMPLE_RATE:
                recordings[DIGITS.index(clip.label)].append(clip.file)
        missing = [DIGITS[digit] for digit in range(10) if not recordings[digit]]
        if missing:
            raise UserError(f"{found.root}: {', '.join(own)}: no recording of {missing[0]} under {LONGEST_SECONDS} s")
        sources[split] = Sources(images, recordings)
    return sources


@functools.cache
def read_sound(path: Path) -> Float32[np.ndarray, " sample"]:
    """A recording of any rate at `SAMPLE_RATE` and `LOUDNESS`. Raises BadClip where it cannot be read."""
    grid = ChunkGrid(frames_per_chunk=1, num_chunks=1)
    clip = read_clip(path, grid, image_size=8, sample_rate=SAMPLE_RATE, fit="pad")
    sound = clip.waveform.numpy().astype(np.float32)
    return sound * np.float32(LOUDNESS / max(float(np.sqrt(np.mean(sound**2))), 1e-4))


def render_picture(second: DigitSecond) -> Float[np.ndarray, "side side"]:
    """A digit on dark paper."""
    from PIL import Image

    size = round(second.size * SIDE)
    images, _ = load_images()
    ink = Image.fromarray((images[second.image].astype(np.float32) / 16).clip(0, 1))
    ink = np.asarray(ink.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)
    picture = np.full((SIDE, SIDE), PAPER)
    left, top = round(second.x * (SIDE - size)), round(second.y * (SIDE - size))
    picture[top : top + size, left : left + size] += (INK - PAPER) * ink
    return picture


def render_scene(
    scene: DigitScene, root: Path
) -> tuple[UInt8[np.ndarray, "frame side side 3"], Float32[np.ndarray, "1 sample"]]:
    """Frames and sound of a clip. Noise is drawn from the scene's seed."""
    rng = np.random.default_rng(scene.seed)
    pictures, sound = [], np.zeros(len(scene.seconds) * SAMPLE_RATE, np.float32)
    for slot, second in enumerate(scene.seconds):
        picture = render_picture(second) + PICTURE_NOISE[scene.picture_noise] * rng.standard_normal((SIDE, SIDE))
        pictures += [picture] * FRAME_RATE
        said = read_sound(root / second.recording)
        first = round((slot + second.onset) * SAMPLE_RATE)
        sound[first : first + len(said)] += said
    sound += np.float32(SOUND_NOISE[scene.sound_noise] * LOUDNESS) * rng.standard_normal(len(sound)).astype(np.float32)
    frames = np.repeat(np.stack(pictures).clip(0, 255).astype(np.uint8)[..., None], 3, axis=3)
    return frames, sound.clip(-1, 1)[None]


def write_digits(
    target: Path, found: Recordings, counts: dict[str, int], seed: int, progress: Progress | None = None
) -> None:
    """Renders `counts` clips of each split, and of the grid, into the new folder `target`: train, validation and test
    with noise drawn, and a grid of clips whose digits agree, each in all steps of both noises.

    Raises:
        UserError: as `choose_sources`, and for a folder that has content.
    """
    sources = choose_sources(found)
    jobs = [(split, index, None) for split in SPLITS for index in range(counts[split])]
    steps = [(picture, sound) for picture in range(STEPS) for sound in range(STEPS)]
    jobs += [(GRID, index, noise) for index in range(counts[GRID]) for noise in steps]

    def fill(folder: Path) -> None:
        rows: dict[str, list[str]] = {split: [] for split in (*SPLITS, GRID)}
        for split in rows:
            (folder / "clips" / split).mkdir(parents=True)
        for done, (split, index, noise) in enumerate(jobs, start=1):
            of = sources["test" if split == GRID else split]
            scene = make_digit_scene(of, seed, split, index, noise, agrees=split == GRID)
            name = f"clips/{split}/{index:05d}" + ("" if noise is None else f"-{noise[0]}{noise[1]}") + ".mp4"
            frames, sound = render_scene(scene, found.root)
            write_mp4(folder / name, frames, FRAME_RATE, sound, SAMPLE_RATE)
            rows[split] += [_make_row(name, number, item) for number, item in enumerate(_list_asked(scene, split))]
            if progress is not None:
                progress(done, len(jobs))
        for split, lines in rows.items():
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")

    write_folder_atomically(target, fill, sync=False)


def _list_asked(scene: DigitScene, split: str) -> list[Question]:
    questions = list_digit_questions(scene)
    if split == GRID:
        return [question for question in questions if question.question_type == "either"]
    return questions + (describe_seconds(scene) if split != "test" else [])


def _make_row(name: str, number: int, question: Question) -> str:
    row = {
        "id": f"{Path(name).parent.name}-{Path(name).stem}-q{number:02d}",
        "file": name,
        "start": question.start,
        "end": question.end,
        "prompt": question.prompt,
        "target": question.target,
        "question_type": question.question_type,
        "candidates": list(question.candidates),
    }
    return json.dumps(row) + "\n"

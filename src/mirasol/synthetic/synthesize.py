"""The shapes-and-sounds data sets on disk: real mp4 files and their questions, deterministic in a seed."""

import concurrent.futures
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mirasol.errors import UserError
from mirasol.files import hash_file, write_folder_atomically
from mirasol.processes import make_process_context
from mirasol.synthetic.flashes import list_flash_questions, make_flash_scene, make_long_flash_scene
from mirasol.synthetic.lamps import list_lamp_questions, make_lamp_scene
from mirasol.synthetic.questions import (
    Question,
    choose_questions,
    describe_slots,
    make_captions,
    make_conversations,
    make_image_caption,
    make_pairs,
    make_sound_classes,
    make_stories,
)
from mirasol.synthetic.render import write_clip, write_still
from mirasol.synthetic.scenes import SPLITS, Scene, compute_stable_hash, make_split_scene
from mirasol.synthetic.worlds import SHAPES_AND_SOUNDS, World

# Goes up whenever the same seed gives other scenes, pixels, sounds or questions.
DATA_VERSION = 1

# What is rendered: clips with questions, also without those about single seconds (for a fine-tuning in one stage) or
# with conversations (of training clips), longer and harder clips with questions (flashes.py), clips of hundreds of
# chunks with questions about what was seen long ago (lamps.py), or what the stages before question answering are
# trained on: stills with texts (image-text), clips of which three in four are silent, with captions (video-text; of the
# others also what is heard), clips with the class names of their sounds (audio).
KINDS = ("questions", "whole", "conversations", "flashes", "long_flashes", "lamps", "images", "captions", "sounds")
_FLASHES = {"flashes": make_flash_scene, "long_flashes": make_long_flash_scene}
SILENT_SHARE = 0.75

Progress = Callable[[int, int], None]


def format_clip_id(split: str, index: int) -> str:
    """Name of a clip, also its file's stem."""
    return f"{split}-{index:06d}"


def list_clip_questions(scene: Scene, seed: int, split: str, index: int) -> list[Question]:
    """All questions that are written for a clip: training clips also get stories and a description of each slot."""
    rng = np.random.default_rng(compute_stable_hash("questions", seed, split, index))
    if split != "train":
        return choose_questions(scene, rng, training=False)
    return choose_questions(scene, rng, training=True) + make_stories(scene) + describe_slots(scene)


def synthesize(
    root: Path,
    *,
    seed: int,
    train: int,
    validation: int,
    test: int,
    kind: str = "questions",
    world: World = SHAPES_AND_SOUNDS,
    workers: int = 1,
    progress: Progress | None = None,
) -> None:
    """Renders a data set of `train` + `validation` + `test` clips into the new folder `root`.

    Writes `<split>.jsonl`, `clips/<split>/<id>.mp4` (`images/<split>/<id>.png` for the kind `images`) and
    `manifest.json` (seed, counts, versions, SHA-256 of every other file). `kind`: one of `KINDS`; `world`: what is
    seen and heard. The same arguments give the same bytes with the same PyAV version. Splits never share a scene,
    also not those of data sets with different seeds. `workers` processes render; `progress(done, total)` is called
    after each clip. An interrupted call leaves no folder behind; a split of no clips gets an empty jsonl file.

    Raises UserError where `root` is a file or a folder that holds something, for negative counts, for no clips and for
    an unknown kind.
    """
    root = Path(root)
    if kind not in KINDS:
        raise UserError(f"kind={kind!r}: choose {', '.join(KINDS)}")
    counts = {"train": train, "validation": validation, "test": test}
    _check(root, seed, counts, workers)
    # Not synced file by file: the manifest has every file's hash.
    write_folder_atomically(
        root, lambda folder: _render_all(folder, _Source(seed, kind, world), counts, workers, progress), sync=False
    )


@dataclass(frozen=True)
class _Source:
    """What all clips of a data set follow from."""

    seed: int
    kind: str
    world: World


def _render_all(root: Path, source: _Source, counts: dict[str, int], workers: int, progress: Progress | None) -> None:
    for split in SPLITS:
        (root / _choose_folder(source.kind) / split).mkdir(parents=True)
    jobs = [(root, source, split, index) for split in SPLITS for index in range(counts[split])]
    rows: dict[str, list[str]] = {split: [] for split in SPLITS}
    files: dict[str, str] = {}
    for done, (job, (name, digest, lines)) in enumerate(zip(jobs, _run(jobs, workers), strict=True), start=1):
        rows[job[2]] += lines
        files[name] = digest
        if progress is not None:
            progress(done, len(jobs))
    for split, lines in rows.items():
        content = "".join(lines).encode()
        (root / f"{split}.jsonl").write_bytes(content)
        files[f"{split}.jsonl"] = hashlib.sha256(content).hexdigest()
    _write_manifest(root, source, counts, files)


def _choose_folder(kind: str) -> str:
    return "images" if kind == "images" else "clips"


def _check(root: Path, seed: int, counts: dict[str, int], workers: int) -> None:
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file: give a new folder for the data set")
    if root.is_dir() and any(root.iterdir()):
        raise UserError(f"{root} is not empty: give a new folder for the data set, or remove that one first")
    for split, count in counts.items():
        if count < 0:
            raise UserError(f"{split}={count}: the number of clips must not be negative")
    if not any(counts.values()):
        raise UserError("no clips asked for: give train, validation or test a number above zero")
    if seed < 0:
        raise UserError(f"seed={seed}: must not be negative")
    if workers < 1:
        raise UserError(f"workers={workers}: must be at least 1")


def _run(jobs: list[tuple], workers: int) -> Iterator[tuple[str, str, list[str]]]:
    """Renders all jobs; results come in the jobs' order, whatever the number of workers."""
    if workers == 1 or len(jobs) < 2:
        yield from map(_render_job, jobs)
        return
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), mp_context=make_process_context()) as pool:
        try:
            yield from pool.map(_render_job, jobs, chunksize=4)
        finally:
            pool.shutdown(cancel_futures=True)


def _render_job(job: tuple[Path, _Source, str, int]) -> tuple[str, str, list[str]]:
    """Renders one clip or still: its path relative to root, the file's SHA-256 and its lines for the split's jsonl."""
    root, source, split, index = job
    seed, kind = source.seed, source.kind
    if kind in _FLASHES:
        scene = make_split_scene(seed, split, index, source.world, _FLASHES[kind])
        return _render_scene(root, scene, split, index, list_flash_questions(scene, seed, split, index))
    if kind == "lamps":
        make = functools.partial(make_lamp_scene, test=split == "test")
        scene = make_split_scene(seed, split, index, source.world, make)
        return _render_scene(root, scene, split, index, list_lamp_questions(scene, split))
    # The scenes of one seed are others for every kind: pretraining never shows a clip that is asked about later.
    asked_about = kind in ("questions", "whole", "conversations")
    scene = make_split_scene(seed if asked_about else compute_stable_hash(kind, seed), split, index, source.world)
    ending = "png" if kind == "images" else "mp4"
    name = f"{_choose_folder(kind)}/{split}/{format_clip_id(split, index)}.{ending}"
    if kind == "images":
        slot = scene.shapes[compute_stable_hash("still", scene.seed) % len(scene.shapes)].slot
        write_still(scene, root / name, slot + 0.5)
        asked = [make_image_caption(scene, slot)]
    elif asked_about:
        write_clip(scene, root / name)
        asked = list_clip_questions(scene, seed, split, index)
        if kind == "whole":
            asked = [question for question in asked if question.start is None]
            asked += make_pairs(scene) if split == "train" else []
        if kind == "conversations" and split == "train":
            rng = np.random.default_rng(compute_stable_hash("conversations", seed, index))
            asked += make_conversations(scene, rng)
    else:
        silent = kind == "captions" and compute_stable_hash("silent", scene.seed) % 100 < 100 * SILENT_SHARE
        write_clip(scene, root / name, sound=not silent)
        asked = [*(make_captions(scene) if kind == "captions" else []), *([] if silent else make_sound_classes(scene))]
    return _describe_job(root, name, split, index, asked)


def _render_scene(
    root: Path, scene: Scene, split: str, index: int, asked: list[Question]
) -> tuple[str, str, list[str]]:
    name = f"clips/{split}/{format_clip_id(split, index)}.mp4"
    write_clip(scene, root / name)
    return _describe_job(root, name, split, index, asked)


def _describe_job(root: Path, name: str, split: str, index: int, asked: list[Question]) -> tuple[str, str, list[str]]:
    clip = format_clip_id(split, index)
    lines = [_make_row(name, clip, number, item) for number, item in enumerate(asked)]
    return name, hash_file(root / name), lines


def _make_row(name: str, clip: str, number: int, question: Question) -> str:
    row = {
        "id": f"{clip}-q{number:02d}",
        "file": name,
        "start": question.start,
        "end": question.end,
        "prompt": question.prompt,
        "target": question.target,
        "question_type": question.question_type,
        "candidates": question.candidates,
    }
    return json.dumps(row) + "\n"


def _write_manifest(root: Path, source: _Source, counts: dict[str, int], files: dict[str, str]) -> None:
    manifest = {
        "data_set": source.world.title,
        "data_version": DATA_VERSION,
        "kind": source.kind,
        "seed": source.seed,
        "clips": counts,
        "versions": {name: importlib.metadata.version(name) for name in ("av", "numpy")},
        "sha256": dict(sorted(files.items())),
    }
    (root / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")

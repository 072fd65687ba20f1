"""What is done with a mutated input, in a decoder process; UserError is an answer, any other error a finding."""

import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import av.error

from mirasol.errors import UserError
from mirasol.media.formats.content import detect_content_kind
from mirasol.media.image import check_image, read_image
from mirasol.media.integrity import inspect_media
from mirasol.media.isolation.shared import report_progress
from mirasol.media.limits import Limits
from mirasol.media.reader import read_window
from mirasol.media.timeline import ChunkGrid
from mirasol.media.transcode import Reencoding, reencode_media

GRID = ChunkGrid(2, 0.25, max_chunks=8)
IMAGES = ("png", "jpg", "webp", "bmp")
WINDOWS = ((0.31, 0.62), (0.7, 0.9))


def gather(attempts: Iterator[Callable[[], object]]) -> list[str]:
    """The outcome of each attempt: "read", "noted" where there are notes, or the class of the UserError."""
    outcomes = []
    for attempt in attempts:
        report_progress()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = attempt()
            outcomes.append("noted" if getattr(value, "notes", ()) else "read")
        except UserError as error:
            outcomes.append(type(error).__name__)
    return outcomes


def exercise_media(path: Path, kind: str, number: int, limits: Limits) -> list[str]:
    """Everything that commands do with a media file."""
    return gather(_media_attempts(path, kind, number, limits))


def _media_attempts(path: Path, kind: str, number: int, limits: Limits) -> Iterator[Callable[[], object]]:
    if kind in IMAGES:
        yield lambda: check_image(path, detect_content_kind(path.read_bytes()[:512]))
        yield lambda: read_image(path, image_size=16, limits=limits)
        return
    yield lambda: read_window(path, GRID, image_size=16, limits=limits, threads=number % 3)
    yield lambda: inspect_media(path, limits)
    start, end = WINDOWS[number % 2]
    yield lambda: read_window(path, GRID, image_size=16, start=start, end=end, limits=limits, threads=1)
    if number % 3 == 0:
        with tempfile.TemporaryDirectory() as folder:
            yield lambda: reencode_media(path, Path(folder) / "small.mp4", Reencoding(32), limits)


def remux(content: bytes, target: Path, container: str, seed: int) -> None:
    """Writes the packets of a media file again: in another order, with other times, some of them lost or twice."""
    generator = random.Random(seed)
    source = target.with_name("source")
    source.write_bytes(content)
    try:
        with av.open(str(source)) as read, av.open(str(target), "w", format=container) as out:
            copies = {stream.index: out.add_stream_from_template(stream) for stream in read.streams}
            packets = [packet for packet in read.demux() if packet.size and packet.dts is not None]
            for packet in _shuffle(packets, generator):
                packet.stream = copies[packet.stream_index]
                try:
                    out.mux(packet)
                except (av.error.FFmpegError, ValueError):
                    continue
    except (av.error.FFmpegError, ValueError, KeyError):
        if not target.exists():
            target.write_bytes(b"")
    finally:
        source.unlink()


def _shuffle(packets: list[av.Packet], generator: random.Random) -> list[av.Packet]:
    for _ in range(generator.randrange(1, 5)):
        if not packets:
            break
        kind, place = generator.choice(("swap", "drop", "time", "shift", "sort")), generator.randrange(len(packets))
        other = generator.randrange(len(packets))
        if kind == "swap":
            packets[place], packets[other] = packets[other], packets[place]
        elif kind == "drop":
            del packets[place : place + generator.randrange(1, 20)]
        elif kind == "sort":
            packets.sort(key=lambda packet: (packet.stream_index, packet.dts))
        else:
            jump = generator.choice((-1, 1, 2, 1000, -90_000, 10**9, 2**31, 2**40))
            for packet in packets[place:] if kind == "shift" else packets[place : place + 1]:
                packet.pts = None if packet.pts is None else packet.pts + jump
                packet.dts = None if packet.dts is None else packet.dts + jump
                if generator.random() < 0.05:
                    packet.duration = generator.choice((0, 1, 10**6, 2**40))
    return packets


def exercise_annotations(root: Path, dataset: str) -> list[str]:
    """Lists and reads all splits of a data set, and checks it without opening media."""
    return gather(_annotation_attempts(root, dataset))


def _annotation_attempts(root: Path, dataset: str) -> Iterator[Callable[[], object]]:
    from mirasol.data.check import check_dataset, format_report
    from mirasol.data.datasets.registry import list_splits, read_dataset, select_usable_examples

    splits: list[str] = []
    yield lambda: splits.extend(list_splits(dataset, root))
    for split in splits:
        yield lambda split=split: select_usable_examples(read_dataset(dataset, root, split), "skip")
    yield lambda: format_report(check_dataset(dataset, root, open_media=False))


def exercise_shards(root: Path, dataset: str) -> list[str]:
    """Reads all splits of shards, and the bytes of all media in them."""
    return gather(_shard_attempts(root, dataset))


def _shard_attempts(root: Path, dataset: str) -> Iterator[Callable[[], object]]:
    from mirasol.data.check import check_dataset, format_report
    from mirasol.data.datasets.registry import list_splits, read_dataset
    from mirasol.data.media_files import open_media_file, scan_tar

    def open_all(split: str) -> None:
        for example in read_dataset(dataset, root, split).examples:
            with open_media_file(root, example.media) as path:
                path.read_bytes()

    splits: list[str] = []
    yield lambda: splits.extend(list_splits(dataset, root))
    for split in splits:
        yield lambda split=split: open_all(split)
    for tar in sorted(root.rglob("*.tar")):
        yield lambda tar=tar: scan_tar(tar)
    yield lambda: format_report(check_dataset(dataset, root, hashes=dataset == "shards", open_media=False))


def exercise_predictions(root: Path, dataset: str) -> list[str]:
    """Scores every file of predictions."""
    return gather(_prediction_attempts(root, dataset))


def _prediction_attempts(root: Path, dataset: str) -> Iterator[Callable[[], object]]:
    from mirasol.data.datasets.registry import read_dataset
    from mirasol.evaluation.evaluate import score_file
    from mirasol.evaluation.metrics import format_scores

    split = "train" if dataset == "epic_sounds" else "test"  # whose labels are the challenge server's
    for file in sorted(root.glob("pred.*")):
        yield lambda file=file: format_scores(score_file(read_dataset(dataset, root, split), file))


def exercise_recipe(root: Path, name: str) -> list[str]:
    """Reads a recipe."""
    from mirasol.config.recipe_io import load_recipe

    return gather(iter([lambda: load_recipe(root / "recipe.yaml")]))


def exercise_checkpoint(root: Path, name: str) -> list[str]:
    """Loads a checkpoint, or only its processor where that is what was mutated."""
    import transformers

    from mirasol.checkpoint import load_checkpoint, load_processor

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    load = load_processor if name in ("tokenizer.json", "tokenizer_config.json") else load_checkpoint
    return gather(iter([lambda: load(root)]))

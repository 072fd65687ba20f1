"""A trained row as it runs on what does not end: chunk by chunk, with the bytes it keeps and the time a chunk takes."""

import itertools
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirasol.ablation.runs import ANSWERS, Run
from mirasol.json_values import read_own_object

if TYPE_CHECKING:
    from mirasol.checkpoint import Loaded
    from mirasol.data.datasets.contract import DatasetSplit
    from mirasol.data.example import ClipExamples
    from mirasol.evaluation.controls import ClipTensors
    from mirasol.model.streaming import MirasolStream

FIRST_POINT = 16  # chunks; then 32, 64, 128 …
CLIP = "clip"  # the window that is as long as a clip


def stream_run(run: Run, cache: Path | None, device: str) -> dict[str, Any]:
    """Shows clips to a trained row chunk by chunk, asks their questions at their ends, and measures.

    Returns plain data: the number of `streams`, their `window`, what was measured at `points` and at the `end`
    (`milliseconds` of a chunk since the point before, of processor time; `state`, bytes by part; `process`, bytes),
    and of every question its `id`, `video`, `type`, its `place` in chunks of the stream, and `value`, 1 where right.
    `same`: of how many questions the value is that of the whole clip; None where a window makes it another question.
    """
    from mirasol.checkpoint import load_checkpoint
    from mirasol.data.datasets.registry import read_dataset
    from mirasol.data.example import group_by_clip
    from mirasol.evaluation.answer import eval_mode

    asked, data = run.asked, run.recipe.data.data_sets[""]
    assert asked is not None
    settings = asked["stream"]
    dataset = read_dataset(data.dataset, Path(data.root), asked["split"], data.options)
    loaded = load_checkpoint(run.checkpoint, device)
    whole = _read_answers(run.folder / ANSWERS)
    # Those that were asked about whole clips: of other types, or of clips that cannot be read, none were.
    clips = group_by_clip(one for one in dataset.examples if one.id in whole)[: settings["clips"]]
    load = _make_loader(loaded, dataset, asked["control"], cache)
    found: dict[str, list] = {key: [] for key in ("id", "video", "type", "place", "value")}
    measured = []
    with eval_mode(loaded.model):
        for part in [clips] if settings["clips"] is None else [[clip] for clip in clips]:
            measured.append(_stream(loaded, dataset.name, part, load, settings, found))
    window = measured[0]["window"]
    pairs = zip(found["id"], found["value"], strict=True)
    same = None if window is not None else sum(whole[id] == value for id, value in pairs)
    return {"streams": len(measured), "window": window, **_average(measured), **found, "same": same}


def _read_answers(file: Path) -> dict[str, float]:
    """Which questions were answered rightly about whole clips."""
    answers = read_own_object(file, "remove this run's folder, and run again")
    return dict(zip(answers["id"], answers["value"], strict=True))


def _make_loader(
    loaded: "Loaded", dataset: "DatasetSplit", control: str | None, cache: Path | None
) -> "Callable[[ClipExamples], ClipTensors]":
    """What gives a clip's tensors. It raises BadClip for one that cannot be read."""
    from mirasol.data.clip_cache import ClipCache
    from mirasol.evaluation.answer import load_clip
    from mirasol.evaluation.controls import apply_control

    kept = cache and ClipCache(cache, dataset.root, loaded.model.config.media_settings())

    def load(clip: "ClipExamples") -> "ClipTensors":
        if kept:
            return apply_control(control, kept.load(clip.media, clip.start, clip.end))
        return apply_control(control, load_clip(loaded.processor.feature_extractor, dataset.root, clip))

    return load


def _stream(
    loaded: "Loaded",
    name: str,
    clips: "Sequence[ClipExamples]",
    load: "Callable[[ClipExamples], ClipTensors]",
    settings: dict[str, Any],
    found: dict[str, list],
) -> dict[str, Any]:
    """One stream: the clips one after another, from the first again until there are `chunks`; fills `found`."""
    length = len(load(clips[0])["video_mask"])
    window = length if settings["window"] == CLIP else settings["window"]
    stream = loaded.model.stream(window=window)
    meter, wanted = _Meter(stream), settings["chunks"] or length
    for clip in itertools.cycle(clips):
        tensors = load(clip)  # each time again: what is kept would look like memory that grows
        media = loaded.processor.feature_extractor.collate([tensors])
        length = len(tensors["video_mask"])
        for place in range(min(length, wanted - stream.chunks)):
            meter.append(*(media[key][:, place] for key in ("video", "audio", "video_mask", "audio_mask")))
        if place == length - 1:
            _ask(loaded, name, stream, clip, tensors, found)
        if stream.chunks == wanted:
            break
    meter.mark()
    return {"window": window, "points": meter.points}


def _ask(
    loaded: "Loaded",
    name: str,
    stream: "MirasolStream",
    clip: "ClipExamples",
    tensors: "ClipTensors",
    found: dict[str, list],
) -> None:
    """Asks the questions of the clip that has just ended."""
    from mirasol.evaluation.answer import answer_clips
    from mirasol.evaluation.metrics import score_answers
    from mirasol.evaluation.predictions import Prediction
    from mirasol.evaluation.tables import find_normalisation

    prompts = [example.prompt for example in clip.examples]
    [answers] = answer_clips(loaded.model, loaded.processor, [tensors], [prompts], encoded=stream.encoder_outputs)
    predictions = {example.id: Prediction(answer.text) for example, answer in zip(clip.examples, answers, strict=True)}
    judged = score_answers(name, clip.examples, predictions, find_normalisation(name)).judged
    found["id"] += [one.example.id for one in judged]
    found["video"] += [one.example.video_name for one in judged]
    found["type"] += [one.example.type_name for one in judged]
    found["place"] += [stream.chunks] * len(judged)
    found["value"] += [one.value for one in judged]


class _Meter:
    """What a stream takes, at chunks 16, 32, 64 … and wherever `mark` is called."""

    def __init__(self, stream: "MirasolStream"):
        self.stream = stream
        self.points: list[dict[str, Any]] = []
        self._spent, self._marked = 0.0, 0

    def append(self, *chunk: Any) -> None:
        """One more chunk of the stream."""
        device = self.stream.model.device
        chunk = tuple(part.to(device) for part in chunk)
        began = _read_clock(device)
        self.stream.append(*chunk)
        self._spent += _read_clock(device) - began
        chunks = self.stream.chunks
        if chunks >= FIRST_POINT and chunks & (chunks - 1) == 0:
            self.mark()

    def mark(self) -> None:
        """A point here, unless there is one."""
        chunks = self.stream.chunks
        if chunks == self._marked:
            return
        self.points.append({
            "chunks": chunks,
            "milliseconds": 1000 * self._spent / (chunks - self._marked),
            "state": self.stream.state_bytes,
            "process": _measure_process(),
        })  # fmt: skip
        self._spent, self._marked = 0.0, chunks


def _read_clock(device: Any) -> float:
    """Seconds: of the processor, for other programs share it; with a GPU of the wall, when it has done its work."""
    if device.type == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize(device)
    return time.perf_counter()


def _measure_process() -> int:
    """Bytes of memory that the process has now; where the system does not say, the most it has had."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _average(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the streams: at the points that all of them have, and at their ends."""
    by_chunks: dict[int, list[dict[str, Any]]] = {}
    for one in measured:
        for point in one["points"]:
            by_chunks.setdefault(point["chunks"], []).append(point)
    points = [average_points(points) for _, points in sorted(by_chunks.items()) if len(points) == len(measured)]
    return {"points": points, "end": average_points([one["points"][-1] for one in measured])}


def average_points(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of what was measured at several points."""

    def over(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    return {key: over([point[key] for point in points]) for key in ("chunks", "milliseconds", "process")} | {
        "state": {part: over([point["state"][part] for point in points]) for part in points[0]["state"]}
    }

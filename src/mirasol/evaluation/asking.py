"""Asking a model every question of a data set, clip by clip, in one process or several; the same answers in all."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirasol.checkpoint import Loaded, load_checkpoint
from mirasol.data.example import ClipExamples, Example
from mirasol.errors import BadClip
from mirasol.evaluation.answer import answer_clips, encode_clips, score_clips
from mirasol.evaluation.controls import apply_control
from mirasol.evaluation.evaluate import DecodedClips, eval_mode
from mirasol.processes import process_context

# Log-likelihoods differ in their last bits between batches: what is beyond these digits decides nothing.
DIGITS = 5


@dataclass(frozen=True)
class Asking:
    """How questions are asked.

    root: what `media` is relative to; controls: names, asked after the clip as it is; classes: the candidates of
    questions without their own; max_new_tokens: longest answer; clips_per_batch, threads (that decode): change speed
    and memory alone
    """

    root: Path
    controls: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    max_new_tokens: int = 16
    clips_per_batch: int = 16
    threads: int = 1

    def candidates(self, example: Example) -> tuple[str, ...]:
        """What the example's answer is chosen from; empty where answers are open."""
        return example.candidates or self.classes


# One clip's line of the journal: its key, and either what was answered or the reason why nothing was.
Row = dict[str, Any]


def clip_key(clip: ClipExamples) -> list[Any]:
    """What tells a clip from all others of its data set."""
    return [clip.media, clip.start, clip.end]


def ask(
    loaded: Loaded,
    clips: Sequence[ClipExamples],
    asking: Asking,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[list[Row]]:
    """Yields the lines of a batch of clips at a time.

    `progress(done, total)` is called with numbers of clips.
    """
    size = asking.clips_per_batch
    batches = [clips[first : first + size] for first in range(0, len(clips), size)]
    answered = _in_processes if processes > 1 and len(batches) > 1 else _here
    done = 0
    for rows in answered(loaded, batches, asking, processes):
        done += len(rows)
        yield rows
        if progress is not None:
            progress(done, len(clips))


def _here(
    loaded: Loaded, batches: Sequence[Sequence[ClipExamples]], asking: Asking, processes: int
) -> Iterator[list[Row]]:
    """Batch by batch in this process; the next batch is decoded meanwhile."""
    dataset = DecodedClips(loaded.processor.feature_extractor, asking.root)
    with ThreadPoolExecutor(asking.threads) as pool, eval_mode(loaded.model):
        ahead = [pool.submit(_load, dataset, clip) for batch in batches[:1] for clip in batch]
        for place, batch in enumerate(batches):
            tensors = [future.result() for future in ahead]
            ahead = [pool.submit(_load, dataset, clip) for after in batches[place + 1 : place + 2] for clip in after]
            yield _answer_batch(loaded, batch, tensors, asking)


def _in_processes(
    loaded: Loaded, batches: Sequence[Sequence[ClipExamples]], asking: Asking, processes: int
) -> Iterator[list[Row]]:
    """Each process loads the checkpoint; a batch is one job."""
    threads = torch.get_num_threads()  # as many as here: another number adds up in another order
    pool = ProcessPoolExecutor(
        processes, mp_context=process_context(), initializer=torch.set_num_threads, initargs=(threads,)
    )
    device = str(loaded.model.device)
    try:
        waiting = [pool.submit(_job, str(loaded.folder), device, batch, asking) for batch in batches]
        for future in waiting:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _job(folder: str, device: str, batch: Sequence[ClipExamples], asking: Asking) -> list[Row]:
    loaded = _loaded(folder, device)
    dataset = DecodedClips(loaded.processor.feature_extractor, asking.root)
    return _answer_batch(loaded, batch, [_load(dataset, clip) for clip in batch], asking)


@lru_cache(maxsize=1)
def _loaded(folder: str, device: str) -> Loaded:
    return load_checkpoint(folder, device)


def _load(dataset: DecodedClips, clip: ClipExamples) -> dict[str, Tensor] | str:
    """The clip's tensors, or why there are none."""
    try:
        return dataset.load(clip.media, clip.start, clip.end)
    except BadClip as error:
        return error.reason


def _answer_batch(
    loaded: Loaded, batch: Sequence[ClipExamples], loads: Sequence[Mapping[str, Tensor] | str], asking: Asking
) -> list[Row]:
    rows: list[Row] = [{"clip": clip_key(clip)} for clip in batch]
    usable = [place for place, tensors in enumerate(loads) if not isinstance(tensors, str)]
    for row, tensors in zip(rows, loads, strict=True):
        if isinstance(tensors, str):
            row["reason"] = tensors
        else:
            row.update(chunks=len(tensors["video_mask"]), answered={})
    clips = [batch[place] for place in usable]
    for name in (None, *asking.controls) if usable else ():
        tensors = [apply_control(name, loads[place]) for place in usable]
        for place, found in zip(usable, _answers(loaded, clips, tensors, asking), strict=True):
            rows[place]["answered"][name or "test"] = found
    return rows


def _answers(
    loaded: Loaded, clips: Sequence[ClipExamples], tensors: Sequence[Mapping[str, Tensor]], asking: Asking
) -> list[dict[str, dict[str, Any]]]:
    """Of every clip, by question id: `answer`, and `scores` where there are candidates."""
    model, processor = loaded.model, loaded.processor
    encoded = encode_clips(model, processor, tensors)
    prompts = [[example.prompt for example in clip.examples] for clip in clips]
    texts = answer_clips(model, processor, tensors, prompts, max_new_tokens=asking.max_new_tokens, encoded=encoded)
    found = [
        {example.id: {"answer": text} for example, text in zip(clip.examples, answers, strict=True)}
        for clip, answers in zip(clips, texts, strict=True)
    ]
    for place, clip in enumerate(clips):
        # Alone: a batch would change the last digits of its scores.
        chosen = [example for example in clip.examples if asking.candidates(example)]
        if chosen:
            one = encode_clips(model, processor, tensors[place : place + 1]) if len(clips) > 1 else encoded
            lists = [asking.candidates(example) for example in chosen]
            [scores] = score_clips(model, processor, one, [[e.prompt for e in chosen]], [lists])
            for example, row in zip(chosen, scores, strict=True):
                found[place][example.id]["scores"] = [round(score, DIGITS) for score in row]
    return found

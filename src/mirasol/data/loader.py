"""The DataLoader that turns a step's number into its batch and media tensors."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mirasol.config.parts import IGNORED_LABEL
from mirasol.config.recipe import Recipe
from mirasol.data.clip_cache import BadWindow, ClipCache, UnreadableWindow, Window, describe_window
from mirasol.data.feature_cache import FeatureCache, collate_features
from mirasol.data.frame_memory import FrameMemory, FrameRows, release_frames
from mirasol.data.mixup import MODALITIES, add_partners, draw_own_share, mix_clips
from mirasol.data.sampler import Batch, BatchPlan, compute_clip_seed, mentions_any
from mirasol.data.workers import WorkerStatus
from mirasol.errors import BadClip, UserError
from mirasol.media.augment import augment_clip, compute_decode_size, shift_audio
from mirasol.media.feature_extractor import MirasolFeatureExtractor
from mirasol.media.tokenizer import TextRows
from mirasol.processes import make_process_context

OTHER = {"video": "audio", "audio": "video"}
# After this many bad clips in a row the data as such is taken to be wrong.
_MOST_BAD = 20

# Takes a clip's compact tensors (`MirasolFeatureExtractor.tensors`), its batch and its row there; gives what the step
# sees instead. Runs in the loader's workers, so it must be importable, and follow from its arguments alone.
Augment = Callable[[dict[str, Tensor], Batch, int], dict[str, Tensor]]


@dataclass(frozen=True)
class BatchTexts:
    """The text tensors of a batch, and its rows' weights where it has any."""

    rows: TextRows

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        text = dict(self.rows.encode(batch.prompts, batch.targets))
        text["labels"][batch.uncounted_rows] = IGNORED_LABEL
        if batch.row_weights is not None:
            text["row_weights"] = torch.tensor(batch.row_weights)
        return text


class ClipAugment:
    """Augments a clip of a batch as its stage says, by hash(seed, stage, epoch, clip): whichever process does it,
    whenever, the same clip of the same epoch becomes the same."""

    def __init__(self, recipe: Recipe, image_size: int):
        self.recipe, self.image_size = recipe, image_size

    def __call__(self, tensors: Mapping[str, Tensor], batch: Batch, row: int) -> dict[str, Tensor]:
        augment = self.recipe.stages[batch.stage].augment
        if augment.flip_except and mentions_any(batch.clips[row], augment.flip_except):
            augment = replace(augment, flip=0.0, flip_except=[])
        return augment_clip(tensors, augment, self.image_size, compute_clip_seed(self.recipe.seed, batch, row))


@dataclass(frozen=True)
class RowsOfRank:
    """The rows of a step's batch that a process computes, microbatch by microbatch; asked by the loader's processes.

    A microbatch is a run of consecutive rows; so is every process's part of it.
    """

    recipe: Recipe
    rank: int
    world_size: int

    def __call__(self, step: int) -> list[int]:
        stage, _ = self.recipe.find_stage(step)
        accumulation = self.recipe.accumulation
        share = self.recipe.stages[stage].clips_per_step // (accumulation * self.world_size)
        starts = [(part * self.world_size + self.rank) * share for part in range(accumulation)]
        return [row for start in starts for row in range(start, start + share)]


class StepBatches(Dataset):
    """Item `step` is that step's batch and its media tensors, whoever asks and in whatever order.

    rows: which rows of a step's global batch this process loads, and in which order; by default all
    augment: what is done to each clip's compact tensors
    status: where the sample at hand is reported
    on_bad: what a clip does that cannot be read: "error" raises UnreadableWindow, "skip" takes another in its place,
        which `Batch.replaced` tells
    texts: the text tensors of a batch, which are added to the media's
    features: chunk features that its stages take in place of video and audio, where it has them
    """

    def __init__(
        self,
        plan: BatchPlan,
        cache: ClipCache,
        extractor: MirasolFeatureExtractor,
        rows: Callable[[int], Sequence[int]] | None = None,
        augment: Augment | None = None,
        status: WorkerStatus | None = None,
        on_bad: str = "error",
        texts: Callable[[Batch], dict[str, Tensor]] | None = None,
        features: FeatureCache | None = None,
    ):
        self.texts, self.features = texts, features
        self.plan, self.extractor, self.root = plan, extractor, cache.root
        self.caches = {
            name: cache.at_size(size) for name, size in compute_decoded_sizes(plan.recipe, extractor).items()
        }
        self.rows, self.augment, self.status, self.on_bad = rows, augment, status, on_bad
        self._bad: dict[Window, str] = {}

    def __len__(self) -> int:
        return self.plan.recipe.total_steps

    def __getitem__(self, step: int) -> tuple[Batch, dict[str, Tensor]]:
        batch, media = self.compact(step)
        return batch, self.ready(media)

    def ready(self, media: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the model takes of what `compact` gives, on the same device."""
        present = media.pop("video_present", None)
        if present is not None:
            media["video"] = self.extractor.normalise(media["video"], present)
        return media

    def compact(self, step: int, memory: FrameMemory | None = None) -> tuple[Batch, dict[str, Tensor]]:
        """As the item, but small enough to travel: video is uint8, in bytes of `memory`, where nothing is mixed, and
        `video_present` (`video_mask` before modalities are dropped) says where there is any."""
        batch = self.plan.batch(step)
        count, alpha = len(batch.clips), self.plan.recipe.stages[batch.stage].augment.mixup
        rows = range(count) if self.rows is None else self.rows(step)
        loaded = add_partners(rows, count) if alpha else rows
        batch = batch.select_rows(loaded)
        clips, frames = [], FrameRows(len(batch.clips), memory)
        damaged = 0 if self.features is None else self.features.damaged
        for row in range(len(batch.clips)):
            batch, tensors = self._clip(batch, row)
            if not alpha and "video" in tensors:
                frames.add(tensors.pop("video"))
            clips.append(tensors)
        if self._has_features(batch.stage):
            media = collate_features(clips, self.extractor, frames.batch())
            media["damaged"] = torch.tensor(self.features.damaged - damaged)
        else:
            media = dict(self.extractor.collate(clips, frames.batch()))
        if not alpha and "video" in media:
            media["video_present"] = media.get("uncached_video_mask", media["video_mask"]).clone()
        # After both caches, which know nothing of it. Features of clips that are yet to be computed follow later.
        names = ("audio_features", "audio_target") if self._has_features(batch.stage) else ("audio",)
        shift_rows(media, batch.shifted, names)
        for row, modality in enumerate(batch.dropped):
            # A silent clip keeps its video: nothing at all would teach only to guess.
            if modality is not None and media[f"{OTHER[modality]}_mask"][row].any():
                media[f"{modality}_mask"][row] = False
        hide_clips(media, batch.fillers)
        if alpha:
            seeds = [compute_clip_seed(self.plan.recipe.seed, batch, place) for place in range(len(rows))]
            batch, media = mix_clips(batch, media, rows, loaded, count, [draw_own_share(alpha, seed) for seed in seeds])
        return batch, media if self.texts is None else {**media, **self.texts(batch)}

    def _has_features(self, stage: str) -> bool:
        return self.features is not None and stage in self.features.stages

    def _clip(self, batch: Batch, row: int) -> tuple[Batch, dict[str, Tensor]]:
        """The compact tensors of a row's clip, as the step sees them, and the batch with the clip that was taken."""
        attempt = 1
        while True:
            clip = batch.clips[row]
            window = (clip.media, clip.start, clip.end)
            try:
                return batch, self._load(batch, row, window)
            except BadClip as error:
                self._bad[window] = error.reason
                bad = BadWindow(*window, error.reason)
                if self.on_bad == "error":
                    raise UnreadableWindow(self.root, bad) from error
            if attempt > _MOST_BAD:
                raise UserError(
                    f"step {batch.step + 1}: {attempt} clips in a row cannot be read, the last is "
                    f"{self.root / bad.media}: {bad.reason}"
                )
            batch = self.plan.replace_clip(batch, row, attempt, bad)
            attempt += 1

    def _load(self, batch: Batch, row: int, window: Window) -> dict[str, Tensor]:
        if window in self._bad:
            raise BadClip(self.root / window[0], self._bad[window])
        text = f"step {batch.step + 1}, {describe_window(window)}"
        with contextlib.nullcontext() if self.status is None else self.status.report_while(text):
            found = self.features.load(window) if self._has_features(batch.stage) else None
            if found is not None:
                return found
            tensors = self.caches[batch.stage].load(*window)
            return tensors if self.augment is None else self.augment(tensors, batch, row)


def shift_rows(media: Mapping[str, Tensor], shifted: Sequence[bool], names: Sequence[str]) -> None:
    """Shifts `audio_mask` and what there is of `names` in the rows that are `shifted`, as far as their chunks go."""
    names = ("audio_mask", *(name for name in names if name in media))
    for row, is_shifted in enumerate(shifted):
        if is_shifted:
            chunks = int(media["chunk_mask"][row].sum())
            for name, value in shift_audio({name: media[name][row, :chunks] for name in names}).items():
                media[name][row, :chunks] = value


def hide_clips(media: Mapping[str, Tensor], rows: Sequence[int]) -> None:
    """Takes from clips that only fill the batch whatever a loss would count: all but the first chunk, and all that is
    seen and heard in it."""
    if rows and "chunk_mask" in media:
        media["chunk_mask"][rows, 1:] = False
        for name in MODALITIES:
            media[f"{name}_mask"][rows] = False


def compute_decoded_sizes(recipe: Recipe, extractor: MirasolFeatureExtractor) -> dict[str, int]:
    """How large, in pixels, each stage needs its frames decoded: larger than the model takes them where it crops."""
    return {
        name: compute_decode_size(extractor.image_size, stage.augment.crop) for name, stage in recipe.stages.items()
    }


def load_media(cache: ClipCache, extractor: MirasolFeatureExtractor, windows: Sequence[Window]) -> dict[str, Tensor]:
    """The media tensors of a batch of windows, padded at the end to the longest."""
    return dict(extractor.collate([cache.load(*window) for window in windows]))


def _return_unchanged(item):
    return item


class CompactSteps(Dataset):
    """The steps in compact form, as workers send them; a UserError is an item too, or the worker would wrap it in its
    traceback."""

    def __init__(self, batches: StepBatches, memory: FrameMemory | None):
        self.batches, self.memory = batches, memory

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> tuple[Batch, dict[str, Tensor]] | UserError:
        try:
            return self.batches.compact(step, self.memory)
        except UserError as error:
            return error


class StepLoader(DataLoader):
    """A DataLoader over `CompactSteps` that raises the errors among them and puts the batches on `device`."""

    device = torch.device("cpu")

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        return self._ready(super().__iter__())  # not a generator itself: workers start at once

    def _ready(self, items: Iterator[Any]) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        for item in items:
            if isinstance(item, UserError):
                raise item
            batch, media = item
            moved = {name: value.to(self.device, non_blocking=self.pin_memory) for name, value in media.items()}
            ready = self.dataset.batches.ready(moved)
            frames = media.get("video")
            # Pinned frames are a copy, and mixed ones are floats in memory of their own.
            if self.num_workers and frames is not None and frames.dtype == torch.uint8 and frames.is_shared():
                release_frames(frames)
            yield batch, ready


def make_loader(
    batches: StepBatches,
    steps: range,
    workers: int,
    pin_memory: bool = False,
    seconds: float = 0,
    prefetch: int = 4,
    device: torch.device | None = None,
) -> StepLoader:
    """Yields the batches of `steps` in order. With workers, each loads `prefetch` of them ahead, to the same effect.

    seconds: with workers, how long one batch may be waited for; 0 is for ever. `WorkerStatus.within` says what the
        RuntimeError means that follows.
    device: where the tensors go, and pixels become numbers; by default they stay on the CPU
    """
    loader = StepLoader(
        # DataLoader copies to pinned memory by itself: then nothing can be released, and nothing is kept.
        CompactSteps(batches, FrameMemory(0 if pin_memory else prefetch + 1) if workers else None),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        collate_fn=_return_unchanged,
        # An iterator draws a seed for its workers: from here, so that the global generator stays untouched.
        generator=torch.Generator().manual_seed(0),
        multiprocessing_context=make_process_context() if workers else None,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        timeout=seconds if workers else 0,
    )
    loader.device = device or loader.device
    return loader

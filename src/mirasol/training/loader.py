"""The DataLoader that turns a step's number into its batch and media tensors."""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mirasol.media.augmentation import decoded_size
from mirasol.media.processor import MirasolFeatureExtractor
from mirasol.processes import process_context
from mirasol.training.batches import Batch, BatchPlan, clip_seed
from mirasol.training.clip_cache import ClipCache, Window, named
from mirasol.training.mixup import mixed, own_share, with_partners
from mirasol.training.recipe import Recipe
from mirasol.training.worker_status import WorkerStatus

OTHER = {"video": "audio", "audio": "video"}

# Takes a clip's compact tensors (`MirasolFeatureExtractor.tensors`), its batch and its row there; gives what the step
# sees instead. Runs in the loader's workers, so it must be importable, and follow from its arguments alone.
Augment = Callable[[dict[str, Tensor], Batch, int], dict[str, Tensor]]


class StepBatches(Dataset):
    """Item `step` is that step's batch and its media tensors, whoever asks and in whatever order.

    rows: which rows of a step's global batch this process loads, and in which order; by default all
    augment: what is done to each clip's compact tensors
    status: where the sample at hand is reported
    """

    def __init__(
        self,
        plan: BatchPlan,
        cache: ClipCache,
        extractor: MirasolFeatureExtractor,
        rows: Callable[[int], Sequence[int]] | None = None,
        augment: Augment | None = None,
        status: WorkerStatus | None = None,
    ):
        self.plan, self.extractor = plan, extractor
        self.caches = {name: cache.at_size(size) for name, size in decoded_sizes(plan.recipe, extractor).items()}
        self.rows, self.augment, self.status = rows, augment, status

    def __len__(self) -> int:
        return self.plan.recipe.total_steps

    def __getitem__(self, step: int) -> tuple[Batch, dict[str, Tensor]]:
        batch = self.plan.batch(step)
        clips, alpha = len(batch.clips), self.plan.recipe.stages[batch.stage].augment.mixup
        rows = range(clips) if self.rows is None else self.rows(step)
        loaded = with_partners(rows, clips) if alpha else rows
        batch = batch.only(loaded)
        media = dict(self.extractor.collate([self._clip(batch, row) for row in range(len(batch.clips))]))
        for row, modality in enumerate(batch.dropped):
            # A silent clip keeps its video: nothing at all would teach only to guess.
            if modality is not None and media[f"{OTHER[modality]}_mask"][row].any():
                media[f"{modality}_mask"][row] = False
        if alpha:
            seeds = [clip_seed(self.plan.recipe.seed, batch, place) for place in range(len(rows))]
            batch, media = mixed(batch, media, rows, loaded, clips, [own_share(alpha, seed) for seed in seeds])
        return batch, media

    def _clip(self, batch: Batch, row: int) -> dict[str, Tensor]:
        """The compact tensors of a row's clip, as the step sees them."""
        clip = batch.clips[row]
        text = f"step {batch.step + 1}, {named((clip.media, clip.start, clip.end))}"
        with contextlib.nullcontext() if self.status is None else self.status.at(text):
            tensors = self.caches[batch.stage].load(clip.media, clip.start, clip.end)
            return tensors if self.augment is None else self.augment(tensors, batch, row)


def decoded_sizes(recipe: Recipe, extractor: MirasolFeatureExtractor) -> dict[str, int]:
    """How large, in pixels, each stage needs its frames decoded: larger than the model takes them where it crops."""
    return {name: decoded_size(extractor.image_size, stage.augment.crop) for name, stage in recipe.stages.items()}


def load_media(cache: ClipCache, extractor: MirasolFeatureExtractor, windows: Sequence[Window]) -> dict[str, Tensor]:
    """The media tensors of a batch of windows, padded at the end to the longest."""
    return dict(extractor.collate([cache.load(*window) for window in windows]))


def _as_is(item):
    return item


def make_loader(
    batches: StepBatches, steps: range, workers: int, pin_memory: bool = False, seconds: float = 0
) -> DataLoader:
    """Yields the batches of `steps` in order. With workers they are loaded ahead, to the same effect.

    seconds: with workers, how long one batch may be waited for; 0 is for ever. `WorkerStatus.failure` says what the
        RuntimeError means that follows.
    """
    return DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        collate_fn=_as_is,
        # An iterator draws a seed for its workers: from here, so that the global generator stays untouched.
        generator=torch.Generator().manual_seed(0),
        multiprocessing_context=process_context() if workers else None,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        timeout=seconds if workers else 0,
    )

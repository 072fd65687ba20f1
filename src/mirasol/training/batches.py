"""The batches of a run's steps on their way to the model, with what their losses must know of the global batch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from signal import Signals

import torch
from torch import Tensor
from torch.nn import functional as F

from mirasol.config.model import MirasolConfig
from mirasol.config.recipe import Recipe
from mirasol.data.clip_cache import BadWindow, UnreadableWindow
from mirasol.data.sampler import Batch
from mirasol.data.workers import WorkerStatus
from mirasol.model.losses import BatchTotals, count_loss_chunks, sum_text_weights
from mirasol.training.distributed import Ranks
from mirasol.training.features import FeatureEncoder
from mirasol.training.measures import Clock
from mirasol.training.run_folder import RunFolder
from mirasol.training.signals import StopSignals

MASKS = ("chunk_mask", "video_mask", "audio_mask")


@dataclass(frozen=True)
class RankShare:
    """What the other processes must know of this one's rows of a step's batch.

    text: weight of its target tokens
    masks: its chunk, video and audio masks, bool [3, clip, chunk]; None for images
    stop_signal: a signal that this process received
    replaced: bad clips that this process replaced with others
    """

    text: float
    masks: Tensor | None
    stop_signal: Signals | None = None
    replaced: tuple[BadWindow, ...] = ()


def count_share(batch: Batch, tensors: Mapping[str, Tensor], stop_signal: Signals | None = None) -> RankShare:
    """Counts what the other processes must know of these tensors."""
    masks = torch.stack([tensors[name] for name in MASKS]).cpu() if MASKS[0] in tensors else None
    text = sum_text_weights(tensors["labels"], tensors.get("row_weights"))
    return RankShare(text, masks, stop_signal, batch.replaced)


def make_batch_totals(
    shares: Sequence[RankShare], clips: int, accumulation: int, config: MirasolConfig, ranks: Ranks
) -> list[BatchTotals | None]:
    """For each microbatch the totals of the step's batch of `clips` clips; None for one that is the entire batch."""
    if accumulation == ranks.world_size == 1:
        return [None]
    totals = {"text": sum(share.text for share in shares), "images": float(clips)}
    longest = 0
    if shares[0].masks is not None:
        longest = max(share.masks.shape[2] for share in shares)
        padded = [F.pad(share.masks, (0, longest - share.masks.shape[2])).chunk(accumulation, 1) for share in shares]
        for parts in zip(*padded, strict=True):
            for name, total in count_loss_chunks(config, *torch.cat(parts, dim=1)).items():
                totals[name] = totals.get(name, 0.0) + total
    return [BatchTotals(**totals, chunks=longest)] * accumulation


def split_microbatches(tensors: Mapping[str, Tensor], accumulation: int) -> list[dict[str, Tensor]]:
    """A process's tensors of a step, split into its microbatches along the first dimension."""
    parts = {name: value.split(len(value) // accumulation) for name, value in tensors.items()}
    return [{name: values[place] for name, values in parts.items()} for place in range(accumulation)]


@dataclass(frozen=True)
class StepBatch:
    """This process's part of a step's batch, on the device.

    rows: its clips and examples
    microbatches: the tensors of each microbatch
    totals: for each microbatch the totals of the global batch; None for one that is the entire batch
    stop_signal: a signal that some process received before the batch was ready; known to all processes alike
    """

    step: int
    rows: Batch
    microbatches: list[dict[str, Tensor]]
    totals: list[BatchTotals | None]
    stop_signal: Signals | None

    @property
    def stage(self) -> str:
        """Name of the stage that the step belongs to."""
        return self.rows.stage


@dataclass(frozen=True)
class BatchStream:
    """The batches of steps `first_step` and on, in order. Every process iterates over its own part at the same time.

    loader: yields (rows, tensors) of the same steps, see `data.loader.make_loader`
    encoder: completes batches of features, if stages use any

    Raises, while iterating:
        UnreadableWindow: a clip that cannot be read, with `on_bad_clip: error`; it is listed in the run's folder.
        WorkerFailed: a loading process died or took longer than `batch_seconds`.
    """

    recipe: Recipe
    loader: Iterable[tuple[Batch, dict[str, Tensor]]]
    first_step: int
    config: MirasolConfig
    device: torch.device
    ranks: Ranks
    folder: RunFolder
    clock: Clock
    status: WorkerStatus
    signals: StopSignals
    encoder: FeatureEncoder | None = None

    def __iter__(self) -> Iterator[StepBatch]:
        recipe, on_gpu = self.recipe, self.device.type == "cuda"
        loaded = iter(self.loader)
        self.status.take_over()
        for step in range(self.first_step, recipe.total_steps):
            with self.clock.count_waiting():
                rows, tensors, shares = self._load(loaded, step)
                clips = recipe.stages[rows.stage].clips_per_step
                totals = make_batch_totals(shares, clips, recipe.accumulation, self.config, self.ranks)
                tensors = {name: value.to(self.device, non_blocking=on_gpu) for name, value in tensors.items()}
            if self.encoder is not None and self.encoder.serves(rows.stage):
                windows = [(clip.media, clip.start, clip.end) for clip in rows.clips]
                tensors = self.encoder.complete(windows, tensors, rows.shifted)
            stop_signal = next((share.stop_signal for share in shares if share.stop_signal), None)
            yield StepBatch(step, rows, split_microbatches(tensors, len(totals)), totals, stop_signal)

    def _load(
        self, loaded: Iterator[tuple[Batch, dict[str, Tensor]]], step: int
    ) -> tuple[Batch, dict[str, Tensor], list[RankShare]]:
        """The next batch, its tensors, and every process's share of it; bad clips that any process met are listed."""
        own: list[tuple[Batch, dict[str, Tensor]]] = []

        def load() -> RankShare:
            with self.status.limit_wait(self.recipe.batch_seconds):
                rows, tensors = next(loaded)
            own.append((rows, tensors))
            if self.ranks.world_size == self.recipe.accumulation == 1:
                return RankShare(0.0, None, self.signals.received, rows.replaced)  # the batch needs no counts
            return count_share(rows, tensors, self.signals.received)

        try:
            shares = self.ranks.run_and_gather(load)
        except UnreadableWindow as error:
            self.folder.add_bad_clips([error.window], step + 1)
            raise
        replaced = [bad for share in shares for bad in share.replaced]
        if replaced:
            self.folder.add_bad_clips(replaced, step + 1)
            self.clock.count_replaced(len(replaced))
        return *own[0], shares

"""The training loop: plain PyTorch, one step after the other."""

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

# From the top of the package, which registers them with the Auto classes that the processor loads its parts through.
from mirasol import (
    MirasolConfig,
    MirasolFeatureExtractor,
    MirasolForConditionalGeneration,
    MirasolOutput,
    MirasolProcessor,
)
from mirasol.checkpoint import Loaded, load_checkpoint
from mirasol.console import Progress
from mirasol.data.example import Example
from mirasol.errors import UserError
from mirasol.media.tokenizer import train_tokenizer
from mirasol.parts import LossWeights
from mirasol.training.batches import Batch, BatchPlan
from mirasol.training.checkpoints import Checkpoints, save_model, write_folder
from mirasol.training.examples import read_split, tokenizer_texts
from mirasol.training.loader import BadWindow, ClipCache, StepBatches, UnreadableWindow, make_loader, write_bad_clips
from mirasol.training.logging import RunLog
from mirasol.training.optimizer import Optimizer, learning_rate
from mirasol.training.randomness import hash64
from mirasol.training.recipe import Recipe
from mirasol.training.run_folder import RunFolder, versions
from mirasol.training.validation import Validation


class NonFiniteLoss(UserError):
    """A loss or gradient norm that is no number: the run stopped before it reached the weights."""


def train(recipe: Recipe, *, resume: bool = False, console: Any = None) -> Path:
    """Trains what the recipe says. Returns the folder of the finished checkpoint, `<output>/checkpoint`.

    With `resume` an interrupted run in `recipe.output` goes on from its newest checkpoint, bit-identically to a run
    that was never interrupted (on a CPU with the same number of threads); a finished one is left as it is; without a
    run there, one starts. `console` is a `rich.console.Console` for progress, by default one on stderr.

    Raises:
        UserError: output already holds a run (without `resume`), a changed recipe (with it), another process that
            trains into the same output, bad data, and everything the parts of a run refuse.
        BadClip: a clip that cannot be read, with `on_bad_clip: error`.
        NonFiniteLoss: a loss or gradient norm is not finite; nothing of that step reached the weights.
    """
    if console is None:
        from rich.console import Console

        console = Console(stderr=True)
    with RunFolder(recipe, resume) as folder:
        if folder.finished:
            console.print(f"{folder.path}: this run is finished", highlight=False, soft_wrap=True)
            return folder.checkpoint
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        return Trainer(recipe, folder, console).run()


class Trainer:
    """One run: made of parts that each follow from the recipe, and the loop over its steps."""

    def __init__(self, recipe: Recipe, folder: RunFolder, console: Any):
        self.recipe, self.folder, self.console = recipe, folder, console
        self.device = pick_device(recipe.device)
        examples, absent = read_split(recipe.data, recipe.data.train_split)
        validation_examples = []
        if recipe.data.validation_split:
            validation_examples, also_absent = read_split(recipe.data, recipe.data.validation_split)
            absent += also_absent
        self.plan, self.validation = BatchPlan(recipe, examples), Validation(recipe, validation_examples)

        initial = load_checkpoint(recipe.model.init) if recipe.model.init is not None else None
        self.processor = make_processor(
            recipe, examples, initial, folder.path / "processor" if folder.holds_run else None
        )
        check_texts(self.processor, [*examples, *validation_examples])
        torch.manual_seed(hash64(recipe.seed, "weights") >> 1)
        self.model = make_model(recipe, self.processor, initial).to(self.device)
        check_loss_weights(recipe, self.model.config)
        self.optimizer = Optimizer(self.model, recipe.optimizer)
        settings = self.model.config.media_settings()
        cache_folder = Path(recipe.data.cache) if recipe.data.cache else folder.path / "cache"
        whole = {e.media for e in [*examples, *validation_examples] if e.start is None and e.end is None}
        self.cache = ClipCache(cache_folder, Path(recipe.data.root), settings, whole)
        self.checkpoints = Checkpoints(folder.path / "checkpoints", recipe.keep_last)

        bad = self._decode_clips()
        if bad:
            unusable = {(entry.media, entry.start, entry.end) for entry in bad}
            usable = [e for e in examples if (e.media, e.start, e.end) not in unusable]
            self.plan = BatchPlan(recipe, usable)
            self.validation.without(unusable)
            console.print(
                f"{len(bad)} clips cannot be read and are left out ({len(examples) - len(usable)} training examples): "
                f"see {folder.path / 'bad_clips.jsonl'}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
        if absent:
            console.print(
                f"{len(absent)} problems of the annotations, missing clips among them, are skipped: "
                f"see {folder.path / 'bad_clips.jsonl'}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
        folder.start([*absent, *bad])
        if not (folder.path / "processor").exists():
            write_folder(folder.path / "processor", self.processor.save_pretrained)

    def _decode_clips(self) -> list[BadWindow]:
        windows = list(dict.fromkeys([*self.plan.used_clips(), *self.validation.windows()]))
        workers, policy = max(os.cpu_count() or 1, self.recipe.workers), self.recipe.data.on_bad_clip
        with Progress(self.console, "Decoding clips", len(windows), "clips") as progress:

            def report(done: int, total: int) -> None:
                progress.total = total
                progress.update(done)

            try:
                return self.cache.fill(windows, workers, policy, report)
            except UnreadableWindow as error:
                # A run that is there keeps its own list: what cannot be read today may be read tomorrow.
                if not self.folder.holds_run:
                    write_bad_clips(self.folder.path / "bad_clips.jsonl", [error.window])
                raise

    def run(self) -> Path:
        """Trains from the newest checkpoint, or from the start, to the end."""
        state = self.checkpoints.load_newest(self.model, self.optimizer, self.recipe.fingerprint(), self._warn)
        self.folder.clear_error()
        first = state["step"]
        log = RunLog(self.folder.path, first)
        self.clock = Clock(state.get("seconds", 0.0))
        try:
            with Progress(self.console, "Training", self.recipe.total_steps, "steps", start=first) as progress:
                for step, batch, tensors in self._batches(first):
                    values = self._step(step, batch, tensors)
                    self._after_step(step + 1, values, log, progress)
        except NonFiniteLoss as error:
            self.folder.record_error(str(error))
            raise
        finally:
            log.close()
        return self._finish()

    def _warn(self, message: str) -> None:
        self.console.print(f"warning: {message}", highlight=False, markup=False, soft_wrap=True)

    def _batches(self, first: int) -> Iterator[tuple[int, Batch, dict[str, Tensor]]]:
        """(step, batch, its tensors on the device) for every step left; keeps count of the time spent waiting."""
        steps = StepBatches(self.plan, self.cache, self.processor.feature_extractor)
        on_gpu = self.device.type == "cuda"
        remaining = range(first, self.recipe.total_steps)
        loaded = iter(make_loader(steps, remaining, self.recipe.workers, pin_memory=on_gpu))
        for step in remaining:
            with self.clock.waiting():
                batch, media = next(loaded)
                text = self.processor.encode_text(batch.prompts, batch.targets)
                tensors = {
                    name: value.to(self.device, non_blocking=on_gpu) for name, value in {**media, **text}.items()
                }
            yield step, batch, tensors

    def _step(self, step: int, batch: Batch, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """One optimizer step. Returns its values; raises NonFiniteLoss before anything reaches the weights."""
        stage_name, _ = self.recipe.stage_at(step)
        rate = learning_rate(self.recipe, step)
        self.optimizer.set_learning_rate(rate)
        self.model.train()
        self.model.config.loss_weights = self.recipe.stages[stage_name].loss_weights
        torch.manual_seed(self.plan.noise_seed(step))
        with self._precision():
            output = self.model(**tensors)
        values = {"stage": stage_name, "loss": output.loss.item()}
        values |= {name: loss.item() for name, loss in output.items() if name.endswith("_loss")}
        check_finite(step, batch, values)
        self.optimizer.zero_grad()
        output.loss.backward()
        values["gradient_norm"] = self.optimizer.clip_gradients()
        check_finite(step, batch, values)
        self.optimizer.step()
        self.clock.clips += len(batch.clips)
        values["learning_rate"] = rate
        if self._logs(step + 1):
            values.update(spread(output, tensors["chunk_mask"]), repeated_rows=batch.repeated)
        return values

    def _precision(self):
        if self.recipe.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _logs(self, done: int) -> bool:
        return done % self.recipe.log_every == 0 or done in (1, self.recipe.total_steps)

    def _after_step(self, done: int, values: dict[str, Any], log: RunLog, progress: Progress) -> None:
        recipe, last = self.recipe, done == self.recipe.total_steps
        if self._logs(done):
            log.train(done, {**values, **self.clock.lap()})
        losses = " ".join(f"{name[:-5]} {loss:.3f}" for name, loss in values.items() if name.endswith("_loss"))
        progress.update(done, f"{values['stage']}: {losses}")
        if self.validation.parts and (done % recipe.validate_every == 0 or last):
            with self.clock.paused(), self._precision():
                log.validation(done, self.validation.run(self.model, self.processor, self.cache, self.device))
        if done % recipe.checkpoint_every == 0 or last:
            with self.clock.paused():
                state = {"seconds": self.clock.seconds(), "fingerprint": recipe.fingerprint()}
                self.checkpoints.save(done, self.model, self.processor, self.optimizer, state)

    def _finish(self) -> Path:
        def fill(target: Path) -> None:
            save_model(target, self.model, self.processor)
            weights = hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest()
            facts = {
                "steps": self.recipe.total_steps,
                "training_seconds": round(self.clock.seconds(), 1),
                "weights_sha256": weights,
                "versions": versions(),
                "recipe": self.recipe.to_dict(),
            }
            (target / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

        write_folder(self.folder.checkpoint, fill)
        return self.folder.checkpoint


class Clock:
    """Seconds of training, and since the last lap clips per second and the share of time spent waiting for data.

    Validation and checkpoints count into the seconds, not into the rates.
    """

    def __init__(self, seconds_before: float):
        self.before, self.began = seconds_before, time.monotonic()
        self._new_lap()

    def _new_lap(self) -> None:
        self.lap_began, self.clips, self.waited, self.pause = time.monotonic(), 0, 0.0, 0.0

    def seconds(self) -> float:
        """Training time in all, earlier parts of a resumed run included."""
        return self.before + time.monotonic() - self.began

    @contextlib.contextmanager
    def waiting(self):
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    @contextlib.contextmanager
    def paused(self):
        began = time.monotonic()
        yield
        self.pause += time.monotonic() - began

    def lap(self) -> dict[str, float]:
        """Numbers since the last lap; starts a new one."""
        elapsed = max(time.monotonic() - self.lap_began - self.pause, 1e-9)
        numbers = {
            "clips_per_second": self.clips / elapsed,
            "data_wait": self.waited / elapsed,
            "seconds": self.seconds(),
        }
        self._new_lap()
        return numbers


def pick_device(name: str) -> torch.device:
    """The recipe's device. Raises UserError for a GPU that is not there."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("device=cuda: PyTorch finds no GPU here: use device: auto or cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def make_processor(
    recipe: Recipe, examples: list[Example], initial: Loaded | None, saved: Path | None
) -> MirasolProcessor:
    """The run's processor: as saved by an earlier part of the run, of the checkpoint it goes on from, or new with a
    tokenizer trained on the training texts."""
    if saved is not None and saved.is_dir():
        return MirasolProcessor.from_pretrained(saved)
    if initial is not None:
        return initial.processor
    config = MirasolConfig.preset(recipe.model.preset, **recipe.model.overrides)
    tokenizer = train_tokenizer(tokenizer_texts(examples), recipe.tokenizer.vocab_size)
    return MirasolProcessor(MirasolFeatureExtractor.for_config(config), tokenizer, config.text.max_length)


def make_model(recipe: Recipe, processor: MirasolProcessor, initial: Loaded | None) -> MirasolForConditionalGeneration:
    """A new model from the preset, its vocabulary as large as the tokenizer's, or the checkpoint to go on from."""
    if initial is not None:
        return initial.model
    config = MirasolConfig.preset(recipe.model.preset, **recipe.model.overrides)
    config.vocab_size = len(processor.tokenizer)
    return MirasolForConditionalGeneration(config)


def check_loss_weights(recipe: Recipe, config: MirasolConfig) -> None:
    """Raises UserError for the weight of a loss that this training does not have."""
    for name, stage in recipe.stages.items():
        weights = stage.loss_weights
        if weights.audio != LossWeights.audio and not config.reconstruction.audio:
            raise UserError(
                f"stages.{name}.loss_weights.audio={weights.audio} has no effect: the model reconstructs no audio, "
                "set model.overrides.reconstruction.audio"
            )
        if weights.contrastive != LossWeights.contrastive:
            raise UserError(
                f"stages.{name}.loss_weights.contrastive={weights.contrastive} has no effect: clips have no "
                "contrastive loss, leave it out"
            )


def check_texts(processor: MirasolProcessor, examples: list[Example], rows_at_once: int = 1024) -> None:
    """Encodes every prompt and target once, so that one too long is refused before the run begins."""
    drawn = {(example.prompt, text) for example in examples if example.random_target for text in example.references}
    pairs = sorted({(example.prompt, example.target) for example in examples} | drawn)
    for first in range(0, len(pairs), rows_at_once):
        prompts, targets = zip(*pairs[first : first + rows_at_once], strict=True)
        processor.encode_text(list(prompts), list(targets))


def check_finite(step: int, batch: Batch, values: Mapping[str, Any]) -> None:
    """Raises NonFiniteLoss with the step (counted from 1) and the ids of all its samples."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            ids = ", ".join(dict.fromkeys(example.id for row in batch.examples for example in row))
            raise NonFiniteLoss(f"step {step + 1}: {name}={value}, stopped before the optimizer step; samples: {ids}")


@torch.no_grad()
def spread(output: MirasolOutput, chunk_mask: Bool[Tensor, "clip chunk"]) -> dict[str, float]:
    """How far clips lie apart in x, to notice features that are the same for all: the mean cosine between pooled x of
    different clips (1: they collapsed), and the standard deviation over clips (0: they collapsed)."""
    mask = chunk_mask[:, :, None].to(torch.float32)
    per_chunk = output.combined.float().mean(dim=2)
    pooled: Float[Tensor, "clip width"] = (per_chunk * mask).sum(1) / mask.sum(1)
    if len(pooled) < 2:
        return {"x_cosine": 1.0, "x_std": 0.0}
    cosines = F.normalize(pooled, dim=-1) @ F.normalize(pooled, dim=-1).T
    count = len(pooled)
    between = (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))
    return {"x_cosine": float(between), "x_std": float(pooled.std(dim=0).mean())}

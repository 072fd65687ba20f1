"""The training loop: plain PyTorch, one step after the other."""

import contextlib
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirasol.console import Progress
from mirasol.errors import Stopped, UserError
from mirasol.training.batches import KINDS, Batch, BatchPlan
from mirasol.training.best import BestStep, check_metric
from mirasol.training.checkpoints import Checkpoints, remove_folder, save_model, write_folder
from mirasol.training.clip_cache import BadWindow, UnreadableWindow, write_bad_clips
from mirasol.training.clock import Clock
from mirasol.training.examples import examples_hash, read_data
from mirasol.training.loader import StepBatches, decoded_sizes, make_loader
from mirasol.training.logging import RunLog, read_metrics
from mirasol.training.measures import NonFiniteLoss, check_finite, spread
from mirasol.training.optimizer import Optimizer, learning_rate
from mirasol.training.randomness import hash64
from mirasol.training.recipe import Recipe
from mirasol.training.regularisers import ClipAugment, Regularisers, check_augmentation
from mirasol.training.run_folder import RunFolder, versions
from mirasol.training.samples import Samples
from mirasol.training.setup import (
    check_loss_weights,
    check_texts,
    load_initial,
    make_caches,
    make_model,
    make_processor,
    pick_device,
)
from mirasol.training.signals import StopSignals
from mirasol.training.stages import StageWeights, stage_losses
from mirasol.training.trackers import check_tracker, make_tracker
from mirasol.training.validation import Validation
from mirasol.training.worker_status import WorkerStatus


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
        WorkerFailed: a process that decodes or loads clips died, or took longer than `batch_seconds`.
        Stopped: SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) asked the run to stop; the step at hand was finished and saved.
    """
    if console is None:
        from rich.console import Console

        console = Console(stderr=True)
    with StopSignals() as signals, RunFolder(recipe, resume) as folder:
        if folder.finished:
            console.print(f"{folder.path}: this run is finished", highlight=False, soft_wrap=True)
            return folder.checkpoint
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        return Trainer(recipe, folder, console, signals).run()


class Trainer:
    """One run: made of parts that each follow from the recipe, and the loop over its steps."""

    def __init__(self, recipe: Recipe, folder: RunFolder, console: Any, signals: StopSignals):
        self.recipe, self.folder, self.console, self.signals = recipe, folder, console, signals
        self.device = pick_device(recipe.device)
        check_tracker(recipe.tracker)
        by_data_set, absent = read_data(recipe.data, "train")
        held_out, also_absent = read_data(recipe.data, "validation")
        absent += also_absent
        self.plan, self.validation = BatchPlan(recipe, by_data_set), Validation(recipe, held_out)
        examples = [example for some in by_data_set.values() for example in some]
        validation_examples = [example for some in held_out.values() for example in some]

        initial = load_initial(recipe)
        self.processor = make_processor(
            recipe, examples, initial, folder.path / "processor" if folder.holds_run else None
        )
        check_texts(self.processor, [*examples, *validation_examples])
        torch.manual_seed(hash64(recipe.seed, "weights") >> 1)
        self.model = make_model(recipe, self.processor, initial).to(self.device)
        check_loss_weights(recipe, self.model.config)
        check_augmentation(recipe, self.model.config)
        if recipe.keep_best is not None:
            check_metric(recipe.keep_best, self.validation.parts)
        self.regularisers = Regularisers(self.model)
        self.weights = StageWeights(recipe, self.model)
        self.weights.enter(None)  # the optimizer takes all that some stage trains
        self.optimizer = Optimizer(self.model, recipe.optimizer)
        settings = self.model.config.media_settings()
        # Of training, and of validation and samples.
        self.clips, self.cache = make_caches(recipe, folder.path, settings, [*examples, *validation_examples])
        self.checkpoints = Checkpoints(folder.path / "checkpoints", recipe.keep_last)

        bad = self._decode_clips()
        if bad:
            unusable = {(entry.media, entry.start, entry.end) for entry in bad}
            usable = {
                name: [e for e in some if (e.media, e.start, e.end) not in unusable]
                for name, some in by_data_set.items()
            }
            self.plan = BatchPlan(recipe, usable)
            self.validation.without(unusable)
            lost = len(examples) - sum(map(len, usable.values()))
            console.print(
                f"{len(bad)} clips cannot be read and are left out ({lost} training examples): "
                f"see {folder.path / 'bad_clips.jsonl'}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
        if absent:
            console.print(
                f"{len(absent)} problems of the annotations, missing clips among them, are skipped: "
                f"see {folder.path / 'bad_clips.jsonl'}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
        hashes = {
            f"{name}/{part} examples" if name else f"{part} examples": examples_hash(recipe.data.folder, some)
            for part, data_sets in (("train", by_data_set), ("validation", held_out))
            for name, some in data_sets.items()
        }
        folder.start([*absent, *bad], self.weights.to_dict(), self.model.config.to_dict(), hashes)
        for kind, count in self.plan.unused.items():
            self._warn(f"{count} examples ({KINDS[kind]}) are of a kind that no stage trains on: see stages.….window")
        console.print(self.weights.table(), highlight=False, markup=False, soft_wrap=True)
        self.samples = Samples(self.validation, recipe.samples)
        # In files that the loading processes share.
        self.plan = self.plan.stored(folder.path / "examples")
        if not (folder.path / "processor").exists():
            write_folder(folder.path / "processor", self.processor.save_pretrained)

    def _decode_clips(self) -> list[BadWindow]:
        before = self.recipe.data.decode == "before"
        sizes = decoded_sizes(self.recipe, self.processor.feature_extractor) if before else {}
        windows = {
            size: self.plan.used_clips(name for name in sizes if sizes[name] == size)
            for size in dict.fromkeys(sizes.values())
        }
        own = self.cache.settings["image_size"]
        windows[own] = list(dict.fromkeys([*windows.get(own, []), *self.validation.windows()]))
        workers, policy = max(os.cpu_count() or 1, self.recipe.workers), self.recipe.data.on_bad_clip
        with Progress(self.console, "Decoding clips", sum(map(len, windows.values())), "clips") as progress:

            def report(done: int, total: int) -> None:
                progress.total = total
                progress.update(done)

            try:
                caches = ((self.cache.at_size(size), clips) for size, clips in windows.items())
                bad = [cache.fill(clips, workers, policy, report, self.recipe.batch_seconds) for cache, clips in caches]
                return list(dict.fromkeys(itertools.chain.from_iterable(bad)))
            except UnreadableWindow as error:
                # A run that is there keeps its own list: what cannot be read today may be read tomorrow.
                if not self.folder.holds_run:
                    write_bad_clips(self.folder.path / "bad_clips.jsonl", [error.window])
                raise

    def run(self) -> Path:
        """Trains from the newest checkpoint, or from the start, to the end."""
        state = self.checkpoints.load_newest(self._tensors(), self.recipe.fingerprint(), self._warn)
        self.folder.clear_error()
        first = state["step"]
        log = RunLog(self.folder.path, first, make_tracker(self.recipe))
        self.best = BestStep(self.recipe.keep_best, read_metrics(log.file)) if self.recipe.keep_best else None
        self.saved = first
        self.clock, self.status = Clock(state.get("seconds", 0.0)), WorkerStatus(self.recipe.workers)
        self.signals.defer()
        try:
            with Progress(self.console, "Training", self.recipe.total_steps, "steps", start=first) as progress:
                for step, batch, tensors in self._batches(first):
                    if step == first or self.recipe.stage_at(step)[1] == 0:
                        self.weights.enter(self.recipe.stage_at(step)[0])
                    values = self._step(step, batch, tensors)
                    self._after_step(step + 1, values, log, progress)
                    self._stop_if_asked(step + 1)
            self.checkpoints.wait()
        except BaseException as raised:
            error = self.status.failure(raised) or raised
            # Whatever ends the run, the checkpoint that is being written is worth its last seconds.
            with contextlib.suppress(UserError):
                self.checkpoints.wait()
            if isinstance(error, UserError):
                self.folder.record_error(str(error), error.facts if isinstance(error, NonFiniteLoss) else None)
            raise error from error.__cause__
        finally:
            log.close()
        return self._finish()

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint holds."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.tensors()}

    def _warn(self, message: str) -> None:
        self.console.print(f"warning: {message}", highlight=False, markup=False, soft_wrap=True)

    def _batches(self, first: int) -> Iterator[tuple[int, Batch, dict[str, Tensor]]]:
        """(step, batch, its tensors on the device) for every step left; keeps count of the time spent waiting."""
        data, extractor = self.recipe.data, self.processor.feature_extractor
        augment = ClipAugment(self.recipe, extractor.image_size)
        steps = StepBatches(
            self.plan, self.clips, extractor, augment=augment, status=self.status, on_bad=data.on_bad_clip
        )
        on_gpu = self.device.type == "cuda"
        remaining = range(first, self.recipe.total_steps)
        # Batches decoded ahead may be large, and there is none to catch up with.
        prefetch = 4 if data.decode == "before" else 2
        seconds = self.recipe.batch_seconds
        loaded = iter(make_loader(steps, remaining, self.recipe.workers, on_gpu, seconds, prefetch))
        for step in remaining:
            with self.clock.waiting():
                batch, media = self._next(loaded, step)
                text = self.processor.encode_text(batch.prompts, batch.targets)
                if batch.row_weights is not None:
                    text["row_weights"] = torch.tensor(batch.row_weights)
                tensors = {
                    name: value.to(self.device, non_blocking=on_gpu) for name, value in {**media, **text}.items()
                }
            yield step, batch, tensors

    def _next(self, loaded: Iterator[tuple[Batch, dict[str, Tensor]]], step: int) -> tuple[Batch, dict[str, Tensor]]:
        """The next batch; clips that turned out to be bad are listed."""
        try:
            batch, media = next(loaded)
        except UnreadableWindow as error:
            self.folder.add_bad_clips([error.window], step + 1)
            raise
        if batch.replaced:
            self.folder.add_bad_clips(batch.replaced, step + 1)
            self.clock.replaced += len(batch.replaced)
        return batch, media

    def _step(self, step: int, batch: Batch, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """One optimizer step. Returns its values; raises NonFiniteLoss before anything reaches the weights."""
        stage_name, _ = self.recipe.stage_at(step)
        stage = self.recipe.stages[stage_name]
        rate = learning_rate(self.recipe, step)
        self.optimizer.set_learning_rate(rate)
        self.model.train()
        self.model.config.loss_weights = stage.loss_weights
        self.regularisers.enter(stage)
        torch.manual_seed(self.plan.noise_seed(step))
        with self._precision():
            output = stage_losses(self.model, stage, tensors)
        values = {"stage": stage_name, "loss": output.loss.item()}
        values |= {name: loss.item() for name, loss in output.items() if name.endswith("_loss")}
        check_finite(batch, values)
        self.optimizer.zero_grad()
        output.loss.backward()
        values["gradient_norm"] = self.optimizer.clip_gradients()
        check_finite(batch, values)
        self.checkpoints.wait_until_copied()
        self.optimizer.step()
        self.clock.clips += len(batch.clips)
        values["learning_rate"] = rate
        if self._logs(step + 1):
            values["repeated_rows"] = batch.repeated
            if self.recipe.data.mixture:
                shares = Counter(self.plan.batch(step).data_sets)
                values |= {f"clips_of_{name}": shares[name] for name in self.recipe.data.mixture}
            if stage.objective == "clips":
                values |= spread(output, tensors["chunk_mask"])
        return values

    def _precision(self):
        if self.recipe.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _logs(self, done: int) -> bool:
        return done % self.recipe.log_every == 0 or done in (1, self.recipe.total_steps)

    def _after_step(self, done: int, values: dict[str, Any], log: RunLog, progress: Progress) -> None:
        recipe, last = self.recipe, done == self.recipe.total_steps
        self.checkpoints.poll()
        if self._logs(done):
            log.train(done, {**values, **self.clock.lap()})
        losses = " ".join(f"{name[:-5]} {loss:.3f}" for name, loss in values.items() if name.endswith("_loss"))
        progress.update(done, f"{values['stage']}: {losses}")
        is_best = False
        if self.validation.parts and (done % recipe.validate_every == 0 or last):
            with self.clock.paused(), self._precision():
                found = self.validation.run(self.model, self.processor, self.cache, self.device)
                log.validation(done, found)
                is_best = self.best is not None and self.best.add(done, found)
                if self.samples.rows:
                    log.samples(done, self.samples.take(self.model, self.processor, self.cache, self.device))
        if done % recipe.checkpoint_every == 0 or is_best or last:
            self._save(done)

    def _save(self, done: int) -> None:
        """Begins to write a checkpoint, unless this step's is there or being written."""
        if done == self.saved:
            return
        with self.clock.paused():
            state = {"seconds": self.clock.seconds(), "fingerprint": self.recipe.fingerprint()}
            self.checkpoints.save(done, self._tensors(), state, self.best.step if self.best is not None else None)
        self.saved = done

    def _stop_if_asked(self, done: int) -> None:
        """Saves and raises Stopped where a signal came. After the last step the run is as good as finished: it ends."""
        number, total = self.signals.received, self.recipe.total_steps
        if number is None or done == total:
            return
        self._save(done)
        self.checkpoints.wait()
        raise Stopped(
            f"{self.folder.path}: stopped by {number.name} after step {done} of {total}, which is saved: "
            "--resume goes on from there", number,
        )  # fmt: skip

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
        remove_folder(self.folder.path / "examples")
        return self.folder.checkpoint

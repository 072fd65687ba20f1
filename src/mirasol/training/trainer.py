"""The training loop: plain PyTorch, one step after the other."""

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirasol.config.recipe import Recipe
from mirasol.console import Progress
from mirasol.data.clip_cache import BadWindow, UnreadableWindow, write_bad_clips
from mirasol.data.digest import examples_digest
from mirasol.data.example import Example
from mirasol.data.loader import (
    BatchTexts,
    ClipAugment,
    RowsOfRank,
    StepBatches,
    decoded_sizes,
    make_loader,
)
from mirasol.data.sampler import KINDS, Batch, BatchPlan, joined
from mirasol.data.splits import read_data
from mirasol.data.workers import WorkerStatus
from mirasol.errors import Stopped, UserError
from mirasol.files import hash_file, remove_folder, write_folder_atomically
from mirasol.model.losses import BatchTotals
from mirasol.training.average import WeightAverage
from mirasol.training.best import BestStep, check_metric
from mirasol.training.build import (
    check_loss_weights,
    check_texts,
    load_initial,
    make_caches,
    make_model,
    make_outline,
    make_processor,
    pick_device,
)
from mirasol.training.checkpoint import Checkpoints, save_model
from mirasol.training.clock import Clock
from mirasol.training.logging import RunLog, read_metrics
from mirasol.training.measures import NonFiniteLoss, check_finite, spread
from mirasol.training.optim import Optimizer, learning_rate
from mirasol.training.parallel import (
    ParallelModel,
    Share,
    joined_ranks,
    make_batch_totals,
    microbatches,
    seed_noise,
    share_of,
)
from mirasol.training.ranks import Ranks
from mirasol.training.regularisers import Regularisers, check_augmentation
from mirasol.training.run_folder import RunFolder, versions
from mirasol.training.samples import Samples
from mirasol.training.signals import StopSignals
from mirasol.training.stages import StageWeights
from mirasol.training.trackers import check_tracker, make_tracker
from mirasol.training.validation import Validation


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
        ProcessLost: of several processes another one has gone, or gave no answer for `process_seconds`.
        Stopped: SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) asked the run to stop; the step at hand was finished and saved.
    """
    if console is None:
        from rich.console import Console

        console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        ranks, signals = stack.enter_context(joined_ranks(recipe)), stack.enter_context(StopSignals())
        console.quiet = console.quiet or not ranks.is_first
        warn = partial(_warn, console)
        folder = stack.enter_context(ranks.together(lambda: RunFolder(recipe, resume, ranks.is_first, warn)))
        if ranks.from_first(folder.finished):
            console.print(f"{folder.path}: this run is finished", highlight=False, soft_wrap=True)
            return folder.checkpoint
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        return Trainer(recipe, folder, console, signals, ranks).run()


def _warn(console: Any, message: str) -> None:
    console.print(f"warning: {message}", highlight=False, markup=False, soft_wrap=True)


class Trainer:
    """One run: made of parts that each follow from the recipe, and the loop over its steps."""

    def __init__(self, recipe: Recipe, folder: RunFolder, console: Any, signals: StopSignals, ranks: Ranks):
        self.recipe, self.folder, self.console, self.signals, self.ranks = recipe, folder, console, signals, ranks
        self.device = pick_device(recipe.device, ranks.local_rank)
        # The first process decodes clips and makes the processor, the others find both.
        ranks.first_then_rest(self._prepare)
        self.parallel = ParallelModel(self.model, recipe, ranks, self.device)
        self.weights.enter(None)  # the optimizer takes all that some stage trains
        self.optimizer = Optimizer(self.model, recipe.optimizer)
        self.average = None if recipe.ema is None else WeightAverage(self.model, recipe.ema)
        self.checkpoints = Checkpoints(folder.path / "checkpoints", recipe.keep_last, ranks)

    def _prepare(self) -> None:
        """Everything that a process makes for itself, before they share a model."""
        recipe, folder = self.recipe, self.folder
        check_tracker(recipe.tracker)
        by_data_set, absent = read_data(recipe.data, "train")
        held_out, also_absent = read_data(recipe.data, "validation")
        absent += also_absent
        self.plan, self.validation = BatchPlan(recipe, by_data_set), Validation(recipe, held_out)
        self._make_model(*([e for some in data.values() for e in some] for data in (by_data_set, held_out)))
        bad = self._decode_clips()
        self._leave_out(bad, absent, by_data_set)
        digests = {
            f"{name}/{part} examples" if name else f"{part} examples": examples_digest(recipe.data.folder, some)
            for part, data_sets in (("train", by_data_set), ("validation", held_out))
            for name, some in data_sets.items()
        }
        folder.start([*absent, *bad], self.weights.to_dict(), self.model.config.to_dict(), digests)
        self._tell_what_is_used()
        self.samples = Samples(self.validation, recipe.samples)
        # In files that the loading processes share.
        self.plan = self.plan.stored(folder.path / "examples")
        if not (folder.path / "processor").exists():
            write_folder_atomically(folder.path / "processor", self.processor.save_pretrained, replace=True)

    def _make_model(self, examples: list[Example], validation_examples: list[Example]) -> None:
        """The processor, the model, what is made from its config, and the checks that need them."""
        recipe, folder = self.recipe, self.folder
        saved = folder.path / "processor" if folder.holds_run else None
        if recipe.parallel.kind == "fsdp" and not self.ranks.is_first:
            self.processor = make_processor(recipe, examples, None, saved)
            self.model = make_outline(recipe, self.processor)
        else:
            initial = load_initial(recipe)
            self.processor = make_processor(recipe, examples, initial, saved)
            self.model = make_model(recipe, self.processor, initial)
        if not folder.holds_run:  # a resumed run has the same texts, or is refused
            check_texts(self.processor, [*examples, *validation_examples])
        check_loss_weights(recipe, self.model.config)
        check_augmentation(recipe, self.model.config)
        if recipe.keep_best is not None:
            check_metric(recipe.keep_best, self.validation.parts)
        self.regularisers = Regularisers(self.model)
        self.weights = StageWeights(recipe, self.model)
        settings = self.model.config.media_settings()
        # Of training, and of validation and samples.
        self.clips, self.cache = make_caches(recipe, folder.path, settings, [*examples, *validation_examples])

    def _leave_out(
        self, bad: list[BadWindow], absent: list[BadWindow], by_data_set: Mapping[str, list[Example]]
    ) -> None:
        """Goes on without the clips that cannot be decoded, and tells of them and of what was absent from the start."""
        told = []
        if bad:
            unusable = {(entry.media, entry.start, entry.end) for entry in bad}
            usable = {
                name: [e for e in some if (e.media, e.start, e.end) not in unusable]
                for name, some in by_data_set.items()
            }
            self.plan = BatchPlan(self.recipe, usable)
            self.validation.without(unusable)
            lost = sum(map(len, by_data_set.values())) - sum(map(len, usable.values()))
            told.append(f"{len(bad)} clips cannot be read and are left out ({lost} training examples)")
        if absent:
            told.append(f"{len(absent)} problems of the annotations, missing clips among them, are skipped")
        for line in told:
            file = self.folder.path / "bad_clips.jsonl"
            self.console.print(f"{line}: see {file}", highlight=False, markup=False, soft_wrap=True)

    def _tell_what_is_used(self) -> None:
        """What each stage trains, and what it takes of the data as far as that may surprise."""
        for kind, count in self.plan.unused.items():
            self._warn(f"{count} examples ({KINDS[kind]}) are of a kind that no stage trains on: see stages.NAME.span")
        if self.validation.absent:
            self._warn(
                f"not validated: {', '.join(self.validation.absent)}: the validation split has no example of the kind "
                "and question types that the stages train on there"
            )
        self.console.print(self.weights.table(), highlight=False, markup=False, soft_wrap=True)

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
        log = RunLog(self.folder.path, first, make_tracker(self.recipe)) if self.ranks.is_first else None
        logged = self.ranks.from_first(read_metrics(log.file) if log is not None and self.recipe.keep_best else [])
        self.best = BestStep(self.recipe.keep_best, logged) if self.recipe.keep_best else None
        self.saved = first
        self.clock, self.status = Clock(state.get("seconds", 0.0)), WorkerStatus(self.recipe.workers)
        self.signals.defer()
        try:
            training = Progress(self.console, "Training", self.recipe.total_steps, "steps", start=first)
            with self.ranks.losses_told(), training as progress:
                for step, batch, tensors, batch_totals in self._batches(first):
                    if step == first or self.recipe.stage_at(step)[1] == 0:
                        self.weights.enter(batch.stage)
                        self.parallel.enter(self.recipe.stages[batch.stage])
                    values = self._step(step, batch, tensors, batch_totals)
                    self._after_step(step + 1, values, log, progress)
                    self._stop_if_asked(step + 1)
            self.checkpoints.wait()
        except BaseException as raised:
            error = raised
            # Whatever ends the run, the checkpoint that is being written is worth its last seconds.
            try:
                self.checkpoints.wait()
            except UserError as unwritten:
                # The log may meet the full disk first. This tells of it too, and what there is to go on from.
                error = unwritten if isinstance(raised, OSError) else raised
            if isinstance(error, UserError):
                self.folder.record_error(str(error), error.facts if isinstance(error, NonFiniteLoss) else None)
            raise error from error.__cause__
        finally:
            if log is not None:
                log.close()
            self.status.hand_back()
        return self._finish()

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint holds."""
        average = {} if self.average is None else {"average": self.average.tensors()}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.tensors(), **average}

    def _warn(self, message: str) -> None:
        _warn(self.console, message)

    def _batches(self, first: int) -> Iterator[tuple[int, Batch, dict[str, Tensor], list[BatchTotals | None]]]:
        """(step, this process's rows of the batch, their tensors on the device, what the losses of each microbatch must
        know of the whole) for every step left; keeps count of the time spent waiting."""
        data, extractor, ranks = self.recipe.data, self.processor.feature_extractor, self.ranks
        steps = StepBatches(
            self.plan, self.clips, extractor, status=self.status, on_bad=data.on_bad_clip,
            rows=RowsOfRank(self.recipe, ranks.rank, ranks.world_size) if ranks.world_size > 1 else None,
            augment=ClipAugment(self.recipe, extractor.image_size), texts=BatchTexts(self.processor.text_rows),
        )  # fmt: skip
        on_gpu = self.device.type == "cuda"
        remaining = range(first, self.recipe.total_steps)
        # Batches decoded ahead may be large, and there is none to catch up with.
        prefetch = 4 if data.decode == "before" else 2
        seconds = self.recipe.batch_seconds
        loaded = iter(make_loader(steps, remaining, self.recipe.workers, on_gpu, seconds, prefetch, self.device))
        self.status.take_over()
        for step in remaining:
            with self.clock.waiting():
                batch, tensors, shares = self._next(loaded, step)
                clips = self.recipe.stages[batch.stage].clips_per_step
                batch_totals = make_batch_totals(shares, clips, self.recipe.accumulation, self.model.config, ranks)
                tensors = {name: value.to(self.device, non_blocking=on_gpu) for name, value in tensors.items()}
            yield step, batch, tensors, batch_totals

    def _next(
        self, loaded: Iterator[tuple[Batch, dict[str, Tensor]]], step: int
    ) -> tuple[Batch, dict[str, Tensor], list[Share]]:
        """The next batch, its tensors, and what every process tells of its own; bad clips that any met are listed."""
        taken: list[tuple[Batch, dict[str, Tensor]]] = []

        def take() -> Share:
            with self.status.within(self.recipe.batch_seconds):
                batch, tensors = next(loaded)
            taken.append((batch, tensors))
            if self.ranks.world_size == self.recipe.accumulation == 1:
                return Share(0.0, None, self.signals.received, batch.replaced)  # nobody asks for counts
            return share_of(batch, tensors, self.signals.received)

        try:
            shares = self.ranks.exchange(take)
        except UnreadableWindow as error:
            self.folder.add_bad_clips([error.window], step + 1)
            raise
        self.asked_to_stop = next((share.asked_to_stop for share in shares if share.asked_to_stop), None)
        replaced = [bad for share in shares for bad in share.replaced]
        if replaced:
            self.folder.add_bad_clips(replaced, step + 1)
            self.clock.replaced += len(replaced)
        return *taken[0], shares

    def _step(
        self, step: int, batch: Batch, tensors: Mapping[str, Tensor], batch_totals: Sequence[BatchTotals | None]
    ) -> dict[str, Any]:
        """One optimizer step. Returns its values; raises NonFiniteLoss before anything reaches the weights."""
        stage = self.recipe.stages[batch.stage]
        rate = learning_rate(self.recipe, step)
        self.optimizer.set_learning_rate(rate)
        if not self.model.training:  # a validation came between
            self.model.train()
        self.model.config.loss_weights = stage.loss_weights
        self.regularisers.enter(stage)
        self.optimizer.zero_grad()
        parts = microbatches(tensors, len(batch_totals))
        values: dict[str, Any] = {"stage": batch.stage}
        values |= self._pass(step, parts, batch_totals)
        # Each process knows its own rows; the values are the same on all.
        check_finite(lambda: joined(self.ranks.gathered(batch)), values)
        values["gradient_norm"] = self.optimizer.clip_gradients()
        check_finite(lambda: joined(self.ranks.gathered(batch)), values)
        self.checkpoints.wait_until_copied()
        self.optimizer.step()
        if self.average is not None:
            self.average.update(step + 1)
        self.clock.clips += stage.clips_per_step
        values["learning_rate"] = rate
        if self._logs(step + 1):
            values["repeated_rows"] = batch.repeated
            if self.recipe.data.mixture:
                shares = Counter(self.plan.batch(step).data_sets)
                values |= {f"clips_of_{name}": shares[name] for name in self.recipe.data.mixture}
            if stage.objective == "clips":
                values |= spread(self.output, parts[-1]["chunk_mask"])
        self.output = None  # lest its tensors stay beside those of the next step
        return values

    def _pass(
        self, step: int, parts: Sequence[Mapping[str, Tensor]], batch_totals: Sequence[BatchTotals | None]
    ) -> dict[str, float]:
        """Gradients of the step's batch, microbatch by microbatch. Returns its losses, the same on every process."""
        losses = []
        for place, (part, totals) in enumerate(zip(parts, batch_totals, strict=True)):
            seed_noise(self.plan.noise_seed(step, place, self.ranks.rank), self.device)
            self.output = self.parallel.backward(part, totals, is_last=place == len(parts) - 1)
            names = [name for name in self.output if name == "loss" or name.endswith("_loss")]
            losses.append(torch.stack([self.output[name].detach().float() for name in names]))
        total = self.ranks.summed(torch.stack(losses).sum(0) if len(losses) > 1 else losses[0])
        return dict(zip(names, total.tolist(), strict=True))

    def _logs(self, done: int) -> bool:
        return done % self.recipe.log_every == 0 or done in (1, self.recipe.total_steps)

    def _after_step(self, done: int, values: dict[str, Any], log: RunLog | None, progress: Progress) -> None:
        recipe, last = self.recipe, done == self.recipe.total_steps
        self.checkpoints.poll()
        if self._logs(done) and log is not None:
            log.train(done, {**values, **self.clock.lap()})
        losses = " ".join(f"{name[:-5]} {loss:.3f}" for name, loss in values.items() if name.endswith("_loss"))
        rate = f"learning rate {values['learning_rate']:.3g}"
        progress.update(done, f"{values['stage']}: loss {values['loss']:.3f} ({losses}), {rate}")
        is_best = False
        if self.validation.parts and (done % recipe.validate_every == 0 or last):
            # Every process does all of it, on the same clips: sharded weights are gathered by all of them together.
            with self.clock.paused(), self.parallel.precision(), self._averaged():
                found = self.validation.run(self.model, self.processor, self.cache, self.device)
                # Their last bits may differ between GPUs, and all processes have to save together.
                found = self.ranks.from_first(found)
                is_best = self.best is not None and self.best.add(done, found)
                taken = None
                if self.samples.rows:
                    taken = self.samples.take(self.model, self.processor, self.cache, self.device)
            if log is not None:
                log.validation(done, found)
                if taken is not None:
                    log.samples(done, taken)
        if done % recipe.checkpoint_every == 0 or is_best or last:
            self._save(done)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model has its averaged weights, where there are any, while this is open."""
        self.checkpoints.wait_until_copied()
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            yield
            self.parallel.rest()

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
        number = self.signals.received if self.ranks.world_size == 1 else self.asked_to_stop
        total = self.recipe.total_steps
        if number is None or done == total:
            return
        self._save(done)
        self.checkpoints.wait()
        raise Stopped(
            f"{self.folder.path}: stopped by {number.name} after step {done} of {total}, which is saved: "
            "--resume goes on from there", number,
        )  # fmt: skip

    def _finish(self) -> Path:
        with self._averaged():
            weights = self.parallel.full_weights()
            self.ranks.patiently(lambda: self._write_result(weights) if self.ranks.is_first else None)
        return self.folder.checkpoint

    def _write_result(self, weights: Mapping[str, Tensor]) -> None:
        def fill(target: Path) -> None:
            save_model(target, self.model, self.processor, weights)
            digest = hash_file(target / "model.safetensors")
            facts = {
                "steps": self.recipe.total_steps,
                "training_seconds": round(self.clock.seconds(), 1),
                "weights_sha256": digest,
                "versions": versions(),
                "recipe": self.recipe.to_dict(),
            }
            (target / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

        write_folder_atomically(self.folder.checkpoint, fill, replace=True)
        remove_folder(self.folder.path / "examples")

"""The training loop: plain PyTorch, one step after another."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mirasol.config.recipe import Recipe
from mirasol.console import Progress, print_line
from mirasol.data.sampler import concatenate_samples
from mirasol.errors import Stopped, UserError
from mirasol.training.batches import StepBatch
from mirasol.training.build import Run, build_run, warn
from mirasol.training.distributed import LossOutput, join_ranks, seed_noise, seed_rows
from mirasol.training.export import write_finished_model
from mirasol.training.measures import NonFiniteLoss, check_finite, describe_rows, feature_spread
from mirasol.training.optim import compute_learning_rate
from mirasol.training.run_folder import RunFolder
from mirasol.training.signals import StopSignals

if TYPE_CHECKING:
    from rich.console import Console

# The values of a step by name: numbers, and the name of its stage.
StepValues = dict[str, float | str]


def train(
    recipe: Recipe, *, resume: bool = False, console: "Console | None" = None, watch: Callable[[], None] | None = None
) -> Path:
    """Trains a recipe. Returns the folder of the finished checkpoint, `<output>/checkpoint`.

    With `resume` an interrupted run in `recipe.output` resumes from its newest checkpoint, bit-identically to a run
    that was never interrupted (on a CPU with the same number of threads); a finished run is left unchanged; if there is
    no run yet, one starts. Progress goes to `console`, by default one on stderr; `watch` is called after validations.

    Raises:
        UserError: output already contains a run (without `resume`), the recipe changed (with it), another process is
            training into the same output, bad data, and whatever the parts of a run refuse.
        BadClip: a clip that cannot be read, with `on_bad_clip: error`.
        NonFiniteLoss: a loss or gradient norm is not finite; nothing of that step reached the weights.
        WorkerFailed: a process that decodes or loads clips died, or took longer than `batch_seconds`.
        ProcessLost: another process of the run has ended, or gave no answer for `process_seconds`.
        Stopped: SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) stopped the run; its last step was finished and saved.
    """
    if console is None:
        from rich.console import Console

        console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        ranks, signals = stack.enter_context(join_ranks(recipe)), stack.enter_context(StopSignals())
        console.quiet = console.quiet or not ranks.is_first
        open_folder = partial(RunFolder, recipe, resume, ranks.is_first, partial(warn, console))
        folder = stack.enter_context(ranks.run_together(open_folder))
        if ranks.broadcast(folder.finished):
            print_line(console, f"{folder.path}: this run is finished")
            return folder.checkpoint
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        run = build_run(recipe, folder, ranks, signals, console, watch)
        return write_result(run, run_steps(run))


def run_steps(run: Run) -> int:
    """Takes the steps that are left, and logs, validates and saves as the recipe says. Returns how many steps the run
    has: fewer than the recipe's if it ran out of `patience`."""
    run.signals.defer()
    progress = Progress(run.console, "Training", run.recipe.total_steps, "steps", run.first_step)
    with close_run(run), run.ranks.raise_if_rank_lost(), progress:
        if is_out_of_patience(run):  # a resumed run that had only its result to write
            return run.first_step
        for batch in run.batches:
            if batch.step == run.first_step or run.recipe.find_stage(batch.step)[1] == 0:
                enter_stage(run, batch.stage)
            values = training_step(run, batch)
            after_step(run, batch.step + 1, values, progress)
            if is_out_of_patience(run):
                print_line(run.console, f"ends after step {batch.step + 1}: {run.best.describe()}")
                return batch.step + 1
            stop_if_requested(run, batch)
    if run.encoder is not None and run.encoder.used:
        print_line(run.console, run.encoder.describe())
    return run.recipe.total_steps


def enter_stage(run: Run, name: str) -> None:
    """Sets the model to a stage: what trains, its losses and their weights, dropout and the like."""
    stage = run.recipe.stages[name]
    run.weights.enter(name)
    run.parallel.enter(stage)
    run.regularisers.enter(stage)
    run.model.config.loss_weights = stage.loss_weights


def training_step(run: Run, batch: StepBatch) -> StepValues:
    """One optimizer step. Returns its values; raises NonFiniteLoss before anything reaches the weights."""
    rate = compute_learning_rate(run.recipe, batch.step)
    run.optimizer.set_learning_rate(rate)
    if not run.model.training:  # after a validation
        run.model.train()
    run.optimizer.zero_grad()
    losses, output = compute_gradients(run, batch)
    run.weights.mask_gradients()
    values: StepValues = {"stage": batch.stage, **losses}
    # The values are the same on every process, the rows are not.
    check_finite(lambda: concatenate_samples(run.ranks.gather(batch.rows)), values)
    values["gradient_norm"] = run.optimizer.clip_gradients()
    check_finite(lambda: concatenate_samples(run.ranks.gather(batch.rows)), values)
    run.optimizer.step()
    if run.average is not None:
        run.average.update(batch.step + 1)
    run.clock.count_clips(run.recipe.stages[batch.stage].clips_per_step)
    values["learning_rate"] = rate
    if is_logged(run.recipe, batch.step + 1):
        values |= describe_batch(run, batch, output)
    return values


def compute_gradients(run: Run, batch: StepBatch) -> tuple[dict[str, float], LossOutput]:
    """Gradients of the step's global batch, microbatch by microbatch. Returns its losses, the same on every process,
    and the output of this process's last microbatch."""
    losses = []
    last = len(batch.microbatches) - 1
    seeds = torch.tensor(run.plan.compute_row_seeds(batch.rows), device=run.device).chunk(last + 1)
    for place, (tensors, totals) in enumerate(zip(batch.microbatches, batch.totals, strict=True)):
        seed_noise(run.plan.compute_noise_seed(batch.step, place, run.ranks.rank), run.device)
        seed_rows(run.model, seeds[place])
        output = run.parallel.backward(tensors, totals, is_last=place == last)
        names = [name for name in output if name == "loss" or name.endswith("_loss")]
        losses.append(torch.stack([output[name].detach().float() for name in names]))
    seed_rows(run.model, None)
    total = run.ranks.sum_tensor(torch.stack(losses).sum(0) if len(losses) > 1 else losses[0])
    return dict(zip(names, total.tolist(), strict=True)), output


def describe_batch(run: Run, batch: StepBatch, output: LossOutput) -> StepValues:
    """What a logged step records of its batch: what its rows are, and the spread of the features x."""
    rows = describe_rows(run.recipe, batch.stage, run.plan.batch(batch.step))
    values: StepValues = {"repeated_rows": batch.rows.repeated, **rows}
    if run.recipe.stages[batch.stage].objective == "clips":
        values |= feature_spread(output, batch.microbatches[-1]["chunk_mask"])
    return values


def is_logged(recipe: Recipe, done: int) -> bool:
    """Whether the step after which `done` steps are finished is logged."""
    return done % recipe.log_every == 0 or done in (1, recipe.total_steps)


def after_step(run: Run, done: int, values: StepValues, progress: Progress) -> None:
    """Logs, shows, validates and saves after `done` steps, whatever is due."""
    recipe, is_last = run.recipe, done == run.recipe.total_steps
    run.checkpoints.poll()
    if run.log is not None and is_logged(recipe, done):
        run.log.log_step(done, {**values, **run.clock.start_lap()})
    losses = " ".join(f"{name[:-5]} {loss:.3f}" for name, loss in values.items() if name.endswith("_loss"))
    rate = f"learning rate {values['learning_rate']:.3g}"
    progress.update(done, f"{values['stage']}: loss {values['loss']:.3f} ({losses}), {rate}")
    is_best = False
    if run.validation.parts and (done % recipe.validate_every == 0 or is_last):
        is_best = validate(run, done)
    if done % recipe.checkpoint_every == 0 or is_best or is_last or is_out_of_patience(run):
        save_checkpoint(run, done)


def is_out_of_patience(run: Run) -> bool:
    """Whether as many validations in a row as `patience` were no better than the best one before them."""
    return run.recipe.patience is not None and run.best is not None and run.best.worse_since >= run.recipe.patience


def validate(run: Run, done: int) -> bool:
    """Validates after `done` steps, and takes samples. Returns whether this is the best validation so far.

    Every process validates all clips: sharded weights are gathered by all processes together.
    """
    where = run.model, run.processor, run.validation_clips, run.device
    with run.clock.exclude_time(), run.parallel.use_precision(), use_average(run):
        # The last bits may differ between GPUs, and all processes have to save together.
        parts = run.ranks.broadcast(run.validation.run(*where, run.find_encoder(done - 1)))
        is_best = run.best is not None and run.best.add(done, parts)
        samples = run.samples.take(*where) if run.samples.rows else None
    if run.log is not None:
        run.log.log_validation(done, parts)
        if samples is not None:
            run.log.log_samples(done, samples)
    return is_best


@contextlib.contextmanager
def use_average(run: Run) -> Iterator[None]:
    """Gives the model its averaged weights, if there are any, for as long as the context is open."""
    with contextlib.nullcontext() if run.average is None else run.average.use_as_weights():
        yield
        run.parallel.reshard()


def save_checkpoint(run: Run, done: int) -> None:
    """Begins to write the checkpoint after `done` steps."""
    with run.clock.exclude_time():
        state = {"seconds": run.clock.seconds(), "fingerprint": run.recipe.compute_fingerprint()}
        run.checkpoints.save(done, run.tensors(), state, run.best.step if run.best is not None else None)


def stop_if_requested(run: Run, batch: StepBatch) -> None:
    """Saves and raises Stopped if a signal came. After the last step the run simply finishes."""
    stop_signal = run.signals.received if run.ranks.world_size == 1 else batch.stop_signal
    done, total = batch.step + 1, run.recipe.total_steps
    if stop_signal is None or done == total:
        return
    save_checkpoint(run, done)
    run.checkpoints.wait()
    raise Stopped(
        f"{run.folder.path}: stopped by {stop_signal.name} after step {done} of {total}, which is saved: "
        "continue with --resume", stop_signal,
    )  # fmt: skip


@contextlib.contextmanager
def close_run(run: Run) -> Iterator[None]:
    """Waits for the last checkpoint and closes the log when the context ends, also after an error. A UserError is
    recorded in the run's folder."""
    try:
        yield
        run.checkpoints.wait()
    except BaseException as raised:
        error = raised
        try:
            run.checkpoints.wait()
        except UserError as unwritten:
            # On a full disk the log may fail first; this error also names the checkpoint to resume from.
            error = unwritten if isinstance(raised, OSError) else raised
        if isinstance(error, UserError):
            run.folder.record_error(str(error), error.facts if isinstance(error, NonFiniteLoss) else None)
        raise error from error.__cause__
    finally:
        if run.log is not None:
            run.log.close()
        run.status.hand_back()


def write_result(run: Run, steps: int) -> Path:
    """Writes the finished model after `steps` steps, with averaged weights if there are any. Returns its folder."""
    with use_average(run):
        weights = run.parallel.gather_weights()
        run.ranks.with_heartbeat(lambda: write_finished_model(run, weights, steps) if run.ranks.is_first else None)
    return run.folder.checkpoint

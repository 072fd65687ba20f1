"""Making the runs of a suite: here, in several processes, or on a Ray cluster."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from multiprocessing import connection
from typing import Any

from mirasol.ablation.run import run_once
from mirasol.ablation.runs import Run
from mirasol.errors import Stopped, UserError
from mirasol.processes import make_process_context

# Makes runs, each after the pretraining it needs where that is among them; gives the name and the facts of each as it
# ends. Of the runs given, a pretraining comes before those that need it.
Executor = Callable[[Sequence[Run]], Iterator[tuple[str, dict[str, Any]]]]
Report = Callable[[str, dict[str, Any]], None]
EXECUTORS = ("local", "ray")


def make_runs(left: Sequence[Run], execute: Executor, report: Report) -> None:
    """Makes runs, each as soon as the pretraining it needs is finished.

    Raises UserError for the first run that fails; the others are stopped, and the same command resumes them.
    """
    with closing(execute(left)) as made:
        for name, facts in made:
            report(name, facts)


def run_here(runs: Sequence[Run]) -> Iterator[tuple[str, dict[str, Any]]]:
    """One after the other in this process."""
    for run in runs:
        yield run.name, run_once(run.to_json())


def find_ready(waiting: Sequence[Run], running: Iterable[Run]) -> Run | None:
    """The first run whose pretraining is neither waiting nor running; None where all have to wait."""
    unfinished = {run.name for run in (*waiting, *running)}
    return next((run for run in waiting if run.needs is None or run.needs.name not in unfinished), None)


def run_in_processes(runs: Sequence[Run], jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """In `jobs` processes at a time, each run in a new one: its peak memory is its own, and a crash ends it alone.

    When this ends early the processes are killed: a run may be killed at any moment.
    """
    context, waiting = make_process_context(), list(runs)
    running: dict[Any, tuple[Run, Any]] = {}
    try:
        while waiting or running:
            while len(running) < jobs and (run := find_ready(waiting, [one for one, _ in running.values()])):
                waiting.remove(run)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_send_result, args=(run.to_json(), sender))
                process.start()
                sender.close()
                running[receiver] = run, process
            for receiver in connection.wait(list(running)):
                run, process = running.pop(receiver)
                yield run.name, _receive(run, receiver, process)
    finally:
        for _, process in running.values():
            process.kill()
            process.join()


def _send_result(text: str, sender: connection.Connection) -> None:
    """Makes a run and sends its facts, or the error in place of them."""
    try:
        sender.send(run_once(text))
    except (UserError, Stopped, OSError) as error:
        sender.send(error)


def _receive(run: Run, receiver: connection.Connection, process: Any) -> dict[str, Any]:
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise UserError(
            f"{run.name}: its process ended with exit code {process.exitcode} (out of memory?): see "
            f"{run.folder}, and run the same command again"
        ) from None
    finally:
        receiver.close()
    process.join()
    if isinstance(result, UserError):
        raise UserError(f"{run.name}: {result}") from result
    if isinstance(result, BaseException):
        raise result
    return result


def run_by_ray(runs: Sequence[Run]) -> Iterator[tuple[str, dict[str, Any]]]:
    """On a Ray cluster, whose machines all have to see the folders of data and results: a task for each run, on a GPU
    of its own where the cluster has any.

    Raises UserError where the package ray is missing.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--executor ray needs the package ray: pip install 'mirasol[prepare]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    task = ray.remote(num_gpus=gpus, max_calls=1, max_retries=0)(run_for_ray)
    running: dict[Any, Run] = {}
    references: dict[str, Any] = {}
    for run in runs:  # a task begins when the references it is given are there
        needed = [references[run.needs.name]] if run.needs is not None and run.needs.name in references else []
        references[run.name] = task.remote(run.to_json(), *needed)
        running[references[run.name]] = run
    try:
        while running:
            [done], _ = ray.wait(list(running), num_returns=1)
            run = running.pop(done)
            result = ray.get(done)
            if "error" in result:
                raise UserError(f"{run.name}: {result['error']}")
            yield run.name, result
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def run_for_ray(text: str, *needed: dict[str, Any]) -> dict[str, Any]:
    """`run_once`, whose errors are text, which is what a cluster hands around.

    needed: results of the runs that this one needs; where one of them failed, this one fails with its error
    """
    for result in needed:
        if "error" in result:
            return result
    try:
        return run_once(text)
    except UserError as error:
        return {"error": str(error)}


def choose_executor(name: str, jobs: int) -> Executor:
    """The executor of that name. Raises UserError for an unknown one, and for `jobs` that it would ignore."""
    if name not in EXECUTORS:
        raise UserError(f"--executor {name}: choose {' or '.join(EXECUTORS)}")
    if name == "ray":
        if jobs != 1:
            raise UserError(f"--jobs {jobs} has no effect with --executor ray, whose cluster decides: leave it out")
        return run_by_ray
    return lambda runs: run_in_processes(runs, jobs)

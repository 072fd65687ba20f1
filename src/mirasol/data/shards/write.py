"""`mirasol data shard`: a data set as WebDataset tars with an index, made in parallel, resumed after a kill."""

import dataclasses
import fcntl
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mirasol.config.recipe import DatasetOptions
from mirasol.data.datasets.contract import DatasetSplit
from mirasol.data.media_files import get_index_path
from mirasol.data.shards.format import EXAMPLES, FORMAT, MANIFEST, PLAN, ShardJob, make_example_row, read_finished_index
from mirasol.data.shards.plan import Sharding, ShardPlan, plan_shards
from mirasol.data.shards.write_shard import UNFINISHED, write_shard
from mirasol.errors import UserError
from mirasol.files import hash_file, write_file_atomically
from mirasol.processes import make_process_context

Progress = Callable[[int, int], None]
LOCK = ".lock"
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Sharded:
    """What was done.

    finished_before: shards that were there already; bytes: of all shards
    examples, clips: by split, those that are in the shards; not_usable: annotated examples that are not, by split
    bad: media that cannot be read, each with `media`, `kind`, `reason`
    kept: media that were not re-encoded although that was requested, with the reason
    cut_short: media that are packed although they are known to be cut short, and what they hold
    """

    shards: int
    finished_before: int
    bytes: int
    examples: dict[str, int]
    clips: dict[str, int]
    not_usable: dict[str, int]
    bad: tuple[dict[str, str], ...]
    kept: dict[str, str]
    cut_short: dict[str, str]


def shard_dataset(
    name: str,
    root: Path,
    out: Path,
    split: str | None = None,
    options: DatasetOptions = DatasetOptions(),  # noqa: B008 - frozen
    sharding: Sharding = Sharding(),  # noqa: B008 - frozen
    *,
    on_bad_clip: Literal["error", "skip"] = "error",
    processes: int = 1,
    executor: Literal["local", "ray"] = "local",
    progress: Progress | None = None,
) -> Sharded:
    """Writes a data set, or one split of it, as shards into the folder `out` (`mirasol.data.shards.format`).

    The same data set and settings give the same bytes, however many `processes` work and however often the work was
    interrupted; shards that are finished are not made again. `executor="ray"` works on a Ray cluster, whose machines
    all have to see `root` and `out`. `on_bad_clip="error"` stops at annotations and media that cannot be used, "skip"
    leaves them out; the manifest counts and lists them, and so does the result. `progress(done, total)` counts clips.

    Raises:
        UserError: an unknown data set, split, option; `out` holds something else, or shards of another data set or of
            other settings; a bad clip; a disk that is full; a process that died.
    """
    return write_shards(
        plan_shards(name, root, out, split, options, sharding, on_bad_clip=on_bad_clip),
        on_bad_clip=on_bad_clip,
        processes=processes,
        executor=executor,
        progress=progress,
    )


def write_shards(
    plan: ShardPlan,
    *,
    on_bad_clip: Literal["error", "skip"] = "error",
    processes: int = 1,
    executor: Literal["local", "ray"] = "local",
    progress: Progress | None = None,
) -> Sharded:
    """Writes the shards of a plan, as `shard_dataset` does."""
    settings = plan.settings()
    with _take_folder(plan.out, settings) as before:
        work = [job for of_split in plan.jobs.values() for job in of_split]
        finished = sum(read_finished_index(job.path) is not None for job in work)
        # Closed at an error, too: the folder stays taken until no process writes there any more.
        with closing(_write_all(work, processes, executor, progress)) as written:
            indices = _collect_indices(written, plan.root, on_bad_clip)
        result = _make_result(plan.datasets, plan.jobs, indices, finished)
        if before is None:
            entries = {s.split: _finish_split(s, plan.out, plan.jobs[s.split], indices) for s in plan.datasets}
            manifest = {"format": FORMAT, "source": plan.datasets[0].name, "plan": settings, "splits": entries}
            write_file_atomically(plan.out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        (plan.out / PLAN).unlink(missing_ok=True)
    return result


def _collect_indices(
    written: Iterator[tuple[str, dict[str, Any]]], root: Path, on_bad_clip: str
) -> dict[str, dict[str, Any]]:
    """The index of every shard by name. Raises UserError at the first bad clip where that is asked for."""
    indices = {}
    for name, index in written:
        if index["bad"] and on_bad_clip == "error":
            first = index["bad"][0]
            raise UserError(
                f"{root / first['media']}: {first['reason']}; leave such clips out with --on-bad-clip skip "
                f"(finished shards are kept)"
            )
        indices[name] = index
    return indices


@contextmanager
def _take_folder(out: Path, plan: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
    """Keeps `out` to this process; gives the manifest where everything is done already.

    Raises UserError where the folder cannot be used or belongs to another plan.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = {path.name for path in out.iterdir()} - {LOCK}
        if held and not held & {PLAN, MANIFEST}:
            raise UserError(f"{out}: holds something else: give another folder, for nothing is overwritten")
        lock = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{out}: cannot be written to ({error.strerror}): give another folder") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out}: another process writes shards here: wait for it or stop it") from error
        except OSError as error:
            raise UserError(
                f"{out}: its disk cannot lock files ({error.strerror}), and two processes could mix their shards: "
                f"give a folder on another disk"
            ) from error
        done = (out / MANIFEST).is_file()
        before = _read_plan(out, done)
        _check_same_plan(out, before, plan, held)
        if not done:
            write_file_atomically(out / PLAN, json.dumps(plan, indent=1) + "\n")
        for left in out.glob(f"*/.*{UNFINISHED}"):
            left.unlink(missing_ok=True)  # of a run that was killed
        yield before if done else None
        (out / LOCK).unlink(missing_ok=True)
    finally:
        os.close(lock)


def _read_plan(out: Path, done: bool) -> dict[str, Any] | None:
    file = out / (MANIFEST if done else PLAN)
    try:
        content = json.loads(file.read_bytes())
        return content["plan"] if done else content
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error}): give another folder") from error


def _check_same_plan(out: Path, before: dict[str, Any] | None, plan: dict[str, Any], held: set[str]) -> None:
    if before is None:
        return
    for key, value in plan.items():
        if before.get(key) != value:
            shown = "has changed" if key == "content of the data set" else f"was {before.get(key)}, now it is {value}"
            raise UserError(
                f"{out}: holds shards made otherwise: {key} {shown}: give another folder, or remove this one"
            )


def _write_all(
    jobs: Sequence[ShardJob], processes: int, executor: str, progress: Progress | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, index) of every shard, in the order in which they are done."""
    total = sum(len(job.samples) for job in jobs)
    if all(read_finished_index(job.path) is not None for job in jobs):
        processes, executor = 1, "local"  # nothing to do but to read what is there
    if executor == "ray":
        return _write_by_ray(jobs, total, progress)
    if processes == 1 or len(jobs) == 1:
        return _write_here(jobs, total, progress)
    return _write_by_processes(jobs, processes, total, progress)


def _write_here(jobs: Sequence[ShardJob], total: int, progress: Progress | None) -> Iterator[tuple[str, Any]]:
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    for job in jobs:
        yield job.name, write_shard(job, count)


_counter: Any = None  # in a process of the pool: how many clips all of them have done


def _take_counter(counter: Any) -> None:
    global _counter
    _counter = counter


def _count() -> None:
    with _counter.get_lock():
        _counter.value += 1


def _write_counted(job: ShardJob) -> dict[str, Any]:
    return write_shard(job, _count)


def _write_by_processes(
    jobs: Sequence[ShardJob], processes: int, total: int, progress: Progress | None
) -> Iterator[tuple[str, Any]]:
    context = make_process_context()
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_take_counter, initargs=(counter,))
    try:
        running = {pool.submit(_write_counted, job): job.name for job in jobs}
        while running:
            ended, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            if progress is not None:
                progress(counter.value, total)
            for future in ended:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that writes shards was killed (out of memory?): run the same command again, with fewer "
            "--processes; finished shards are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _write_by_ray(jobs: Sequence[ShardJob], total: int, progress: Progress | None) -> Iterator[tuple[str, Any]]:
    try:
        import ray.data
    except ImportError as error:
        raise UserError("--executor ray needs the package ray: pip install 'mirasol[prepare]'") from error
    items = [{"job": job.to_json()} for job in jobs]
    clips = {job.name: len(job.samples) for job in jobs}
    done = 0
    for row in ray.data.from_items(items, override_num_blocks=len(items)).map(write_row).iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        done += clips[row["name"]]
        if progress is not None:
            progress(done, total)
        yield row["name"], json.loads(row["index"])


def write_row(row: dict[str, str]) -> dict[str, str]:
    """`write_shard` as a function of rows of text, which is what a cluster hands around."""
    job = ShardJob.from_json(row["job"])
    try:
        return {"name": job.name, "index": json.dumps(write_shard(job)), "error": ""}
    except UserError as error:
        return {"name": job.name, "index": "", "error": str(error)}


def _finish_split(
    dataset: DatasetSplit, out: Path, jobs: Sequence[ShardJob], indices: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Writes the split's examples; returns its part of the manifest."""
    places: dict[str, str] = {}
    lost: dict[str, dict[str, str]] = {}
    shards = {}
    for job in jobs:
        index = indices[job.name]
        members = {name.partition(".")[0]: name for name in index["members"] if not name.endswith(".json")}
        places |= {s.media: f"{job.name}/{members[s.key]}" for s in job.samples if s.key in members}
        lost |= {entry["media"]: entry for entry in index["bad"]}
        shards[job.name] = {
            "clips": len(members),
            "bytes": index["bytes"],
            "sha256": index["sha256"],
            "index_sha256": hash_file(get_index_path(job.path)),
        }
    asked = _write_examples(dataset, out, places, lost)
    problems, reasons = [dataclasses.asdict(problem) for problem in dataset.problems], dict(dataset.reasons)
    for media, entry in lost.items():
        problems.append({"kind": entry["kind"], "message": entry["reason"], "file": media, "examples": asked[media]})
        reasons[entry["kind"]] = reasons.get(entry["kind"], 0) + asked[media]
    reencoded = {"reencoded": jobs[0].reencode} if jobs[0].reencode else {}
    return {
        "examples": len(dataset.annotated),
        "clips": sum(entry["clips"] for entry in shards.values()),
        "sha256": hash_file(out / dataset.split / EXAMPLES),
        "protocol": dataset.protocol,
        "classes": list(dataset.classes),
        "facts": {**dataset.facts, **reencoded},
        "published": dataclasses.asdict(dataset.published),
        "annotation_files": list(dataset.annotation_files),
        "problems": problems,
        "reasons": reasons,
        "kept": _merge_by_media("kept", (indices[job.name] for job in jobs)),
        "cut_short": _merge_by_media("cut_short", (indices[job.name] for job in jobs)),
        "shards": shards,
    }


def _write_examples(
    dataset: DatasetSplit, out: Path, places: Mapping[str, str], lost: Collection[str]
) -> dict[str, int]:
    """Writes a split's examples, their media at their `places` in the shards; returns how many each lost one costs."""
    lines, asked = [], dict.fromkeys(lost, 0)
    for example in dataset.annotated:
        row = make_example_row(example, dataset.classes)
        if example.media in lost:
            asked[example.media] += 1
        elif example.media:
            row["media"] = places[example.media]
        lines.append(json.dumps(row) + "\n")
    write_file_atomically(out / dataset.split / EXAMPLES, "".join(lines))
    return asked


def _make_result(
    datasets: Sequence[DatasetSplit], jobs: dict[str, list[ShardJob]], indices: dict[str, dict[str, Any]], finished: int
) -> Sharded:
    bad = {entry["media"]: entry for index in indices.values() for entry in index["bad"]}
    usable = {s.split: sum(example.media not in bad for example in s.examples) for s in datasets}
    clips = {
        split: sum(sum(name.endswith(".json") for name in indices[job.name]["members"]) for job in of_split)
        for split, of_split in jobs.items()
    }
    lost = {dataset.split: dataset.counts.n_annotated - usable[dataset.split] for dataset in datasets}
    size = sum(index["bytes"] for index in indices.values())
    kept, cut_short = (_merge_by_media(name, indices.values()) for name in ("kept", "cut_short"))
    return Sharded(len(indices), finished, size, usable, clips, lost, tuple(bad.values()), kept, cut_short)


def _merge_by_media(name: str, indices: Iterable[dict[str, Any]]) -> dict[str, str]:
    """What all of these indices say under `name`, by media."""
    return {media: reason for index in indices for media, reason in index[name].items()}

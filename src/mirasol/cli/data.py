"""`mirasol data`: data sets on disk."""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from mirasol.cli.common import add_data_arguments, add_dataset_arguments, check_positive
from mirasol.errors import UserError

SHOWN = 20  # clips that are left out and named on the screen

HELP = "make, check and shard data sets (data synthesize, data check, data shard)"
DESCRIPTION = "Makes data sets on disk, checks existing ones, and packs them into shards."
SYNTHESIZE = """Renders shapes and sounds: real mp4 files and questions about them, deterministic in the seed.

  mirasol data synthesize data/shapes --seed 7 --train 0 --validation 0 --test 100
  mirasol data synthesize data/chat --kind conversations --train 1000  training clips have questions after others, too
  mirasol data synthesize data/signs --world signs --test 100 other shapes, colours, motions and sounds
  mirasol data synthesize data/flashes --kind flashes --train 800     half a minute of short flashes (docs/ablations.md)
  mirasol data synthesize data/lamps --kind lamps --train 1200        what was seen long ago (docs/ablations.md)
  mirasol data synthesize data/captions --kind captions --train 1000   for pretraining: images, captions or sounds"""

CHECK = """Reads all annotations of a data set and opens the media: counts per split and type next to the published
ones, missing and undecodable files, files without audio, durations, duplicates. Ends with code 1 if there are problems.
DATASET is folder (your own: SPLIT.jsonl or SPLIT.csv next to media files) or the name of a public data set, which
docs/datasets.md lists; ROOT is the folder of its annotations and media. Which of --annotations, --class-list,
--prompt, --targets and --pattern a data set takes is in its section there; others are refused.

  mirasol data check folder data/shapes
  mirasol data check msrvtt_qa data/msrvtt --split test --json"""

SHARD = """Packs a data set into WebDataset tars with an index: few large files instead of many small ones, on request
re-encoded at the size that training needs. The data set `shards` reads them, with the same examples.
After an interruption the same command continues; finished shards are kept. Clips, bytes and shards are printed first;
--dry-run stops there.

  mirasol data shard msrvtt_qa data/msrvtt data/msrvtt-shards --reencode 256@8 --processes 8
  mirasol data check shards data/msrvtt-shards --hashes"""


def add_arguments(parser: Any, make: Any) -> None:
    """Declares the arguments of `synthesize`, `check` and `shard`."""
    commands = parser.add_subcommands(required=True, dest="action", metavar="ACTION", title="actions")
    synthesize = make(SYNTHESIZE)
    commands.add_subcommand("synthesize", synthesize, help="render shapes and sounds to mp4 files with questions")
    synthesize.add_argument("directory", metavar="DIR", help="new folder for the data set")
    add_data_arguments(synthesize)
    synthesize.add_argument(
        "--kind",
        type=str,
        default="questions",
        help="questions, whole (none about single seconds), conversations; longer and harder: flashes, long_flashes; "
        "of things seen long ago: lamps; for pretraining: images, captions, sounds",
    )
    synthesize.add_argument(
        "--world", type=str, default="shapes", help="shapes (what the shipped weights know) or signs (what they do not)"
    )
    synthesize.add_argument("--workers", type=int, default=0, help="processes that render; 0 is one per core")
    check = make(CHECK)
    commands.add_subcommand("check", check, help="read a data set's annotations and open its media")
    add_dataset_arguments(check)
    check.add_argument("--split", type=str, help="only this split")
    check.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    check.add_argument("--skip-media", action="store_true", help="look which media files exist, but open none")
    check.add_argument("--workers", type=int, default=0, help="threads that open media; 0 is one per core")
    check.add_argument("--max-text-length", type=int, default=64, help="tokens over which a text is listed as long")
    check.add_argument(
        "--tokenizer",
        type=str,
        metavar="CHECKPOINT",
        help="whose tokenizer counts them; else the least possible",
    )
    check.add_argument("--hashes", action="store_true", help="of shards: read every byte and compare its hash")
    shard = make(SHARD)
    commands.add_subcommand("shard", shard, help="pack a data set into tars with an index")
    add_dataset_arguments(shard)
    shard.add_argument("out", metavar="OUT", help="folder for the shards, outside of ROOT")
    shard.add_argument("--split", type=str, help="only this split")
    shard.add_argument("--shard-bytes", type=int, default=500_000_000, help="most bytes of media in a shard")
    shard.add_argument("--clips-per-shard", type=int, default=10_000, help="most media files in a shard")
    shard.add_argument(
        "--reencode", type=str, metavar="SIZE[@FPS]", help="shorter side in pixels, and most frames a second"
    )
    shard.add_argument("--processes", type=int, default=0, help="processes that write shards; 0 is one per core")
    shard.add_argument("--executor", type=str, default="local", help="local processes, or ray: a Ray cluster")
    shard.add_argument(
        "--on-bad-clip", type=str, default="error", help="skip leaves out unusable clips, error stops at the first"
    )
    shard.add_argument("--dry-run", action="store_true", help="print what would be written, and write nothing")


def run(options: Any) -> None:
    """Does the action."""
    {"synthesize": _synthesize, "check": _check, "shard": _shard}[options.action](options[options.action])


def _check(chosen: Any) -> None:
    from mirasol.cli.common import read_dataset_options
    from mirasol.console import count_cores, make_console, show_progress
    from mirasol.data.check import check_dataset, format_report
    from mirasol.data.text_lengths import make_counter

    check_positive("--max-text-length", chosen.max_text_length)
    count_tokens = None
    if chosen.tokenizer is not None:
        from mirasol.checkpoint import load_processor

        count_tokens = make_counter(load_processor(chosen.tokenizer).tokenizer)
    with show_progress(make_console(), "Opening", "files") as report:
        found = check_dataset(
            chosen.dataset,
            chosen.root,
            chosen.split,
            read_dataset_options(chosen),
            open_media=not chosen.skip_media,
            hashes=chosen.hashes,
            workers=chosen.workers or count_cores(),
            progress=report,
            max_text_length=chosen.max_text_length,
            count_tokens=count_tokens,
        )
    sys.stdout.write((json.dumps(found.to_dict()) if chosen.json else format_report(found)) + "\n")
    if not found.good:
        raise SystemExit(1)


def _synthesize(chosen: Any) -> None:
    from mirasol.console import count_cores, make_console, show_progress
    from mirasol.synthetic.synthesize import synthesize
    from mirasol.synthetic.worlds import find_world

    world = find_world(chosen.world)
    out, began = make_console(), time.monotonic()
    with show_progress(out, "Rendering", "clips") as report:
        synthesize(
            chosen.directory,
            seed=chosen.seed,
            train=chosen.train,
            validation=chosen.validation,
            test=chosen.test,
            kind=chosen.kind,
            world=world,
            workers=chosen.workers or count_cores(),
            progress=report,
        )
    total = chosen.train + chosen.validation + chosen.test
    out.print(f"{chosen.directory}: {total} clips in {time.monotonic() - began:.0f} s")


def _shard(chosen: Any) -> None:
    from mirasol.cli.common import read_dataset_options
    from mirasol.console import count_cores, make_console, show_progress

    for name, known in (("executor", ("local", "ray")), ("on_bad_clip", ("error", "skip"))):
        if chosen[name] not in known:
            raise UserError(f"--{name.replace('_', '-')} {chosen[name]}: choose {' or '.join(known)}")
    if chosen.executor == "ray" and chosen.processes:
        raise UserError(f"--processes {chosen.processes} has no effect with --executor ray: leave it out")
    if chosen.processes < 0:
        raise UserError(f"--processes {chosen.processes}: must be at least 0")

    from mirasol.data.shards.plan import Sharding, plan_shards
    from mirasol.data.shards.write import write_shards
    from mirasol.media.transcode import Reencoding

    reencode = Reencoding.parse(chosen.reencode) if chosen.reencode else None
    out, began = make_console(), time.monotonic()
    plan = plan_shards(
        chosen.dataset,
        chosen.root,
        chosen.out,
        chosen.split,
        read_dataset_options(chosen),
        Sharding(chosen.shard_bytes, chosen.clips_per_shard, reencode),
        on_bad_clip=chosen.on_bad_clip,
    )
    for line in _format_plan(plan):
        out.print(line, markup=False)
    if chosen.dry_run:
        return
    with show_progress(out, "Sharding", "clips") as report:
        done = write_shards(
            plan,
            on_bad_clip=chosen.on_bad_clip,
            processes=chosen.processes or count_cores(),
            executor=chosen.executor,
            progress=report,
        )
    for line in _format_result(done):
        out.print(line, markup=False)
    before = f", {done.finished_before} of them finished before" if done.finished_before else ""
    seconds = time.monotonic() - began
    out.print(f"{chosen.out}: {done.shards} shards{before}, {_format_megabytes(done.bytes)} in {seconds:.0f} s")


def _format_plan(plan: Any) -> Iterator[str]:
    """What will be written: clips, bytes and shards of every split, media larger than a shard, want of room."""
    sharding = plan.sharding
    for split, jobs in plan.jobs.items():
        clips, length = len(plan.sizes[split]), _format_megabytes(sum(plan.sizes[split].values()))
        before = f", before re-encoding ({sharding.reencode})" if sharding.reencode else ""
        most = f"at most {_format_megabytes(sharding.shard_bytes)} and {sharding.clips_per_shard} clips each"
        yield f"{split}: {clips} clips, {length}{before}, into {len(jobs)} shards of {most}"
    larger = sorted(plan.larger.items(), key=lambda entry: -entry[1])
    entries = [f"{media} ({_format_megabytes(length)})" for media, length in larger]
    yield from _shorten_list("larger than a shard may be, so alone in one: ", entries)
    left, free = plan.count_bytes_left(), plan.find_free_bytes()
    if left > free and sharding.reencode is None:
        needed, room = _format_megabytes(left), _format_megabytes(free)
        yield f"{plan.out}: {needed} are to be written, but its disk has {room} free"


def _format_result(done: Any) -> Iterator[str]:
    for split, examples in done.examples.items():
        lost = f", {done.not_usable[split]} examples left out" if done.not_usable[split] else ""
        yield f"{split}: {examples} examples on {done.clips[split]} clips{lost}"
    yield from _shorten_list("left out: ", [f"{entry['media']}: {entry['reason']}" for entry in done.bad])
    yield from _shorten_list("packed although ", [f"{media} is {reason}" for media, reason in done.cut_short.items()])
    for reason, count in Counter(done.kept.values()).items():
        yield f"not re-encoded: {count} files ({reason})"


def _shorten_list(head: str, entries: list[str]) -> Iterator[str]:
    """A line for each entry, for the first `SHOWN` of them."""
    yield from (head + entry for entry in entries[:SHOWN])
    if len(entries) > SHOWN:
        yield f"{head}… and {len(entries) - SHOWN} more: see manifest.json"


def _format_megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"

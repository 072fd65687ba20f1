"""`make fuzz N=10000 SEED=1 KIND=media`: mutated inputs, read in a process that may crash.

Case `number` of a seed is always the same. Allowed outcomes are that the input is read, with or without notes, or a
BadClip or UserError of one line. Everything else is a finding: another error, a crash, no progress for 30 s, more
memory than the cap, a file written outside of the folder that the case is given. A finding is made smaller and appended
to findings.jsonl as the seed's name and its mutations, which `--replay` runs again.

Progress is kept in --folder each minute: the same command goes on where it stopped, unless the number of cases is
reached.
"""

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import targets
import text_seeds
from media_seeds import render_seeds
from mutations import Mutation, draw_byte_mutation, draw_text_mutation, draw_token_mutation, mutate

from mirasol.errors import BadClip
from mirasol.media.isolation.decoders import run_isolated
from mirasol.media.limits import Limits

KINDS = ("media", "annotations", "tars", "predictions", "recipes", "config", "safetensors", "tokenizers")
LIMITS = Limits(max_idle_seconds=30.0, max_memory=2**30)
# The first case of these imports PyTorch in the decoder process, which takes long on a busy machine.
HEAVY = Limits(max_idle_seconds=120.0, max_memory=3 * 2**30)
SLOW_SECONDS = 30.0
REPORT_SECONDS = 60.0
MOST_OF_A_FINDING = 20  # findings that look the same and are kept
CHECKPOINT_FILES = {
    "config": ("config.json",),
    "safetensors": ("model.safetensors",),
    "tokenizers": ("tokenizer.json", "tokenizer_config.json", "processor_config.json"),
}
CONTAINERS = ("mp4", "matroska", "mpegts", "avi", "flv", "mov", "webm", "ogg")
REASONS = ("the reader failed", "the decoder crashed", "the decoder ended", "the decoder made no progress",
           "decoding it takes more than")  # fmt: skip


@dataclass
class Finding:
    """What went wrong, and how to see it again. `mutated`: the file of the seed that is changed."""

    kind: str
    seed: str
    mutated: str
    mutations: list[Mutation]
    number: int
    outcome: str


@dataclass
class State:
    """What has been done of a run."""

    done: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: Counter[str] = field(default_factory=Counter)


class Fuzzer:
    """Cases of one kind of input; `folder` is for seeds and everything that is written."""

    def __init__(self, kind: str, seed: int, folder: Path, only: str = "*"):
        self.kind, self.seed = kind, seed
        self.folder = folder.absolute()
        self.sandbox = self.folder / "sandbox"
        self.limits = LIMITS if kind in ("media", "annotations", "tars", "recipes") else HEAVY
        self.seeds = {key: files for key, files in self._load_seeds().items() if fnmatch(key[1], only)}
        self.media = {name: content for files in self.seeds.values() for name, content in files.items() if content}

    def _load_seeds(self) -> dict[tuple[str, str], dict[str, bytes]]:
        """(what it is, name) → its files."""
        if self.kind == "media":
            rendered = render_seeds(self.folder / "media-seeds")
            return {("media", name): {name: content} for name, content in rendered.items()}
        if self.kind == "annotations":
            return text_seeds.list_annotations()
        if self.kind == "tars":
            clip = render_seeds(self.folder / "media-seeds")["h264.mp4"]
            return {**text_seeds.list_shards(), **text_seeds.make_own_shards(self.folder / "own", clip)}
        if self.kind == "predictions":
            return text_seeds.list_predictions()
        if self.kind == "recipes":
            return text_seeds.list_recipes()
        checkpoint = text_seeds.make_checkpoint(self.folder / "checkpoint")
        names = CHECKPOINT_FILES[self.kind]
        return {("checkpoint", name): checkpoint for name in names if name in checkpoint}

    def draw(self, number: int) -> tuple[tuple[str, str], str, list[Mutation]]:
        """Seed, mutated file and mutations of a case."""
        generator = random.Random(f"{self.seed}/{self.kind}/{number}")
        key = generator.choice(sorted(self.seeds))
        files = self.seeds[key]
        name = key[1] if key[0] == "checkpoint" else generator.choice(self._mutable(files))
        size, others = max(1, len(files[name])), sorted(self.media)
        if self.kind == "media" and name.rpartition(".")[2] not in targets.IMAGES and generator.random() < 0.12:
            return key, name, [("remux", generator.choice(CONTAINERS), generator.randrange(2**30))]
        binary = name.endswith((".tar", ".npy")) or self.kind == "media"
        count = generator.choice((1, 1, 1, 2, 3, 5, 20 if binary else 4))
        if name == "model.safetensors":
            header = 8 + int.from_bytes(files[name][:8], "little")
            draws = [draw_byte_mutation, draw_token_mutation]
            return key, name, [generator.choice(draws)(generator, header, others) for _ in range(count)]
        draw = draw_byte_mutation if binary else draw_text_mutation
        return key, name, [draw(generator, size, others) for _ in range(count)]

    def _mutable(self, files: dict[str, bytes]) -> list[str]:
        """The files that may be mutated: those with content, and of predictions these alone."""
        names = sorted(name for name, content in files.items() if content)
        return [name for name in names if name.startswith("pred.") or self.kind != "predictions"]

    def run(self, key: tuple[str, str], name: str, mutations: Sequence[Mutation], number: int) -> list[str]:
        """The outcomes of a case; a finding begins with "FOUND"."""
        begin = time.monotonic()
        shutil.rmtree(self.sandbox, ignore_errors=True)
        inside = self.sandbox / "inside"
        inside.mkdir(parents=True)
        try:
            self._write(inside, key, name, mutations)
            before = sorted(str(path) for path in self.sandbox.rglob("*"))
            outcomes = self._exercise(inside, key, name, number)
        except BadClip as error:
            begins = [reason for reason in REASONS if error.reason.startswith(reason)]
            outcomes = [f"FOUND {error.reason[:300]}" if begins else "BadClip"]
            before = sorted(str(path) for path in self.sandbox.rglob("*"))
        except Exception as error:
            return [f"FOUND in the process that reads: {type(error).__name__}: {error}"]
        if time.monotonic() - begin > SLOW_SECONDS and self.limits is LIMITS:
            outcomes.append(f"FOUND slow: {time.monotonic() - begin:.0f} s")
        after = sorted(str(path) for path in self.sandbox.rglob("*"))
        if set(after) - set(before):
            outcomes.append(f"FOUND written: {sorted(set(after) - set(before))[:3]}")
        return outcomes

    def _write(self, inside: Path, key: tuple[str, str], name: str, mutations: Sequence[Mutation]) -> None:
        for other, content in self.seeds[key].items():
            file = inside / other
            file.parent.mkdir(parents=True, exist_ok=True)
            if other != name:
                if key[0] == "checkpoint":
                    file.symlink_to(self.folder / "checkpoint" / other)
                else:
                    file.write_bytes(content)
            elif mutations and mutations[0][0] == "remux":
                _, container, seed = mutations[0]
                run_isolated(self.limits, file, targets.remux, content, file, container, seed)
            elif other == "model.safetensors":
                length = 8 + int.from_bytes(content[:8], "little")
                header = mutate(content[8:length], [m for m in mutations if m[0] == "token"], self.media)
                head = len(header).to_bytes(8, "little") + header
                file.write_bytes(mutate(head, [m for m in mutations if m[0] != "token"], self.media) + content[length:])
            else:
                file.write_bytes(mutate(content, mutations, self.media))

    def _exercise(self, inside: Path, key: tuple[str, str], name: str, number: int) -> list[str]:
        if self.kind == "media":
            kind = name.rpartition(".")[2] if name.startswith("image") else "media"
            return run_isolated(self.limits, name, targets.exercise_media, inside / name, kind, number, self.limits)
        exercise = {
            "annotations": targets.exercise_annotations,
            "tars": targets.exercise_shards,
            "predictions": targets.exercise_predictions,
            "recipes": targets.exercise_recipe,
        }.get(self.kind, targets.exercise_checkpoint)
        return run_isolated(self.limits, name, exercise, inside, name if key[0] == "checkpoint" else key[0])

    def shrink(self, finding: Finding, key: tuple[str, str]) -> Finding:
        """The finding without the mutations that it does not need."""
        kept = list(finding.mutations)
        for mutation in list(kept):
            fewer = [other for other in kept if other is not mutation]
            if fewer and _gist(self.run(key, finding.mutated, fewer, finding.number)) == _gist([finding.outcome]):
                kept = fewer
        finding.mutations = kept
        return finding

    def cases(self, first: int, last: int) -> Iterator[tuple[int, list[str], Finding | None]]:
        """Runs cases; yields their outcomes and, where there is one, the finding."""
        for number in range(first, last):
            (self.folder / "current").write_text(str(number))
            key, name, mutations = self.draw(number)
            outcomes = self.run(key, name, mutations, number)
            found = next((outcome for outcome in outcomes if outcome.startswith("FOUND")), None)
            finding = Finding(self.kind, "/".join(key), name, mutations, number, found) if found else None
            yield number, outcomes, finding


def _gist(outcomes: Sequence[str]) -> str:
    """What findings of one cause have in common."""
    found = next((outcome for outcome in outcomes if outcome.startswith("FOUND")), "")
    return "".join(letter for letter in found[:90] if not letter.isdigit())


def load_state(file: Path) -> State:
    if not file.is_file():
        return State()
    values = json.loads(file.read_text())
    return State(values["done"], values["seconds"], Counter(values["outcomes"]), Counter(values["findings"]))


def save_state(file: Path, state: State) -> None:
    file.with_suffix(".new").write_text(json.dumps(vars(state), indent=1))
    os.replace(file.with_suffix(".new"), file)


def fuzz(
    kind: str,
    seed: int,
    count: int,
    folder: Path,
    minutes: float = float("inf"),
    quiet: bool = False,
    only: str = "*",
) -> State:
    """Runs the cases up to `count` that were not run before, for at most so many minutes; returns the state.

    `only`: a pattern of the names of the seeds that are mutated.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "state.json"
    state, fuzzer = load_state(file), Fuzzer(kind, seed, folder)
    begin, before, reported = time.monotonic(), state.seconds, time.monotonic()
    for number, outcomes, finding in fuzzer.cases(state.done, count):
        state.done = number + 1
        state.outcomes[_summary(outcomes)] += 1
        if finding is not None:
            gist = _gist([finding.outcome])
            state.findings[gist] += 1
            if state.findings[gist] <= MOST_OF_A_FINDING:
                key, _, _ = fuzzer.draw(number)
                finding = fuzzer.shrink(finding, key) if state.findings[gist] <= 3 else finding
                with (folder / "findings.jsonl").open("a") as out:
                    out.write(json.dumps(asdict(finding)) + "\n")
        now = time.monotonic()
        state.seconds = before + now - begin
        if now - reported > REPORT_SECONDS:
            reported = now
            save_state(file, state)
            if not quiet:
                print(f"{kind}: {state.done} of {count}, {sum(state.findings.values())} findings", flush=True)
        if now - begin > 60 * minutes:
            break
    save_state(file, state)
    shutil.rmtree(fuzzer.sandbox, ignore_errors=True)
    (folder / "current").unlink(missing_ok=True)
    return state


def _summary(outcomes: Sequence[str]) -> str:
    """One word for a case."""
    for word in ("FOUND", "noted"):
        if any(outcome.startswith(word) for outcome in outcomes):
            return {"FOUND": "finding", "noted": "read with notes"}[word]
    return "read" if all(outcome == "read" for outcome in outcomes) else "refused in one line"


def replay(finding: dict[str, Any], folder: Path) -> list[str]:
    """Runs a finding again; returns its outcomes."""
    fuzzer = Fuzzer(finding["kind"], 0, folder)
    kind, _, name = finding["seed"].partition("/")
    mutations = [tuple(mutation) for mutation in finding["mutations"]]
    return fuzzer.run((kind, name), finding["mutated"], mutations, finding["number"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=[*KINDS, "all"], default="all")
    parser.add_argument("--count", "-n", type=int, default=10_000, help="cases; of kind all: of media, others a tenth")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="most time for each kind")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="mutate seeds of these names, such as '*.ts'")
    parser.add_argument("--folder", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run the findings of a findings.jsonl again")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, 8 * 2**30))
    if options.replay:
        for line in options.replay.read_text().splitlines():
            with tempfile.TemporaryDirectory() as folder:
                print(json.loads(line)["outcome"][:100], "→", replay(json.loads(line), Path(folder)), flush=True)
        return
    failed = False
    for kind in KINDS if options.kind == "all" else [options.kind]:
        count = options.count if options.kind == kind or kind == "media" else -(-options.count // 10)
        folder = options.folder / f"{kind}-{options.seed}"
        state = fuzz(kind, options.seed, count, folder, options.minutes, only=options.only)
        print(f"{kind}: {state.done} cases in {state.seconds:.0f} s: {dict(state.outcomes)}", flush=True)
        for gist, count in state.findings.most_common():
            print(f"  {count} x {gist}", flush=True)
        failed |= bool(state.findings)
    sys.exit(failed)


if __name__ == "__main__":
    main()

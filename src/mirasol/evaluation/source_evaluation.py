"""A checkpoint on a data set: what was asked becomes predictions, numbers under every protocol, and files."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirasol.checkpoint import Loaded
from mirasol.data.datasets import DatasetSplit
from mirasol.data.example import ClipExamples, Example, group_by_clip
from mirasol.data.media_files import is_image
from mirasol.errors import UserError
from mirasol.evaluation.asking import Asking, Row, ask, clip_key
from mirasol.evaluation.journal import Journal
from mirasol.evaluation.predictions import Prediction, official_format
from mirasol.evaluation.results import describe_data, versions
from mirasol.evaluation.scoring import (
    CANDIDATES,
    FILES,
    OPEN,
    WUPS,
    Estimate,
    Scored,
    as_text,
    score_answers,
    score_choices,
    score_wups,
    with_answers,
)
from mirasol.evaluation.tables import normalisation_of
from mirasol.evaluation.wups import Wups
from mirasol.files import write_whole
from mirasol.media.processor import MirasolProcessor

HOW = {
    OPEN: "greedy decoding over the whole vocabulary; right where it equals a reference after the normalisation",
    CANDIDATES: "the candidate of highest log-likelihood per token, <eos> included; for mAP, AUC and d-prime its "
    "log-softmax over the candidates",
    WUPS: "greedy decoding over the whole vocabulary; a word counts by its WordNet similarity to the reference's, as "
    "in NExT-QA's script, without a threshold and with 0.9",
}


# What the model sees of a clip, which every published number names; the checkpoint's hash covers the rest.
SEEN = ("frames_per_chunk", "num_chunks", "chunk_seconds", "max_chunks", "image_size")


@dataclass(frozen=True)
class Evaluated:
    """One checkpoint on one split.

    protocols: numbers by protocol, open generation (the headline) first; controls: by protocol, then by control
    predictions: by question id, with answers and scores; chunks: length of each clip by question id
    unusable: clips that could not be read with the reason; counts: n_annotated to n_evaluated and `reasons`
    record: what results.json holds
    """

    dataset: DatasetSplit
    protocols: dict[str, Scored]
    controls: dict[str, dict[str, Scored]]
    examples: tuple[Example, ...]
    predictions: Mapping[str, Prediction]
    chunks: Mapping[str, int]
    record: dict[str, Any]

    def table(self) -> str:
        """All protocols, controls, counts, for the screen."""
        parts = [as_text(scored) for scored in self.protocols.values()]
        for protocol, controls in self.controls.items():
            name = self.protocols[protocol].headline
            shown = [f"{control} {_percent(scored.metrics.get(name))}" for control, scored in controls.items()]
            if shown:
                parts.append(f"controls, {protocol}, {name}: {', '.join(shown)}")
        counts = self.record["counts"]
        lost = "".join(f", {reason} {count}" for reason, count in counts["reasons"].items())
        parts.append(", ".join(f"{key} {counts[key]}" for key in counts if key != "reasons") + lost)
        return "\n".join(parts)


def _percent(estimate: Estimate | None) -> str:
    return "-" if estimate is None or estimate.value is None else f"{100 * estimate.value:.2f}"


def evaluate_dataset(
    loaded: Loaded,
    dataset: DatasetSplit,
    asking: Asking,
    journal: Path | None = None,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
    wups: Wups | None = None,
    hash_media: bool = False,
    known: tuple[Sequence[Example], str] = ((), "none"),
) -> Evaluated:
    """Asks the model every usable question of the split and scores the answers, by WUPS, too, where it is given.
    With `hash_media` the data's hash counts the contents of the media. `known` is what `training_examples` gives, for
    the baselines of blind guessing.

    `journal` is the file that an interrupted evaluation goes on from; None keeps everything in memory. The numbers do
    not depend on interruptions, `processes`, or batches.

    Raises:
        UserError: no usable example, or a journal of another evaluation.
    """
    examples, left_out = _fitting(loaded.processor, dataset.examples, asking)
    if not examples:
        why = _why_none(dataset, left_out)
        raise UserError(f"{dataset.root}: no usable example in split {dataset.split!r} of {dataset.name}: {why}")
    clips, media = group_by_clip(examples), loaded.model.config.media_settings()
    record = {
        **describe_data(dataset, hash_media),
        "checkpoint": {"name": str(loaded.folder.name), "sha256": checkpoint_hash(loaded.folder)},
        "settings": {
            "max_new_tokens": asking.max_new_tokens,
            "controls": list(asking.controls),
            "device": loaded.model.device.type,
            **{name: media[name] for name in SEEN},
        },
        "versions": versions(),
    }
    if journal is None:
        rows = [row for batch in ask(loaded, clips, asking, processes, progress) for row in batch]
    else:
        with Journal.open(journal, record) as kept:
            answered = {tuple(row["clip"]) for row in kept.rows}
            left = [clip for clip in clips if tuple(clip_key(clip)) not in answered]
            for batch in ask(loaded, left, asking, processes, progress):
                kept.append(batch)
            rows = list(kept.rows)
    # Below the journal: answers do not depend on it, so an evaluation may go on without or with a training split.
    record["train_baselines"] = known[1]
    return _evaluated(dataset, asking, clips, rows, record, left_out, wups, known[0])


def _why_none(dataset: DatasetSplit, left_out: Mapping[str, int]) -> str:
    """The first problem in its own words, and how many examples are lost for which reason."""
    reasons = {**dataset.reasons, **left_out}
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons.items()) or "it has none"
    costly = next((problem for problem in dataset.problems if problem.severity == "error"), None)
    # Where media were found it is not the first problem that left none of them.
    return f"{costly} ({counts})" if costly is not None and not dataset.examples else counts


def _fitting(
    processor: MirasolProcessor, examples: Sequence[Example], asking: Asking
) -> tuple[list[Example], Counter[str]]:
    """The examples that can be asked, and how many cannot for which reason: the prompt (with its longest candidate) is
    longer than the model takes, or the medium is a still image, which is no clip."""

    def tokens(texts: Sequence[str]) -> int:
        return max(map(len, processor.tokenizer(list(texts), add_special_tokens=False)["input_ids"]))

    lengths: dict[tuple[str, ...], int] = {(): 0}
    fitting: list[Example] = []
    left_out: Counter[str] = Counter()
    for example in examples:
        if is_image(example.media):
            left_out["still image"] += 1
            continue
        candidates = asking.candidates(example)
        if candidates not in lengths:
            lengths[candidates] = tokens(candidates) + 1  # <eos>
        whole = tokens([example.prompt]) + 2 + lengths[candidates]  # <bos>, <sep>
        if whole <= processor.max_text_length:
            fitting.append(example)
        else:
            left_out["text too long"] += 1
    return fitting, left_out


def _evaluated(
    dataset: DatasetSplit,
    asking: Asking,
    clips: Sequence[ClipExamples],
    rows: Sequence[Row],
    record: dict[str, Any],
    left_out: Mapping[str, int],
    wups: Wups | None,
    known: Sequence[Example],
) -> Evaluated:
    by_clip = {tuple(row["clip"]): row for row in rows}
    usable, unusable, chunks = [], [], {}
    for clip in clips:
        row = by_clip[tuple(clip_key(clip))]
        if "reason" in row:
            unusable.append({"media": clip.media, "start": clip.start, "end": clip.end, "reason": row["reason"],
                             "questions": len(clip.examples)})  # fmt: skip
            continue
        usable += clip.examples
        chunks |= {example.id: row["chunks"] for example in clip.examples}
    places = {example.id: place for place, example in enumerate(dataset.annotated)}
    usable.sort(key=lambda example: places[example.id])
    found = {name: _predictions(rows, name) for name in ("test", *asking.controls)}
    scored = {name: _score(dataset, usable, said, wups, known) for name, said in found.items()}
    counts = _counts(dataset, usable, unusable, left_out)
    protocols = scored.pop("test")
    controls = {protocol: {name: by[protocol] for name, by in scored.items()} for protocol in protocols}
    record = {
        **record,
        "counts": counts,
        "protocols": {
            name: {
                "how": HOW[name],
                **one.to_dict(),
                "headline_over_annotated": _over_annotated(one, counts["n_annotated"]),
                "controls": {key: control.to_dict()["metrics"] for key, control in controls[name].items()},
            }
            for name, one in protocols.items()
        },
        "unusable_clips": unusable,
    }
    return Evaluated(dataset, protocols, controls, tuple(usable), found["test"], chunks, record)


def _predictions(rows: Sequence[Row], name: str) -> dict[str, Prediction]:
    found = {}
    for row in rows:
        for id, said in row.get("answered", {}).get(name, {}).items():
            scores = said.get("scores")
            choice = max(range(len(scores)), key=scores.__getitem__) if scores else None
            found[id] = Prediction(said["answer"], choice, _log_softmax(scores) if scores else None)
    return found


def _log_softmax(scores: Sequence[float]) -> tuple[float, ...]:
    highest = max(scores)
    total = highest + math.log(math.fsum(math.exp(score - highest) for score in scores))
    return tuple(score - total for score in scores)


def _score(
    dataset: DatasetSplit,
    examples: Sequence[Example],
    said: Mapping[str, Prediction],
    wups: Wups | None,
    known: Sequence[Example],
) -> dict[str, Scored]:
    """Numbers by protocol; candidate scoring where every question has candidates and some answer is published."""
    scored = {OPEN: score_answers(dataset.name, examples, said, normalisation_of(dataset.name), known=known)}
    if wups is not None:
        scored[WUPS] = score_wups(dataset.name, examples, said, wups)
    if with_answers(examples) and all(said[example.id].scores is not None for example in examples):
        scored[CANDIDATES] = score_choices(dataset.name, examples, said, dataset.classes, known=known)
    return scored


def _over_annotated(scored: Scored, annotated: int) -> float | None:
    """The headline with every annotated example that was not asked counted as wrong; None where it is no mean."""
    headline = scored.metrics.get(scored.headline)
    if headline is None or headline.value is None or scored.headline == "mAP":
        return None
    return headline.value * headline.n / annotated


def _counts(
    dataset: DatasetSplit, usable: Sequence[Example], unusable: Sequence[Mapping[str, Any]], left_out: Mapping[str, int]
) -> dict[str, Any]:
    reasons = Counter(dataset.reasons)
    reasons.update(left_out)
    reasons["unreadable clip"] += sum(clip["questions"] for clip in unusable)
    reasons["no published answer"] += sum(not example.target for example in usable)
    before = dataset.counts
    return {
        "n_annotated": before.n_annotated,
        "n_found": before.n_found,
        "n_usable": len(usable),
        "n_evaluated": sum(bool(example.target) for example in usable),
        "reasons": {reason: count for reason, count in reasons.items() if count},
    }


def checkpoint_hash(folder: Path) -> str:
    """Hash of the names and contents of a checkpoint's files, in hexadecimal."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")):
        digest.update(file.name.encode() + b"\n")
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def write_evaluation(folder: Path, evaluated: Evaluated) -> list[str]:
    """Writes predictions, the data set's official format where it has one, and last results.json; returns the names.

    The journal stays until all that belongs to a result is written (`Journal.end`): what is interrupted before goes on
    from it.
    """
    written = []
    for protocol, scored in evaluated.protocols.items():
        right = {item.example.id: item for item in scored.judged}
        rows = [_line(example, evaluated.predictions[example.id], right, protocol) for example in evaluated.examples]
        written.append(FILES[protocol])
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(folder / written[-1], lines)
    official = official_format(evaluated.dataset.name, evaluated.examples, evaluated.predictions)
    if official is not None:
        written.append(official[0])
        write_whole(folder / official[0], json.dumps(official[1], ensure_ascii=False) + "\n")
    write_whole(folder / "results.json", json.dumps(evaluated.record, indent=1) + "\n")
    return [*written, "results.json"]


def _line(example: Example, prediction: Prediction, right: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    judged = right.get(example.id)
    line = {"id": example.id, "video": example.video_name, "question_type": example.question_type,
            "prompt": example.prompt, "target": example.target}  # fmt: skip
    if protocol == CANDIDATES:
        line |= {"prediction": prediction.choice, "scores": prediction.scores}
    else:
        line["answer"] = prediction.answer
    value = {"value": judged.value} if protocol == WUPS and judged is not None else {}
    return {**line, "right": None if judged is None else judged.right, **value}

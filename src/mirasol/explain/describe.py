"""An explanation as plain numbers: what the JSON holds, and all that the page and the figures show beside pictures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from mirasol.errors import UserError
from mirasol.explain.compute import Explanation
from mirasol.explain.reading import MemoryReading

DIGITS = 5
LEAST_LOSS = 0.005  # nats


def find_chunk(explanation: Explanation, number: int | None) -> int:
    """The index of a chunk given by its number, from 1; of the decisive one where none is given.

    Raises:
        UserError: the clip has no such chunk.
    """
    if number is None:
        return explanation.find_decisive_chunk()
    if not 1 <= number <= explanation.chunks:
        raise UserError(f"chunk {number}: the clip has chunks 1 to {explanation.chunks}: give one of these")
    return number - 1


def describe_explanation(explanation: Explanation, chunk: int, each_token: bool = False) -> dict[str, Any]:
    """Everything in numbers; `chunk`, from 0, is the one whose features are looked at. Chunks are numbered from 1 in
    what is returned, lists over chunks have one entry each, and None stands where there is nothing to say.

    each_token: also what each feature reads of every single tube and patch, which are many numbers
    """
    reading, occlusion, edges = explanation.reading, explanation.occlusion, explanation.edges
    attention = explanation.cross_attention.mean(axis=0).sum(axis=2)  # [token, chunk]
    return {
        "question": explanation.prompt,
        "answer": explanation.answer,
        "log_likelihood": round_numbers(explanation.token_log_likelihood.sum()),
        "probability": float(f"{np.exp(float(explanation.token_log_likelihood.sum())):.{DIGITS}g}"),
        "chunks": [
            {"start": round_numbers(start), "end": round_numbers(end), "picture": bool(picture), "sound": bool(sound)}
            for start, end, picture, sound in zip(
                edges[:-1], edges[1:], explanation.video_present, explanation.audio_present, strict=True
            )
        ],
        "tokens": [
            {"text": text, "log_likelihood": round_numbers(likelihood), "attention": round_numbers(row)}
            for text, likelihood, row in zip(
                explanation.tokens, explanation.token_log_likelihood, attention, strict=True
            )
        ],
        "mattered": {
            "complete": round_numbers(occlusion.complete),
            "without_picture": round_numbers(occlusion.without_picture),
            "without_sound": round_numbers(occlusion.without_sound),
            "loss_without_picture": round_numbers(occlusion.losses[0]),
            "loss_without_sound": round_numbers(occlusion.losses[1]),
            "without_pictures": round_numbers(occlusion.without_pictures),
            "without_sounds": round_numbers(occlusion.without_sounds),
            "decisive_chunk": explanation.find_decisive_chunk() + 1 if is_felt(occlusion.losses) else None,
            "passes": occlusion.passes,
            "seconds": round(occlusion.seconds, 2),
        },
        "reads": {
            "chunk": chunk + 1,
            "combiner": reading.kind,
            "scope": reading.scope,
            "features": reading.rollout.shape[1],
            "rollout": _describe_shares(explanation, reading.rollout[chunk], reading.own[chunk], each_token),
            "last_layer": None
            if reading.last_layer is None or reading.last_own is None
            else _describe_shares(explanation, reading.last_layer[chunk], reading.last_own[chunk], each_token),
            "memory": None if reading.memory is None else _describe_memory(explanation, reading.memory, chunk),
        },
        "boxes": {
            "tubes": explanation.tubes.tolist(),
            "patches": explanation.patches.tolist(),
            "frame_times": None if explanation.frame_times is None else round_numbers(explanation.frame_times),
        },
        "every_chunk_reads": round_numbers(reading.rollout.sum(axis=3).mean(axis=1)),
        "expected": {
            "chunk": chunk + 2 if explanation.first_expected else chunk + 1,
            "from_earlier_chunks_alone": bool(explanation.first_expected),
            "is_shown": explanation.first_expected + chunk < explanation.chunks,
        },
    }


def is_felt(losses: Float[np.ndarray, "..."]) -> bool:
    """Whether any loss, in nats, is one that two decimals show."""
    return bool((losses[~np.isnan(losses)] >= LEAST_LOSS).any())


def _describe_shares(
    explanation: Explanation,
    shares: Float[np.ndarray, "m source token"],
    own: Float[np.ndarray, " m"],
    each_token: bool,
) -> dict[str, Any]:
    """Shares of one chunk's features: the mean of all m by chunk, and by tube and patch, and the same of each feature;
    `missing` is what picture and sound have in chunks without them, where learned tokens stand in their place."""
    tubes, patches = np.split(shares, [len(explanation.tubes)], axis=2)
    missing = tubes[:, ~explanation.video_present].sum() + patches[:, ~explanation.audio_present].sum()
    by_feature = [
        {
            "picture": round_numbers(of_tubes.sum(axis=1)),
            "sound": round_numbers(of_patches.sum(axis=1)),
            "own": round_numbers(rest),
            **({"tubes": round_numbers(of_tubes), "patches": round_numbers(of_patches)} if each_token else {}),
        }
        for of_tubes, of_patches, rest in zip(tubes, patches, own, strict=True)
    ]
    return {
        "picture": round_numbers(tubes.sum(axis=2).mean(axis=0)),
        "sound": round_numbers(patches.sum(axis=2).mean(axis=0)),
        "own": round_numbers(own.mean()),
        "missing": round_numbers(missing / len(shares)),
        "tubes": round_numbers(tubes.mean(axis=0)),
        "patches": round_numbers(patches.mean(axis=0)),
        "by_feature": by_feature,
    }


def _describe_memory(explanation: Explanation, memory: MemoryReading, chunk: int) -> dict[str, Any]:
    """What the memory holds after every chunk, and what was read and written at one: sums over the tokens of each
    part."""
    size, tubes, patches = memory.write.shape[1], len(explanation.tubes), len(explanation.patches)
    parts = {"memory": slice(size), "picture": slice(size, size + tubes)}
    parts["sound"] = slice(size + tubes, size + tubes + patches)
    written = {**parts, "processed": slice(size + tubes + patches, None)}
    return {
        "content": round_numbers(memory.content.mean(axis=1)),
        "empty": round_numbers(memory.empty.mean(axis=1)),
        "slots": round_numbers(memory.content[chunk]),
        "slots_empty": round_numbers(memory.empty[chunk]),
        "read": {name: round_numbers(memory.read[chunk][:, part].sum(axis=1)) for name, part in parts.items()},
        "write": {name: round_numbers(memory.write[chunk][:, part].sum(axis=1)) for name, part in written.items()},
    }


def round_numbers(values: Any) -> Any:
    """Numbers, or arrays of them as lists, with `DIGITS` decimals; None for NaN."""
    if isinstance(values, np.ndarray) and values.ndim:
        return [round_numbers(value) for value in values]
    value = float(values)
    return None if np.isnan(value) else round(value, DIGITS) + 0.0  # no -0.0


def list_in_words(record: dict[str, Any]) -> list[str]:
    """What the pictures show, in sentences: a page's text alternative, and what the command prints."""
    chunks, mattered, reads = record["chunks"], record["mattered"], record["reads"]
    lines = [f"{record['question']} {record['answer']} (probability {record['probability']:.2g})"]
    for token in record["tokens"]:
        best = _rank_shown(token["attention"])
        shown = ", ".join(f"{token['attention'][place]:.0%} on {_name(chunks, place)}" for place in best)
        lines.append(f"“{token['text'].strip()}” looks most at: {shown}.")
    for name in ("picture", "sound"):
        losses = mattered[f"loss_without_{name}"]
        if all(loss is None for loss in losses):
            lines.append(f"The clip has no {name} to take away.")
            continue
        ranked = [place for place in _rank(losses)[:3] if losses[place] is not None and losses[place] >= LEAST_LOSS]
        shown = ", ".join(f"{losses[place]:.2f} nats for {_name(chunks, place)}" for place in ranked)
        falls = f"falls most by {shown}" if ranked else "does not fall by 0.01 nats"
        lines.append(f"Without the {name} of one chunk the answer's log-likelihood {falls}.")
    shares = reads["rollout"]
    together = [picture + sound for picture, sound in zip(shares["picture"], shares["sound"], strict=True)]
    shown = ", ".join(f"{together[place]:.0%} of {_name(chunks, place)}" for place in _rank_shown(together))
    missing = f"; {shares['missing']:.0%} of it stands for what is missing" if shares["missing"] >= 0.005 else ""
    lines.append(
        f"The {reads['features']} features of chunk {reads['chunk']} are read from: {shown}; "
        f"pictures {sum(shares['picture']):.0%}, sound {sum(shares['sound']):.0%}, "
        f"neither {shares['own']:.0%}{missing}."
    )
    if reads["memory"] is not None:
        content = reads["memory"]["content"][reads["chunk"] - 1]
        shown = ", ".join(f"{content[place]:.0%} of {_name(chunks, place)}" for place in _rank_shown(content))
        empty = reads["memory"]["empty"][reads["chunk"] - 1]
        lines.append(f"After it the memory holds: {shown}; {empty:.0%} is still the empty memory of the beginning.")
    if not record["expected"]["is_shown"]:
        lines.append(f"Chunk {reads['chunk']} is the last one: what the model expects after it cannot be compared.")
    lines.append(f"Cost of taking parts away: {mattered['passes']} passes, {mattered['seconds']:.2f} s.")
    return lines


def _rank(values: Sequence[float | None]) -> list[int]:
    """Places of the largest values first; None last."""
    return sorted(range(len(values)), key=lambda place: -np.inf if values[place] is None else values[place])[::-1]


def _rank_shown(shares: Sequence[float]) -> list[int]:
    """Places of the three largest shares, those that round to 0 % left out unless all do."""
    ranked = _rank(shares)[:3]
    return [place for place in ranked if shares[place] >= 0.005] or ranked[:1]


def _name(chunks: Sequence[dict[str, Any]], place: int) -> str:
    return f"chunk {place + 1} ({chunks[place]['start']:g} to {chunks[place]['end']:g} s)"

"""More tables of a suite's result: accuracy over the age of what is asked about, and what streaming takes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mirasol.ablation.result import RowResult, SuiteResult
from mirasol.ablation.statistics import Spread

_AGE = re.compile(r"age (\d+)")
_STREAM = ("chunks", "window", "state", "Combiner", "latent model", "latents", "process", "ms early", "ms late")
_STREAM_VALUES = ("row", "label", "chunks", "milliseconds", "combiner_bytes", "latent_bytes", "latents_bytes",
                  "process_bytes")  # fmt: skip


@dataclass(frozen=True)
class Section:
    """One more table: its rows as text, and as plain values for `name`.csv; the figure of that name goes with it."""

    name: str
    title: str
    note: str
    headings: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    value_headings: tuple[str, ...]
    values: tuple[tuple[object, ...], ...]


def list_sections(result: SuiteResult) -> list[Section]:
    """The tables that a suite has besides the main one; most have none."""
    found = (_make_ages(result), _make_stream(result))
    return [section for section in found if section is not None]


def list_ages(result: SuiteResult) -> list[int]:
    """The ages that questions have, in chunks: those of the types `age N`. Empty where a type is another one."""
    types = dict.fromkeys(kind for row in result.rows for kind in row.by_type)
    matches = [_AGE.fullmatch(kind) for kind in types]
    return sorted(int(match[1]) for match in matches if match) if all(matches) else []


def _make_ages(result: SuiteResult) -> Section | None:
    ages = list_ages(result)
    if not ages:
        return None
    rows = [(row, {age: row.by_type.get(f"age {age}") for age in ages}) for row in result.rows]
    return Section(
        name="ages",
        title="Accuracy over age",
        note="Percent right of the questions about something that was shown so many chunks before the last one.",
        headings=("", *(f"{age:,} chunk{'' if age == 1 else 's'} ago" for age in ages)),
        cells=tuple((row.label, *(format_spread(found[age]) for age in ages)) for row, found in rows),
        value_headings=("row", "label", "age", "mean", "low", "high"),
        values=tuple(
            (row.name, row.label, age, spread.mean, spread.low, spread.high)
            for row, found in rows
            for age, spread in found.items()
            if spread is not None
        ),
    )


def _make_stream(result: SuiteResult) -> Section | None:
    rows = [row for row in result.rows if row.stream is not None]
    if not rows:
        return None
    places = list(dict.fromkeys(place for row in rows for place in row.stream.by_place))
    asked = [f"right to chunk {place:,}" for place in places] if len(places) > 1 else ["right"]
    return Section(
        name="stream",
        title="Streaming",
        note=(
            "Chunk by chunk: bytes of state at the end, of it the Combiner's, the latent model's and the latents that "
            "questions attend to (a full buffer doubles); growth of the whole process; milliseconds of processor time "
            "a chunk, early and late."
        ),
        headings=("", *_STREAM, *asked, "as offline"),
        cells=tuple(_list_cells(row, places) for row in rows),
        value_headings=_STREAM_VALUES,
        values=tuple(
            (
                row.name,
                row.label,
                round(point["chunks"]),
                point["milliseconds"],
                *(round(value) for value in (*point["state"].values(), point["process"])),
            )
            for row in rows
            for point in row.stream.points
        ),
    )


def _list_cells(row: RowResult, places: Sequence[int]) -> tuple[str, ...]:
    stream = row.stream
    assert stream is not None
    state = stream.end["state"]
    return (
        row.label,
        f"{stream.end['chunks']:,.0f}",
        "" if stream.window is None else str(stream.window),
        *(_format_bytes(value) for value in (sum(state.values()), *state.values())),
        _format_bytes(stream.end["process"] - stream.early["process"]),
        f"{stream.early['milliseconds']:.2f}",
        f"{stream.late['milliseconds']:.2f}",
        *(format_spread(stream.by_place.get(place)) for place in places),
        "" if stream.same is None else f"{100 * stream.same:.1f} %",
    )


def _format_bytes(value: float) -> str:
    return f"{value / 1024:,.0f} KiB" if abs(value) < 10 * 2**20 else f"{value / 2**20:,.1f} MiB"


def format_spread(spread: Spread | None) -> str:
    """A share with its interval in percent."""
    if spread is None:
        return ""
    return f"{100 * spread.mean:.1f} [{100 * spread.low:.1f}, {100 * spread.high:.1f}]"

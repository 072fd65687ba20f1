"""The table of a suite: as text, csv, LaTeX and Markdown."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from mirasol.ablation.result import RowResult, SuiteResult
from mirasol.ablation.sections import Section, list_sections
from mirasol.ablation.statistics import Spread
from mirasol.console import format_table

HEADINGS = ("", "paper", "ours", "95 % interval", "seeds", "difference", "95 % interval", "from", "verdict",
            "parameters", "training TFLOP", "peak memory", "seconds")  # fmt: skip
_NAMED = ("python", "torch", "transformers")
_CSV = ("row", "label", "paper", "mean", "low", "high", "seeds", "difference", "difference_low", "difference_high",
        "against", "expected", "verdict", "parameters", "training_flops", "peak_memory_bytes",
        "training_seconds")  # fmt: skip
_LATEX = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "\\": r"\textbackslash{}",
          "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}  # fmt: skip


def format_cells(row: RowResult) -> list[str]:
    """The cells of a row in the order of `HEADINGS`; shares in percent."""
    score, difference = row.score, row.difference
    return [
        row.label,
        "" if row.paper is None else f"{row.paper:.1f}",
        "" if score is None else f"{100 * score.mean:.1f}",
        "" if score is None else _format_interval(score),
        str(len(row.seeds)),
        "" if difference is None else f"{100 * difference.mean:+.1f}",
        "" if difference is None else _format_interval(difference, "+"),
        "" if difference is None else str(row.against),
        row.verdict or "",
        "" if row.parameters is None else f"{row.parameters:,}",
        "" if row.flops is None else f"{row.flops / 1e12:,.4g}",
        "" if row.peak_memory is None else f"{row.peak_memory / 2**20:,.0f} MiB",
        "" if row.seconds is None else f"{row.seconds:,.0f}",
    ]


def _format_interval(spread: Spread, sign: str = "") -> str:
    return f"[{100 * spread.low:{sign}.1f}, {100 * spread.high:{sign}.1f}]"


def format_text(result: SuiteResult) -> str:
    """The table as text, and below it chance, what is missing and what the numbers are; then the other tables."""
    cells = [list(HEADINGS), *(format_cells(row) for row in result.rows)]
    lines = [str(result.suite["title"]), "", format_table(cells), "", *describe_numbers(result)]
    for section in list_sections(result):
        lines += ["", section.title, "", format_table([section.headings, *section.cells]), "", section.note]
    return "\n".join(lines)


def describe_numbers(result: SuiteResult) -> list[str]:
    """What belongs below every form of the table, a line each."""
    lines = [
        f"Percent right of {result.questions:,} questions about {result.videos:,} videos; intervals: seeds and videos."
    ]
    guesses = [f"{name} {100 * value:.1f}" for name, value in result.baselines.items() if value is not None]
    if guesses:
        lines.append(f"Guessing: {', '.join(guesses)}.")
    lines += describe_runs(result.facts)
    if any(len(row.seeds) == 1 for row in result.rows):
        lines.append("Rows with one seed: the interval is over videos alone, and nothing is decided.")
    if result.missing:
        more = f" and {len(result.missing) - 5} more" if len(result.missing) > 5 else ""
        lines.append(f"Not finished: {', '.join(result.missing[:5])}{more}.")
    return lines


def describe_runs(facts: Mapping[str, Any]) -> list[str]:
    """Steps, hours, versions and commit of the runs, as far as they are known."""
    steps = {tuple(own) for own in facts.get("steps", {}).values()}
    lines = []
    if len(steps) > 1:  # a comparison of unequal trainings
        listed = ", ".join(f"{name} {' and '.join(map(str, own))}" for name, own in facts["steps"].items())
        lines.append(f"Rows differ in their steps of training: {listed}.")
    known = [f"{own:,} steps a run" for own in (next(iter(steps)) if len(steps) == 1 else ())]
    known += [f"{facts['hours']:.2f} hours of training together"] if "hours" in facts else []
    known += [f"{name} {version}" for name, version in facts.get("versions", {}).items() if name in _NAMED]
    known += [f"commit {facts['commit'][:10]}"] if facts.get("commit") else []
    return [*lines, f"Runs: {', '.join(known)}."] if known else lines


def format_csv(result: SuiteResult) -> str:
    """The table as csv: shares between 0 and 1, units in the headings."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_CSV)
    for row in result.rows:
        writer.writerow([_format_value(value) for value in _list_values(row)])
    return stream.getvalue()


def format_section_csv(section: Section) -> str:
    """One of the other tables as csv: a line for each number, units in the headings."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(section.value_headings)
    for row in section.values:
        writer.writerow([_format_value(value) for value in row])
    return stream.getvalue()


def _list_values(row: RowResult) -> Sequence[object]:
    def split(spread: Spread | None) -> tuple[object, ...]:
        return (None, None, None) if spread is None else (spread.mean, spread.low, spread.high)

    return (row.name, row.label, row.paper, *split(row.score), len(row.seeds), *split(row.difference), row.against,
            row.expected, row.verdict, row.parameters, row.flops, row.peak_memory, row.seconds)  # fmt: skip


def _format_value(value: object) -> object:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def format_latex(result: SuiteResult) -> str:
    """The table as LaTeX, for booktabs."""
    shown = (0, 1, 2, 3, 4, 5, 6, 8, 9, 10)
    lines = [r"% needs \usepackage{booktabs}"]
    lines += _list_latex([HEADINGS[place] for place in shown],
                         [[format_cells(row)[place] for place in shown] for row in result.rows])  # fmt: skip
    lines += [f"% {line}" for line in describe_numbers(result)]
    for section in list_sections(result):
        lines += [f"% {section.title}", *_list_latex(section.headings, section.cells), f"% {section.note}"]
    return "\n".join([*lines, ""])


def _list_latex(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of one table."""
    return [
        rf"\begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}",
        r"\toprule",
        _join_latex(headings),
        r"\midrule",
        *(_join_latex(row) for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]


def format_markdown(result: SuiteResult) -> str:
    """The table as Markdown: what a page needs, the rest is in the other forms."""
    headings = ["row", "paper", "ours", "seeds", "difference", "from", "verdict", "TFLOP", "memory", "seconds"]
    lines = _list_markdown(headings, [_list_markdown_cells(row) for row in result.rows])
    lines += ["", *describe_numbers(result), ""]
    for section in list_sections(result):
        rows = [[cell.replace("|", "\\|") for cell in row] for row in section.cells]
        lines += [*_list_markdown(section.headings, rows), "", section.note, ""]
    return "\n".join(lines)


def _list_markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of one table."""
    return [f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows)]


def _list_markdown_cells(row: RowResult) -> list[str]:
    label, paper, mean, interval, seeds, difference, of_difference, against, *rest = format_cells(row)
    verdict, _, flops, memory, seconds = rest
    if verdict in ("reproduced", "refuted"):
        verdict = f"**{verdict}**"
    cells = [label, paper, f"{mean} {interval}", seeds, f"{difference} {of_difference}", against and f"`{against}`"]
    return [cell.strip().replace("|", "\\|") for cell in (*cells, verdict, flops, memory, seconds)]


def _join_latex(cells: Sequence[str]) -> str:
    return " & ".join("".join(_LATEX.get(letter, letter) for letter in cell) for cell in cells) + r" \\"

"""The files of a suite's result: results.json, the table in four forms, and one HTML page."""

import json
from pathlib import Path

from mirasol.ablation.figures import draw_ages, draw_forest, draw_learning, draw_stream
from mirasol.ablation.pack import PACKED, pack_runs
from mirasol.ablation.result import RESULTS, SuiteResult
from mirasol.ablation.sections import format_spread, list_sections
from mirasol.ablation.tables import (
    HEADINGS,
    describe_numbers,
    format_cells,
    format_csv,
    format_latex,
    format_markdown,
    format_section_csv,
    format_text,
)
from mirasol.evaluation.figures import check_figure_format, convert_to_svg, write_figures
from mirasol.files import write_file_atomically

REPORT, TEXT, CSV, LATEX, MARKDOWN = "report.html", "table.txt", "table.csv", "table.tex", "table.md"


def write_result(
    output: Path, result: SuiteResult, figure_format: str | None = None, packed: bool = False
) -> list[str]:
    """Writes everything that shows the result, with a `figure_format` the figures as files in `figures/` too, and
    where it is to be `packed` what it was made from. Returns the names. The same runs give the same bytes. Raises
    UserError for an unknown format."""
    check_figure_format(figure_format)
    figures = {"forest": draw_forest(result)}
    for name, draw in (("learning", draw_learning), ("ages", draw_ages), ("stream", draw_stream)):
        if (figure := draw(result)) is not None:
            figures[name] = figure
    contents = {
        TEXT: f"{format_text(result)}\n",
        CSV: format_csv(result),
        LATEX: format_latex(result),
        MARKDOWN: format_markdown(result),
        REPORT: _render_page(result, {name: convert_to_svg(figure, name) for name, figure in figures.items()}),
        **{f"{section.name}.csv": format_section_csv(section) for section in list_sections(result)},
        RESULTS: json.dumps(result.to_dict(), indent=1) + "\n",
    }
    for name, content in contents.items():
        write_file_atomically(output / name, content)
    written = list(contents)
    if figure_format is not None:
        files = write_figures(output / "figures", figures, figure_format)
        written += [f"figures/{file.name}" for file in files]
    if packed:
        (output / PACKED).write_bytes(pack_runs(output))
        written.append(PACKED)
    return written


def _render_page(result: SuiteResult, drawings: dict[str, str]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(f"mirasol.{room}", ".") for room in ("ablation", "evaluation")]
        ),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    types = list(dict.fromkeys(kind for row in result.rows for kind in row.by_type))
    return environment.get_template("report.html.jinja").render(
        title=result.suite["title"],
        about=result.suite["about"],
        headings=HEADINGS,
        rows=[format_cells(row) for row in result.rows],
        notes=describe_numbers(result),
        forest=drawings["forest"],
        learning=drawings.get("learning"),
        types=types,
        by_type=[(row.label, [format_spread(row.by_type.get(kind)) for kind in types]) for row in result.rows],
        sections=[(section, drawings.get(section.name)) for section in list_sections(result)],
        details=json.dumps({"suite": result.suite, **result.facts}, indent=1),
    )

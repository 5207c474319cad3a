"""`render` writes a run's report into its folder: report.json, report.md, report.html and the plots.

Every file appears whole or not at all. The page needs nothing but itself: its style, its
plots and the script that sorts and filters its tables are inside.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qeval import escape
from qeval.files.atomic import write_bytes, write_text
from qeval.report import formatting, style
from qeval.report.build import build_paired
from qeval.report.document import Heading, Plot, Section, TableCell
from qeval.report.explain import highlights
from qeval.report.explain.section import TOKENS_SHOWN, rows_section
from qeval.report.model import Report, report_json
from qeval.report.plots import all_plots
from qeval.report.run_rows import PairedRun
from qeval.report.sections import report_sections
from qeval.report.summary import offline_texts

_TEMPLATES = Path(__file__).parent / "templates"


class Rendered(NamedTuple):
    """The paths of the report's files; `plots` holds the PNG and SVG files."""

    json: Path
    markdown: Path
    html: Path
    plots: list[Path]


def render(run_dir: Path) -> Rendered:
    """Write the report of a finished run into its own folder.

    Raises:
        UsageError, BrokenRecordError, QevalError: as `build`, and where a file can't be written.
    """
    run = PairedRun(run_dir)
    return write_report(build_paired(run), run_dir, run)


def write_report(report: Report, folder: Path, run: PairedRun | None = None) -> Rendered:
    """Write a report that is already built; `run` is the run in `folder`, where its rows have been read already."""
    plots = all_plots(report)
    written = write_plots(plots, folder)
    files = Rendered(folder / "report.json", folder / "report.md", folder / "report.html", written)
    rows = rows_section(report, highlights(run or PairedRun(folder), TOKENS_SHOWN))
    top = _heading(report)
    write_text(files.markdown, html_page("report.md.j2", top, report_sections(report, plots)))
    write_text(files.html, html_page("report.html.j2", top, report_sections(report, plots, rows)))
    write_text(files.json, report_json(report))
    return files


def write_plots(plots: Sequence[Plot], folder: Path) -> list[Path]:
    """Write every plot as PNG and SVG under `folder`/plots."""
    written = []
    for plot in plots:
        for suffix, data in ((".png", plot.png), (".svg", plot.svg.encode())):
            written.append(folder / "plots" / f"{plot.name}{suffix}")
            write_bytes(written[-1], data)
    return written


def html_page(template: str, heading: Heading, parts: Sequence[Section]) -> str:
    """Fill a template."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )

    environment.filters |= {"svg": _svg, "md": escape.escape_markdown, "mdcell": _markdown_cell}
    return environment.get_template(template).render(
        heading=heading,
        sections=parts,
        css=Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8")),
        live=Markup((_TEMPLATES / "live.js").read_text(encoding="utf-8")),
    )


def _heading(report: Report) -> Heading:
    """Return the title, and the model and the machine in a line."""
    model, environment = report.model, report.provenance.environment
    facts = (
        f"{model.architecture}, {formatting.count(model.parameters)} parameters",
        report.baseline.label,
        f"{environment.device}, {environment.processor}, {environment.cores} cores".removeprefix("cpu, "),
        report.provenance.started[:10],
        f"qeval {environment.qeval}",
    )
    return Heading(f"{model.name}: what quantization lost", facts, offline_texts(report))


def _shown(value: object) -> object:
    """Return what a template writes: text without what turns or hides letters; its own markup as it is."""
    return escape.page(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _markdown_cell(cell: TableCell) -> str:
    parts = [cell.text, cell.interval, f"({cell.remark})" if cell.remark else None]
    return escape.escape_markdown(" ".join(part for part in parts if part))


def _svg(plot: Plot) -> Markup:
    """Return the plot inside the page; its letters are drawn, so the figure says what it shows in `aria-label`."""
    return Markup(style.inline(plot.svg, plot.name))

"""`render` writes a run's report beside its rows: report.json, report.md, report.html and the plots.

Every file appears whole or not at all. The page needs nothing but itself: its style, its
plots and the script that sorts and filters its tables are inside.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qeval.report import style
from qeval.report.build import build_paired
from qeval.report.explain import highlights
from qeval.report.explain.section import TOKENS_SHOWN, rows_section
from qeval.report.model import Report, report_json
from qeval.report.page import Cell, Heading, Plot, Section
from qeval.report.paired import PairedRun
from qeval.report.plots import all_plots
from qeval.report.sections import sections
from qeval.store.atomic import write_bytes, write_text

_TEMPLATES = Path(__file__).parent / "templates"


class Rendered(NamedTuple):
    """Where the report's files are; `plots` holds the PNG and SVG files."""

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
    return write(build_paired(run), run_dir, run)


def write(report: Report, folder: Path, run: PairedRun | None = None) -> Rendered:
    """Write a report that is already built; `run` is the run in `folder`, where its rows have been read already."""
    plots = all_plots(report)
    written = write_plots(plots, folder)
    found = Rendered(folder / "report.json", folder / "report.md", folder / "report.html", written)
    rows = rows_section(report, highlights(run or PairedRun(folder), TOKENS_SHOWN))
    top = _heading(report)
    write_text(found.markdown, page("report.md.j2", top, sections(report, plots)))
    write_text(found.html, page("report.html.j2", top, sections(report, plots, rows)))
    write_text(found.json, report_json(report))
    return found


def write_plots(plots: Sequence[Plot], folder: Path) -> list[Path]:
    """Write every plot as PNG and SVG under `folder`/plots."""
    written = []
    for plot in plots:
        for suffix, data in ((".png", plot.png), (".svg", plot.svg.encode())):
            written.append(folder / "plots" / f"{plot.name}{suffix}")
            write_bytes(written[-1], data)
    return written


def page(template: str, heading: Heading, parts: Sequence[Section]) -> str:
    """One template, filled."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"svg": _svg, "md": markdown_text, "mdcell": _markdown_cell}
    return environment.get_template(template).render(
        heading=heading,
        sections=parts,
        css=Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8")),
        live=Markup((_TEMPLATES / "live.js").read_text(encoding="utf-8")),
    )


def _heading(report: Report) -> Heading:
    made = report.provenance
    facts = (report.model.architecture, report.baseline.label, made.started[:10], f"qeval {made.environment.qeval}")
    title = f"{report.model.name}: what quantization lost"
    return Heading(title, facts, tuple(report.notes), tuple(report.warnings))


def markdown_text(text: str) -> str:
    r"""Text that markdown takes as it is.

    >>> print(markdown_text("a|b *c* [d](e) <i> [1, 2]"))
    a\|b \*c\* [d]\(e) &lt;i> [1, 2]
    """
    flat = " ".join(text.split()).replace("<", "&lt;")
    return re.sub(r"([\\`*|]|(?<=\])[(\[])", r"\\\1", flat)


def _markdown_cell(cell: Cell) -> str:
    parts = [cell.text, cell.interval, f"({cell.remark})" if cell.remark else None]
    return markdown_text(" ".join(part for part in parts if part))


def _svg(plot: Plot) -> Markup:
    """The plot inside the page; its letters are drawn, so the figure says what it shows in `aria-label`."""
    return Markup(style.inline(plot.svg, plot.name))

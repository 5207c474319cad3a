"""HTML for notebooks: titles, lists and tables of plain text, everything in them escaped."""

from collections.abc import Sequence

from markupsafe import Markup

from qeval import escape
from qeval.report.document import Table, TableCell


def title_markup(text: str) -> Markup:
    """Return a heading."""
    return _element("h3", text)


def list_markup(sentences: Sequence[str]) -> Markup:
    """Return sentences as a list."""
    return _wrapped("ul", [_element("li", each) for each in sentences])


def paragraphs(sentences: Sequence[str]) -> Markup:
    """Return sentences as paragraphs."""
    return Markup("").join(_element("p", each) for each in sentences)


def table_markup(content: Table) -> Markup:
    """Return a table of the report; a cell's interval and remark stand below its text."""
    head = _wrapped("tr", [_element("th", column) for column in content.columns])
    rows = [_wrapped("tr", [_cell(cell) for cell in row]) for row in content.rows]
    parts = [_element("caption", content.caption), _wrapped("thead", [head]), _wrapped("tbody", rows)]
    return _wrapped("table", parts)


def _cell(cell: TableCell) -> Markup:
    below = [Markup("<br>") + _element("small", part) for part in (cell.interval, cell.remark) if part]
    return _wrapped("td", [_text(cell.text), *below])


def _element(name: str, text: str) -> Markup:
    return _wrapped(name, [_text(text)])


def _wrapped(name: str, parts: Sequence[Markup]) -> Markup:
    return Markup(f"<{name}>") + Markup("").join(parts) + Markup(f"</{name}>")


def _text(text: str) -> Markup:
    return Markup.escape(escape.page(text))

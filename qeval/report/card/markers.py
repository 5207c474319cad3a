"""The lines between which a README's section belongs to qeval: replaced there, and byte for byte the same outside.

In the body they are `<!-- qeval:begin -->` and `<!-- qeval:end -->`. The front matter may have `# qeval:begin` and
`# qeval:end`, between which the metadata goes; without them it is left as it is. Pure: text in, text out.
"""

import re
from typing import NamedTuple

from qeval.errors import UsageError
from qeval.parsing import parse_yaml

BEGIN, END = "<!-- qeval:begin -->", "<!-- qeval:end -->"
_YAML_BEGIN, _YAML_END = "# qeval:begin", "# qeval:end"
_FRONT = re.compile(r"\A\ufeff?\s*---[ \t]*(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\r|\n|\Z)", re.DOTALL)
_LINE = r"(?:\A|(?<=\n)|(?<=\r))[ \t]*{}[ \t]*(\r\n|\r|\n|\Z)"


class Replaced(NamedTuple):
    """The whole text, and whether its front matter had a place for the metadata."""

    text: str
    metadata: bool


class _Span(NamedTuple):
    """The start and end of the part between two marker lines, and the file's line ending."""

    start: int
    end: int
    newline: str


def replace_section(text: str, section: str, metadata: str, where: str) -> Replaced:
    r"""Return `text` with the part between its markers replaced; `where` is what an error calls it.

    >>> replace_section("a\n<!-- qeval:begin -->\nold\n<!-- qeval:end -->\nb", "new", "", "README.md").text
    'a\n<!-- qeval:begin -->\nnew\n<!-- qeval:end -->\nb'

    Raises:
        UsageError: markers are missing, doubled or in the wrong order, or the metadata is told outside of them.
    """
    front = _FRONT.match(text)
    split = front.end() if front else 0
    head, body = text[:split], text[split:]
    span = _span(body, BEGIN, END, where, text.count("\n", 0, split))
    if span is None:
        raise UsageError(f"{where} has no place for the section: put the two lines {BEGIN} and {END} where it belongs.")
    replaced = _put(body, span, section)
    inside = _span(head, _YAML_BEGIN, _YAML_END, where, 0)
    if inside is None:
        return Replaced(head + replaced, False)
    _check_front_matter(head, inside, where)
    return Replaced(_put(head, inside, metadata) + replaced, True)


def _put(text: str, span: _Span, new: str) -> str:
    lines = "".join(line + span.newline for line in new.removesuffix("\n").split("\n"))
    return text[: span.start] + lines + text[span.end :]


def _span(text: str, begin: str, end: str, where: str, lines_before: int) -> _Span | None:
    """Return the part between the markers; None where there is neither."""
    begins, ends = (list(re.finditer(_LINE.format(re.escape(marker)), text)) for marker in (begin, end))
    for marker, places in ((begin, begins), (end, ends)):
        if len(places) > 1:
            lines = " and ".join(str(lines_before + text.count("\n", 0, match.start()) + 1) for match in places)
            raise UsageError(f"{where} has the line {marker} {len(places)} times (lines {lines}); leave one.")
    if not begins and not ends:
        return None
    if not begins or not ends:
        there, missing = (begin, end) if begins else (end, begin)
        raise UsageError(f"{where} has the line {there} but not {missing}; put it where the section {_side(begins)}.")
    if ends[0].start() < begins[0].end():
        raise UsageError(f"{where} has the line {end} before {begin}; put them the other way round.")
    return _Span(begins[0].end(), ends[0].start(), begins[0][1])


def _side(begins: list[re.Match[str]]) -> str:
    return "ends" if begins else "begins"


def _check_front_matter(head: str, inside: _Span, where: str) -> None:
    """Refuse front matter with a model-index of its own: YAML would keep one of the two in silence."""
    front = _FRONT.match(head[: inside.start] + head[inside.end :])
    metadata = parse_yaml(front[1], f"The front matter of {where}") if front else None
    if isinstance(metadata, dict) and "model-index" in metadata:
        raise UsageError(
            f"The front matter of {where} has a 'model-index' outside of its markers; take it out, or the markers."
        )

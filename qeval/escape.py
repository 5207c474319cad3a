"""Text that files and users give, made harmless for the place that shows it: one function for each place.

A model's folder, a policy or a corpus says what things are called. Such a name may hold escape sequences of a terminal,
Markdown, or characters that XML forbids. Whatever is shown passes through here: `terminal` and `visible` for a
terminal, `escape_markdown`, `code_span` and `code_block` for Markdown, `xml` for JUnit, `page` for HTML, `json_text`
for JSON that is printed. No text is refused, and none is changed where it is stored.
"""

import re

DOT = "\N{MIDDLE DOT}"
"""What stands for a character that can't be shown."""

# Controls, C1 included; soft hyphen; what turns the direction of writing; line and paragraph separators; invisible
# operators; byte order mark; halves of surrogate pairs; tags. Joiners stay: scripts and emoji need them.
_UNSHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_NOT_IN_XML = re.compile("[\ufffe\uffff]")
_DRAWN = {"\n": "↵", "\r": "↵", "\t": "⇥"}
# Where Markdown would take the start of a paragraph or of a cell for a heading, a quote, a list, a rule or a reference.
_BLOCK_START = re.compile(r"#{1,6}(?:\s|$)|>|[-+](?:\s|$)|[-_=~]{3,}|\[")
_NUMBERED = re.compile(r"\d{1,9}(?=[.)](?:\s|$))")
_ENTITY = re.compile(r"&(?=#?\w+;)")
_MARKUP = re.compile(r"([\\`*|]|(?<=\])[(\[])")


def terminal(text: str) -> str:
    r"""Return text for a terminal: line ends and tabs stay, other characters that are not shown become a dot.

    >>> terminal("a\x1b[31mb\n\x07")
    'a·[31mb\n·'
    """
    return text if text.isascii() and text.isprintable() else _UNSHOWN.sub(DOT, text.replace("\r\n", "\n"))


def visible(text: str, most: int | None = None) -> str:
    r"""Return text on one line: line ends and tabs drawn, the rest that can't be printed as a dot, cut in front.

    >>> visible("a\n b\x00"), visible("abcdef", 4)
    ('a↵ b·', '…def')
    """
    drawn = "".join(_DRAWN.get(c, c if c.isprintable() else DOT) for c in text)
    return drawn if most is None or len(drawn) <= most else "\N{HORIZONTAL ELLIPSIS}" + drawn[len(drawn) - most + 1 :]


def escape_markdown(text: str) -> str:
    r"""Return text that Markdown takes as it is, on one line: in a paragraph, a heading or a table's cell.

    >>> print(escape_markdown("a|b *c* [d](e) <i> [1, 2]"))
    a\|b \*c\* [d]\(e) &lt;i> [1, 2]
    >>> print(escape_markdown("x\n\n## pass"), escape_markdown("# pass"), escape_markdown("1. pass"))
    x ## pass \# pass 1\. pass
    """
    flat = _UNSHOWN.sub(DOT, " ".join(text.split()))
    flat = _MARKUP.sub(r"\\\1", _ENTITY.sub("&amp;", flat).replace("<", "&lt;"))
    if number := _NUMBERED.match(flat):
        return f"{number[0]}\\{flat[number.end() :]}"
    return f"\\{flat}" if _BLOCK_START.match(flat) else flat


def code_span(text: str, *, in_table: bool = False) -> str:
    r"""Return text as a code span of Markdown; the fence is longer than any row of backticks in it.

    >>> print(code_span("rtn"), code_span("a`b``"), code_span("a|b", in_table=True))
    `rtn` ``` a`b`` ``` `a\|b`
    """
    flat = _UNSHOWN.sub(DOT, " ".join(text.split())) or " "
    flat = flat.replace("|", "\\|") if in_table else flat
    fence = "`" * (1 + _longest_run(flat))
    space = " " if "`" in flat else ""
    return f"{fence}{space}{flat}{space}{fence}"


def code_block(text: str, language: str = "") -> str:
    """Return lines as a fenced block of Markdown, whose fence is longer than any row of backticks in them."""
    fence = "`" * max(3, 1 + _longest_run(text))
    return f"{fence}{language}\n{terminal(text)}\n{fence}"


def xml(text: str) -> str:
    r"""Return text without the characters that XML 1.0 forbids; a writer of XML escapes the rest.

    >>> xml("a\x1bb")
    'a·b'
    """
    return _NOT_IN_XML.sub(DOT, terminal(text))


def page(text: str) -> str:
    """Return text without what turns or hides letters on a page; the template escapes the rest."""
    return terminal(text)


def json_text(text: str, encoding: str = "utf-8") -> str:
    r"""Return JSON for a stream of some encoding: what can't be shown there as \uXXXX, which reads back.

    >>> print(json_text('{"a": "\x9b31m"}'), json_text('["é−"]', "latin-1"))
    {"a": "\u009b31m"} ["é\u2212"]
    """
    spelled = _UNSHOWN.sub(lambda match: _spelled(match[0]), text)
    try:
        spelled.encode(encoding)
    except UnicodeEncodeError:
        return "".join(c if _fits(c, encoding) else _spelled(c) for c in spelled)
    return spelled


def cut_text(text: str, most: int) -> str:
    """Return a text of at most so many letters.

    >>> cut_text("abcdef", 4)
    'abc…'
    """
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def cut(value: object, most: int = 80) -> str:
    """Return how a message shows a value that a file holds: never longer than `most`, however large it is.

    >>> cut([1, 2]), cut("x" * 200, 10), cut([["lol"] * 99] * 99, 20)
    ('[1, 2]', "'xxxxxxxx…", 'a list of 99 entries')
    """
    if isinstance(value, str):
        shown = repr(value[:most])
    elif isinstance(value, int):
        shown = str(value) if value.bit_length() < 256 else "a number of more than 70 digits"
    elif isinstance(value, (list, tuple, dict, set)):
        kind = "a mapping" if isinstance(value, dict) else "a list"
        plain = all(isinstance(each, (str, int, float, bool, type(None))) for each in value)
        small = plain and not isinstance(value, dict) and len(value) <= 8
        shown = repr(value) if small else f"{kind} of {len(value)} entries"
    else:
        shown = repr(value)
    return cut_text(shown, most)


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _spelled(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


def _fits(character: str, encoding: str) -> bool:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True

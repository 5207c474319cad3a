"""The formats that a mix chooses among, from the names that a user types."""

from collections.abc import Sequence
from difflib import get_close_matches

from qeval.errors import UsageError
from qeval.quant.grid import FLOAT, parse, with_span

UNQUANTIZED = ("fp16", "bf16")
"""Names of weights that stay what they are: of a whole recipe's, and of a group's in a mix."""
CANDIDATE_MARK = "/"
"""Stands between the formats in a name."""
_LARGE = 4096
"""Rows and columns of the matrix that formats are ranked by."""


def candidate_formats(recipe: str, texts: Sequence[str]) -> tuple[str, ...]:
    """Return the whole names of formats, the one that takes the fewest bits first; `float` for what stays as it is.

    >>> candidate_formats("a", ["bf16", "int8", "fp8-tile128", "int4-g32"])
    ('int4-g32-signed', 'fp8-tile128', 'int8-g128', 'float')

    Args:
        recipe: The name that errors tell.
        texts: The formats as they were typed.

    Raises:
        UsageError: There is one alone, one twice, or one that is unknown.
    """
    names = [_whole_name(recipe, text) for text in texts]
    if twice := [each for place, each in enumerate(names) if each in names[:place]]:
        raise UsageError(f"'{recipe}' names {twice[0]} twice among its formats; name each once.")
    if len(names) < 2:
        raise UsageError(
            f"'{recipe}' names one format, {names[0]}, and a mix chooses among several; add another one, such as "
            "fp8-tile128 or bf16."
        )
    return tuple(sorted(names, key=_bits_of_large))


def _whole_name(recipe: str, text: str) -> str:
    """Return the whole name of a format.

    Raises:
        UsageError: There is no such format; the nearest are named.
    """
    if not text:
        raise UsageError(
            f"'{recipe}' has an empty name among its formats; name one on both sides of each {CANDIDATE_MARK}, or drop "
            "that."
        )
    if text in (*UNQUANTIZED, FLOAT):
        return FLOAT
    try:
        return str(with_span(parse(text)))
    except UsageError as error:
        if nearest := get_close_matches(text, UNQUANTIZED, n=1):
            raise UsageError(f"'{recipe}': '{text}' is no format; nearest: {nearest[0]}.") from error
        raise UsageError(f"'{recipe}': {error}") from error


def _bits_of_large(name: str) -> tuple[float, str]:
    return (float("inf") if name == FLOAT else parse(name).size_bits(_LARGE, _LARGE)), name

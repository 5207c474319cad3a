"""The words of a recipe's name: presets, options, numbers and formats; and the nearest to one that means nothing."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from qeval.errors import UsageError, unknown
from qeval.methods import METHODS
from qeval.quant.candidates import CANDIDATE_MARK
from qeval.quant.grid import FLOAT_GRIDS, FLOAT_WORDS, GRID_WORDS
from qeval.quant.scheme import W8A8

PRESETS: Mapping[str, str] = {
    "int8-w8a8": "rtn:int8-w8a8",
    "quarot": "gptq:int4-channel+r1r2",
    "quarot-rtn": "rtn:int4-channel+r1r2",
}
"""Short names; what follows their `+` gives way to parts of the user's for the same field."""
_OPTIONS: dict[str, dict[str, Any]] = {
    "clip": {"clip": True},
    "noclip": {"clip": False},
    "actorder": {"act_order": True},
    "noactorder": {"act_order": False},
    "fold": {"fold_only": True},
    "head": {"quantize_head": True},
    "measured": {"importance": "measured"},
    "fisher": {"importance": "fisher"},
    "positional": {"importance": "positional"},
}
_NUMBERS = {"budget": "{}bpw", "damping": "damp{}", "alpha": "alpha{}"}
"""The fields that a word gives a number, and the word."""
_OPTION_WORDS = (*_OPTIONS, W8A8, "4.8bpw", "damp0.01", "alpha0.5")
"""The words that are no part of a grid's name, of those with a number one each."""
_INTEGER_GRID = re.compile(r"int\d+(-(g\d+|channel|tensor|a?sym|full|half|signed))*")


def read_words(words: str) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of a recipe that words give, and the words that are left, which name a grid.

    Raises:
        UsageError: A word is nearly one of those that give a field.
    """
    options: dict[str, Any] = {}
    grid: list[str] = []
    for word in filter(None, words.split("-")):
        if fields := _OPTIONS.get(word) or _number_of(word):
            options |= fields
            continue
        nearest = get_close_matches(word, [*GRID_WORDS, *_OPTION_WORDS], n=1)
        if nearest and nearest[0] in _OPTION_WORDS and nearest[0] != word:
            raise UsageError(f"'{word}' in '{words}' means nothing; nearest: {nearest[0]}.")
        grid.append(word)
    return options, grid


def read_formats(words: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the fields that words give, and the formats among them; words and formats may stand in any order."""
    options: dict[str, Any] = {}
    formats = []
    for part in words.split(CANDIDATE_MARK):
        named_options, grid = read_words(part)
        options |= named_options
        formats.append("-".join(grid))
    return options, tuple(formats)


def _number_of(word: str) -> dict[str, float]:
    """Return the field and the number that a word such as `damp0.05` gives; empty where it gives none."""
    matches = {name: re.fullmatch(form.format(r"(\d+(?:\.\d+)?)"), word) for name, form in _NUMBERS.items()}
    return {name: float(match[1]) for name, match in matches.items() if match}


def unknown_method(name: str) -> UsageError:
    """Return the error for a word that is no method, preset or format; the nearest of the kind that is nearer."""
    if name in PRESETS:
        return UsageError(f"{name} is short for {PRESETS[name]} and takes no words after a colon; say that, changed.")
    if _INTEGER_GRID.fullmatch(name):
        return UsageError(f"'{name}' names a grid and no method; say for example rtn:{name} or awq:{name}.")
    methods = [*METHODS, *PRESETS]
    nearest = get_close_matches(name.partition("-")[0].lower(), [*methods, *FLOAT_WORDS], n=1)
    if nearest and nearest[0] in FLOAT_WORDS:
        return unknown("method or format", name, [*methods, *FLOAT_WORDS, *FLOAT_GRIDS])
    return unknown("method", name, methods)


def replaces_part(words: Sequence[str], default: str) -> bool:
    """Return whether words of a grid's name say the same part as a default: bits, blocks or symmetry."""
    parts = (r"int\d+", r"g\d+|channel|tensor", r"a?sym")
    return any(re.fullmatch(part, default) and any(re.fullmatch(part, word) for word in words) for part in parts)

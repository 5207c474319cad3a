"""Draws of a calibration text: the same text with its parts in an order that a seed decides.

A method sees the first tokens of a text, so another order shows it other parts. Seed 0 is the text as it is.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qeval.compare.arguments import slug
from qeval.compare.settings import CalibrationChoice
from qeval.errors import UsageError
from qeval.files.atomic import write_text
from qeval.identity import digest
from qeval.paths import home
from qeval.tasks.corpus import corpus_names, load_calibration

_PARTS, _DRAWS = 256, "draws"


class CalibrationDraw(NamedTuple):
    """One draw: the name of the text, the seed, and what `compare` takes as its calibration."""

    text: str
    seed: int
    source: str


def draw_calibrations(choices: Sequence[CalibrationChoice], seeds: int) -> list[CalibrationDraw]:
    """Return every draw of every text, the texts in order; those of other seeds than 0 are written into the cache.

    Args:
        choices: The texts.
        seeds: Draws of each.

    Raises:
        UsageError: A text is not there, or two have one name.
    """
    draws = []
    names = [Path(choice.source).name if Path(choice.source).is_file() else choice.source for choice in choices]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"Two of the calibration texts are called {twice}; rename one.")
    for choice, name in zip(choices, names, strict=True):
        draws.append(CalibrationDraw(name, 0, choice.source))
        for seed in range(1, seeds):
            drawn = shuffle_parts(load_calibration(choice.source).text, seed)
            path = home() / _DRAWS / digest({"text": drawn})[:16] / f"{slug(choice.source)}-seed{seed}.txt"
            write_text(path, drawn)
            draws.append(CalibrationDraw(name, seed, str(path)))
    return draws


def shuffle_parts(text: str, seed: int) -> str:
    """Return a text with its lines in another order: runs of lines, 256 at most, each kept whole.

    Args:
        text: The text.
        seed: Decides the order.
    """
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    size = -(-len(lines) // _PARTS)
    parts = ["".join(lines[start : start + size]) for start in range(0, len(lines), max(size, 1))]
    random.Random(seed).shuffle(parts)
    return "".join(parts)


def named_texts(calibration: object | None) -> list[str | None]:
    """Return the texts of a comma-separated list; one None where none is named."""
    return [None] if calibration is None else [*corpus_names(str(calibration))]

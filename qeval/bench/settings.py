"""Everything that a benchmark was asked for, checked once at the door."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from qeval.compare.settings import CalibrationChoice, ModelChoice
from qeval.config import Defaults, Recipe, check_distinct, parse_method
from qeval.engines.opening import Precision
from qeval.engines.registry import ENGINES
from qeval.errors import UsageError, unknown
from qeval.paths import check_place

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
"""What `--methods` takes beside the quantizers: the model itself in one of these types."""


@dataclass(frozen=True)
class BenchChoice:
    """One benchmark: engines x variants x batches x prompts.

    `prompts` are lengths in tokens, `generate` is the number of tokens generated after each. `budget_seconds` is for
    the whole command, `repeats` the most that one cell gets.
    """

    model: ModelChoice
    engines: tuple[str, ...]
    precisions: tuple[Precision, ...]
    recipes: tuple[Recipe, ...]
    variants: tuple[tuple[str, Path], ...]
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    generate: int
    out: Path
    calibration: CalibrationChoice = field(default_factory=CalibrationChoice)
    corpus: str = "pydoc"
    provider: str = "cpu"
    accuracy_level: int = 4
    threads: int | None = None
    budget_seconds: float = 540.0
    repeats: int = 30
    seed: int = 0
    command: str = ""

    def __post_init__(self) -> None:
        """Refuse what can't be measured.

        Raises:
            UsageError: an unknown engine, no variant, a number below one, two variants of one name, a file as --out.
        """
        for engine in self.engines or ("",):
            if engine not in ENGINES:
                raise unknown("engine", engine, ENGINES)
        given = [Recipe(name, "rtn") for name in (*self.precisions, *(name for name, _ in self.variants))]
        check_distinct((*self.recipes, *given))
        if not self.recipes and not given:
            raise UsageError("Nothing to run: give --methods, for example --methods fp32,rtn, or --variant.")
        if self.accuracy_level not in (1, 4):
            raise UsageError("--accuracy-level takes 1 (fp32 activations) or 4 (int8 activations).")
        check_place(self.out, "the records")
        self._check_numbers()

    def _check_numbers(self) -> None:
        flags = {
            "--batch": self.batches,
            "--prompt": self.prompts,
            "--generate": (self.generate,),
            "--repeats": (self.repeats,),
            "--time-budget": (self.budget_seconds,),
            "--threads": (1 if self.threads is None else self.threads,),
        }
        for flag, values in flags.items():
            if not values:
                raise UsageError(f"{flag} names no number.")
            if not all(math.isfinite(value) for value in values):
                raise UsageError(f"{flag} must be a finite number, not {values[0]:g}.")
            if min(values) < 1:
                raise UsageError(f"{flag} must be at least 1, not {min(values):g}.")

    @property
    def variant_names(self) -> list[str]:
        """All variants, in the order of the tables: the model itself, quantizers, those given."""
        return [*self.precisions, *(recipe.name for recipe in self.recipes), *(name for name, _ in self.variants)]

    @property
    def cells(self) -> list[tuple[int, int]]:
        """(batch, prompt), the least work first, so that what a short budget leaves out is the dearest."""
        every = [(batch, prompt) for batch in self.batches for prompt in self.prompts]
        return sorted(every, key=lambda cell: (cell[0] * (cell[1] + self.generate), cell))


def parse_variants(text: str, defaults: Defaults) -> tuple[tuple[Precision, ...], tuple[Recipe, ...]]:
    """The types and the recipes of `fp32,awq,rtn:int8-channel`.

    >>> parse_variants("fp32,rtn", Defaults())[0]
    ('fp32',)

    Raises:
        UsageError: a name that is neither.
    """
    names = dict.fromkeys(name for name in (part.strip() for part in text.split(",")) if name)
    precisions = tuple(name for name in PRECISIONS if name in names)
    return precisions, tuple(parse_method(name, defaults) for name in names if name not in PRECISIONS)


def parse_numbers(text: str, flag: str) -> tuple[int, ...]:
    """The whole numbers of `1,4,16`, each once, ascending.

    >>> parse_numbers("16, 4,4", "--batch")
    (4, 16)

    Raises:
        UsageError: something else stands among them.
    """
    words = [word for word in (part.strip() for part in text.split(",")) if word]
    try:
        return tuple(sorted({int(word) for word in words}))
    except ValueError as error:
        raise UsageError(f"{flag} takes whole numbers such as 1,4,16, not '{text}'.") from error

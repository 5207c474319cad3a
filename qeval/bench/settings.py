"""The settings of a benchmark, checked when they are built; each is described by its option."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, get_args

from qeval.bench.engines.registry import ENGINES
from qeval.compare import arguments as read
from qeval.compare.options import Checked, Option
from qeval.compare.settings import EP, OUT, THREADS, CalibrationChoice, ModelChoice
from qeval.config import Defaults, Recipe, check_distinct, parse_method
from qeval.errors import UsageError, unknown
from qeval.store.out import check_out
from qeval.types import FloatType

PRECISIONS: tuple[FloatType, ...] = get_args(FloatType)
"""What `--methods` takes beside the quantizers: the model itself in one of these types."""


def parse_numbers(numbers: str | int | Iterable[int], flag: str) -> tuple[int, ...]:
    """Return the whole numbers of `1,4,16`, 4 or [1, 4], each once, ascending.

    >>> parse_numbers("16, 4,4", "--batch")
    (4, 16)

    Raises:
        UsageError: Something else stands among them.
    """
    text = str(numbers) if isinstance(numbers, str | int) else ",".join(str(number) for number in numbers)
    words = [word for word in (part.strip() for part in text.split(",")) if word]
    try:
        return tuple(sorted({int(word) for word in words}))
    except ValueError as error:
        raise UsageError(f"{flag} takes whole numbers such as 1,4,16, not '{text}'.") from error


@dataclass(frozen=True)
class BenchChoice(Checked):
    """One benchmark: engines x variants x batches x prompts.

    `prompts` are lengths in tokens, `generate` is the number of tokens generated after each. `budget_seconds` is for
    the whole command, `repeats` the most that one cell gets.
    """

    model: ModelChoice
    engines: Annotated[
        tuple[str, ...],
        Option(
            "Comma-separated: onnxruntime, onnxruntime-genai, pytorch-eager, pytorch-compile, llama.cpp.",
            type=str,
            parse=read.names,
        ),
    ]
    precisions: tuple[FloatType, ...]
    recipes: tuple[Recipe, ...]
    variants: Annotated[
        tuple[tuple[str, Path], ...],
        Option(
            "NAME=PATH: a variant, an ONNX folder or a GGUF file; may be repeated.",
            flags=("--variant",),
            type=list[str] | None,
            parse=read.variant_paths,
        ),
    ]
    batches: Annotated[
        tuple[int, ...],
        Option(
            "Batch sizes, comma-separated.",
            keyword="batch",
            type=str,
            parse=partial(parse_numbers, flag="--batch"),
            least=1,
            range_shown=False,
        ),
    ]
    prompts: Annotated[
        tuple[int, ...],
        Option(
            "Prompt lengths in tokens, comma-separated.",
            keyword="prompt",
            type=str,
            parse=partial(parse_numbers, flag="--prompt"),
            least=1,
            range_shown=False,
        ),
    ]
    generate: Annotated[
        int,
        Option(
            "Tokens generated after each prompt; default: 256, on a CPU 32.",
            type=int | None,
            least=1,
            range_shown=False,
        ),
    ]
    out: Annotated[Path, OUT]
    calibration: CalibrationChoice = field(default_factory=CalibrationChoice)
    corpus: Annotated[
        str,
        Option(
            "What prompts are cut from (no speed depends on it): pydoc, wikitext2, a file.", parse=read.text_or_none
        ),
    ] = "pydoc"
    provider: Annotated[str, EP] = "cpu"
    accuracy_level: Annotated[int, Option("ONNX Runtime's: 1, fp32 activations; 4, int8 in the product.")] = 4
    threads: Annotated[int | None, THREADS] = None
    budget_seconds: Annotated[
        float,
        Option(
            "Seconds for the whole command; what it leaves out is said.",
            keyword="time_budget",
            least=1,
            range_shown=False,
        ),
    ] = 540.0
    repeats: Annotated[int, Option("The most that a cell is run.", least=1, range_shown=False)] = 30
    seed: Annotated[int, Option("Decides the order of the engines.", least=0)] = 0
    command: str = ""

    def __post_init__(self) -> None:
        """Refuse what can't be measured.

        Raises:
            UsageError: An unknown engine, no variant, a number below one, two variants of one name, a file as --out.
        """
        for engine in self.engines or ("",):
            if engine not in ENGINES:
                raise unknown("engine", engine, ENGINES)
        made_before = [Recipe(name, "rtn") for name in (*self.precisions, *(name for name, _ in self.variants))]
        check_distinct((*self.recipes, *made_before))
        if not self.recipes and not made_before:
            raise UsageError("Nothing to run: give --methods, for example --methods fp32,rtn, or --variant.")
        if self.accuracy_level not in (1, 4):
            raise UsageError("--accuracy-level takes 1 (fp32 activations) or 4 (int8 activations).")
        check_out(self.out, "the records")
        super().__post_init__()

    @property
    def variant_names(self) -> list[str]:
        """Return all variants in the order of the tables: the model itself, those to quantize, those made before."""
        return [*self.precisions, *(recipe.name for recipe in self.recipes), *(name for name, _ in self.variants)]

    @property
    def cells(self) -> list[tuple[int, int]]:
        """Return each (batch, prompt), the least work first, so that what a short budget leaves out is the dearest."""
        every = [(batch, prompt) for batch in self.batches for prompt in self.prompts]
        return sorted(every, key=lambda cell: (cell[0] * (cell[1] + self.generate), cell))


def parse_variants(text: str, defaults: Defaults) -> tuple[tuple[FloatType, ...], tuple[Recipe, ...]]:
    """Return the types and the recipes of `fp32,awq,rtn:int8-channel`.

    >>> parse_variants("fp32,rtn", Defaults())[0]
    ('fp32',)

    Raises:
        UsageError: A name is neither.
    """
    names = dict.fromkeys(name for name in (part.strip() for part in text.split(",")) if name)
    precisions = tuple(name for name in PRECISIONS if name in names)
    return precisions, tuple(parse_method(name, defaults) for name in names if name not in PRECISIONS)


@dataclass(frozen=True)
class PageChoice:
    """The parts of a benchmark's page beside the speeds."""

    quality: Annotated[
        Path | None,
        Option("A comparison of the same variants, to lay beside their speed.", parse=read.path_or_none),
    ] = None
    reference: Annotated[
        tuple[str, ...],
        Option(
            "A published table to lay beside one's own; may be repeated.",
            type=list[str] | None,
            parse=lambda tables: tuple(tables or ()),
        ),
    ] = ()
    base: Annotated[str | None, Option("What 'x times' refers to: an engine, or ENGINE/VARIANT.")] = None

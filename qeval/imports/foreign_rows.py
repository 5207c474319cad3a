"""The nouns of an import: where rows come from, and what one file says of one score of one task."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from numpy import object_
from numpy.typing import NDArray

from qeval.stats.bootstrap import Floats, Ints
from qeval.tasks.directions import Direction
from qeval.tasks.score_names import score_name, score_title

TextArray = NDArray[object_]
HASHES = ("doc_hash", "prompt_hash", "target_hash")
"""The hashes by which lm-eval's samples say what was asked."""
ONLY_REPEAT = "0"
"""The repeat of an item that has one score."""


class SourceFile(NamedTuple):
    """A file of rows, and the name of their model; None: the file says it, or its own name does."""

    path: Path
    model: str | None


@dataclass(frozen=True)
class Declarations:
    """The user's word on files that do not say it themselves.

    `task` takes all files as one task; `better` is the direction of metrics whose direction isn't known.
    """

    task: str | None = None
    better: Direction | None = None


@dataclass(frozen=True, eq=False)
class ForeignChoices:
    """Answers to multiple-choice items: `gold` and `pred` are indices of choices, [items].

    `loglikelihoods` holds the choices' summed log-likelihoods (nats), one item after the other, `counts` [items] how
    many each item has.
    """

    gold: Ints
    pred: Ints
    loglikelihoods: Floats
    counts: Ints
    acc_norm: Floats | None


@dataclass(frozen=True, eq=False)
class ForeignRows:
    """One model's rows of one score of one task, from one file; all arrays are [rows].

    `unit` is None where the file does not say; `hashes` are by name, those that the file has.
    """

    model: str
    file: Path
    format: str
    task: str
    metric: str
    filter: str | None
    better: Direction
    unit: str | None
    subjects: TextArray
    items: TextArray
    repeats: TextArray
    scores: Floats
    hashes: Mapping[str, TextArray] = field(default_factory=dict)
    choices: ForeignChoices | None = None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The score's name in rows and policies, such as gsm8k_exact_match_strict_match."""
        return score_name(self.task, self.metric, self.filter)

    @property
    def title(self) -> str:
        """The score in words, such as 'gsm8k, exact_match, strict-match'."""
        return score_title(self.task, self.metric, self.filter)

"""What an adapter is given and what it returns: one small Protocol for all tools."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from qeval.errors import UsageError
from qeval.formats.base import Matrix
from qeval.quant.grid import Grid


@dataclass(frozen=True, eq=False)
class Job:
    """What a tool is to quantize: matrices of `model` by parameter name, each with its grid.

    `algorithm` is the tool's own word (`awq_lite`), None where it has but one; `samples` are token ids of calibration
    text, empty for tools that see none. The model must be left as it is.
    """

    model: Any
    parameters: Mapping[str, Tensor]
    grids: Mapping[str, Grid]
    algorithm: str | None
    samples: Sequence[Sequence[int]] = ()

    def one_grid(self, tool: str) -> Grid:
        """The grid, for tools that take one for the whole model.

        Raises:
            UsageError: the weights have several, or it is not all of the decoder layers' linears.
        """
        grids = set(self.grids.values())
        if len(grids) != 1:
            raise UsageError(f"{tool} takes one grid for all weights; leave the recipe's rules out.")
        return grids.pop()


class Quantize(Protocol):
    """A tool: its matrices, by parameter name; everything that `job.grids` names."""

    def __call__(self, job: Job) -> Mapping[str, Matrix]:
        """Quantize.

        Raises:
            UsageError: the tool can't do what the grids ask for.
        """
        ...


@dataclass(frozen=True)
class Tool:
    """An adapter, the package that it needs, and the command that installs it."""

    quantize: Quantize
    package: str
    distribution: str
    install: str

"""The Protocol that the adapters of all tools satisfy, and the job that they do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from qeval.errors import UsageError
from qeval.formats.base import DecodedMatrix
from qeval.quant.grid import Grid


@dataclass(frozen=True, eq=False)
class ToolJob:
    """The matrices that a tool quantizes; it leaves the model as it was.

    Attributes:
        model: The float model.
        parameters: Its weights by name.
        grids: The grid of every matrix that is quantized, by parameter name.
        algorithm: The tool's own word (`awq_lite`); None where it has but one.
        samples: Token ids of calibration text; empty for tools that read none.
    """

    model: Any
    parameters: Mapping[str, Tensor]
    grids: Mapping[str, Grid]
    algorithm: str | None
    samples: Sequence[Sequence[int]] = ()

    def one_grid(self, tool: str) -> Grid:
        """Return the grid of all weights, for a tool that takes one for the whole model.

        Raises:
            UsageError: The weights have several.
        """
        grids = set(self.grids.values())
        if len(grids) != 1:
            raise UsageError(f"{tool} takes one grid for all weights; leave the recipe's rules out.")
        return grids.pop()


class Quantize(Protocol):
    """Quantizes by a tool."""

    def __call__(self, job: ToolJob) -> Mapping[str, DecodedMatrix]:
        """Return the quantized matrices by parameter name: all that `job.grids` names.

        Raises:
            UsageError: The tool can't do what the grids ask for.
        """
        ...


@dataclass(frozen=True)
class Tool:
    """An adapter, the package that it needs, and the command that installs it."""

    quantize: Quantize
    package: str
    distribution: str
    install: str

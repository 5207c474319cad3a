"""What variants are made from: a model, its structure, its calibration text, and what trials with it may cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qeval.calibrate import accept, fisher, sensitivity
from qeval.calibrate.groups import Search
from qeval.calibrate.sensitivity import Effective
from qeval.models.graph import Description
from qeval.models.head import Head
from qeval.progress import Advance


class Trials(Protocol):
    """Tries quantized groups in a model, and gives mean KLs in nats; the model stays as it is.

    `advance` is told `sensitivity.trial_passes` in all by each of them.
    """

    def measure(self, effective: Effective, advance: Advance) -> dict[str, float]:
        """As `sensitivity.measure`: every group quantized alone."""
        ...

    def predict(self, effective: Effective, advance: Advance) -> dict[str, float]:
        """As `fisher.predict`: the same to second order."""
        ...

    def measure_ways(self, ways: Mapping[str, Effective], advance: Advance) -> dict[str, float]:
        """As `accept.measure_ways`: all groups quantized together, each way."""
        ...


@dataclass(frozen=True, eq=False)
class InMemory:
    """Trials with a model that memory holds."""

    model: Any
    description: Description
    head: Head
    samples: Sequence[Sequence[int]]

    def measure(self, effective: Effective, advance: Advance) -> dict[str, float]:
        """As `sensitivity.measure`."""
        return sensitivity.measure(self.model, self.description, self.head, self.samples, effective, advance)

    def predict(self, effective: Effective, advance: Advance) -> dict[str, float]:
        """As `fisher.predict`."""
        return fisher.predict(self.model, self.description, self.head, self.samples, effective, advance)

    def measure_ways(self, ways: Mapping[str, Effective], advance: Advance) -> dict[str, float]:
        """As `accept.measure_ways`."""
        return accept.measure_ways(self.model, self.description, self.head, self.samples, ways, advance)


@dataclass(frozen=True, eq=False)
class Source:
    """The model that variants are made from: its parameters (head included), structure, and calibration."""

    model: Any
    description: Description
    head: Head
    samples: Sequence[Sequence[int]]
    search: Search
    trials: Trials

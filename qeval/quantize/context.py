"""The model that variants are made from: its structure, its calibration text, and a way to try quantized groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qeval.models.structure.graph import Description
from qeval.models.structure.head import Head
from qeval.progress import Advance
from qeval.quantize import fisher, select_mix, sensitivity
from qeval.quantize.scaling import Search
from qeval.quantize.sensitivity import Effective


class Trials(Protocol):
    """Tries quantized groups in a model and returns mean KLs in nats; the model is left as it was.

    Each method calls `advance` with `sensitivity.trial_passes` in all.
    """

    def measure(self, effective: Effective, advance: Advance) -> dict[str, float]:
        """As `sensitivity.measure`: every group quantized alone."""
        ...

    def predict(self, effective: Effective, advance: Advance) -> dict[str, float]:
        """As `fisher.predict`: the same to second order."""
        ...

    def measure_mixes(self, mixes: Mapping[str, Effective], advance: Advance) -> dict[str, float]:
        """As `select_mix.measure_mixes`: all groups quantized together, each mix."""
        ...

    def on_grid(self, name: str) -> "Trials":
        """Return the trials of one grid among several; what they come to is another grid's no more."""
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

    def measure_mixes(self, mixes: Mapping[str, Effective], advance: Advance) -> dict[str, float]:
        """As `select_mix.measure_mixes`."""
        return select_mix.measure_mixes(self.model, self.description, self.head, self.samples, mixes, advance)

    def on_grid(self, name: str) -> "InMemory":
        """Return itself: nothing is kept between trials."""
        return self


@dataclass(frozen=True, eq=False)
class Source:
    """The model that variants are made from: its parameters (head included), structure, and calibration.

    `float_bits`: bits of a weight that stays in float, in the checkpoint. `all_experts`: whether each expert is
    calibrated on every token, not on those routed to it alone.
    """

    model: Any
    description: Description
    head: Head
    samples: Sequence[Sequence[int]]
    search: Search
    trials: Trials
    float_bits: int
    all_experts: bool = False

"""What trying groups in a model came to, kept in the cache: another budget, in this run or the next, starts from it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qeval.calibrate.sensitivity import Effective
from qeval.calibrate.source import Trials
from qeval.progress import Advance
from qeval.store.atomic import write_text


@dataclass(frozen=True, eq=False)
class Remembered:
    """`calibrate.source.Trials` whose KLs of single groups are read from `path`, where they are, and written there.

    `units` is what either kind of trial tells its progress in all; `warn` is told of a file that is torn.
    """

    trials: Trials
    path: Path
    units: int
    warn: Callable[[str], None]

    def measure(self, effective: Effective, advance: Advance) -> dict[str, float]:
        """As `sensitivity.measure`."""
        return self._found(self.trials.measure, effective, advance)

    def predict(self, effective: Effective, advance: Advance) -> dict[str, float]:
        """As `fisher.predict`."""
        return self._found(self.trials.predict, effective, advance)

    def measure_ways(self, ways: Mapping[str, Effective], advance: Advance) -> dict[str, float]:
        """As `accept.measure_ways`: the ways are those of one budget, so nothing of them is kept."""
        return self.trials.measure_ways(ways, advance)

    def _found(
        self, trial: Callable[[Effective, Advance], dict[str, float]], effective: Effective, advance: Advance
    ) -> dict[str, float]:
        if (kept := self._read()) is not None:
            advance(self.units)
            return kept
        found = trial(effective, advance)
        write_text(self.path, json.dumps({"kl_nats": found}, indent=1) + "\n")
        return found

    def _read(self) -> dict[str, float] | None:
        """The KLs by group, to the last bit; None where there are none."""
        if not self.path.exists():
            return None
        try:
            return {str(name): float(kl) for name, kl in json.loads(self.path.read_text("utf-8"))["kl_nats"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            self.warn(f"{self.path} is torn; what it held is measured again.")
            return None

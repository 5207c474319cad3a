"""A cache of groups' sensitivities in a model: another budget, in this run or the next, starts from it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qeval.files.atomic import write_text
from qeval.progress import Advance
from qeval.quantize.context import Trials
from qeval.quantize.sensitivity import Effective
from qeval.store.seal import has_valid_seal, parse_object, seal

TRIALS_VERSION = 2
"""Files of version 1 said no version, and carry no checksum."""


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
        """Do as `sensitivity.measure`."""
        return self._measured(self.trials.measure, effective, advance)

    def predict(self, effective: Effective, advance: Advance) -> dict[str, float]:
        """Do as `fisher.predict`."""
        return self._measured(self.trials.predict, effective, advance)

    def measure_mixes(self, mixes: Mapping[str, Effective], advance: Advance) -> dict[str, float]:
        """Do as `select_mix.measure_mixes`: the mixes are those of one budget, so nothing of them is kept."""
        return self.trials.measure_mixes(mixes, advance)

    def on_grid(self, name: str) -> "Remembered":
        """Return the trials of one grid among several, in a file of its own that other mixes of it share."""
        return replace(self, path=self.path.with_stem(f"{self.path.stem}-{name}"))

    def _measured(
        self, trial: Callable[[Effective, Advance], dict[str, float]], effective: Effective, advance: Advance
    ) -> dict[str, float]:
        if (kept := self._read()) is not None:
            advance(self.units)
            return kept
        kls = trial(effective, advance)
        content = {"trials_version": TRIALS_VERSION, "key": self.path.stem, "kl_nats": kls}
        write_text(self.path, json.dumps(seal(content), indent=1) + "\n")
        return kls

    def _read(self) -> dict[str, float] | None:
        """Return the KLs by group, to the last bit; None where there are none, or none that a checksum vouches for."""
        if not self.path.exists():
            return None
        try:
            content = parse_object(self.path.read_bytes())
            kls = {str(name): float(kl) for name, kl in content["kl_nats"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            self.warn(f"{self.path} is torn; what it held is measured again.")
            return None
        if not has_valid_seal(content) or content.get("key") != self.path.stem:
            self.warn(
                f"{self.path} has no checksum that fits it: it was changed, or is an older qeval's; what it held is "
                "measured again."
            )
            return None
        return kls

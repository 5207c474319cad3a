"""The false alarms of a nightly gate on sampled generation: alarms although nothing is worse than it may be.

    python -m benchmarks.nightly_gate

A model answers the questions of a test by sampling, so that its accuracy differs from night to night. A fixed threshold
(accuracy may fall by `margin` points against the stored run) is compared with qeval's gate on the same rows, as
`qeval import` and `qeval gate` judge them: paired by question, clustered by subject, repeats as a variance component.

Two truths: nothing changed, and the model is worse by exactly the margin, which is the hardest that is still allowed.
At the margin even a good gate alarms at its level; where nothing changed it should hardly ever. The exit code is 1
where qeval's gate alarms more often than its level by more than the simulation's own error (two standard errors), or
where the fixed threshold's false alarms are not over 10 %, which is what this simulation is to show.
"""

import argparse
import sys
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from qeval.gate.score_figures import score_figure
from qeval.report.score_rows import ScoreRows
from qeval.store.run import ScoreRecord

CONFIDENCE, MARGIN = 0.95, 0.02
FIXED_AT_LEAST = 0.10
SUBJECTS = 40
_RECORD = ScoreRecord(
    name="t", title="t", better="higher", unit="fraction", subjects=[], items=0, harness="simulation"
)  # fmt: skip
Floats = NDArray[np.float64]


class Setting(NamedTuple):
    """A nightly test: its questions, and how often each is asked."""

    questions: int
    repeats: int
    drop: float  # the true one


SETTINGS = [
    Setting(questions, repeats, drop) for questions in (200, 500, 1320) for repeats in (1, 4) for drop in (0.0, MARGIN)
]


def alarms(setting: Setting, nights: int, rng: Generator) -> tuple[float, float]:
    """Return the share of nights on which the fixed threshold and qeval's gate alarm."""
    fixed = gate = 0
    for _ in range(nights):
        skill = rng.normal(0.9, 1.5, setting.questions) + np.repeat(
            rng.normal(0, 0.5, SUBJECTS), -(-setting.questions // SUBJECTS)
        )[: setting.questions]  # fmt: skip
        chance = 1 / (1 + np.exp(-skill))
        worse = chance * (1 - setting.drop / chance.mean())
        before, now = (_night(each, setting.repeats, rng) for each in (chance, worse))
        fixed += now.values.mean() < before.values.mean() - MARGIN
        bounded = score_figure(_RECORD, "acc_drop", now, before).bounded
        assert bounded is not None
        low = bounded.bounds(CONFIDENCE).low
        gate += low is not None and low > MARGIN
    return fixed / nights, gate / nights


def _night(chance: Floats, repeats: int, rng: Generator) -> ScoreRows:
    """Return one night's answers, right with each question's chance."""
    right = (rng.random((len(chance), repeats)) < chance[:, None]).astype(np.float64)
    places, labels = np.indices(right.shape)
    width = -(-len(chance) // SUBJECTS)
    items = np.arange(len(chance)).astype(str).astype(np.object_)
    subjects = (np.arange(len(chance)) // width).astype(str).astype(np.object_)
    return ScoreRows(subjects, items, items, right.ravel(), places.ravel(), labels.ravel())


def main() -> int:
    """Print the table and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nights", type=int, default=2000)
    nights, rng, faults = parser.parse_args().nights, np.random.default_rng(0), 0
    level = 1 - CONFIDENCE
    most = level + 2 * sqrt(level * (1 - level) / nights)
    print(f"Margin {100 * MARGIN:g} points, level {level:.0%}, {nights} nights each; alarms of")
    print("| questions | repeats | true drop | fixed threshold | qeval gate |")
    print("|---:|---:|---:|---:|---:|")
    for setting in SETTINGS:
        fixed, gate = alarms(setting, nights, rng)
        faults += gate > most
        if setting.questions == SETTINGS[0].questions and setting.repeats == 1:
            faults += fixed <= FIXED_AT_LEAST
        drop = f"{100 * setting.drop:g} points"
        print(f"| {setting.questions} | {setting.repeats} | {drop} | {fixed:.1%} | {gate:.1%} |", flush=True)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())

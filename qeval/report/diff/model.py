"""The output of `qeval diff --json`, schema version 1: run B against run A, paired row by row."""

import json
from typing import Literal

from pydantic import BaseModel, ConfigDict

from qeval.report.model import Metric

Verdict = Literal["better", "worse", "not resolved", "inconclusive", "the same"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Difference(_Part):
    """One figure of B minus A's, from paired rows; `a` and `b` are the two sides' own values.

    `difference` has its own 95 % interval. `p_adjusted` is the p-value that it is zero, after Holm over all
    differences of the diff, and decides the `verdict`, which is about B: `not resolved` above 0.05, `the same` where no
    row differs, and `inconclusive` where the difference is no larger than `floor`, what the baseline differs by from
    itself.
    """

    name: str
    title: str
    a: float
    b: float
    difference: Metric
    floor: float | None
    p_value: float | None
    p_adjusted: float | None
    verdict: Verdict


class AnswerChanges(_Part):
    """One task's answers of B against A's. McNemar's exact test asks whether more flipped one way."""

    task: str
    title: str
    questions: int
    baseline_at_chance: bool
    right_to_wrong: int
    wrong_to_right: int
    wrong_to_other: int
    p_value: float
    p_adjusted: float  # after Holm over all such tests of the diff


class VariantDiff(_Part):
    """One variant of A against one of B."""

    a: str
    b: str
    differences: list[Difference]
    answers: list[AnswerChanges]


class ChangedMetric(_Part):
    """Something in how the two runs, or two variants, were made that is not the same."""

    what: str
    a: str
    b: str


class Diff(_Part):
    """All of `qeval diff RUN_A RUN_B --json`."""

    schema_version: Literal[1]
    a: str
    b: str
    model: str
    changed: list[ChangedMetric]
    variants: list[VariantDiff]
    notes: list[str]


def diff_json(diff: Diff) -> str:
    """Return the diff as text."""
    return json.dumps(diff.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

"""Policies: margins in YAML, read strictly. `configs/gate.schema.json` is made from this module.

    name: release
    confidence: 0.95
    rules:
      - metric: kl_nats
        at_most: 0.05 nats

A margin says its unit. Unknown keys and metrics, and margins in another unit, are refused with what would be right.
"""

import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qeval.errors import UsageError, unknown
from qeval.escape import cut
from qeval.gate.metrics import MetricKind, kind_of, margin_of
from qeval.parsing import load_yaml
from qeval.paths import shipped

Counts = Literal["inconclusive", "fail", "pass"]
Requirement = Literal["every", "any", "quantized"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Rule(_Part):
    """One margin: `at_most` or `at_least`, whichever side the metric is limited on."""

    metric: str = Field(description="such as kl_nats, ppl_increase, mmlu_acc_drop, drift_equal, size_ratio")
    at_most: str | None = Field(None, description="a number and its unit, such as '1.0 points'")
    at_least: str | None = Field(None, description="a number and its unit, such as '2.5 times'")
    variants: list[str] | None = Field(
        None, min_length=1, description="names or patterns such as 'rtn*' that the rule holds for; all without it"
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1)] | None = Field(None, description="else the policy's")
    when_inconclusive: Counts | None = Field(None, description="how an inconclusive verdict counts; else the policy's")
    when_at_chance: Counts | None = Field(
        None, description="how it counts where the baseline is no better than guessing; else as when_inconclusive"
    )

    @property
    def kind(self) -> MetricKind:
        """The kind of metric that is limited."""
        return kind_of(self.metric)

    @property
    def margin(self) -> float:
        """The margin in the figure's own unit: a share, nats, a factor, bytes."""
        return margin_of(self.margin_text, self.kind, self.metric)

    @property
    def margin_text(self) -> str:
        """The margin as it stands in the file."""
        return self.at_most or self.at_least or ""

    @property
    def text(self) -> str:
        """The rule in words, such as 'mmlu_acc_drop at most 1.0 points'."""
        return f"{self.metric} {self.kind.limit.replace('_', ' ')} {self.margin_text}"

    def holds_for(self, variant: str) -> bool:
        """Return whether the rule is about a variant."""
        return self.variants is None or any(variant == name or fnmatchcase(variant, name) for name in self.variants)


class Policy(_Part):
    """Rules that every variant must pass, and how they are judged."""

    name: str
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of each rule's bound, one-sided")
    require: Requirement | list[Requirement] = Field(
        "every",
        description="every: all gated variants must pass; any: one is enough (corrected by Holm); quantized: a variant "
        "in which nothing is quantized, or that is the baseline, fails. Several stand in a list, such as "
        "[any, quantized]",
    )
    when_inconclusive: Counts = Field("inconclusive", description="how an inconclusive verdict counts")
    rules: list[Rule] = Field(min_length=1)

    @property
    def needs_one(self) -> bool:
        """Return whether it is enough that one variant passes."""
        return "any" in self._required

    @property
    def needs_quantized(self) -> bool:
        """Return whether a variant must be quantized to pass."""
        return "quantized" in self._required

    @property
    def _required(self) -> list[Requirement]:
        return self.require if isinstance(self.require, list) else [self.require]

    def confidence_of(self, rule: Rule) -> float:
        """Return the confidence that a rule's bound must be held with."""
        return rule.confidence or self.confidence


def load_policy(path: Path) -> Policy:
    """Read the policy in a YAML file, which may be one that is shipped, such as `configs/gates/release.yaml`.

    Raises:
        UsageError: the file is missing, is no YAML, or says what no policy may say; the sentence says where.
    """
    file = path if path.exists() or path.is_absolute() else shipped(str(path))
    if not file.exists() or file.is_dir():
        raise UsageError(f"There is no policy '{path}' to read.")
    return policy_from(load_yaml(file), str(path))


def policy_from(data: object, where: str) -> Policy:
    """Return the policy that plain values mean.

    Args:
        data: What a policy's file holds: a mapping with `name`, `rules` and so on.
        where: What an error names: the file.

    Raises:
        UsageError: they say what no policy may say; the sentence says where.
    """
    try:
        policy = Policy.model_validate(data)
        if {"every", "any"} <= set(policy._required):
            raise UsageError("require says both every and any; leave one out.")
        for place, rule in enumerate(policy.rules):
            _check(rule, f"rule {place + 1}")
    except ValidationError as error:
        raise UsageError(f"'{where}': {_sentence(error)}") from error
    except UsageError as error:
        raise UsageError(f"'{where}': {error}") from error
    return policy


def policy_schema_json() -> str:
    """Return the text of `configs/gate.schema.json`; `python -m qeval.gate.policy` prints it."""
    return json.dumps(Policy.model_json_schema(), indent=1) + "\n"


def _check(rule: Rule, where: str) -> None:
    try:
        kind = rule.kind
        if (rule.at_most is None) == (rule.at_least is None):
            raise UsageError(f"{rule.metric} needs {kind.limit}, and nothing beside it.")
        if getattr(rule, kind.limit) is None:
            raise UsageError(f"{rule.metric} is limited by {kind.limit}, not by its opposite.")
        margin_of(rule.margin_text, kind, rule.metric)
        if rule.when_at_chance and not rule.metric.endswith("_acc_drop"):
            raise UsageError(f"when_at_chance is for accuracy (TASK_acc_drop), not for {rule.metric}.")
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    if not first["loc"]:
        return "it must hold a mapping with 'name' and 'rules', such as configs/gates/release.yaml."
    where = ".".join(str(part + 1) if isinstance(part, int) else str(part) for part in first["loc"])
    if first["loc"][-1] in ("at_most", "at_least"):
        return f"{where}: a margin is a number and its unit in words, such as '1.0 points', not {cut(first['input'])}."
    if first["type"] != "extra_forbidden":
        return f"{where}: {first['msg']}."
    known = Policy.model_fields if len(first["loc"]) == 1 else Rule.model_fields
    return f"{where}: {unknown('key', str(first['loc'][-1]), known)}"


if __name__ == "__main__":
    sys.stdout.write(policy_schema_json())

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
from collections.abc import Hashable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qeval.errors import UsageError, unknown
from qeval.gate.kinds import Kind, kind_of, margin_of
from qeval.paths import shipped

Counts = Literal["inconclusive", "fail", "pass"]


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
    def kind(self) -> Kind:
        """What is limited."""
        return kind_of(self.metric)

    @property
    def margin(self) -> float:
        """The margin in the figure's own unit: a share, nats, a factor, bytes."""
        return margin_of(self.given, self.kind, self.metric)

    @property
    def given(self) -> str:
        """The margin as it stands in the file."""
        return self.at_most or self.at_least or ""

    @property
    def text(self) -> str:
        """The rule in words, such as 'mmlu_acc_drop at most 1.0 points'."""
        return f"{self.metric} {self.kind.limit.replace('_', ' ')} {self.given}"

    def holds_for(self, variant: str) -> bool:
        """Whether the rule is about a variant."""
        return self.variants is None or any(variant == name or fnmatchcase(variant, name) for name in self.variants)


class Policy(_Part):
    """Rules that every variant must pass, and how they are judged."""

    name: str
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of each rule's bound, one-sided")
    require: Literal["every", "any"] = Field(
        "every", description="every: all gated variants must pass; any: one is enough (corrected by Holm)"
    )
    when_inconclusive: Counts = Field("inconclusive", description="how an inconclusive verdict counts")
    rules: list[Rule] = Field(min_length=1)

    def confidence_of(self, rule: Rule) -> float:
        """The confidence that a rule's bound must be held with."""
        return rule.confidence or self.confidence


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error: the second margin would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As SafeLoader does, but for keys that are there already."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                where = f"line {key.start_mark.line + 1}"
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is given twice ({where})", None)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_policy(path: Path) -> Policy:
    """The policy in a YAML file, which may be one that is shipped, such as `configs/gates/release.yaml`.

    Raises:
        UsageError: the file is missing, is no YAML, or says what no policy may say; the sentence says where.
    """
    try:
        found = path if path.exists() or path.is_absolute() else shipped(str(path))
        data = yaml.load(found.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UsageError(f"There is no policy '{path}' to read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from error
    try:
        policy = Policy.model_validate(data)
        for place, rule in enumerate(policy.rules):
            _check(rule, f"rule {place + 1}")
    except ValidationError as error:
        raise UsageError(f"'{path}': {_sentence(error)}") from error
    except UsageError as error:
        raise UsageError(f"'{path}': {error}") from error
    return policy


def schema_json() -> str:
    """The text of `configs/gate.schema.json`; `python -m qeval.gate.policy` prints it."""
    return json.dumps(Policy.model_json_schema(), indent=1) + "\n"


def _check(rule: Rule, where: str) -> None:
    try:
        kind = rule.kind
        if (rule.at_most is None) == (rule.at_least is None):
            raise UsageError(f"{rule.metric} needs {kind.limit}, and nothing beside it.")
        if getattr(rule, kind.limit) is None:
            raise UsageError(f"{rule.metric} is limited by {kind.limit}, not by its opposite.")
        margin_of(rule.given, kind, rule.metric)
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
        return f"{where}: a margin is a number and its unit in words, such as '1.0 points', not {first['input']}."
    if first["type"] != "extra_forbidden":
        return f"{where}: {first['msg']}."
    known = Policy.model_fields if len(first["loc"]) == 1 else Rule.model_fields
    return f"{where}: {unknown('key', str(first['loc'][-1]), known)}"


if __name__ == "__main__":
    sys.stdout.write(schema_json())

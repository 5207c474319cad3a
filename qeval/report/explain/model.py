"""The output of `qeval explain --json`, schema version 1: one variant's loss, row by row and group by group."""

import json
from typing import Literal

from pydantic import BaseModel, ConfigDict

from qeval.report.model import Flips, Metric, ScoreFlips

Went = Literal["right_to_wrong", "wrong_to_right", "wrong_to_other"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ChangedQuestion(_Part):
    """A question whose answer changed. Probabilities are the softmax of the choices' log-likelihoods.

    `question` and `choices` are None where the run kept no texts. Choices are counted from 0.
    """

    subject: str
    category: str | None
    item: int
    went: Went
    gold: int
    baseline_answer: int
    variant_answer: int
    baseline_probabilities: list[float]
    variant_probabilities: list[float]
    gold_change: float  # the right choice's probability under the variant, minus the baseline's
    baseline_margin: float  # probability of the baseline's first choice above its second: how sure it was
    question: str | None
    choices: list[str] | None


class GroupLoss(_Part):
    """A subject or a category: its accuracy under both models, and what changed."""

    name: str
    questions: int
    baseline: Metric
    variant: Metric
    difference: Metric | None
    baseline_at_chance: bool
    right_to_wrong: int
    wrong_to_right: int
    choice_kl_nats: float
    p_value: float  # McNemar's exact test on the group's flips
    p_adjusted: float  # the same after Holm over all groups of its kind


class TaskLoss(_Part):
    """One task. `changed` holds the answers that changed, those that lost most first; `flips` counts all."""

    name: str
    title: str
    questions: int
    chance: float
    baseline_at_chance: bool
    baseline: Metric
    variant: Metric
    difference: Metric
    flips: Flips
    changed: list[ChangedQuestion]
    subjects: list[GroupLoss]
    categories: list[GroupLoss]


class ChangedAnswer(_Part):
    """An item of a task without choices whose answer changed.

    `baseline_answer` is what the score's filter left of `baseline_response`, and so is the variant's. They and the
    question are None where the run kept no texts, or nothing was generated.
    """

    subject: str
    item: str
    went: Went
    question: str | None
    baseline_answer: str | None
    variant_answer: str | None
    baseline_response: str | None
    variant_response: str | None


class AnswersLoss(_Part):
    """One score that is right or wrong: what of its answers changed, those that were right first."""

    name: str
    title: str
    items: int
    flips: ScoreFlips
    changed: list[ChangedAnswer]


class TokenLoss(_Part):
    """A position with a large KL: the model has read the tokens up to `position` and predicts the next.

    `before` is the text up to the position and `next` the token that really follows; both are None where the run
    kept no texts. `next_token`, the probabilities and `delta_p` are None where what follows is not scored.
    """

    window: int
    position: int
    token: int
    kl_nats: float
    top1_agreement: bool
    before: str | None
    next: str | None
    after: str | None
    next_token: int | None
    baseline_probability: float | None
    variant_probability: float | None


class SpanLoss(_Part):
    """A spike: positions in a row, `first` to `last`, of which some have a KL among the largest hundredth.

    `kl_nats` is their sum. `text` is what the distributions at these positions predict, `before` what was read before
    it; both are None where the run kept no texts.
    """

    window: int
    first: int
    last: int
    kl_nats: float
    largest_kl_nats: float
    before: str | None
    text: str | None


class TokensLoss(_Part):
    """The positions with the largest KL, and how much of all KL the worst of them hold.

    `worst_shares[i]` is the share of the summed KL that lies in the worst `worst_levels[i]` of positions.
    """

    positions: int
    mean_kl_nats: float
    worst_levels: list[float]
    worst_shares: list[float]
    worst: list[TokenLoss]
    spans: list[SpanLoss] = []


class LayerLoss(_Part):
    """One layer's share of the damage; `kinds` by kind of linear, None where no sensitivity was measured."""

    layer: int
    share: float
    kl_nats: float
    kinds: dict[str, float | None]


class LayersLoss(_Part):
    """The KL of groups quantized alone, layer by layer, each group at the width that it has in the variant.

    `sum_kl_nats` adds them up; beside the variant's own mean KL it says how far they add (`additivity` is the one
    over the other). `unmeasured` groups have no KL at their width and count as none.
    """

    sum_kl_nats: float
    additivity: float | None
    unmeasured: int
    layers: list[LayerLoss]


class Explanation(_Part):
    """All of `qeval explain RUN VARIANT --json`."""

    schema_version: Literal[1]
    variant: str
    role: Literal["variant", "floor", "part"]
    backend: str
    model: str
    tasks: list[TaskLoss]
    answers: list[AnswersLoss] = []
    tokens: TokensLoss | None
    layers: LayersLoss | None
    notes: list[str]


def explanation_json(explanation: Explanation) -> str:
    """Return the explanation as text."""
    return json.dumps(explanation.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

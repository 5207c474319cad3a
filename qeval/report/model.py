"""The content of `report.json`, schema version 1. `configs/report.schema.json` is made from this module.

The keys that other programs may lean on, and that stay where they are as long as `schema_version` is 1:

    {"schema_version": 1,
     "model": {...},
     "baseline": {"label", "bits_per_weight", "size_bytes", "metrics": {NAME: METRIC}, ...},
     "variants": [{"name", "method", "backend", "status", "bits_per_weight", "size_bytes",
                   "metrics": {NAME: METRIC}, ...}],
     "provenance": {...}}

    METRIC = {"value", "low", "high", "unit", "better", "n", "clusters", "non_finite"}

`value` is null where nothing could be measured: no rows, or `non_finite` of its `n` rows are NaN or infinite
(the variant's status is then `broken`, and nothing of that kind is averaged). `low` and `high` bound the 95 %
interval; they are null where fewer than two clusters leave it undefined, and for a maximum. A metric that was
not asked for is absent.

Names of metrics, all of them paired with the baseline (same tokens, same questions):

| name | what it is | unit |
|---|---|---|
| `kl_nats` | mean of KL(baseline, variant) over positions | nats |
| `kl_nats_p50`, `_p90`, `_p99`, `_p99_9`, `_max` | its quantiles and its largest value | nats |
| `kl_nats_p99_over_mean` | how much worse the worst hundredth begins than the mean is | ratio |
| `reverse_kl_nats` | mean of KL(variant, baseline) | nats |
| `kl_abs_modelopt` | mean of the sum of p abs(log p - log q), Model Optimizer's 'KL' | nats |
| `top1_agreement` | share of positions with the same most likely next token | fraction |
| `top5_agreement`, `top10_agreement` | share of the baseline's k likeliest tokens among the variant's k | fraction |
| `sampling_kl_nats` | with `--sampling`: mean KL of tempered distributions, cut to the baseline's nucleus | nats |
| `outside_nucleus` | with `--sampling`: mean share of the variant's samples outside that nucleus | fraction |
| `kl_lower_bound_nats` | of an endpoint, no KL: what it is at least, by the tokens that are reported | nats |
| `mass_outside` | of an endpoint: the baseline's mean probability of all tokens that are not reported | fraction |
| `overlap` | mean of the sum of min(p, q), 1 minus total variation: what speculative decoding accepts | fraction |
| `ppl` | exp of the mean NLL over tokens (convention `token-mean`) | ppl |
| `ppl_hf_strided`, `ppl_gptq_2048`, `ppl_llamacpp_512_half` | by the run's convention, if it is that one | ppl |
| `word_ppl`, `byte_ppl`, `bits_per_byte` | the same under `lm-eval-word` | ppl, ppl, bits |
| `ppl_ratio` | perplexity over the baseline's | ratio |
| `nll_diff_nats` | mean of the paired differences of NLL | nats |
| `delta_p`, `delta_p_rms` | change of the true token's probability: mean, root mean square | probability |
| `delta_p_p01`, `_p05`, `_p50`, `_p95`, `_p99` | its quantiles: 1 % of tokens lose more than `_p01` | probability |
| `chat_kl_nats`, `chat_kl_nats_p99`, `chat_top1_agreement`, `chat_ppl_ratio` | the same on answers alone | |
| `drift_equal` | share of tokens, each after the baseline's own, that the variant would say too | fraction |
| `drift_diverged` | share of prompts at which a free run leaves the baseline's continuation | fraction |
| `drift_first_tokens` | mean number of tokens before it does (all of them where it doesn't) | tokens |
| `drift_kl_nats`, `drift_margin_nats` | mean KL and margin of the baseline's choice, where it does | nats |
| `drift_rejoined` | share of these that go on with the baseline once its token is forced there | fraction |
| `needle_recall` | share of needles whose answer would be said greedily | fraction |
| `needle_log_p_nats` | mean log-probability of the answer | nats |
| `needle_rank` | geometric mean of the rank of the answer's least likely token | rank |
| `needle_recall_drop`, `needle_loss_nats` | the baseline's recall and log-probability minus the variant's, paired | |
| `reasoning_kl_nats` | mean KL at the tokens of the baseline's chains of thought | nats |
| `reasoning_answer_nll`, `..._diff` | minus log p of the right answer behind the chain; minus the baseline's | nats |
| `reasoning_acc`, `..._diff` | share of right answers that are the likeliest; minus the baseline's | fraction |
| `reasoning_flips` | share of questions whose answer became right or wrong | fraction |
| `reasoning_length_ratio` | mean length of a sampled chain, up to the baseline's end, over the baseline's | ratio |
| `reasoning_unfinished`, `..._diff` | probability of thinking on where the baseline stopped; less its | fraction |
| `reasoning_doubt`, `..._ratio` | mean mass of markers of doubt a token; over the baseline's | fraction, ratio |
| `grammar_leak` | mean mass outside the tools' grammar, a token of the baseline's calls | fraction |
| `grammar_valid`, `..._diff` | probability that a call stays in the grammar; minus the baseline's | fraction |
| `grammar_valid_own` | the variant's own probability of a valid call, by weighing the baseline's calls | fraction |
| `TASK_acc`, `TASK_acc_macro` | accuracy weighted by questions, and by subject | fraction |
| `TASK_acc_norm` | length-normalized accuracy, where the task has it | fraction |
| `TASK_acc_diff` | accuracy minus the baseline's, question by question | fraction |
| `TASK_right_to_wrong`, `TASK_wrong_to_right` | share of all questions whose answer went so | fraction |
| `TASK_wrong_to_other` | share of all questions that went from one wrong answer to another | fraction |
| `TASK_flips` | `TASK_right_to_wrong` and `TASK_wrong_to_right` together | fraction |
| `TASK_brier`, `TASK_brier_diff` | mean squared error of the choices' softmax; its difference | fraction |
| `TASK_ece` | its calibration error: confidence against share right, 15 bins | fraction |
| `SCORE_score`, `SCORE_score_diff` | mean of a task's or an imported score; minus the baseline's, paired | its own |
| `SCORE_flips`, `SCORE_right_to_wrong`, `SCORE_wrong_to_right` | as `TASK_flips`, of scores of 0 or 1 | fraction |
| `SCORE_cut` | share of generated answers that nothing ended before their most tokens | fraction |
| `TASK_choice_kl_nats` | mean KL over the softmax of the choices' log-likelihoods | nats |
"""

import json
import sys
from typing import Literal

from pydantic import BaseModel, ConfigDict

from qeval.store.run import (
    CalibrationRecord,
    DriftRecord,
    EnvironmentRecord,
    GroupRecord,
    ModelRecord,
    NeedleRecord,
    ProtocolRecord,
    RuntimeRecord,
    ScoreRecord,
    TaskRecord,
)
from qeval.store.trace_records import GrammarRecord, ReasoningRecord
from qeval.types import Better, Estimate


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Metric(_Part):
    """An Estimate as it stands in the file; `non_finite` of the `n` rows were NaN or infinite."""

    value: float | None
    low: float | None
    high: float | None
    unit: str
    better: Better
    n: int
    clusters: int
    non_finite: int = 0

    @classmethod
    def of(cls, estimate: Estimate) -> "Metric":
        """Return the metric of an estimate from finite rows."""
        return cls.model_validate(vars(estimate))

    @classmethod
    def broken(cls, unit: str, better: Better, n: int, non_finite: int) -> "Metric":
        """Return the metric that `non_finite` of `n` rows left without a value."""
        return cls(value=None, low=None, high=None, unit=unit, better=better, n=n, clusters=0, non_finite=non_finite)


Metrics = dict[str, Metric]


class GroupScore(_Part):
    """Accuracy in one subject or category; `difference` from the baseline's, None in the baseline's own."""

    acc: Metric
    difference: Metric | None


class Flips(_Part):
    """The changes of the questions' answers, in numbers of questions; they sum to all questions."""

    right_to_right: int
    right_to_wrong: int
    wrong_to_right: int
    wrong_to_same: int
    wrong_to_other: int


class MarginBucket(_Part):
    """Questions whose first choice the baseline held so far above its second (probability over the choices)."""

    low: float
    high: float
    questions: int
    flips: Metric  # right to wrong and wrong to right together, as a share of these questions
    right_to_wrong: int
    wrong_to_right: int
    wrong_to_other: int


class EntropyBucket(_Part):
    """A fifth of the positions by the baseline's entropy (nats), from `low_nats` to `high_nats`."""

    low_nats: float
    high_nats: float
    positions: int
    kl_share: float | None  # of all positions' KL; None where that is zero
    kl_nats: Metric
    top1_agreement: Metric


class PositionBucket(_Part):
    """The scored positions of all windows from `first` to `last`, both counted in their window."""

    first: int
    last: int
    positions: int
    kl_nats: Metric


class TaskResult(_Part):
    """One task, taken apart. All tables are empty, and the rest is None, where rows are not finite.

    `flips_p` is McNemar's exact test of whether more answers flipped one way; `flips_p_adjusted` the same after Holm
    over the run's variants, None for the noise floor, which is not among them.
    """

    by_category: dict[str, GroupScore]
    by_subject: dict[str, GroupScore]
    flips: Flips | None
    flips_p: float | None = None
    flips_p_adjusted: float | None = None
    flips_by_margin: list[MarginBucket] = []  # empty in the baseline's own


class ScoreFlips(_Part):
    """The changes of a score that is right or wrong, in numbers of items; `p` and `p_adjusted` as of tasks."""

    right_to_right: int
    right_to_wrong: int
    wrong_to_right: int
    wrong_to_wrong: int
    p: float
    p_adjusted: float | None = None


class Curve(_Part):
    """The distribution of KL over tokens: `share[i]` of the positions have at least `kl_nats[i]`."""

    share: list[float]
    kl_nats: list[float]


class Kept(_Part):
    """The weights that stay in float for one reason."""

    reason: str
    weights: int
    parameters: int


class Mix(_Part):
    """The distribution of a mixed variant's bits."""

    importance: str
    budget_bits_per_weight: float | None
    groups: list[GroupRecord]


GroupedBy = Literal["kind", "language", "part", "token"]
"""The ways in which answers are parted: the prompt's kind or language; of tokens, thinking and the place."""


class AnswerGroup(_Part):
    """The loss on some of the baseline's answers, or some of their tokens: KL, top-1 agreement, perplexity ratio."""

    by: GroupedBy
    name: str
    metrics: Metrics


class NeedleCell(_Part):
    """The answers to the needles at one depth of haystacks of one length."""

    length: int
    depth: float
    metrics: Metrics


class VariantReport(_Part):
    """One variant: how it was made, how big it is, what it lost."""

    name: str
    role: Literal["variant", "floor", "part"] = "variant"
    """`floor`: the baseline itself in another type or backend; `part`: scored to tell others' losses apart."""
    method: str
    backend: str
    status: Literal["done", "broken", "failed"]
    error: str | None
    key: str
    grid: str
    granularity: str
    symmetric: bool | None
    bits_per_weight: float | None
    bits_per_weight_model: float | None
    size_bytes: int | None
    saving: float | None  # share of the baseline's bytes that is saved
    pareto: bool  # no other variant is both at most as big and at most as far from the baseline
    metrics: Metrics
    tasks: dict[str, TaskResult]
    score_flips: dict[str, ScoreFlips] = {}  # by score, of those that are right or wrong
    kl_curve: Curve | None
    by_corpus: dict[str, Metrics] = {}  # each text apart, and `macro`, their mean; empty where there is one
    chat: list[AnswerGroup] = []  # groups of the baseline's answers; empty where no prompt was answered
    kl_by_entropy: list[EntropyBucket] = []  # the surest fifth first; empty where KL was not asked for or is not finite
    kl_by_position: list[PositionBucket] = []  # empty where windows are short, or as `kl_by_entropy`
    needle: list[NeedleCell] = []  # by length and depth; empty where no needle was asked for, or as `kl_by_entropy`
    parts_over_joint: Metric | None = None  # the sum of the KLs of `parts` over its own; None where it was not split
    mix: Mix | None
    kept: list[Kept]
    input_scales: list[str]
    details: dict[str, str]
    expert_tokens: dict[str, list[int]] = {}  # the calibration tokens that reached each expert, by stack
    quantize_seconds: float
    score_seconds: float
    twin: str | None = None  # the same weights in torch, which `kernel_kl_nats` compares with
    parts: dict[str, str] = {}  # the variants that are a part of this one alone: weights, activations, keys, values
    runtime: RuntimeRecord | None = None  # how ONNX Runtime or llama.cpp ran it; None on torch
    void: str | None = None  # why its figures say nothing: it was calibrated on what it was scored on

    @property
    def ranked_bytes(self) -> int:
        """Return the size of a variant that is ranked; an imported one has none, and is never ranked."""
        if self.size_bytes is None:
            raise ValueError(f"The size of '{self.name}' is not known, so it can't be ranked.")
        return self.size_bytes

    @property
    def ranked(self) -> bool:
        """Return whether it stands for itself: not the noise floor, a part of a variant, or one on a second backend."""
        return self.role == "variant" and self.twin is None


class BaselineReport(_Part):
    """The unquantized model, in the same shape as far as it goes."""

    label: str
    backend: str | None
    bits_per_weight: float | None
    size_bytes: int | None
    metrics: Metrics
    tasks: dict[str, TaskResult]
    needle: list[NeedleCell] = []  # by length and depth
    seconds: float | None


class Task(_Part):
    """A task's record, the accuracy of guessing, and whether the baseline's interval includes it."""

    record: TaskRecord
    chance: float
    baseline_at_chance: bool


class ComparisonReport(_Part):
    """Two variants that follow one another in KL: `better_name`'s paired difference from `other_name`'s."""

    metric: str
    better_name: str
    other_name: str
    difference: Metric  # better minus other, so below zero; unresolved when the interval includes zero


class Intervals(_Part):
    """The method behind every interval of the report."""

    level: float
    method: str
    resamples: int
    seed: int
    clusters: str


class Provenance(_Part):
    """The facts that it takes to make the report again."""

    command: str
    started: str
    finished: str | None
    seconds: float
    peak_rss_bytes: int
    seed: int
    environment: EnvironmentRecord
    calibration: CalibrationRecord | None
    witness: str | None = None
    """The hash of the token ids, positions and BOS of all that was scored, the same for every variant compared."""


class Report(_Part):
    """All of `report.json`."""

    schema_version: Literal[1]
    model: ModelRecord
    baseline: BaselineReport
    variants: list[VariantReport]
    comparisons: list[ComparisonReport]
    protocol: ProtocolRecord | None
    drift: DriftRecord | None = None
    needle: NeedleRecord | None = None
    reasoning: ReasoningRecord | None = None
    grammar: GrammarRecord | None = None
    tasks: list[Task]
    scores: list[ScoreRecord] = []  # of tasks without choices, or given by another program
    metrics_asked: list[str]
    intervals: Intervals
    notes: list[str]
    warnings: list[str]
    provenance: Provenance


def report_json(report: Report) -> str:
    """Return the text of `report.json`."""
    return json.dumps(report.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def report_schema_json() -> str:
    """Return the text of `configs/report.schema.json`; `python -m qeval.report.model` prints it."""
    return json.dumps(Report.model_json_schema(mode="serialization"), indent=1) + "\n"


if __name__ == "__main__":
    sys.stdout.write(report_schema_json())

"""Metrics that a policy may limit, each with its unit, its direction and what a run must hold for it.

Names are those of `report.json` where the figure is the same; `TASK_` stands for a task's name (`mmlu_flips`).
Of greedy continuations what every prompt has is limited; the KL, the margin and the rejoining where a run leaves are
not: the better a variant, the fewer it has, and one that never leaves has none.
"""

from dataclasses import dataclass
from typing import Literal

from qeval.errors import UsageError, unknown

Unit = Literal["points", "%", "nats", "times", "bits", "MB", "tokens", "units"]
Limit = Literal["at_most", "at_least"]
MetricSource = Literal["kl", "ppl", "drift", "needle", "reasoning", "grammar", "task", "size"]

SCALE: dict[Unit, float] = {
    "points": 0.01, "%": 0.01, "nats": 1.0, "times": 1.0, "bits": 1.0, "MB": 1e6, "tokens": 1.0, "units": 1.0,
}  # fmt: skip
"""What a margin's number is multiplied with to stand in a figure's own unit (shares, nats, bytes)."""


@dataclass(frozen=True)
class MetricKind:
    """A metric: its words, the unit of its margin, the side that is limited, and where its rows come from."""

    title: str
    unit: Unit
    limit: Limit
    source: MetricSource
    signed: bool = False  # whether it can lie below zero


METRICS: dict[str, MetricKind] = {
    "kl_nats": MetricKind("mean KL", "nats", "at_most", "kl"),
    "kl_nats_p50": MetricKind("median KL", "nats", "at_most", "kl"),
    "kl_nats_p90": MetricKind("p90 KL", "nats", "at_most", "kl"),
    "kl_nats_p99": MetricKind("p99 KL", "nats", "at_most", "kl"),
    "kl_nats_p99_9": MetricKind("p99.9 KL", "nats", "at_most", "kl"),
    "reverse_kl_nats": MetricKind("mean reverse KL", "nats", "at_most", "kl"),
    "kl_abs_modelopt": MetricKind("Model Optimizer's KL", "nats", "at_most", "kl"),
    "top1_agreement": MetricKind("top-1 agreement", "%", "at_least", "kl"),
    "top5_agreement": MetricKind("top-5 agreement", "%", "at_least", "kl"),
    "top10_agreement": MetricKind("top-10 agreement", "%", "at_least", "kl"),
    "sampling_kl_nats": MetricKind("mean KL under the sampler", "nats", "at_most", "kl"),
    "outside_nucleus": MetricKind("samples outside the baseline's nucleus", "%", "at_most", "kl"),
    "overlap": MetricKind("overlap of distributions", "%", "at_least", "kl"),
    "ppl_increase": MetricKind("increase of perplexity", "%", "at_most", "ppl", signed=True),
    "nll_diff_nats": MetricKind("increase of NLL", "nats", "at_most", "ppl", signed=True),
    "chat_kl_nats": MetricKind("mean KL on answers", "nats", "at_most", "kl"),
    "chat_kl_nats_p99": MetricKind("p99 KL on answers", "nats", "at_most", "kl"),
    "chat_top1_agreement": MetricKind("top-1 agreement on answers", "%", "at_least", "kl"),
    "chat_ppl_increase": MetricKind("increase of perplexity on answers", "%", "at_most", "ppl", signed=True),
    "drift_equal": MetricKind("tokens equal along continuations", "%", "at_least", "drift"),
    "drift_diverged": MetricKind("prompts whose continuation leaves the baseline's", "%", "at_most", "drift"),
    "drift_first_tokens": MetricKind("continuation before leaving the baseline's", "tokens", "at_least", "drift"),
    "needle_recall_drop": MetricKind("drop of recall of needles", "points", "at_most", "needle", signed=True),
    "needle_loss_nats": MetricKind("loss of log p of needles", "nats", "at_most", "needle", signed=True),
    "reasoning_kl_nats": MetricKind("mean KL along chains of thought", "nats", "at_most", "reasoning"),
    "reasoning_answer_nll_diff": MetricKind(
        "increase of the answer's NLL", "nats", "at_most", "reasoning", signed=True
    ),
    "reasoning_acc_drop": MetricKind("drop of right answers", "points", "at_most", "reasoning", signed=True),
    "reasoning_flips": MetricKind("flipped answers behind chains of thought", "%", "at_most", "reasoning"),
    "grammar_leak": MetricKind("leak out of the tools' grammar a token", "%", "at_most", "grammar"),
    "grammar_valid_drop": MetricKind("drop of valid calls", "points", "at_most", "grammar", signed=True),
    "size_ratio": MetricKind("size, times smaller", "times", "at_least", "size"),
    "size_bytes": MetricKind("size", "MB", "at_most", "size"),
    "bits_per_weight": MetricKind("bits per weight", "bits", "at_most", "size"),
}
RUN_AT_ONCE = ("drift", "needle", "reasoning", "grammar")
"""Sources of rows that are scored whole, whatever is drawn of others."""
ANSWERS = "chat_"
"""Before the names of metrics of the baseline's answers alone (`--corpus chat`)."""
QUANTILES = {"kl_nats_p50": 0.5, "kl_nats_p90": 0.9, "kl_nats_p99": 0.99, "kl_nats_p99_9": 0.999}

TASK_METRICS: dict[str, MetricKind] = {
    "acc_drop": MetricKind("drop", "points", "at_most", "task", signed=True),
    "flips": MetricKind("flipped answers", "%", "at_most", "task"),
    "right_to_wrong": MetricKind("answers gone wrong", "%", "at_most", "task"),
    "choice_kl_nats": MetricKind("mean KL over the choices", "nats", "at_most", "task"),
    "score_loss": MetricKind("loss of the score", "units", "at_most", "task", signed=True),
}


def split(metric: str) -> tuple[str | None, str]:
    """Return the task (None where there is none) and the metric's own name.

    Raises:
        UsageError: no metric of that name is known; the nearest are listed.

    >>> split("kl_nats"), split("mmlu_acc_drop")
    ((None, 'kl_nats'), ('mmlu', 'acc_drop'))
    """
    if metric in METRICS:
        return None, metric
    for name in TASK_METRICS:
        task = metric.removesuffix(f"_{name}")
        if task and task != metric:
            return task, name
    raise unknown("metric", metric, [*METRICS, *(f"TASK_{name}" for name in TASK_METRICS)])


def kind_of(metric: str) -> MetricKind:
    """Return a metric's kind; raises as `split` does."""
    task, name = split(metric)
    return METRICS[name] if task is None else TASK_METRICS[name]


def margin_of(text: str, kind: MetricKind, metric: str) -> float:
    """Return a margin such as '1.0 points' in the figure's own unit (0.01).

    Raises:
        UsageError: it is no number, or its unit is not the metric's.
    """
    words = text.split()
    try:
        number = float(words[0])
        unit = " ".join(words[1:])
    except (IndexError, ValueError):
        number, unit = float("nan"), ""
    if unit != kind.unit or not abs(number) < float("inf"):
        raise UsageError(
            f"The margin of {metric} must be a number of {kind.unit}, such as '1.5 {kind.unit}', not '{text}'."
        )
    if number < 0 and not kind.signed:
        raise UsageError(f"The margin of {metric} cannot be below zero, as '{text}' is.")
    return number * SCALE[kind.unit]

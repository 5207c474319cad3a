"""The `model-index` of a card: every figure with its dataset, configuration, metric and value, none of them verified.

The format is the hub's (https://github.com/huggingface/hub-docs, modelcard.md), through huggingface_hub's EvalResult.
Only finite figures are told; the noise floor, failed and broken variants have none.
"""

from collections.abc import Iterator
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from qeval.errors import BrokenRecordError, unknown
from qeval.report import Report, formatting
from qeval.report.chat import answer_metrics
from qeval.report.model import Metric, Task, VariantReport
from qeval.report.privacy import local_name
from qeval.report.tables import perplexities
from qeval.report.traces import trace_metrics
from qeval.store.trace_records import GrammarRecord

_DATASETS = {"wikitext2": ("Salesforce/wikitext", "WikiText-2 raw"), "pydoc": ("pydoc", "CPython reference")}
_TOKENS = {
    "kl_nats": ("kl_divergence", "KL-divergence from the baseline (nats)"),
    "top1_agreement": ("top1_agreement", "Same most likely token as the baseline"),
    "top5_agreement": ("top5_agreement", "Share of the baseline's 5 likeliest tokens among the variant's"),
    "top10_agreement": ("top10_agreement", "Share of the baseline's 10 likeliest tokens among the variant's"),
    "sampling_kl_nats": ("sampling_kl_divergence", "KL-divergence under the sampler (nats)"),
    "outside_nucleus": ("outside_nucleus", "Samples outside the baseline's nucleus"),
}
NEEDLE_METRICS = {
    "needle_recall": "Needles in haystacks recalled",
    "needle_recall_drop": "Recall of needles, the baseline's minus the variant's, paired",
    "needle_loss_nats": "Log-probability of needles' answers that is lost, paired (nats)",
}
_MMLU_ON_THE_HUB = "cais/mmlu"


def chosen(report: Report, name: str | None) -> list[VariantReport]:
    """Return the variants whose figures the metadata holds: the one called `name`, else all that are sound.

    Raises:
        UsageError: the run has no variant of that name; the nearest are listed.
        BrokenRecordError: nothing was scored, or the variant failed, is broken, or is the noise floor.
    """
    variants = {variant.name: variant for variant in report.variants}
    if name is not None and name not in variants:
        raise unknown("variant of the run", name, variants)
    if name is not None and (reason := _unsound(variants[name])):
        raise BrokenRecordError(f"'{name}' {reason}, so it has no figures for a card.")
    sound = [v for v in report.variants if name in (None, v.name) and not _unsound(v) and v.metrics]
    if not sound:
        raise BrokenRecordError("The run has no figures for a card: no variant was scored and is sound.")
    return sound


def metadata(report: Report, variants: list[VariantReport], **more: Any) -> ModelCardData:
    """Return the card's metadata: the `model-index`, and `more` keys of the hub's.

    A card that is about one variant is named after it.
    """
    name = model_name(report) if len(variants) > 1 else f"{model_name(report)}-{variants[0].name}"
    results = [result for variant in variants for result in _results(report, variant)]
    return ModelCardData(model_name=name, eval_results=results, **more)


def model_name(report: Report) -> str:
    """Return what a card calls the model: a folder on one's own machine has no place there, only its last part."""
    return local_name(report.model.name, report.model.source)


def base_model(report: Report) -> dict[str, Any]:
    """Return what a card says of the model that was quantized; nothing where that is not on the hub."""
    hub_id = report.model.hub_id
    return {"base_model": hub_id, "base_model_relation": "quantized"} if hub_id else {}


def _unsound(variant: VariantReport) -> str | None:
    if variant.role == "floor":
        return "is the noise floor, the baseline against itself"
    if variant.status != "done":
        return f"{'failed' if variant.status == 'failed' else 'is broken'} ({variant.error})"
    return f"is void ({variant.void})" if variant.void else None


def _results(report: Report, variant: VariantReport) -> Iterator[EvalResult]:
    perplexity = {name: ("perplexity", title) for name, title in perplexities(report).items()}
    for name, (kind, title) in (perplexity | _TOKENS).items():
        if name in variant.metrics:
            yield _result(variant, variant.metrics[name], (kind, title), _corpus(report))
    for name, title in answer_metrics(report).items():
        if name in variant.metrics:
            kind = name.removeprefix("chat_").replace("kl_nats", "kl_divergence")
            yield _result(variant, variant.metrics[name], (kind, f"{title}, on the baseline's answers"), _chat(report))
    for name, title in NEEDLE_METRICS.items():
        if name in variant.metrics:
            yield _result(variant, variant.metrics[name], (name, title), _needles(report))
    for name, title in trace_metrics(report).items():
        if name in variant.metrics:
            yield _result(variant, variant.metrics[name], (name, title), _traces(report, name))
    for task in report.tasks:
        key = f"{task.record.name}_acc"
        where = _questions(task)
        for name, (kind, title) in {
            key: ("accuracy", f"Accuracy, {task.record.title}"),
            f"{key}_diff": ("accuracy_difference", "Accuracy minus the baseline's, paired"),
            f"{task.record.name}_flips": ("flips", "Answers that went from right to wrong or from wrong to right"),
        }.items():
            if name in variant.metrics:
                extra = {"baseline_at_chance": True} if task.baseline_at_chance else {}
                yield _result(variant, variant.metrics[name], (kind, title), where, extra)
    yield from _score_results(report, variant)


def _score_results(report: Report, variant: VariantReport) -> Iterator[EvalResult]:
    for score in report.scores:
        where = {
            "dataset_type": score.name, "dataset_name": score.title,
            "dataset_args": {"items": score.items, "harness": score.harness},
        }  # fmt: skip
        for name, title in (("score", score.title), ("score_diff", f"{score.title}, minus the baseline's, paired")):
            metric = variant.metrics[f"{score.name}_{name}"]
            yield _result(variant, metric, (name, title), where, {"better": score.better})
        if flips := variant.metrics.get(f"{score.name}_flips"):
            title = "Answers that went from right to wrong or from wrong to right"
            yield _result(variant, flips, ("flips", title), where)


def _result(
    variant: VariantReport,
    metric: Metric,
    what: tuple[str, str],
    dataset: dict[str, Any],
    extra: dict[str, Any] | None = None,
) -> EvalResult:
    kind, title = what
    attributes = {"variant": variant.name, "unit": metric.unit, "n": metric.n, "clusters": metric.clusters}
    ends = {} if metric.low is None else {"low": metric.low, "high": metric.high, "confidence": 0.95}
    return EvalResult(
        task_type="text-generation",
        metric_type=kind,
        metric_name=f"{title}, {variant.name}",
        metric_value=metric.value,
        metric_args=attributes | ends | (extra or {}),
        verified=False,
        **dataset,
    )


def _corpus(report: Report) -> dict[str, Any]:
    protocol = report.protocol
    if protocol is None:
        raise ValueError("Token metrics without a protocol.")
    kind, title = _DATASETS.get(protocol.corpus, (protocol.corpus, protocol.corpus))
    return {
        "dataset_type": kind,
        "dataset_name": f"{title}, {protocol.name}",
        "dataset_config": protocol.name,
        "dataset_args": {
            "window": protocol.window, "stride": protocol.stride, "windows": protocol.windows, "bos": protocol.bos,
            "corpus_sha256": protocol.corpus_sha256, "tokens_sha256": protocol.tokens_sha256,
        },
    }  # fmt: skip


def _chat(report: Report) -> dict[str, Any]:
    chat = report.protocol and report.protocol.chat
    if not chat:
        raise ValueError("Metrics of answers without their prompts.")
    return {
        "dataset_type": "chat",
        "dataset_name": f"answers to {chat.prompts} prompts ({chat.source})",
        "dataset_config": f"chat-{chat.longest_answer}",
        "dataset_args": {"temperature": chat.temperature, "template_sha256": chat.template_sha256},
    }


def _needles(report: Report) -> dict[str, Any]:
    record = report.needle
    if record is None:
        raise ValueError("Metrics of needles without haystacks.")
    return {
        "dataset_type": "needle",
        "dataset_name": f"{record.haystacks} haystacks of each length, a needle at {len(record.depths)} depths",
        "dataset_config": f"needle-{max(record.lengths)}",
        "dataset_args": {
            "lengths": record.lengths, "depths": record.depths, "haystacks": record.haystacks, "bos": record.bos,
            "tokens_sha256": record.tokens_sha256,
        },
    }  # fmt: skip


def _traces(report: Report, metric: str) -> dict[str, Any]:
    task = metric.partition("_")[0]
    record = report.grammar if task == "grammar" else report.reasoning
    if not record:
        raise ValueError("Metrics along traces without their record.")
    if isinstance(record, GrammarRecord):
        what = f"calls for {record.prompts} prompts"
    else:
        what = f"chains of thought on {record.questions} questions"
    return {
        "dataset_type": task,
        "dataset_name": f"{what} ({record.source})",
        "dataset_args": {"tokens_sha256": record.tokens_sha256, "template_sha256": record.template_sha256},
    }


def _questions(task: Task) -> dict[str, Any]:
    record = task.record
    kind = _MMLU_ON_THE_HUB if record.name == "mmlu" and record.source == "hub" else record.name
    return {
        "dataset_type": record.source if record.source == "mmlu_sample" else kind,
        "dataset_name": record.title,
        "dataset_config": f"{formatting.MISSING if record.shots is None else record.shots}-shot",
        "dataset_args": {"num_few_shot": record.shots, "questions": record.items, "harness": record.harness},
    }

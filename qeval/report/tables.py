"""The report's tables, one function each. They lay out what the Report holds and compute nothing."""

from collections.abc import Iterable, Iterator

from qeval.report import conventions, formatting
from qeval.report.document import NOTHING, Table, TableCell, metric_cell
from qeval.report.floors import largest_floor
from qeval.report.measure_items import at_chance
from qeval.report.model import BaselineReport, GroupScore, Kept, Metric, Report, Task, VariantReport

_NEAR_FLOOR = 3
"""Under so many times the noise floor a KL is shown with the floor."""
_FOLD_FROM = 20  # rows
_SCHEME = {
    "activations": "Activations", "keys": "Keys", "values": "Values", "bits per cached token": "Bits/cached token",
}  # fmt: skip
"""The columns for what is rounded beside a variant's weights, by the names of its details."""
LOWER_BOUND = "KL at least, nats"
"""The heading of an endpoint's lower bound of KL, which is no KL."""
VOID = "void: calibrated on what it was scored on"
_SYMMETRY = {True: "symmetric", False: "asymmetric", None: "unknown"}
_DTYPES = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}


def baseline_name(report: Report) -> str:
    """Return the baseline's name, by the type of its weights, such as `FP16 baseline`."""
    dtype = report.model.weight_dtype
    if report.model.source == "imported":
        return "baseline"
    return f"{_DTYPES.get(dtype, dtype)} baseline"


def overview_table(report: Report) -> Table:
    """Return every variant in one line: size and the metrics that were asked for. The terminal prints this one."""
    tasks = [task.record for task in report.tasks]
    wanted = _present(
        report,
        {"kl_nats": "KL, nats", "kl_lower_bound_nats": LOWER_BOUND, "top1_agreement": "Same top token"}
        | perplexities(report)
        | {"drift_equal": "Same greedy token", "needle_recall": "Needles recalled"}
        | {"reasoning_acc": "Reasoning", "grammar_valid": "Valid calls"}
        | {f"{task.name}_acc": task.title for task in tasks}
        | {f"{score.name}_score": score.title for score in report.scores},
    )

    base = report.baseline
    first = (
        TableCell(baseline_name(report)),
        TableCell(formatting.bits(base.bits_per_weight)),
        TableCell(formatting.size(base.size_bytes)),
        *(_baseline_cell(report, name) for name in wanted),
    )
    rows = [first, *(_overview_row(report, variant, list(wanted)) for variant in report.variants)]
    caption = "Size and loss of every variant"
    return Table(caption, ("Variant", "Bits/weight", "Size", *wanted.values()), tuple(rows))


def perplexities(report: Report) -> dict[str, str]:
    """Return the report's perplexities, each with the name of its convention."""
    names = conventions.convention_names(report.protocol) if report.protocol else []
    return {name: conventions.convention_title(name) for name in ("ppl", *names)}


def variants_table(report: Report) -> Table:
    """Return the table of how every variant was made, and what it saves."""
    base = report.baseline
    dash = TableCell(formatting.MISSING)
    scheme = {key: label for key, label in _SCHEME.items() if any(key in v.details for v in report.variants)}
    first = (
        TableCell(baseline_name(report)), dash, dash, dash, TableCell(formatting.bits(base.bits_per_weight)),
        TableCell(formatting.bits(base.bits_per_weight)), TableCell(formatting.size(base.size_bytes)), dash, dash,
        *(dash for _ in scheme),
    )  # fmt: skip
    rows = [
        (
            TableCell(v.name),
            TableCell(v.method),
            TableCell(v.grid),
            TableCell(f"{v.granularity}, {_SYMMETRY[v.symmetric]}"),
            TableCell(formatting.bits(v.bits_per_weight)),
            TableCell(formatting.bits(v.bits_per_weight_model)),
            TableCell(formatting.size(v.size_bytes)),
            TableCell(formatting.percent(v.saving)),
            TableCell(v.status),
            *(TableCell(v.details.get(key, "float")) for key in scheme),
        )
        for v in report.variants
    ]
    columns = (
        "Variant", "Method", "Grid", "Granularity", "Bits/weight", "Bits/weight, whole model", "Size",
        "Saved", "Status", *scheme.values(),
    )  # fmt: skip
    note = (
        "Bits per weight count scales and zero points, over the quantized matrices; for the whole "
        "model, head and embedding are counted too. Sizes are of the weights on disk (MB = 10⁶ bytes)."
    )
    return Table("Variants by method, granularity and size", columns, (first, *rows), note)


def perplexity_table(report: Report) -> Table:
    """Return perplexity with the variants as columns."""
    names = _present(
        report,
        perplexities(report) | {"ppl_ratio": conventions.RATIO, "nll_diff_nats": "NLL difference, nats",
         "delta_p": "Change of the true token's probability", "delta_p_rms": "The same, root mean square",
         "delta_p_p01": "The same, 1st percentile", "delta_p_p99": "The same, 99th percentile"},
    )  # fmt: skip
    signed = {"nll_diff_nats", "delta_p", "delta_p_p01", "delta_p_p99"}
    rows = [
        (
            TableCell(label),
            metric_cell(report.baseline.metrics.get(name)),
            *(metric_cell(v.metrics.get(name), signed=name in signed) for v in report.variants),
        )
        for name, label in names.items()
    ]
    columns = ("", baseline_name(report), *(v.name + (" (void)" if v.void else "") for v in report.variants))
    note = (
        "Ratio, NLL difference and change of probability are paired: the same token under both models, so "
        "their intervals are far narrower than those of two perplexities laid side by side."
    )
    return Table("Perplexity, variants as columns", columns, tuple(rows), note)


def kl_table(report: Report) -> Table:
    """Return KL-divergence from the baseline, and agreement; Model Optimizer's own quantity kept apart."""
    names = {"kl_nats": "KL mean, nats", "top1_agreement": "Same top token"}
    names |= _present(report, {"top5_agreement": "Of top 5", "top10_agreement": "Of top 10"})
    names |= {
        "overlap": "Overlap",
        "reverse_kl_nats": "Reverse KL, nats",
        "kl_abs_modelopt": "kl_abs_modelopt, nats",
    }
    rows = [
        (
            TableCell(v.name, remark=VOID if v.void else None),
            TableCell(v.method),
            TableCell(v.granularity),
            *(metric_cell(v.metrics.get(name), remark=floor_remark(report, v, name)) for name in names),
            TableCell(v.backend),
        )
        for v in report.variants
        if "kl_lower_bound_nats" not in v.metrics
    ]
    columns = ("Variant", "Method", "Granularity", *names.values(), "Backend")
    note = (
        "KL(baseline ‖ variant) over the whole vocabulary, every position. Overlap is the sum of min(p, q): of 100 "
        "sampled tokens so many stay the same under the best coupling, and speculative decoding accepts so many of the "
        "variant's drafts. Of top k: the share of the baseline's k likeliest tokens that are among the variant's k, in "
        "any order. kl_abs_modelopt is the sum of "
        "p·|log p − log q| that Model Optimizer's benchmark page prints as 'KL-divergence': an upper bound, "
        "not a KL; compare it with that page and with nothing else."
    )
    return Table("KL-divergence from the baseline", columns, tuple(rows), note)


def sampling_table(report: Report) -> Iterator[Table]:
    """Yield the table of KL and escapes under a sampler, where one was asked for."""
    names = {"sampling_kl_nats": "KL on the nucleus, nats", "outside_nucleus": "Samples outside it"}
    if report.protocol is None or report.protocol.sampling is None:
        return
    rows = [(TableCell(v.name), *(metric_cell(v.metrics.get(name)) for name in names)) for v in report.variants]
    note = (
        "Both models' distributions after the temperature. KL: both cut to the baseline's nucleus (its likeliest "
        "tokens that hold top_p) and made to sum to one. Samples outside: the share of tokens that the same sampler "
        "would draw from the variant and could never draw from the baseline. Both are zero for the baseline itself."
    )
    caption = f"Under a sampler: {report.protocol.sampling}"
    yield Table(caption, ("Variant", *names.values()), tuple(rows), note)


def lower_bound_table(report: Report) -> Table | None:
    """Return the lower bounds of KL of the models behind endpoints; None where there are none."""
    names = {
        "kl_lower_bound_nats": LOWER_BOUND,
        "mass_outside": "Baseline's mass outside",
        "top1_agreement": "Same top token",
    }
    rows = [
        (TableCell(v.name), *(metric_cell(v.metrics.get(name)) for name in names), TableCell(v.backend))
        for v in report.variants
        if "kl_lower_bound_nats" in v.metrics
    ]
    note = (
        "An endpoint reports the log-probabilities of its likeliest tokens. The KL of both distributions over these "
        "and one cell for all other tokens is a lower bound of KL(baseline ‖ variant): the true one is no smaller, and "
        "nothing says how much larger. Mass outside: what probability the baseline gives to that cell. It is laid "
        "beside no KL and ranks nothing."
    )
    columns = ("Variant", *names.values(), "Backend")
    return Table("Lower bounds of KL, of models behind endpoints", columns, tuple(rows), note) if rows else None


def kl_tail(report: Report) -> Table:
    """Return the table of how KL is distributed over tokens."""
    names = {
        "p50": "Median", "p90": "p90", "p99": "p99", "p99_9": "p99.9", "max": "Max", "p99_over_mean": "p99 / mean",
    }  # fmt: skip
    rows = [
        (TableCell(v.name), *(metric_cell(v.metrics.get(f"kl_nats_{name}")) for name in names))
        for v in report.variants
        if "kl_lower_bound_nats" not in v.metrics
    ]
    note = "A maximum has no interval: no resample holds a larger one."
    return Table("KL over tokens, nats", ("Variant", *names.values()), tuple(rows), note)


def comparisons_table(report: Report) -> Table:
    """Return each variant against the next in rank, paired."""
    rows = [
        (
            TableCell(f"{c.better_name} against {c.other_name}"),
            metric_cell(c.difference, signed=True),
            TableCell("resolved" if _resolved(c.difference) else "not resolved"),
        )
        for c in report.comparisons
    ]
    note = "A difference is resolved when its interval excludes zero. Same tokens, difference by difference."
    return Table("Neighbours in rank, paired", ("Pair", "Difference in KL, nats", "Order"), tuple(rows), note)


def task_summary(report: Report, task: Task) -> Table:
    """Return accuracy of one task, by questions and by subject, and its paired difference."""
    key = task.record.name
    names = _present(
        report,
        {f"{key}_acc": "Accuracy", f"{key}_acc_macro": "By subject", f"{key}_acc_norm": "Length-normalized",
         f"{key}_acc_diff": "Difference", f"{key}_choice_kl_nats": "KL over the choices, nats",
         f"{key}_brier": "Brier score", f"{key}_ece": "Calibration error"},
    )  # fmt: skip
    rows = [
        (
            TableCell(name),
            *(
                metric_cell(metrics.get(m), signed=m.endswith("_diff"), remark=_remark(metrics.get(m), task, m))
                for m in names
            ),
        )
        for name, metrics in _models(report)
    ]
    note = f"{task.record.items} questions; guessing gives {formatting.percent(task.chance)}."
    return Table(f"{task.record.title}: accuracy", ("Model", *names.values()), tuple(rows), note)


def task_groups(report: Report, task: Task, what: str) -> Table:
    """Return accuracy of one task by `category` or by `subject`, variants as columns, the difference under each."""
    name = task.record.name
    base = group_scores(report.baseline, name, what)
    word = formatting.category if what == "category" else formatting.subject
    rows = []
    for label, score in base.items():
        cells = [_group_cell(group_scores(v, name, what).get(label)) for v in report.variants]
        first = metric_cell(score.acc, remark=_remark(score.acc, task, "_acc"))
        rows.append((TableCell(f"{word(label)} ({score.acc.n})"), first, *cells))

    columns = (f"{what.capitalize()} (questions)", baseline_name(report), *(v.name for v in report.variants))
    note = (
        "Accuracy; under a variant's, the paired difference from the baseline in points. An interval without "
        "width means that no answer there changed, not that none would."
    )
    if what == "subject":
        note += " A subject's own interval resamples its questions."
    caption = f"{task.record.title} by {what}"
    return Table(caption, columns, tuple(rows), note, folded=len(rows) >= _FOLD_FROM)


def flips_table(report: Report, task: Task) -> Table:
    """Return the table of what became of each answer."""
    key = task.record.name
    rows = []
    for v in report.variants:
        counts_of = v.tasks[key].flips if key in v.tasks else None
        share = metric_cell(v.metrics.get(f"{key}_flips"))
        if counts_of is None:
            rows.append((TableCell(v.name), share, *([NOTHING] * 7)))
            continue
        counts = (
            counts_of.right_to_wrong, counts_of.wrong_to_right, counts_of.wrong_to_other, counts_of.right_to_right,
            counts_of.wrong_to_same,
        )  # fmt: skip
        p_values = (v.tasks[key].flips_p, v.tasks[key].flips_p_adjusted)
        tests = (NOTHING if p is None else TableCell(f"{p:.2g}") for p in p_values)
        rows.append((TableCell(v.name), share, *(TableCell(str(count)) for count in counts), *tests))

    columns = (
        "Variant", "Flips", "Right → wrong", "Wrong → right", "Wrong → another wrong", "Right, stayed",
        "Wrong, same answer", "p, McNemar", "p, adjusted",
    )  # fmt: skip
    note = (
        "Flips: answers that turned from right to wrong or from wrong to right, as a share of all. Where none "
        f"was seen the interval has no width; {formatting.percent(3 / task.record.items, 1)} still can't be excluded "
        "(rule of three, questions taken as independent). p: McNemar's exact test of whether more flipped one way; "
        "adjusted after Holm over the variants."
    )
    return Table(f"{task.record.title}: flips", columns, tuple(rows), note)


def weights_in_float(report: Report) -> Table:
    """Return the table of the weights that stay in float, by reason."""
    alike: dict[str, tuple[list[str], list[Kept]]] = {}
    for v in report.variants:
        alike.setdefault(repr(v.kept), ([], v.kept))[0].append(v.name)
    rows = [
        (
            TableCell("all variants" if len(names) == len(report.variants) > 1 else formatting.listed(names)),
            TableCell(k.reason),
            TableCell(str(k.weights)),
            TableCell(f"{k.parameters:,}"),
        )
        for names, reasons in alike.values()
        for k in reasons
    ]
    columns = ("Variant", "Why", "Weights", "Parameters")
    return Table("Weights that stay in float", columns, tuple(rows), folded=len(rows) >= _FOLD_FROM)


ROLE_REMARKS = {"floor": "noise floor", "part": "a part alone"}
"""Remarks beside the name of a model that doesn't stand for itself."""


def floor_remark(report: Report, variant: VariantReport, name: str) -> str | None:
    """Return a remark such as `floor 0.00030` for a KL under three times the noise floor of the variant's own backend.

    Less than that, the noise of the arithmetic is a third of the figure or more.
    """
    value = variant.metrics.get(name)
    if name != "kl_nats" or variant.role == "floor" or value is None or value.value is None:
        return None
    floors = [each for each in report.variants if each.role == "floor"]
    largest = largest_floor([each for each in floors if each.backend == variant.backend] or floors)
    if largest is None:
        return None
    _, floor = largest
    return f"floor {formatting.metric_text(floor)}" if value.value < _NEAR_FLOOR * (floor.value or 0.0) else None


def _overview_row(report: Report, variant: VariantReport, names: list[str]) -> tuple[TableCell, ...]:
    remark = ROLE_REMARKS.get(variant.role)
    remark = remark if variant.status == "done" else variant.status
    remark = VOID if variant.void else remark
    return (
        TableCell(variant.name, remark=remark),
        TableCell(formatting.bits(variant.bits_per_weight)),
        TableCell(formatting.size(variant.size_bytes)),
        *(metric_cell(variant.metrics.get(name), remark=floor_remark(report, variant, name)) for name in names),
    )


def _baseline_cell(report: Report, name: str) -> TableCell:
    metric = report.baseline.metrics.get(name)
    task = next((task for task in report.tasks if name == f"{task.record.name}_acc"), None)
    return metric_cell(metric, remark=_remark(metric, task, name) if task else None)


def _present(report: Report, labels: dict[str, str]) -> dict[str, str]:
    """Return the labels of those metrics that some model has."""
    return {name: label for name, label in labels.items() if any(name in m for _, m in _models(report))}


def _models(report: Report) -> Iterable[tuple[str, dict[str, Metric]]]:
    yield baseline_name(report), report.baseline.metrics
    for variant in report.variants:
        yield variant.name, variant.metrics


def group_scores(model: BaselineReport | VariantReport, task: str, what: str) -> dict[str, GroupScore]:
    """Return a model's scores by `category` or by `subject`; empty where it has none."""
    result = model.tasks.get(task)
    if result is None:
        return {}
    return result.by_category if what == "category" else result.by_subject


def _group_cell(score: GroupScore | None) -> TableCell:
    if score is None or score.difference is None:
        return NOTHING
    return TableCell(
        formatting.value_text(score.acc),
        formatting.interval_text(score.acc),
        formatting.metric_text(score.difference, signed=True),
    )


def _remark(metric: Metric | None, task: Task, name: str) -> str | None:
    """Return `at chance` for an accuracy whose interval includes what guessing gives."""
    if metric is None or name.endswith(("_diff", "_nats")):
        return None
    return "at chance" if at_chance(metric, task.chance) else None


def _resolved(metric: Metric) -> bool:
    return metric.low is not None and metric.high is not None and not metric.low <= 0 <= metric.high

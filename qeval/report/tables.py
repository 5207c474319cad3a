"""The report's tables, one function each. They lay out what the Report holds and compute nothing."""

from collections.abc import Iterable

from qeval.report import conventions, words
from qeval.report.measure_items import at_chance
from qeval.report.model import Baseline, GroupScore, Kept, Metric, Report, Task, Variant
from qeval.report.page import NOTHING, Cell, Table, metric_cell

_FOLD_FROM = 20  # rows
_SENSITIVE_SHOWN = 10
VOID = "void: calibrated on what it was scored on"
_DTYPES = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}


def baseline_name(report: Report) -> str:
    """What the baseline is called: by the type of its weights, such as `FP16 baseline`."""
    dtype = report.model.weight_dtype
    return f"{_DTYPES.get(dtype, dtype)} baseline"


def overview(report: Report) -> Table:
    """Every variant in one line: size and the metrics that were asked for. The terminal prints this one."""
    tasks = [task.record for task in report.tasks]
    wanted = _present(
        report,
        {"kl_nats": "KL, nats", "top1_agreement": "Same top token"}
        | perplexities(report)
        | {"drift_equal": "Same greedy token"}
        | {f"{task.name}_acc": task.title for task in tasks},
    )
    base = report.baseline
    first = (
        Cell(baseline_name(report)),
        Cell(f"{base.bits_per_weight:.2f}"),
        Cell(words.size(base.size_bytes)),
        *(_baseline_cell(report, name) for name in wanted),
    )
    rows = [first, *(_overview_row(variant, list(wanted)) for variant in report.variants)]
    caption = "Size and loss of every variant"
    return Table(caption, ("Variant", "Bits/weight", "Size", *wanted.values()), tuple(rows))


def perplexities(report: Report) -> dict[str, str]:
    """The report's perplexities, each with the name of its convention."""
    own = conventions.names(report.protocol) if report.protocol else []
    return {name: conventions.title(name) for name in ("ppl", *own)}


def variants(report: Report) -> Table:
    """How every variant was made, and what it saves."""
    base = report.baseline
    dash = Cell(words.MISSING)
    first = (
        Cell(baseline_name(report)), dash, dash, dash, Cell(f"{base.bits_per_weight:.2f}"),
        Cell(f"{base.bits_per_weight:.2f}"), Cell(words.size(base.size_bytes)), dash, dash,
    )  # fmt: skip
    rows = [
        (
            Cell(v.name),
            Cell(v.method),
            Cell(v.grid),
            Cell(f"{v.granularity}, {'symmetric' if v.symmetric else 'asymmetric'}"),
            Cell(f"{v.bits_per_weight:.2f}"),
            Cell(f"{v.bits_per_weight_model:.2f}"),
            Cell(words.size(v.size_bytes)),
            Cell(words.percent(v.saving)),
            Cell(v.status),
        )
        for v in report.variants
    ]
    columns = (
        "Variant", "Method", "Grid", "Granularity", "Bits/weight", "Bits/weight, whole model", "Size",
        "Saved", "Status",
    )  # fmt: skip
    note = (
        "Bits per weight count scales and zero points, over the quantized matrices; for the whole "
        "model, head and embedding are counted too. Sizes are of the weights on disk (MB = 10⁶ bytes)."
    )
    return Table("Variants by method, granularity and size", columns, (first, *rows), note)


def perplexity(report: Report) -> Table:
    """Perplexity with the variants as columns."""
    names = _present(
        report,
        perplexities(report) | {"ppl_ratio": conventions.RATIO, "nll_diff_nats": "NLL difference, nats",
         "delta_p": "Change of the true token's probability", "delta_p_rms": "The same, root mean square"},
    )  # fmt: skip
    signed = {"nll_diff_nats", "delta_p"}
    rows = [
        (
            Cell(label),
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


def kl(report: Report) -> Table:
    """KL-divergence from the baseline, and agreement; Model Optimizer's own quantity kept apart."""
    names = {
        "kl_nats": "KL mean, nats",
        "top1_agreement": "Same top token",
        "reverse_kl_nats": "Reverse KL, nats",
        "kl_abs_modelopt": "kl_abs_modelopt, nats",
    }
    rows = [
        (
            Cell(v.name, remark=VOID if v.void else None),
            Cell(v.method),
            Cell(v.granularity),
            *(metric_cell(v.metrics.get(name)) for name in names),
            Cell(v.backend),
        )
        for v in report.variants
    ]
    columns = ("Variant", "Method", "Granularity", *names.values(), "Backend")
    note = (
        "KL(baseline ‖ variant) over the whole vocabulary, every position. kl_abs_modelopt is the sum of "
        "p·|log p − log q| that Model Optimizer's benchmark page prints as 'KL-divergence': an upper bound, "
        "not a KL; compare it with that page and with nothing else."
    )
    return Table("KL-divergence from the baseline", columns, tuple(rows), note)


def kl_tail(report: Report) -> Table:
    """How KL is distributed over tokens."""
    names = {
        "p50": "Median", "p90": "p90", "p99": "p99", "p99_9": "p99.9", "max": "Max", "p99_over_mean": "p99 / mean",
    }  # fmt: skip
    rows = [(Cell(v.name), *(metric_cell(v.metrics.get(f"kl_nats_{name}")) for name in names)) for v in report.variants]
    note = "A maximum has no interval: no resample holds a larger one."
    return Table("KL over tokens, nats", ("Variant", *names.values()), tuple(rows), note)


def comparisons(report: Report) -> Table:
    """Each variant against the next in rank, paired."""
    rows = [
        (
            Cell(f"{c.better_name} against {c.other_name}"),
            metric_cell(c.difference, signed=True),
            Cell("resolved" if _resolved(c.difference) else "not resolved"),
        )
        for c in report.comparisons
    ]
    note = "A difference is resolved when its interval excludes zero. Same tokens, difference by difference."
    return Table("Neighbours in rank, paired", ("Pair", "Difference in KL, nats", "Order"), tuple(rows), note)


def task_summary(report: Report, task: Task) -> Table:
    """Accuracy of one task, by questions and by subject, and its paired difference."""
    key = task.record.name
    names = _present(
        report,
        {f"{key}_acc": "Accuracy", f"{key}_acc_macro": "By subject", f"{key}_acc_norm": "Length-normalized",
         f"{key}_acc_diff": "Difference", f"{key}_choice_kl_nats": "KL over the choices, nats"},
    )  # fmt: skip
    rows = [
        (
            Cell(name),
            *(
                metric_cell(metrics.get(m), signed=m.endswith("_diff"), remark=_remark(metrics.get(m), task, m))
                for m in names
            ),
        )
        for name, metrics in _models(report)
    ]
    note = f"{task.record.items} questions; guessing gives {words.percent(task.chance)}."
    return Table(f"{task.record.title}: accuracy", ("Model", *names.values()), tuple(rows), note)


def task_groups(report: Report, task: Task, what: str) -> Table:
    """Accuracy of one task by `category` or by `subject`, variants as columns, the difference under each."""
    name = task.record.name
    base = groups(report.baseline, name, what)
    word = words.category if what == "category" else words.subject
    rows = []
    for label, score in base.items():
        cells = [_group_cell(groups(v, name, what).get(label)) for v in report.variants]
        first = metric_cell(score.acc, remark=_remark(score.acc, task, "_acc"))
        rows.append((Cell(f"{word(label)} ({score.acc.n})"), first, *cells))
    columns = (f"{what.capitalize()} (questions)", baseline_name(report), *(v.name for v in report.variants))
    note = (
        "Accuracy; under a variant's, the paired difference from the baseline in points. An interval without "
        "width means that no answer there changed, not that none would."
    )
    if what == "subject":
        note += " A subject's own interval resamples its questions."
    caption = f"{task.record.title} by {what}"
    return Table(caption, columns, tuple(rows), note, folded=len(rows) >= _FOLD_FROM)


def flips(report: Report, task: Task) -> Table:
    """What became of each answer."""
    key = task.record.name
    rows = []
    for v in report.variants:
        found = v.tasks[key].flips if key in v.tasks else None
        share = metric_cell(v.metrics.get(f"{key}_flips"))
        if found is None:
            rows.append((Cell(v.name), share, *([NOTHING] * 7)))
            continue
        counts = (
            found.right_to_wrong, found.wrong_to_right, found.wrong_to_other, found.right_to_right,
            found.wrong_to_same,
        )  # fmt: skip
        p_values = (v.tasks[key].flips_p, v.tasks[key].flips_p_adjusted)
        tests = (NOTHING if p is None else Cell(f"{p:.2g}") for p in p_values)
        rows.append((Cell(v.name), share, *(Cell(str(count)) for count in counts), *tests))
    columns = (
        "Variant", "Flips", "Right → wrong", "Wrong → right", "Wrong → another wrong", "Right, stayed",
        "Wrong, same answer", "p, McNemar", "p, adjusted",
    )  # fmt: skip
    note = (
        "Flips: answers that turned from right to wrong or from wrong to right, as a share of all. Where none "
        f"was seen the interval has no width; {words.percent(3 / task.record.items, 1)} still can't be excluded "
        "(rule of three, questions taken as independent). p: McNemar's exact test of whether more flipped one way; "
        "adjusted after Holm over the variants."
    )
    return Table(f"{task.record.title}: flips", columns, tuple(rows), note)


def mix(variant: Variant) -> Table:
    """Which layers of a mixed variant got the high bit width, by kind."""
    groups = variant.mix.groups if variant.mix else []
    high = max((group.bits for group in groups), default=0)
    low = min((group.bits for group in groups), default=0)
    rows = []
    for kind in dict.fromkeys(group.kind for group in groups):
        layers = sorted(g.layer for g in groups if g.kind == kind and g.bits == high and high > low)
        total = sum(g.kind == kind for g in groups)
        rows.append((Cell(kind), Cell(f"{len(layers)} of {total}"), Cell(words.spans(layers) or "none")))
    columns = ("Linears", f"Groups at INT{high}", f"Layers at INT{high}")
    return Table(f"{variant.name}: what went to INT{high}", columns, tuple(rows))


def sensitive(variant: Variant) -> Table | None:
    """The groups whose quantization alone costs most; None where nothing was measured."""
    groups = variant.mix.groups if variant.mix else []
    measured = sorted(
        ((group.kl_low, group) for group in groups if group.kl_low is not None), key=lambda pair: -pair[0]
    )
    if not measured:
        return None
    low = min(group.bits for group in groups)
    rows = [
        (
            Cell(f"Layer {group.layer} {group.kind}"),
            Cell(f"{alone:.3g}"),
            Cell(words.MISSING if group.kl_high is None else f"{group.kl_high:.3g}"),
            Cell(f"INT{group.bits}", remark="below the noise floor" if group.sensitivity_floor else None),
        )
        for alone, group in measured[:_SENSITIVE_SHOWN]
    ]
    columns = ("Group", f"KL alone at INT{low}, nats", "KL alone at the high width, nats", "Choice")
    caption = f"{variant.name}: the {len(rows)} most sensitive of {len(measured)} groups"
    return Table(caption, columns, tuple(rows))


def kept(report: Report) -> Table:
    """Which weights stay in float, by reason."""
    alike: dict[str, tuple[list[str], list[Kept]]] = {}
    for v in report.variants:
        alike.setdefault(repr(v.kept), ([], v.kept))[0].append(v.name)
    rows = [
        (
            Cell("all variants" if len(names) == len(report.variants) > 1 else words.listed(names)),
            Cell(k.reason),
            Cell(str(k.weights)),
            Cell(f"{k.parameters:,}"),
        )
        for names, reasons in alike.values()
        for k in reasons
    ]
    columns = ("Variant", "Why", "Weights", "Parameters")
    return Table("Weights that stay in float", columns, tuple(rows), folded=len(rows) >= _FOLD_FROM)


def _overview_row(variant: Variant, names: list[str]) -> tuple[Cell, ...]:
    remark = "noise floor" if variant.role == "floor" else None
    remark = remark if variant.status == "done" else variant.status
    remark = VOID if variant.void else remark
    return (
        Cell(variant.name, remark=remark),
        Cell(f"{variant.bits_per_weight:.2f}"),
        Cell(words.size(variant.size_bytes)),
        *(metric_cell(variant.metrics.get(name)) for name in names),
    )


def _baseline_cell(report: Report, name: str) -> Cell:
    metric = report.baseline.metrics.get(name)
    task = next((task for task in report.tasks if name == f"{task.record.name}_acc"), None)
    return metric_cell(metric, remark=_remark(metric, task, name) if task else None)


def _present(report: Report, labels: dict[str, str]) -> dict[str, str]:
    """The labels of those metrics that some model has."""
    return {name: label for name, label in labels.items() if any(name in m for _, m in _models(report))}


def _models(report: Report) -> Iterable[tuple[str, dict[str, Metric]]]:
    yield baseline_name(report), report.baseline.metrics
    for variant in report.variants:
        yield variant.name, variant.metrics


def groups(model: Baseline | Variant, task: str, what: str) -> dict[str, GroupScore]:
    """A model's scores by `category` or by `subject`; empty where it has none."""
    result = model.tasks.get(task)
    if result is None:
        return {}
    return result.by_category if what == "category" else result.by_subject


def _group_cell(score: GroupScore | None) -> Cell:
    if score is None or score.difference is None:
        return NOTHING
    return Cell(
        words.value_text(score.acc),
        words.interval_text(score.acc),
        words.metric_text(score.difference, signed=True),
    )


def _remark(metric: Metric | None, task: Task, name: str) -> str | None:
    """`at chance` beside an accuracy whose interval includes what guessing gives."""
    if metric is None or name.endswith(("_diff", "_nats")):
        return None
    return "at chance" if at_chance(metric, task.chance) else None


def _resolved(metric: Metric) -> bool:
    return metric.low is not None and metric.high is not None and not metric.low <= 0 <= metric.high

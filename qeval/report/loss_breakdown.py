"""The loss of a variant on another runtime, split: what the export, the quantizer and the kernel each cost."""

from collections.abc import Sequence
from typing import NamedTuple

from qeval.report import formatting, style
from qeval.report.document import NOTHING, Plot, Section, Table, TableCell, metric_cell
from qeval.report.model import Metric, Report, VariantReport
from qeval.report.style import Drawing

_SHARES = ("Export", "Quantizer", "Kernel")
_ROW = 0.34  # inches a bar takes
_NOTE = (
    "Export: KL of the float model there from the baseline. Quantizer: KL of the variant's weights, computed in torch, "
    "from the baseline. Kernel: KL of the runtime's answers from the same weights' in torch. All: KL of its answers "
    "from the baseline, which is about, but not exactly, the sum. All on the same tokens."
)


class Split(NamedTuple):
    """One variant on another runtime than torch; a share is None where the model that it needs was not scored."""

    variant: VariantReport
    export: Metric | None
    quantizer: Metric | None
    kernel: Metric | None
    whole: Metric

    @property
    def shares(self) -> tuple[Metric | None, Metric | None, Metric | None]:
        """In the order of the pipeline."""
        return self.export, self.quantizer, self.kernel


def splits(report: Report) -> list[Split]:
    """Return the variants that another runtime ran, each with its shares."""
    by_name = {variant.name: variant for variant in report.variants}
    exports = {
        formatting.runtime(variant.runtime.runtime): variant.metrics.get("kernel_kl_nats")
        for variant in report.variants
        if variant.role == "floor" and variant.runtime is not None
    }

    shares = []
    for variant in report.variants:
        whole = variant.metrics.get("kl_nats")
        if variant.role == "variant" and variant.runtime is not None and whole is not None:
            twin = by_name.get(variant.twin or "")
            quantizer = twin.metrics.get("kl_nats") if twin else None
            is_exported = variant.runtime.exporter is not None
            export = exports.get(formatting.runtime(variant.runtime.runtime)) if is_exported else None
            shares.append(Split(variant, export, quantizer, variant.metrics.get("kernel_kl_nats"), whole))
    return shares


def loss_section(report: Report, plot: Plot | None) -> Section:
    """Return the split, and how each model ran."""
    shares = splits(report)
    ran = [variant for variant in report.variants if variant.runtime is not None]
    return Section(
        id="runtimes",
        title=formatting.listed(
            [*dict.fromkeys(formatting.runtime(each.runtime.runtime) for each in ran if each.runtime)]
        ),
        sentences=tuple(_sentences(shares)),
        plots=(plot,) if plot else (),
        tables=(*((_table(shares),) if shares else ()), _runtimes(ran), _contents(ran)),
    )


class StackedRow(NamedTuple):
    """One bar: its name, its shares in the order of their labels, and what the whole came to."""

    name: str
    shares: tuple[Metric | None, ...]
    whole: Metric


def bars(report: Report) -> Drawing | None:
    """Draw the shares of every variant that has them all, stacked; None where none has."""
    complete = [split for split in splits(report) if all(m is not None and m.value is not None for m in split.shares)]
    rows = [StackedRow(split.variant.name, split.shares, split.whole) for split in complete]
    return stacked_bars(rows, _SHARES, "onnx-split", "Where the loss comes from")


def stacked_bars(rows: Sequence[StackedRow], labels: Sequence[str], name: str, title: str) -> Drawing | None:
    """Draw shares of KL as stacked bars, and each whole as a tick; None without rows.

    Args:
        rows: The bars; a share that is absent has no width.
        labels: The shares' names; one that no bar has is left out.
        name: The stem of the plot's file.
        title: Of the plot.
    """
    if not rows:
        return None
    figure, axes = style.figure(1.2 + _ROW * len(rows))
    left = [0.0] * len(rows)
    for place, label in enumerate(labels):
        if any(row.shares[place] is not None for row in rows):
            widths = [max(0.0, _value(row.shares[place])) for row in rows]
            axes.barh(range(len(rows)), widths, left=left, height=0.62, color=style.colour(place), label=label)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    whole = [_value(row.whole) for row in rows]
    axes.plot(whole, range(len(rows)), "|", color=style.ink(), markersize=14, markeredgewidth=1.6, label="All")

    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")
    axes.set_xlim(left=0)
    axes.set_xlabel("KL from the baseline (nats)")
    figure.legend(loc="outside lower center", ncols=len(labels) + 1)
    sentences = "; ".join(f"{row.name}: {_shares_text(row, labels)}" for row in rows)
    return Drawing(figure, name, title, f"Stacked shares of KL in nats. {sentences}.")


_KERNELS = {
    ("ONNX Runtime", 1): "At accuracy level 1 (fp32 activations) the kernel adds",
    ("ONNX Runtime", 4): "At accuracy level 4 (activations rounded to int8 by the kernel) the kernel adds",
    ("llama.cpp", None): "llama.cpp's kernels, which round activations to 8 bits, add",
    ("vLLM", None): "vLLM's kernels, in the type that it computes in, add",
}


def _sentences(shares: list[Split]) -> list[str]:
    ours = [split for split in shares if split.kernel is not None and split.quantizer is not None]
    sentences = []
    for kind, beginning in _KERNELS.items():
        at = [split for split in ours if _kind(split.variant) == kind]
        if at:
            worst = max(at, key=lambda split: _value(split.kernel))
            sentences.append(
                f"{beginning} at most {_text(worst.kernel)} nats ({worst.variant.name}), where the quantizer costs "
                f"{_text(worst.quantizer)}."
            )
    return sentences


def _kind(variant: VariantReport) -> tuple[str, int | None] | None:
    """Return which runtime, at which accuracy level."""
    ran = variant.runtime
    return (formatting.runtime(ran.runtime), ran.accuracy_level) if ran else None


def _table(shares: list[Split]) -> Table:
    rows = tuple(
        (
            TableCell(split.variant.name),
            TableCell(_level(split.variant)),
            *(NOTHING if metric is None else kl_cell(metric) for metric in (*split.shares, split.whole)),
        )
        for split in shares
    )
    columns = ("Variant", "Accuracy level", *(f"{share}, nats" for share in _SHARES), "All, nats")
    return Table("KL by where it comes from", columns, rows, note=_NOTE)


def _runtimes(ran: list[VariantReport]) -> Table:
    rows = []
    for variant in ran:
        runtime = variant.runtime
        assert runtime is not None
        nodes = ", ".join(f"{provider} {count}" for provider, count in runtime.nodes.items())
        source = ", ".join(word for word in (runtime.exporter or "elsewhere", runtime.format) if word)
        rows.append(
            (
                TableCell(variant.name),
                TableCell(source),
                TableCell(_level(variant)),
                TableCell(runtime.runtime),
                TableCell(nodes or NOTHING.text),
            )
        )
    columns = ("Model", "Made by", "Accuracy level", "Runtime", "Nodes by provider")
    return Table("How each model ran", columns, tuple(rows))


def _contents(ran: list[VariantReport]) -> Table:
    rows = tuple((TableCell(v.name), TableCell(" ".join(v.runtime.facts))) for v in ran if v.runtime is not None)
    return Table("What the files of each model hold", ("Model", "Contents"), rows, folded=True)


def _shares_text(row: StackedRow, labels: Sequence[str]) -> str:
    known = [(label, share) for label, share in zip(labels, row.shares, strict=True) if share is not None]
    return ", ".join(f"{label.lower()} {_text(share)}" for label, share in known)


def _level(variant: VariantReport) -> str:
    level = variant.runtime.accuracy_level if variant.runtime else None
    if level is None or variant.role == "floor":
        return formatting.MISSING
    return f"{level}"


def kl_cell(metric: Metric) -> TableCell:
    """Return a KL's cell; shares may be a billion times apart, so small ones are in powers of ten."""
    if metric.value is None or abs(metric.value) >= _SMALL:
        return metric_cell(metric)
    known = metric.low is not None and metric.high is not None
    return TableCell(_text(metric), f"[{metric.low:.1e}, {metric.high:.1e}]" if known else None)


_SMALL = 1e-5


def _text(metric: Metric | None) -> str:
    if metric is None or metric.value is None:
        return formatting.MISSING
    return formatting.value_text(metric) if abs(metric.value) >= _SMALL else f"{metric.value:.1e}"


def _value(metric: Metric | None) -> float:
    return 0.0 if metric is None or metric.value is None else metric.value

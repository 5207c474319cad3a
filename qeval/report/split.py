"""The loss of a variant on another runtime, split: what the export, the quantizer and the kernel each cost."""

from typing import NamedTuple

from qeval.report import style, words
from qeval.report.model import Metric, Report, Variant
from qeval.report.page import NOTHING, Cell, Plot, Section, Table, metric_cell

_SHARES = ("Export", "Quantizer", "Kernel")
_ROW = 0.34  # inches a bar takes
_NOTE = (
    "Export: KL of the float model there from the baseline. Quantizer: KL of the variant's weights, computed in torch, "
    "from the baseline. Kernel: KL of the runtime's answers from the same weights' in torch. All: KL of its answers "
    "from the baseline, which is about, but not exactly, the sum. All on the same tokens."
)


class Split(NamedTuple):
    """One variant on another runtime than torch; a share is None where the model that it needs was not scored."""

    variant: Variant
    export: Metric | None
    quantizer: Metric | None
    kernel: Metric | None
    whole: Metric

    @property
    def shares(self) -> tuple[Metric | None, Metric | None, Metric | None]:
        """In the order of the pipeline."""
        return self.export, self.quantizer, self.kernel


def splits(report: Report) -> list[Split]:
    """The variants that another runtime ran, each with its shares."""
    by_name = {variant.name: variant for variant in report.variants}
    exports = {
        words.runtime(variant.runtime.runtime): variant.metrics.get("kernel_kl_nats")
        for variant in report.variants
        if variant.role == "floor" and variant.runtime is not None
    }
    found = []
    for variant in report.variants:
        whole = variant.metrics.get("kl_nats")
        if variant.role == "variant" and variant.runtime is not None and whole is not None:
            twin = by_name.get(variant.twin or "")
            quantizer = twin.metrics.get("kl_nats") if twin else None
            own = variant.runtime.exporter is not None
            export = exports.get(words.runtime(variant.runtime.runtime)) if own else None
            found.append(Split(variant, export, quantizer, variant.metrics.get("kernel_kl_nats"), whole))
    return found


def section(report: Report, plot: Plot | None) -> Section:
    """The split, and how each model ran."""
    found = splits(report)
    ran = [variant for variant in report.variants if variant.runtime is not None]
    return Section(
        id="runtimes",
        title=words.listed([*dict.fromkeys(words.runtime(each.runtime.runtime) for each in ran if each.runtime)]),
        sentences=tuple(_sentences(found)),
        plots=(plot,) if plot else (),
        tables=(*((_table(found),) if found else ()), _runtimes(ran), _contents(ran)),
    )


def bars(report: Report) -> Plot | None:
    """The shares of every variant that has them all, stacked; None where none has."""
    found = [split for split in splits(report) if all(m is not None and m.value is not None for m in split.shares)]
    if not found:
        return None
    made, axes = style.figure(1.2 + _ROW * len(found))
    left = [0.0] * len(found)
    for place, share in enumerate(_SHARES):
        widths = [max(0.0, _value(split.shares[place])) for split in found]
        axes.barh(range(len(found)), widths, left=left, height=0.62, color=style.colour(place), label=share)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    whole = [_value(split.whole) for split in found]
    axes.plot(whole, range(len(found)), "|", color=style.ink(), markersize=14, markeredgewidth=1.6, label="All")
    axes.set_yticks(range(len(found)), [split.variant.name for split in found])
    axes.set_ylim(len(found) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")
    axes.set_xlim(left=0)
    axes.set_xlabel("KL from the baseline (nats)")
    made.legend(loc="outside lower center", ncols=4)
    told = "; ".join(f"{split.variant.name}: {_told(split)}" for split in found)
    svg, png = style.save(made)
    return Plot("onnx-split", "Where the loss comes from", f"Stacked shares of KL in nats. {told}.", svg, png)


_KERNELS = {
    ("ONNX Runtime", 1): "At accuracy level 1 (fp32 activations) the kernel adds",
    ("ONNX Runtime", 4): "At accuracy level 4 (activations rounded to int8 by the kernel) the kernel adds",
    ("llama.cpp", None): "llama.cpp's kernels, which round activations to 8 bits, add",
}


def _sentences(found: list[Split]) -> list[str]:
    ours = [split for split in found if split.kernel is not None and split.quantizer is not None]
    sentences = []
    for kind, told in _KERNELS.items():
        at = [split for split in ours if _kind(split.variant) == kind]
        if at:
            worst = max(at, key=lambda split: _value(split.kernel))
            sentences.append(
                f"{told} at most {_text(worst.kernel)} nats ({worst.variant.name}), where the quantizer costs "
                f"{_text(worst.quantizer)}."
            )
    return sentences


def _kind(variant: Variant) -> tuple[str, int | None] | None:
    """Which runtime, at which accuracy level."""
    ran = variant.runtime
    return (words.runtime(ran.runtime), ran.accuracy_level) if ran else None


def _table(found: list[Split]) -> Table:
    rows = tuple(
        (
            Cell(split.variant.name),
            Cell(_level(split.variant)),
            *(NOTHING if metric is None else _cell(metric) for metric in (*split.shares, split.whole)),
        )
        for split in found
    )
    columns = ("Variant", "Accuracy level", *(f"{share}, nats" for share in _SHARES), "All, nats")
    return Table("KL by where it comes from", columns, rows, note=_NOTE)


def _runtimes(ran: list[Variant]) -> Table:
    rows = []
    for variant in ran:
        runtime = variant.runtime
        assert runtime is not None
        nodes = ", ".join(f"{provider} {count}" for provider, count in runtime.nodes.items())
        made = ", ".join(word for word in (runtime.exporter or "elsewhere", runtime.format) if word)
        rows.append(
            (Cell(variant.name), Cell(made), Cell(_level(variant)), Cell(runtime.runtime), Cell(nodes or NOTHING.text))
        )
    columns = ("Model", "Made by", "Accuracy level", "Runtime", "Nodes by provider")
    return Table("How each model ran", columns, tuple(rows))


def _contents(ran: list[Variant]) -> Table:
    rows = tuple((Cell(v.name), Cell(" ".join(v.runtime.facts))) for v in ran if v.runtime is not None)
    return Table("What the files of each model hold", ("Model", "Contents"), rows, folded=True)


def _told(split: Split) -> str:
    return ", ".join(f"{name.lower()} {_text(m)}" for name, m in zip(_SHARES, split.shares, strict=True))


def _level(variant: Variant) -> str:
    level = variant.runtime.accuracy_level if variant.runtime else None
    if level is None or variant.role == "floor":
        return words.MISSING
    return f"{level}"


def _cell(metric: Metric) -> Cell:
    """Shares may be a billion times apart: those too small for decimals are said in powers of ten."""
    if metric.value is None or abs(metric.value) >= _SMALL:
        return metric_cell(metric)
    known = metric.low is not None and metric.high is not None
    return Cell(_text(metric), f"[{metric.low:.1e}, {metric.high:.1e}]" if known else None)


_SMALL = 1e-5


def _text(metric: Metric | None) -> str:
    if metric is None or metric.value is None:
        return words.MISSING
    return words.value_text(metric) if abs(metric.value) >= _SMALL else f"{metric.value:.1e}"


def _value(metric: Metric | None) -> float:
    return 0.0 if metric is None or metric.value is None else metric.value

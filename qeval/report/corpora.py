"""Several texts in one run: each shown apart, and their macro average, in which every text counts as one."""

from collections.abc import Iterator

import numpy as np

from qeval.report.align import Mask, TokenRows
from qeval.report.conventions import RATIO
from qeval.report.document import Table, TableCell, metric_cell
from qeval.report.model import Metric, Metrics, Report
from qeval.stats import estimates
from qeval.stats.bootstrap import Clusters, Floats
from qeval.stats.estimates import Transform
from qeval.store.run import ProtocolRecord, RunRecord
from qeval.types import Better

MACRO = "macro"
_TITLES = {"kl_nats": "KL, nats", "top1_agreement": "Same top token", "ppl_ratio": RATIO}
_Kind = tuple[str, Better, Transform | None]
_KL: dict[str, _Kind] = {"kl_nats": ("nats", "lower", None), "top1_agreement": ("fraction", "higher", None)}
_PPL: dict[str, _Kind] = {"ppl_ratio": ("ratio", "lower", np.exp)}


def by_corpus(rows: TokenRows, baseline: TokenRows, protocol: ProtocolRecord, run: RunRecord) -> dict[str, Metrics]:
    """Return each text's metrics and the mean over the texts under `macro`.

    Empty where there is one text, or where rows are not finite; a text of which no window was drawn is left out.
    """
    masks = {part.corpus: _inside(rows, part.first, part.windows) for part in protocol.parts}
    masks = {name: mask for name, mask in masks.items() if mask.any()}
    if len(masks) < 2:
        return {}

    metrics_of: dict[str, Metrics] = {name: {} for name in (*masks, MACRO)}
    for metric, (unit, better, transform) in _kinds(run).items():
        column = "nll" if metric == "ppl_ratio" else metric
        if rows.is_bounded and metric == "kl_nats":
            continue
        values, scored = _values(rows, baseline, metric), rows.scored[column]
        if not np.isfinite(values[scored]).all():
            return {}

        # each text apart, then their mean
        chosen = {name: mask & scored for name, mask in masks.items()}
        parts = [(values[mask], Clusters.of(rows.clusters_of_rows[mask])) for mask in chosen.values()]
        for names, of in ((tuple(masks), [[part] for part in parts]), ((MACRO,), [parts])):
            for name, each in zip(names, of, strict=True):
                estimate = estimates.mean_of_means(each, unit=unit, better=better, seed=run.seed, transform=transform)
                metrics_of[name][metric] = Metric.of(estimate)
    return metrics_of


def corpus_tables(report: Report) -> Iterator[Table]:
    """Yield every variant on every text, and over them, where there are several."""
    rows = [
        (
            TableCell(v.name),
            TableCell("all, each as one" if name == MACRO else name),
            *(metric_cell(metrics.get(m)) for m in _TITLES),
        )
        for v in report.variants
        for name, metrics in v.by_corpus.items()
    ]
    if rows:
        note = "The last of each variant is the mean over the texts, each counting as one whatever its length."
        yield Table("By text", ("Variant", "Text", *_TITLES.values()), tuple(rows), note)


def _kinds(run: RunRecord) -> dict[str, _Kind]:
    return (_KL if "kl" in run.metrics else {}) | (_PPL if "ppl" in run.metrics else {})


def _values(rows: TokenRows, baseline: TokenRows, metric: str) -> Floats:
    if metric == "ppl_ratio":
        return rows.values["nll"] - baseline.values["nll"]
    return rows.values[metric]


def _inside(rows: TokenRows, first: int, count: int) -> Mask:
    return np.asarray((rows.windows >= first) & (rows.windows < first + count), np.bool_)

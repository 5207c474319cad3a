"""`build` turns a finished run folder into a `Report`: read, pair, measure, rank. No model and no torch is needed."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pyarrow as pa

from qeval.errors import BrokenRecordError, QevalError
from qeval.report import measure_items, measure_tokens, pairing
from qeval.report.model import (
    SCHEMA_VERSION,
    Baseline,
    Comparison,
    Curve,
    Intervals,
    Kept,
    Metrics,
    Mix,
    Provenance,
    Report,
    Task,
    TaskResult,
    Variant,
)
from qeval.report.notes import notes
from qeval.report.pairing import BASELINE, ItemRows, TokenRows
from qeval.stats import bootstrap
from qeval.store.rows import RowStore
from qeval.store.run import RunRecord, VariantRecord, read_run

_CLUSTERS = "windows for tokens; subjects for questions, and questions where there is but one subject"


@dataclass
class _Measured:
    """What is found out about one model, filled as rows are read."""

    metrics: Metrics = field(default_factory=dict)
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    curve: Curve | None = None

    @property
    def error(self) -> str | None:
        """Which numbers are not finite, in a sentence; None where all are."""
        bad = [f"{name} ({m.non_finite} of {m.n})" for name, m in self.metrics.items() if m.non_finite]
        return f"Not finite: {', '.join(bad)}." if bad else None


def build(run_dir: Path) -> Report:
    """The report of a finished run, from its record and its rows.

    Raises:
        UsageError: `run_dir` holds no run.
        BrokenRecordError: rows are missing, doubled, or not on the baseline's tokens and questions.
        QevalError: the baseline's own numbers are not finite.
    """
    run = read_run(run_dir)
    store = RowStore(run_dir)
    done = [variant for variant in run.variants if variant.status == "done"]
    measured = {name: _Measured() for name in (BASELINE, *(variant.name for variant in done))}
    comparisons = _measure_tokens(run, done, store, measured)
    tasks, backend = _measure_tasks(run, done, store, measured)
    if measured[BASELINE].error:
        raise QevalError(f"The baseline cannot be compared with. {measured[BASELINE].error}")
    variants = [_variant(each, run, measured.get(each.name)) for each in run.variants]
    return Report(
        schema_version=SCHEMA_VERSION,
        model=run.model,
        baseline=Baseline(
            label=run.baseline_label,
            backend=backend,
            bits_per_weight=run.baseline_bits_per_weight,
            size_bytes=run.baseline_size_bytes,
            metrics=measured[BASELINE].metrics,
            tasks=measured[BASELINE].tasks,
            seconds=run.baseline_seconds,
        ),
        variants=mark_pareto(variants),
        comparisons=comparisons,
        protocol=run.protocol,
        tasks=tasks,
        metrics_asked=run.metrics,
        intervals=_intervals(run.seed),
        notes=notes(run, tasks),
        warnings=run.warnings,
        provenance=_provenance(run),
    )

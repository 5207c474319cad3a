"""A finished run as Python takes it: tables of pandas, estimates, figures of matplotlib, and a summary for notebooks.

Everything is read from the run's folder: the report's figures, and the rows that they were made from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qeval.errors import QevalError, UsageError, unknown
from qeval.escape import terminal
from qeval.report import Report, build_paired, notebook
from qeval.report.align import BASELINE_NAME, ItemRows, TokenRows
from qeval.report.model import Metrics, VariantReport
from qeval.report.run_rows import PairedRun
from qeval.report.score_rows import ScoreRows
from qeval.report.summary import summary
from qeval.report.tables import overview_table
from qeval.store.run import RunRecord, ScoreRecord, TaskRecord
from qeval.store.schema import LOWER_BOUND_COLUMNS
from qeval.types import Estimate

if TYPE_CHECKING:
    import pandas as pd

    from qeval.jobs.export import ExportManifest
    from qeval.jobs.publish import PublishedManifest
    from qeval.report.advice import Advice
    from qeval.report.calibration_spread import CalibrationSpread
    from qeval.report.run_plots import RunPlots
    from qeval.report.sensitivity import Sensitivities
    from qeval.store.timings import BenchRecord
    from qeval.store.variants import Manifest

_COMPARED = (
    "kl_nats", "reverse_kl_nats", "kl_abs_modelopt", "overlap", "top5_agreement", "top10_agreement",
    "sampling_kl_nats", "outside_nucleus", "delta_p", "kernel_kl_nats", *LOWER_BOUND_COLUMNS,
)  # fmt: skip
"""Columns of token rows that are distances from the baseline already."""


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A finished run: its folder, its record (`run.json`) and its report (`report.json`)."""

    folder: Path
    record: RunRecord
    report: Report

    @property
    def page(self) -> Path:
        """Return the path of the report as a page."""
        return self.folder / "report.html"

    @property
    def failed(self) -> tuple[str, ...]:
        """Return the variants that have no figures because quantizing or scoring them failed."""
        return tuple(variant.name for variant in self.record.variants if variant.status == "failed")

    @property
    def plot(self) -> "RunPlots":
        """Return the report's plots, one method each."""
        from qeval.report.run_plots import RunPlots  # noqa: PLC0415 - matplotlib takes as long to import as an import to run

        return RunPlots(self.report)

    def summary(self) -> "pd.DataFrame":
        """Return every figure of the report, one a row.

        Returns:
            Columns variant, metric, value, low, high (the 95 % interval), unit, n (tokens or questions). What is not
            known is missing. The baseline's rows come first.
        """
        named: list[tuple[str, Metrics]] = [(BASELINE_NAME, self.report.baseline.metrics)]
        named += [(variant.name, variant.metrics) for variant in self.report.variants]
        rows = [(name, each, metric) for name, metrics in named for each, metric in metrics.items()]
        columns: dict[str, Any] = {"variant": [name for name, _, _ in rows], "metric": [each for _, each, _ in rows]}
        for field in ("value", "low", "high"):
            columns[field] = np.array([getattr(metric, field) for *_, metric in rows], np.float64)
        columns |= {field: [getattr(metric, field) for *_, metric in rows] for field in ("unit", "n")}
        return _frame(columns)

    def metric(self, variant: str, metric: str) -> Estimate:
        """Return one figure with its interval.

        Args:
            variant: A variant's name, or "baseline".
            metric: A metric's name, such as "kl_nats"; `qeval.report.model` lists them.

        Raises:
            UsageError: The run has no such variant, or the variant no such figure.
        """
        metrics = self.report.baseline.metrics if variant == BASELINE_NAME else self._variant(variant).metrics
        if metric not in metrics:
            raise unknown(f"metric of '{variant}'", metric, metrics)
        each = metrics[metric]
        return Estimate(each.value, each.low, each.high, each.unit, each.better, each.n, each.clusters)

    def tokens(self, variant: str) -> "pd.DataFrame":
        """Return a variant's token rows with the baseline's, one a scored position.

        Args:
            variant: A variant's name.

        Returns:
            Columns window, position, token (its id), nll and baseline_nll (nats), entropy_nats and
            baseline_entropy_nats, the distances from the baseline (kl_nats and others) and top1_agreement. Where a
            position is not scored the value is missing.

        Raises:
            UsageError: The run has no such variant, or scored no tokens.
            BrokenRecordError: The variant failed, or its rows are not the baseline's.
        """
        record = self._rows.variant(variant)
        if self._rows.protocol is None:
            raise UsageError(f"The run in '{self.folder}' scored no tokens; compare with --tasks kl,ppl.")
        rows, base = self._rows.tokens(record), self._rows.baseline_tokens
        columns: dict[str, Any] = {"window": rows.windows, "position": rows.positions, "token": rows.tokens}
        for name in ("nll", "entropy_nats"):
            columns |= {name: _values(rows, name), f"baseline_{name}": _values(base, name)}
        columns |= {name: _values(rows, name) for name in _COMPARED if rows.scored[name].any()}
        agrees = (rows.values["top1_agreement"] > 0).astype(np.object_)
        agrees[~rows.scored["top1_agreement"]] = None
        return _frame(columns | {"top1_agreement": agrees}).astype({"top1_agreement": "boolean"})

    def questions(self, variant: str) -> "pd.DataFrame":
        """Return a variant's answers with the baseline's, one a question.

        Args:
            variant: A variant's name.

        Returns:
            Columns task, subject, item, gold, pred and baseline_pred (indices of choices), acc and baseline_acc,
            acc_norm and baseline_acc_norm (missing where the task has none), loglikelihoods and
            baseline_loglikelihoods (nats, one a choice).

        Raises:
            UsageError: The run has no such variant, or asked no questions.
            BrokenRecordError: The variant failed, or its rows are not the baseline's.
        """
        record = self._rows.variant(variant)
        if not self._rows.record.tasks:
            raise UsageError(f"The run in '{self.folder}' asked no questions; compare with --tasks mmlu.")
        parts = [
            _answers(task, self._rows.items(task, record), self._rows.baseline_items(task))
            for task in self._rows.record.tasks
        ]
        return _frame({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})

    def scores(self, variant: str) -> "pd.DataFrame":
        """Return a variant's scores with the baseline's, one an item and score; of tasks without choices.

        Args:
            variant: A variant's name.

        Returns:
            Columns score (its name), subject, item, value, answer and response, the last three of the baseline too
            (baseline_value and so on). Texts are missing where nothing was generated.

        Raises:
            UsageError: The run has no such variant, or no scores.
            BrokenRecordError: The variant failed, or its rows are not the baseline's.
        """
        record = self._rows.variant(variant)
        if not self._rows.record.scores:
            raise UsageError(f"The run in '{self.folder}' has no scores; compare with --tasks gsm8k, for one.")
        parts = [
            _scored(score, self._rows.scores(score, record), self._rows.baseline_scores(score))
            for score in self._rows.record.scores
        ]
        return _frame({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})

    def _variant(self, name: str) -> VariantReport:
        by_name = {variant.name: variant for variant in self.report.variants}
        if name not in by_name:
            raise unknown(f"variant of the run '{self.folder}'", name, (*by_name, BASELINE_NAME))
        return by_name[name]

    @cached_property
    def _rows(self) -> PairedRun:
        return PairedRun(self.folder)

    def __repr__(self) -> str:
        """Return which run it is, in a line."""
        variants = ", ".join(variant.name for variant in self.record.variants)
        return terminal(f"<Run '{self.folder}': {variants} of {self.report.model.name}>")

    def __str__(self) -> str:
        """Return the report's findings, a sentence a line."""
        return terminal("\n".join(summary(self.report)))

    def _repr_html_(self) -> str:
        """Return the report's findings and its first table as HTML, for notebooks."""
        sentences = notebook.list_markup(summary(self.report))
        title = notebook.title_markup(f"{self.report.model.name}: what quantization lost")
        return str(title + sentences + notebook.table_markup(overview_table(self.report)))


def load_run(folder: Path) -> Run:
    """Return the finished run in a folder, its figures computed from its rows.

    Args:
        folder: What `compare` was given as `out`.

    Raises:
        UsageError: The folder holds no run.
        BrokenRecordError: The run is not finished, or a file is not what the record says.
    """
    rows = PairedRun(folder)
    return Run(folder, rows.record, build_paired(rows))


class QuantizedVariant(NamedTuple):
    """A variant on disk: its name, its folder and its manifest."""

    name: str
    folder: Path
    manifest: "Manifest"


class ExportedModel(NamedTuple):
    """A folder of exported weights, and its manifest: of an ONNX folder, or of a checkpoint or a GGUF file."""

    folder: Path
    manifest: "ExportManifest | PublishedManifest"


class SensitivityMap(NamedTuple):
    """The cost of each group of linears alone: the folder, the page, and the effects."""

    folder: Path
    page: Path
    effects: "Sensitivities"


class AdvisedRun(NamedTuple):
    """The causes of a variant's loss and what treats them: the folder, the page, and the advice."""

    folder: Path
    page: Path
    advice: "Advice"


class BenchRun(NamedTuple):
    """A benchmark's folder, its record, and its page; None where nothing could be timed."""

    folder: Path
    record: "BenchRecord"
    page: Path | None


class ModelOutcome(NamedTuple):
    """One model of a sweep: its run's folder, the exit code of its comparison, why it failed, or None.

    `case`: the draw of a calibration text, where the sweep is over these.
    """

    name: str
    folder: Path
    code: int
    error: str | None
    case: str = ""


class Sweep(NamedTuple):
    """A sweep's models in order, the page of all, and how far calibration moves each method where that was swept over.

    There is no spread where a comparison failed.
    """

    models: tuple[ModelOutcome, ...]
    page: Path
    spread: "CalibrationSpread | None" = None

    @property
    def exit_code(self) -> int:
        """Return 0, or 3 where a model or one of its variants failed."""
        return max(QevalError.exit_code if each.error else each.code for each in self.models)

    @property
    def runs(self) -> dict[str, Run]:
        """Return the runs of the models that have one, by the model's name; they are read from their folders."""
        return {each.name: load_run(each.folder) for each in self.models if each.error is None}


def _values(rows: TokenRows, column: str) -> Any:
    """Return a column [rows], NaN where it is not scored."""
    return np.where(rows.scored[column], rows.values[column], np.nan)


def _answers(task: TaskRecord, rows: ItemRows, base: ItemRows) -> Mapping[str, Any]:
    """Return the columns [questions] of one task, a variant's with the baseline's."""
    columns: dict[str, Any] = {
        "task": np.full(len(rows.items), task.name, np.object_),
        "subject": rows.subjects,
        "item": rows.items,
        "gold": rows.gold,
    }
    for name in ("pred", "acc", "acc_norm"):
        columns |= {name: _present(getattr(rows, name), rows), f"baseline_{name}": _present(getattr(base, name), base)}
    return columns | {"loglikelihoods": _by_question(rows), "baseline_loglikelihoods": _by_question(base)}


def _scored(score: ScoreRecord, rows: ScoreRows, base: ScoreRows) -> Mapping[str, Any]:
    """Return the columns [scores] of one score, a variant's with the baseline's."""
    columns: dict[str, Any] = {
        "score": np.full(len(rows.values), score.name, np.object_),
        "subject": rows.subjects[rows.places],
        "item": rows.items[rows.places],
    }
    for prefix, side in (("", rows), ("baseline_", base)):
        texts = {"answer": side.answers, "response": side.responses}
        columns |= {f"{prefix}{name}": values for name, values in {"value": side.values, **texts}.items()}
    return columns


def _present(values: Any, rows: ItemRows) -> Any:
    return np.full(len(rows.items), np.nan) if values is None else values


def _by_question(rows: ItemRows) -> Any:
    """Return the choices' log-likelihoods [questions], a list each."""
    lists: Sequence[Any] = np.split(rows.choices, rows.starts[1:])
    column = np.empty(len(lists), np.object_)
    for place, values in enumerate(lists):
        column[place] = values.tolist()
    return column


def _frame(columns: Mapping[str, Any]) -> "pd.DataFrame":
    import pandas as pd  # noqa: PLC0415 - takes longer to import than all that a command computes

    return pd.DataFrame(dict(columns))

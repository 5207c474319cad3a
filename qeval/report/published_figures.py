"""Published figures of unquantized models, `configs/selfcheck.yaml`, beside those of a run's baseline.

A figure that was measured by the same protocol agrees or is off. One of another protocol is shown with what differs,
and judges nothing: a perplexity is another number under another window.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from qeval.errors import UsageError
from qeval.models.hub.aliases import aliases
from qeval.parsing import load_yaml
from qeval.paths import shipped
from qeval.report import formatting
from qeval.report.align import BASELINE_NAME
from qeval.report.conventions import convention_title
from qeval.report.document import Table, TableCell, metric_cell
from qeval.report.model import Metric, Report
from qeval.store.run import ModelRecord, ProtocolRecord, TaskRecord
from qeval.tasks.corpus import BosPolicy
from qeval.tasks.protocols import CONVENTIONS, DEFAULT_CONVENTION

_PERPLEXITIES = ("ppl", "word_ppl", "byte_ppl", "bits_per_byte")
_MMLU = "mmlu_acc"
_MMLU_QUESTIONS = 14_042


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Text(_Part):
    """A text: a file of the data folder, or a corpus of the hub by qeval's name for it."""

    file: str | None = None
    hub: str | None = None

    @model_validator(mode="after")
    def _is_one(self) -> "Text":
        if (self.file is None) == (self.hub is None):
            raise ValueError("give either file or hub")
        return self


class FigureRow(_Part):
    """One published figure, of the baseline or of a method, and how far off it may be."""

    id: str
    of: str
    metric: str
    value: float
    absolute: float | None = None
    relative: float | None = None

    @model_validator(mode="after")
    def _has_one_tolerance(self) -> "FigureRow":
        if (self.absolute is None) == (self.relative is None):
            raise ValueError("give either absolute or relative")
        return self

    @property
    def tolerance(self) -> float:
        """The largest deviation, in the metric's own unit."""
        return abs(self.value) * self.relative if self.relative is not None else self.absolute or 0.0


class CheckRun(_Part):
    """One comparison and the rows that are read off it; `date` is its source's, where that is known."""

    model: str
    source: str
    trust: Literal["A", "B", "C"]
    rows: list[FigureRow]
    date: str | None = None
    needs_gpu: bool = False
    tasks: str = "kl,ppl"
    corpus: Text | None = None
    calibration: Text | None = None
    convention: str | None = None
    window: int | None = None
    stride: int | None = None
    max_windows: int | None = None
    bos: BosPolicy = "auto"
    shots: int = 5


class _Table(_Part):
    runs: list[CheckRun]


def read_check_runs(path: Path | None = None) -> list[CheckRun]:
    """Return the runs of a table of published figures, the shipped one by default.

    Raises:
        UsageError: The table can't be read.
    """
    where = path or shipped("configs/selfcheck.yaml")
    try:
        return _Table.model_validate(load_yaml(where)).runs
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole file"
        raise UsageError(f"{where} is no table of published figures ({place}: {first['msg']}).") from error


class PublishedFigure(NamedTuple):
    """A published figure of a run's baseline, what the run measured, and how their protocols differ, in words."""

    run: CheckRun
    row: FigureRow
    name: str
    measured: Metric
    differences: tuple[str, ...]

    @property
    def deviation(self) -> float:
        """Measured minus published."""
        return (self.measured.value or 0.0) - self.row.value

    @property
    def verdict(self) -> Literal["agrees", "off", "another protocol"]:
        """The judgement of the run's figure by the published one."""
        if self.differences:
            return "another protocol"
        return "agrees" if abs(self.deviation) <= self.row.tolerance else "off"


@cache
def _shipped_runs() -> tuple[CheckRun, ...]:
    return tuple(read_check_runs())


def published_figures(report: Report, runs: Iterable[CheckRun] | None = None) -> list[PublishedFigure]:
    """Return the published figures of a report's baseline, those of its own protocol first.

    Args:
        report: A run's.
        runs: A table of figures; default: the shipped one.
    """
    if report.model.source == "imported":
        return []
    known = _shipped_runs() if runs is None else runs
    names = _names(report.model)
    every = [
        figure for run in known if run.model in names for row in run.rows if row.of == BASELINE_NAME
        for figure in _beside(report, run, row)
    ]  # fmt: skip
    return sorted(every, key=lambda figure: len(figure.differences))


def published_warnings(report: Report, runs: Iterable[CheckRun] | None = None) -> list[str]:
    """Return a sentence on each published figure of the same protocol that the baseline is off."""
    return [
        f"The baseline is off a published figure of the same protocol: {figure.name} is "
        f"{formatting.metric_text(figure.measured)} here and {figure.row.value:g} in {_source(figure.run)}; "
        f"{figure.row.tolerance:.2g} is allowed. Look into the model's weights and type before its variants."
        for figure in published_figures(report, runs)
        if figure.verdict == "off"
    ]


def published_table(report: Report, runs: Iterable[CheckRun] | None = None) -> Table | None:
    """Return the published figures beside the baseline's; None where there are none of this model and text."""
    rows = tuple(
        (
            TableCell(figure.name),
            metric_cell(figure.measured),
            TableCell(f"{figure.row.value:g}"),
            TableCell(f"{figure.deviation:+.2g}"),
            TableCell(f"{figure.row.tolerance:.2g}"),
            TableCell(figure.verdict),
            TableCell("; ".join(figure.differences) or "none"),
            TableCell(_source(figure.run)),
        )
        for figure in published_figures(report, runs)
    )
    if not rows:
        return None
    columns = (
        "Figure", "Measured", "Published", "Deviation", "Allowed", "Verdict", "Differences of the protocol", "Source",
    )  # fmt: skip
    note = (
        "Trust: A, the protocol is fully stated and the figure repeated by others; B, one primary source; C, a band. "
        "Figures of another protocol judge nothing."
    )
    return Table("The baseline beside published figures", columns, rows, note)


def _names(model: ModelRecord) -> set[str]:
    """Return what the model is called: the name that was typed, its hub id, and the short names of that."""
    return {model.name, *((model.hub_id, *_short_names().get(model.hub_id, ())) if model.hub_id else ())}


@cache
def _short_names() -> Mapping[str, Sequence[str]]:
    """Return the short names of each hub id."""
    names: dict[str, list[str]] = {}
    for name, alias in aliases().items():
        names.setdefault(alias.hub_id or "", []).append(name)
    return names


def _beside(report: Report, run: CheckRun, row: FigureRow) -> Iterator[PublishedFigure]:
    """Yield the figure with what the run measured of the same text or task; nothing where it measured no such thing."""
    metrics = report.baseline.metrics
    if row.metric == _MMLU:
        for task in (each.record for each in report.tasks if f"{each.record.name}_acc" == _MMLU):
            if task.source != "mmlu_sample" and metrics[_MMLU].value is not None:
                yield PublishedFigure(run, row, task.title, metrics[_MMLU], tuple(_of_task(task, run)))
        return
    protocol, measured = report.protocol, metrics.get(row.metric) or metrics.get("ppl")
    is_ppl = row.metric.startswith("ppl") or row.metric in _PERPLEXITIES
    if protocol is None or measured is None or measured.value is None or not is_ppl:
        return
    text = run.corpus and (run.corpus.hub or run.corpus.file)
    if protocol.parts or protocol.corpus != text:
        return
    name = row.metric if row.metric in metrics else "ppl"
    yield PublishedFigure(run, row, convention_title(name), measured, tuple(_of_windows(protocol, run)))


def _of_task(task: TaskRecord, run: CheckRun) -> Iterator[str]:
    if task.shots != run.shots:
        yield f"{task.shots} shots, published {run.shots}"
    if task.items != _MMLU_QUESTIONS:
        yield f"{task.items:,} of {_MMLU_QUESTIONS:,} questions"


def _of_windows(protocol: ProtocolRecord, run: CheckRun) -> Iterator[str]:
    """Yield what differs between a run's protocol and that of a published figure."""
    convention = CONVENTIONS[run.convention or DEFAULT_CONVENTION]
    if protocol.convention != convention.name:
        yield f"convention {protocol.convention}, published {convention.name}"
    window = run.window or convention.window
    if window is not None and protocol.window != window:
        yield f"windows of {protocol.window}, published {window}"
    stride = run.stride or (window if run.window else convention.stride) or window
    if stride is not None and protocol.stride != stride:
        yield f"stride {protocol.stride}, published {stride}"
    if protocol.bos_policy is not None and protocol.bos_policy != run.bos:
        yield f"--bos {protocol.bos_policy}, published {run.bos}"
    windows = min(protocol.windows_available, run.max_windows or protocol.windows_available)
    if protocol.windows != windows:
        yield f"{protocol.windows} of {protocol.windows_available} windows, published {windows}"


def _source(run: CheckRun) -> str:
    """Return the source with its date and trust."""
    return f"{run.source} ({', '.join(filter(None, (run.date, f'trust {run.trust}')))})"

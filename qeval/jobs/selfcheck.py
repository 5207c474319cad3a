"""Published figures, made again: the runs of `configs/selfcheck.yaml`, what they gave, and how far that is off.

A row is within its tolerance, out of it, or not reached, with the reason: its model, data or device is not here. What
was not reached never counts as reproduced.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import torch

from qeval.compare.hub_access import hub_access, needs_of
from qeval.compare.plan import make_plan
from qeval.compare.run import membership, run_comparison
from qeval.compare.settings import CalibrationChoice, CorpusChoice, ModelChoice, Settings
from qeval.compare.task_choice import TaskChoice
from qeval.config import BASELINE, parse_method
from qeval.errors import QevalError, UsageError
from qeval.identity import digest
from qeval.models.device import check_device
from qeval.paths import home
from qeval.progress import Progress
from qeval.report import build_paired
from qeval.report.model import Report
from qeval.report.published_figures import CheckRun, FigureRow, Text, read_check_runs
from qeval.report.run_rows import PairedRun

_BESIDE = "rtn:int8-channel"
RowStatus = Literal["within", "out", "not reached"]
Reached = tuple[float | None, str | None]
"""A row's measured value, or why there is none."""


@dataclass(frozen=True)
class Where:
    """The location of data, and the device that it is computed on."""

    data: Path | None = None
    mmlu_dir: Path | None = None
    device: str = "cpu"
    threads: int | None = None


@dataclass(frozen=True)
class CheckedRow:
    """The result of one row."""

    id: str
    model: str
    of: str
    metric: str
    published: float
    tolerance: float
    measured: float | None
    status: RowStatus
    reason: str | None
    protocol: str | None
    source: str
    trust: str

    @property
    def deviation(self) -> float | None:
        """Measured minus published; None where nothing was measured."""
        return None if self.measured is None else self.measured - self.published


def read_runs(path: Path | None = None, rows: Sequence[str] = ()) -> list[CheckRun]:
    """Return the runs of a table (the shipped one), with the rows whose id matches one of the patterns `rows`.

    Raises:
        UsageError: the table can't be read, or no row matches.
    """
    table = read_check_runs(path)
    found = [run.model_copy(update={"rows": _matching(run.rows, rows)}) for run in table]
    found = [run for run in found if run.rows]
    if not found:
        every = ", ".join(row.id for run in table for row in run.rows)
        raise UsageError(f"--rows {','.join(rows)} matches none of {every}.")
    return found


def run_selfcheck(runs: Iterable[CheckRun], where: Where, progress: Progress) -> list[CheckedRow]:
    """Check every row of every run, in order; a run that can't be made leaves its rows not reached.

    Raises:
        UsageError: a folder or a device that was named is not here.
    """
    check_device(where.device)
    for flag, folder in (("--data", where.data), ("--mmlu-dir", where.mmlu_dir)):
        if folder is not None and str(folder) != "hub" and not folder.is_dir():
            raise UsageError(f"{flag} {folder}: there is no such folder.")
    return [checked for run in runs for checked in _checked(run, where, progress)]


def selfcheck_exit_code(checked: Sequence[CheckedRow]) -> int:
    """0 where all that was reached is within tolerance, 1 where a row is out of it, 3 where nothing was reached."""
    if any(row.status == "out" for row in checked):
        return 1
    return 0 if any(row.status == "within" for row in checked) else 3


def _matching(rows: Sequence[FigureRow], patterns: Sequence[str]) -> list[FigureRow]:
    return [row for row in rows if not patterns or any(fnmatchcase(row.id, pattern) for pattern in patterns)]


def _checked(run: CheckRun, where: Where, progress: Progress) -> list[CheckedRow]:
    try:
        report = _report(run, where, progress)
    except QevalError as error:
        return [_row(run, row, None, (None, str(error))) for row in run.rows]
    return [_row(run, row, report, _measured(row, report)) for row in run.rows]


def _report(run: CheckRun, where: Where, progress: Progress) -> Report:
    """Return the report of one run; its folder in the cache makes the same check again cheap.

    Raises:
        QevalError: something that the run needs is not here.
    """
    if run.needs_gpu and not (where.device.startswith("cuda") and torch.cuda.is_available()):
        raise UsageError(f"{run.model} needs a GPU: give --device cuda on a machine that has one.")
    settings = _settings(run, where)
    progress.tell(f"{run.model}: {', '.join(row.id for row in run.rows)}")
    with hub_access(needs_of(settings), progress, is_offline=False):
        plan = make_plan(settings)
        with membership(plan, progress) as ledger:
            run_comparison(plan, progress, ledger)
            return build_paired(PairedRun(settings.out, is_running=True))


def _settings(run: CheckRun, where: Where) -> Settings:
    """Return a comparison of the rows' methods; a baseline alone is compared with one that fits any model."""
    methods = sorted({row.of for row in run.rows} - {BASELINE}) or [_BESIDE]
    name = digest({"run": run.model_dump(exclude={"rows", "source", "trust", "date"}), "methods": methods})
    calibration = CalibrationChoice() if run.calibration is None else CalibrationChoice(_text(run.calibration, where))
    return Settings(
        model=ModelChoice(run.model, device=where.device, compute=None if run.needs_gpu else "float32"),
        recipes=tuple(parse_method(method) for method in methods),
        variants=(),
        tasks=tuple(run.tasks.split(",")),
        corpus=CorpusChoice(
            corpus=None if run.corpus is None else _text(run.corpus, where),
            window=run.window,
            stride=run.stride,
            max_windows=run.max_windows,
            bos=run.bos,
            convention=run.convention,
        ),
        questions=TaskChoice(mmlu_dir=where.mmlu_dir or Path("hub"), shots=run.shots),
        calibration=calibration,
        out=home() / "selfcheck" / name,
        threads=where.threads,
        command="qeval selfcheck",
    )


def _text(text: Text, where: Where) -> str:
    if text.file is None:
        return str(text.hub)
    folders = [folder for folder in (where.data, home() / "data") if folder is not None]
    paths = [folder / text.file for folder in folders if (folder / text.file).is_file()]
    if not paths:
        raise UsageError(f"{text.file} is in none of {', '.join(map(str, folders))}; give its folder as --data.")
    return str(paths[0])


def _measured(row: FigureRow, report: Report) -> Reached:
    if row.of == BASELINE:
        metrics = report.baseline.metrics
    else:
        (variant,) = [variant for variant in report.variants if variant.name == row.of]
        if variant.status != "done":
            return None, f"{row.of} is {variant.status}: {variant.error}"
        metrics = variant.metrics
    if row.metric not in metrics:
        return None, f"the run has no {row.metric}"
    return metrics[row.metric].value, None


def _row(run: CheckRun, row: FigureRow, report: Report | None, reached: Reached) -> CheckedRow:
    measured, reason = reached
    near = measured is not None and abs(measured - row.value) <= row.tolerance
    status: RowStatus = "not reached" if report is None else "within" if near else "out"
    return CheckedRow(
        id=row.id,
        model=run.model,
        of=row.of,
        metric=row.metric,
        published=row.value,
        tolerance=row.tolerance,
        measured=measured,
        status=status,
        reason=reason,
        protocol=report.protocol.name if report and report.protocol else None,
        source=run.source,
        trust=run.trust,
    )

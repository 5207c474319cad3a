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
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from qeval.compare.prepare import prepare
from qeval.compare.run import membership, run
from qeval.compare.settings import Bos, CalibrationChoice, CorpusChoice, ModelChoice, Settings, TaskChoice
from qeval.config import BASELINE, parse_method
from qeval.errors import QevalError, UsageError
from qeval.identity import digest
from qeval.models.load import check_device
from qeval.paths import home, shipped
from qeval.progress import Progress
from qeval.report import build
from qeval.report.model import Report

_BESIDE = "rtn:int8-channel"
Status = Literal["within", "out", "not reached"]
Reached = tuple[float | None, str | None]
"""A row's measured value, or why there is none."""


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


class Row(_Part):
    """One published figure, of the baseline or of a method, and how far off it may be."""

    id: str
    of: str
    metric: str
    value: float
    absolute: float | None = None
    relative: float | None = None

    @model_validator(mode="after")
    def _has_one_tolerance(self) -> "Row":
        if (self.absolute is None) == (self.relative is None):
            raise ValueError("give either absolute or relative")
        return self

    @property
    def tolerance(self) -> float:
        """The largest deviation, in the metric's own unit."""
        return abs(self.value) * self.relative if self.relative is not None else self.absolute or 0.0


class Run(_Part):
    """One comparison and the rows that are read off it."""

    model: str
    source: str
    trust: Literal["A", "B", "C"]
    rows: list[Row]
    needs_gpu: bool = False
    tasks: str = "kl,ppl"
    corpus: Text | None = None
    calibration: Text | None = None
    convention: str | None = None
    window: int | None = None
    stride: int | None = None
    max_windows: int | None = None
    bos: Bos = "auto"
    shots: int = 5


class _Table(_Part):
    runs: list[Run]


@dataclass(frozen=True)
class Where:
    """Where data lies, and what it is computed on."""

    data: Path | None = None
    mmlu_dir: Path | None = None
    device: str = "cpu"
    threads: int | None = None


@dataclass(frozen=True)
class Checked:
    """What became of one row."""

    id: str
    model: str
    of: str
    metric: str
    published: float
    tolerance: float
    measured: float | None
    status: Status
    reason: str | None
    protocol: str | None
    source: str
    trust: str

    @property
    def deviation(self) -> float | None:
        """Measured minus published; None where nothing was measured."""
        return None if self.measured is None else self.measured - self.published


def read_runs(path: Path | None = None, rows: Sequence[str] = ()) -> list[Run]:
    """The runs of a table (the shipped one), with the rows whose id matches one of the patterns `rows`.

    Raises:
        UsageError: the table can't be read, or no row matches.
    """
    where = path or shipped("configs/selfcheck.yaml")
    try:
        table = _Table.model_validate(yaml.safe_load(where.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole file"
        raise UsageError(f"{where} is no table of published figures ({place}: {first['msg']}).") from error
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{where} is no table of published figures: {' '.join(str(error).split())}.") from error
    found = [each.model_copy(update={"rows": _matching(each.rows, rows)}) for each in table.runs]
    found = [each for each in found if each.rows]
    if not found:
        every = ", ".join(row.id for each in table.runs for row in each.rows)
        raise UsageError(f"--rows {','.join(rows)} matches none of {every}.")
    return found


def selfcheck(runs: Iterable[Run], where: Where, progress: Progress) -> list[Checked]:
    """Every row of every run, in order; a run that can't be made leaves its rows not reached.

    Raises:
        UsageError: a folder or a device that was named is not here.
    """
    check_device(where.device)
    for flag, folder in (("--data", where.data), ("--mmlu-dir", where.mmlu_dir)):
        if folder is not None and str(folder) != "hub" and not folder.is_dir():
            raise UsageError(f"{flag} {folder}: there is no such folder.")
    return [checked for each in runs for checked in _checked(each, where, progress)]


def exit_code(checked: Sequence[Checked]) -> int:
    """0 where all that was reached is within tolerance, 1 where a row is out of it, 3 where nothing was reached."""
    if any(row.status == "out" for row in checked):
        return 1
    return 0 if any(row.status == "within" for row in checked) else 3


def _matching(rows: Sequence[Row], patterns: Sequence[str]) -> list[Row]:
    return [row for row in rows if not patterns or any(fnmatchcase(row.id, pattern) for pattern in patterns)]


def _checked(each: Run, where: Where, progress: Progress) -> list[Checked]:
    try:
        report = _report(each, where, progress)
    except QevalError as error:
        return [_row(each, row, None, (None, str(error))) for row in each.rows]
    return [_row(each, row, report, _measured(row, report)) for row in each.rows]


def _report(each: Run, where: Where, progress: Progress) -> Report:
    """The report of one run; its folder in the cache makes the same check again cheap.

    Raises:
        QevalError: something that the run needs is not here.
    """
    if each.needs_gpu and not (where.device.startswith("cuda") and torch.cuda.is_available()):
        raise UsageError(f"{each.model} needs a GPU: give --device cuda on a machine that has one.")
    settings = _settings(each, where)
    progress.tell(f"{each.model}: {', '.join(row.id for row in each.rows)}")
    plan = prepare(settings)
    with membership(plan, progress) as ledger:
        run(plan, progress, ledger)
        return build(settings.out)


def _settings(each: Run, where: Where) -> Settings:
    """A comparison of the methods that the rows are of; a baseline alone stands beside one that fits any model."""
    methods = sorted({row.of for row in each.rows} - {BASELINE}) or [_BESIDE]
    name = digest({"run": each.model_dump(exclude={"rows", "source", "trust"}), "methods": methods})
    calibration = CalibrationChoice() if each.calibration is None else CalibrationChoice(_text(each.calibration, where))
    return Settings(
        model=ModelChoice(each.model, device=where.device),
        recipes=tuple(parse_method(method) for method in methods),
        variants=(),
        tasks=tuple(each.tasks.split(",")),
        corpus=CorpusChoice(
            corpus=None if each.corpus is None else _text(each.corpus, where),
            window=each.window,
            stride=each.stride,
            max_windows=each.max_windows,
            bos=each.bos,
            convention=each.convention,
        ),
        questions=TaskChoice(mmlu_dir=where.mmlu_dir or Path("hub"), shots=each.shots),
        calibration=calibration,
        out=home() / "selfcheck" / name,
        threads=where.threads,
        command="qeval selfcheck",
    )


def _text(text: Text, where: Where) -> str:
    if text.file is None:
        return str(text.hub)
    folders = [folder for folder in (where.data, home() / "data") if folder is not None]
    found = [folder / text.file for folder in folders if (folder / text.file).is_file()]
    if not found:
        raise UsageError(f"{text.file} is in none of {', '.join(map(str, folders))}; give its folder as --data.")
    return str(found[0])


def _measured(row: Row, report: Report) -> Reached:
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


def _row(each: Run, row: Row, report: Report | None, reached: Reached) -> Checked:
    measured, reason = reached
    near = measured is not None and abs(measured - row.value) <= row.tolerance
    status: Status = "not reached" if report is None else "within" if near else "out"
    return Checked(
        id=row.id,
        model=each.model,
        of=row.of,
        metric=row.metric,
        published=row.value,
        tolerance=row.tolerance,
        measured=measured,
        status=status,
        reason=reason,
        protocol=report.protocol.name if report and report.protocol else None,
        source=each.source,
        trust=each.trust,
    )

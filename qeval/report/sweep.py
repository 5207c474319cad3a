"""One page for several models' runs: every variant of each, and KL against bits per weight."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qeval.errors import BrokenRecordError, UsageError
from qeval.files.atomic import write_text
from qeval.report import formatting, style
from qeval.report.calibration_spread import CalibrationSpread, spread_json, spread_tables
from qeval.report.conventions import RATIO
from qeval.report.document import NOTHING, Heading, Section, Table, TableCell, metric_cell
from qeval.report.frontier import by_method, frontier, frontiers, model_frontiers
from qeval.report.model import Report, VariantReport
from qeval.report.privacy import strip_paths
from qeval.report.render import html_page, write_plots
from qeval.report.tables import ROLE_REMARKS

REPORT = "report.json"
"""The name of a comparison's own report in its folder."""

_COLUMNS = {
    "kl_nats": "KL, nats",
    "top1_agreement": "Same top token",
    "ppl_ratio": RATIO,
}


@dataclass(frozen=True)
class Ended:
    """One model of a sweep: its run's folder, and why it failed, or None.

    `needs_digest`: another model of the sweep has the same name, so that the name alone does not say which it is.
    `case`: what tells one comparison of a model from its others, in brackets.
    """

    model: str
    folder: Path
    error: str | None = None
    needs_digest: bool = False
    case: str = ""

    @cached_property
    def report(self) -> Report | None:
        """Its report; None where it failed."""
        report = None if self.error is not None else read_report(self.folder)
        if report is None or not (self.needs_digest or self.case):
            return report
        digest = f"({report.model.weights_sha256[:8]})" if self.needs_digest else ""
        name = " ".join(filter(None, (report.model.name, digest, self.case)))
        return report.model_copy(update={"model": report.model.model_copy(update={"name": name})})


def read_report(folder: Path) -> Report:
    """Read the report of a finished run.

    Raises:
        UsageError: `folder` holds none. BrokenRecordError: it is torn or of another version.
    """
    path = folder / REPORT
    try:
        return Report.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"'{folder}' holds no report ({path} is missing).") from error
    except ValidationError as error:
        raise BrokenRecordError(
            f"{path} is torn or of another version of qeval; run the same command again."
        ) from error


def write_sweep(runs: Sequence[Ended], out: Path, spread: CalibrationSpread | None = None) -> Path:
    """Write sweep.md, sweep.html, sweep.json and the plot from the runs' own reports; where the page is.

    Args:
        runs: The comparisons.
        out: The page's folder.
        spread: How far calibration moves each method, where it was swept over.
    """
    runs = _with_distinct_names(runs)
    reports = _reports(runs)
    with style.styled():
        drawn = (model_frontiers(reports), *(frontiers(report) for report in reports))
        plots = [plot for plot in drawn if plot is not None]
    write_plots(plots, out)

    section = Section(
        id="summary",
        title="Every model and variant",
        sentences=_sentences(reports),
        plots=tuple(plots),
        tables=(*(spread_tables(spread) if spread else ()), sweep_table(runs)),
        warnings=tuple(f"{run.model} failed: {run.error}" for run in runs if run.error is not None),
    )
    whose = runs[0].model if len(runs) == 1 else f"{len(runs)} models"
    heading = Heading(f"{whose}: what quantization lost", _facts(reports))

    write_text(out / "sweep.md", html_page("report.md.j2", heading, [section]))
    write_text(out / "sweep.html", html_page("report.html.j2", heading, [section]))
    write_text(out / "sweep.json", json.dumps(_as_json(runs, spread), indent=2, allow_nan=False) + "\n")
    return out / "sweep.html"


def _with_distinct_names(runs: Sequence[Ended]) -> list[Ended]:
    """Return the runs, the models of one name with their digests, and no place of the machine in any text."""
    names = Counter(report.model.name for report in _reports(runs))
    return [
        replace(
            run,
            model=strip_paths(run.model),
            error=None if run.error is None else strip_paths(run.error),
            needs_digest=run.report is not None and names[run.report.model.name] > 1,
        )
        for run in runs
    ]


def sweep_table(runs: Sequence[Ended]) -> Table:
    """Return a line for every variant of every model; a model that failed has one that says so."""
    reports = _reports(runs)
    columns = {name: title for name, title in _columns(reports).items() if _holds(reports, name)}
    rows: list[tuple[TableCell, ...]] = []
    for run in runs:
        if run.report is None:
            rows.append(
                (TableCell(run.model), TableCell(formatting.MISSING, remark="failed"), *[NOTHING] * (2 + len(columns)))
            )
        else:
            rows += [_row(run.report, variant, list(columns)) for variant in run.report.variants]
    names = ("Model", "Variant", "Bits/weight", "Size", *columns.values())
    note = "Each variant is compared with its own model's baseline, on the same tokens and questions."
    return Table("Size and loss of every variant of every model", names, tuple(rows), note, live=True, filters=(0, 1))


def _columns(reports: Sequence[Report]) -> dict[str, str]:
    tasks = {task.record.name: task.record.title for report in reports for task in report.tasks}
    return _COLUMNS | {f"{name}_acc_diff": f"{title}, difference" for name, title in tasks.items()}


def _holds(reports: Sequence[Report], name: str) -> bool:
    return any(name in variant.metrics for report in reports for variant in report.variants)


def _row(report: Report, variant: VariantReport, names: Sequence[str]) -> tuple[TableCell, ...]:
    remark = ROLE_REMARKS.get(variant.role, variant.status if variant.status != "done" else None)
    cells = [metric_cell(variant.metrics.get(name), signed=name.endswith("_diff")) for name in names]
    bits, size = TableCell(formatting.bits(variant.bits_per_weight)), TableCell(formatting.size(variant.size_bytes))
    return TableCell(report.model.name), TableCell(variant.name, remark=remark), bits, size, *cells


def _sentences(reports: Sequence[Report]) -> tuple[str, ...]:
    bests = [
        _best(report.model.name, [v for variants in by_method(report).values() for v in variants]) for report in reports
    ]
    return (*filter(None, bests), "Brackets hold 95 % intervals; each model's own report says how they were made.")


def _best(model: str, variants: Sequence[VariantReport]) -> str:
    """Return the variants that no other is both smaller and closer than, and the closest of them."""
    if not variants:
        return ""
    front = frontier(variants)
    cell = metric_cell(front[-1].metrics["kl_nats"])
    least = (
        f"{model}: {front[-1].name} lost least, KL {cell.text} {cell.interval or ''} nats at "
        f"{front[-1].bits_per_weight:.2f} bits per weight."
    )
    return f"{least} None is both smaller and closer than {formatting.listed([v.name for v in front])}."


def _facts(reports: Sequence[Report]) -> tuple[str, ...]:
    return tuple(sorted({f"qeval {report.provenance.environment.qeval}" for report in reports}))


def _as_json(runs: Sequence[Ended], spread: CalibrationSpread | None) -> dict[str, Any]:
    models = [
        {
            "model": run.model,
            "folder": str(run.folder),
            "error": run.error,
            "report": None if run.report is None else run.report.model_dump(mode="json"),
        }
        for run in runs
    ]
    return {"schema_version": 1, "models": models} | ({"calibration": spread_json(spread)} if spread else {})


def _reports(runs: Sequence[Ended]) -> list[Report]:
    return [run.report for run in runs if run.report is not None]

"""A board's runs in an experiment tracker, through its own client: one tracked run a variant, intervals beside figures.

Where runs go, and as whom, is what the client's own environment says: MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME;
WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and WANDB_DIR. A run that was exported before is not doubled.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qeval.board.history import BoardFigure, BoardRun, board_runs, read_figures
from qeval.errors import QevalError, UsageError, first_line, unknown
from qeval.identity import digest
from qeval.store.run import RunRecord, read_run

_PROJECT = "qeval"
_KEY = "qeval.key"
_TAG_LETTERS = 64
"""The most letters of a tag that Weights & Biases takes."""


@dataclass(frozen=True)
class TrackedRun:
    """One variant of one run as a tracker holds it; `started` is in ISO format.

    `metrics` hold each figure by its name, and the ends of its interval by that with `_low` and `_high`.
    """

    name: str
    key: str
    started: str
    tags: Mapping[str, str]
    params: Mapping[str, str | float | int]
    metrics: Mapping[str, float]

    @property
    def started_ms(self) -> int:
        """Milliseconds since 1970."""
        return int(datetime.fromisoformat(self.started).timestamp() * 1000)


def export_board(board: Path, tracker: str) -> int:
    """Write the runs of a board to a tracker, and return how many were not there yet, as far as the client knows.

    Args:
        board: The board's folder.
        tracker: A key of `TRACKERS`.

    Raises:
        UsageError: There is no such tracker, or its client is not installed.
        QevalError: The client failed; its own reason is told.
    """
    if tracker not in TRACKERS:
        raise unknown("tracker", tracker, TRACKERS)
    runs = tracked_runs(board)
    try:
        return TRACKERS[tracker](runs)
    except QevalError:
        raise
    except Exception as error:  # clients have errors of their own, and no common base
        raise QevalError(f"--export {tracker}: its client failed ({first_line(error)}).") from error


def tracked_runs(board: Path) -> list[TrackedRun]:
    """Return every variant of every run on a board, the oldest run first."""
    order = {run.sha256: place for place, run in enumerate(board_runs(board))}
    figures = sorted(read_figures(board), key=lambda figure: (order[figure.run.sha256], figure.variant))
    tracked = []
    for run, of_run in groupby(figures, key=lambda figure: figure.run):
        record = _record(board / run.folder)
        for variant, own in groupby(of_run, key=lambda figure: figure.variant):
            tracked.append(_tracked(run, variant, own, record))
    return tracked


def check_tracker(tracker: str) -> None:
    """Refuse a tracker that is unknown or whose client is not installed.

    Raises:
        UsageError: It says what to install.
    """
    if tracker not in TRACKERS:
        raise unknown("tracker", tracker, TRACKERS)
    _CLIENTS[tracker]()


def _record(folder: Path) -> RunRecord | None:
    """Return the record of a run; None where its folder is gone: the board has the figures all the same."""
    try:
        return read_run(folder)
    except QevalError:
        return None


def _tracked(run: BoardRun, variant: str, figures: Iterable[BoardFigure], record: RunRecord | None) -> TrackedRun:
    metrics: dict[str, float] = {}
    for figure in figures:
        ends = {"": figure.value, "_low": figure.low, "_high": figure.high}
        metrics |= {f"{figure.metric}{end}": value for end, value in ends.items() if value is not None}
    tags = {
        _KEY: digest({"run": run.sha256, "variant": variant}),
        "qeval.token_hash": run.token_hash,
        "qeval.run_sha256": run.sha256,
        "qeval.variant": variant,
        "qeval.accepted": "true" if run.accepted else "false",
    }
    return TrackedRun(f"{run.name}/{variant}", tags[_KEY], run.started, tags, _params(run, variant, record), metrics)


def _params(run: BoardRun, variant: str, record: RunRecord | None) -> dict[str, str | float | int]:
    """Return what a variant was made and measured with, as far as it is known."""
    params: dict[str, str | float | int | None] = {"model": run.model, "variant": variant}
    if record is not None:
        params |= {
            "seed": record.seed,
            "protocol": record.protocol.name if record.protocol else None,
            "calibration": record.calibration.source if record.calibration else None,
            "qeval": record.environment.qeval,
            "torch": record.environment.torch,
            "device": record.environment.device,
        }
        for each in (each for each in record.variants if each.name == variant):
            params |= {
                "method": each.method, "grid": each.grid, "backend": each.backend,
                "bits_per_weight": each.bits_per_weight, "size_bytes": each.size_bytes,
            }  # fmt: skip
    return {name: value for name, value in params.items() if value is not None}


def _mlflow() -> Any:
    try:
        import mlflow  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UsageError(
            "--export mlflow needs MLflow, which is not installed: pip install 'qeval[mlflow]'."
        ) from error
    return mlflow


def _wandb() -> Any:
    try:
        import wandb  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UsageError(
            "--export wandb needs Weights & Biases, which is not installed: pip install 'qeval[wandb]'."
        ) from error
    return wandb


def _to_mlflow(runs: Iterable[TrackedRun]) -> int:
    """Write runs that the experiment does not hold yet."""
    client = _mlflow().MlflowClient()
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
    known = client.get_experiment_by_name(name)
    experiment = known.experiment_id if known else client.create_experiment(name)
    count = 0
    for run in runs:
        if client.search_runs([experiment], filter_string=f"tags.`{_KEY}` = '{run.key}'", max_results=1):
            continue
        info = client.create_run(experiment, start_time=run.started_ms, tags=dict(run.tags), run_name=run.name).info
        for key, value in run.params.items():
            client.log_param(info.run_id, key, value)
        for key, value in run.metrics.items():
            client.log_metric(info.run_id, key, value, timestamp=run.started_ms)
        client.set_terminated(info.run_id, end_time=run.started_ms)
        count += 1
    return count


def _to_wandb(runs: Iterable[TrackedRun]) -> int:
    """Write runs under ids of their own, so that one that is written again is the same run."""
    wandb, count = _wandb(), 0
    for run in runs:
        tags = [
            run.tags["qeval.token_hash"][:_TAG_LETTERS],
            *(["accepted"] if run.tags["qeval.accepted"] == "true" else []),
        ]
        tracked = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT), id=run.key[:_TAG_LETTERS], name=run.name, resume="allow",
            config={**run.params, **run.tags, "started": run.started}, tags=tags, settings=wandb.Settings(silent=True),
        )  # fmt: skip
        tracked.log(dict(run.metrics))
        tracked.finish()
        count += 1
    return count


_CLIENTS: Mapping[str, Callable[[], Any]] = MappingProxyType({"mlflow": _mlflow, "wandb": _wandb})
TRACKERS: Mapping[str, Callable[[Iterable[TrackedRun]], int]] = MappingProxyType(
    {"mlflow": _to_mlflow, "wandb": _to_wandb}
)
"""The writer of runs to each tracker, by its name; each returns how many it wrote."""

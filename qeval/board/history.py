"""The database of a board: `BOARD/board.sqlite`, the figures of runs of one token hash, and which were accepted."""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from qeval.errors import BrokenRecordError, QevalError, UsageError
from qeval.files.database import connect, database_errors, find_damage
from qeval.report.build import build_paired
from qeval.report.model import Metrics
from qeval.report.run_rows import PairedRun

DATABASE = "board.sqlite"
_VERSION = 1
_SCHEMA = """
CREATE TABLE runs(
    sha256 TEXT PRIMARY KEY, name TEXT NOT NULL, folder TEXT NOT NULL, started TEXT NOT NULL, model TEXT NOT NULL,
    token_hash TEXT NOT NULL, accepted INTEGER NOT NULL
);
CREATE TABLE figures(
    run TEXT NOT NULL REFERENCES runs(sha256), variant TEXT NOT NULL, metric TEXT NOT NULL, value REAL NOT NULL,
    low REAL, high REAL, unit TEXT NOT NULL, better TEXT NOT NULL, n INTEGER NOT NULL,
    PRIMARY KEY (run, variant, metric)
);
"""
_METRICS = ("kl_nats", "top1_agreement", "ppl", "ppl_ratio")
_ENDINGS = ("_acc", "_acc_diff", "_flips", "_score", "_score_diff")


class BoardRun(NamedTuple):
    """A run on the board; `folder` is relative to the board's own."""

    sha256: str
    name: str
    folder: str
    started: str
    model: str
    token_hash: str
    accepted: bool


class BoardFigure(NamedTuple):
    """One figure of a run, with its 95 % interval."""

    run: BoardRun
    variant: str
    metric: str
    value: float
    low: float | None
    high: float | None
    unit: str
    better: str
    n: int


def add_runs(board: Path, folders: Sequence[Path], *, accept: bool) -> None:
    """Put finished runs on a board, figures made from their rows; one that is there already is only accepted.

    Args:
        board: The board's folder.
        folders: The runs'.
        accept: Whether they are accepted: the last one is then what the next gate compares with.

    Raises:
        UsageError: A folder holds no run, or one of another token hash than the board's.
        BrokenRecordError: A run is broken, or vouches for nothing.
        QevalError: The database is broken or can't be written.
    """
    if not folders:
        return
    entries = [_entry(board, folder, accept) for folder in folders]
    _check_one_hash([*board_runs(board), *(run for run, _ in entries)])
    board.mkdir(parents=True, exist_ok=True)
    with _database(board) as database:
        for run, figures in entries:
            database.execute("BEGIN IMMEDIATE")
            database.execute(
                "INSERT INTO runs VALUES(?, ?, ?, ?, ?, ?, ?) ON CONFLICT(sha256) DO UPDATE SET "
                "folder = excluded.folder, accepted = max(accepted, excluded.accepted)",
                (*run[:-1], int(run.accepted)),
            )
            database.executemany("INSERT OR REPLACE INTO figures VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?)", figures)
            database.execute("COMMIT")


def board_runs(board: Path) -> list[BoardRun]:
    """Return the runs on a board, the oldest first; none where there is no board yet."""
    if not (board / DATABASE).is_file():
        return []
    with _database(board) as database:
        rows = database.execute("SELECT * FROM runs ORDER BY started, sha256").fetchall()
    return [BoardRun._make((*row[:-1], bool(row[-1]))) for row in rows]


def read_figures(board: Path) -> list[BoardFigure]:
    """Return all figures of a board, by variant, metric and time."""
    runs = {run.sha256: run for run in board_runs(board)}
    with _database(board) as database:
        rows = database.execute(
            "SELECT figures.* FROM figures JOIN runs ON run = sha256 ORDER BY variant, metric, started, sha256"
        ).fetchall()
    return [BoardFigure(runs[row[0]], *row[1:]) for row in rows]


def last_accepted(board: Path) -> Path:
    """Return the folder of the last accepted run of a board.

    Raises:
        UsageError: No run of it was accepted.
    """
    accepted = [run for run in board_runs(board) if run.accepted]
    if not accepted:
        raise UsageError(f"No run on the board '{board}' was accepted; `qeval board RUN --out {board} --accept` does.")
    return board / accepted[-1].folder


def is_board(folder: Path) -> bool:
    """Return whether a folder is a board's."""
    return (folder / DATABASE).is_file()


def _entry(board: Path, folder: Path, accept: bool) -> tuple[BoardRun, list[tuple[object, ...]]]:
    run = PairedRun(folder)
    record = run.record
    if run.missing_chain:
        raise BrokenRecordError(run.missing_chain)
    if record.witness is None or record.sha256 is None:
        raise BrokenRecordError(f"The run in '{folder}' has no token hash, so nothing says what it can be laid beside.")
    place = os.path.relpath(folder.resolve(), board.resolve())
    name = folder.resolve().name
    entry = BoardRun(record.sha256, name, place, record.started, record.model.name, record.witness, accept)
    report = build_paired(run)
    models: list[tuple[str, Metrics]] = [("baseline", report.baseline.metrics)]
    models += [(variant.name, variant.metrics) for variant in report.variants if variant.role == "variant"]
    figures: list[tuple[object, ...]] = [
        (record.sha256, variant, metric, m.value, m.low, m.high, m.unit, m.better, m.n)
        for variant, metrics in models
        for metric, m in metrics.items()
        if m.value is not None and (metric in _METRICS or metric.endswith(_ENDINGS))
    ]
    return entry, figures


def _check_one_hash(runs: Sequence[BoardRun]) -> None:
    for run in runs:
        if run.token_hash != runs[0].token_hash:
            raise UsageError(
                f"'{run.name}' was not asked what '{runs[0].name}' was: its token hash is {run.token_hash} and the "
                f"board's {runs[0].token_hash}; give it a board of its own."
            )


@contextmanager
def _database(board: Path) -> Iterator[sqlite3.Connection]:
    """Open the board's database; a broken one is an error, since what was accepted stands nowhere else."""
    path = board / DATABASE
    with database_errors(path), closing(connect(path)) as database:
        if reason := find_damage(database, _VERSION):
            raise QevalError(f"{path} is torn or of another version ({reason}); move it away and add the runs again.")
        if not database.execute("PRAGMA user_version").fetchone()[0]:
            database.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT")
        yield database

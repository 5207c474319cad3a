"""Lay finished runs of one token hash beside each other over time."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from qeval.api.folders import folder_of
from qeval.compare import arguments as read
from qeval.compare.arguments import PathLike

if TYPE_CHECKING:
    from qeval.board.page import WrittenBoard
    from qeval.results import Run


def board(
    runs: "Iterable[Run | PathLike]" = (), *, out: PathLike, accept: bool = False, export: str | None = None
) -> Path:
    """Put finished runs on a board and write its page: trends with intervals, and where they change.

    Args:
        runs: The runs to add, or their folders; none: the page alone is written again.
        out: The board's folder; its database keeps what was added before.
        accept: Whether the runs are accepted; `gate(..., against=BOARD)` compares with the last that is.
        export: "mlflow" or "wandb": write all runs of the board there too, through the client of that name, which its
            own environment variables tell where.

    Returns:
        The page's path.

    Raises:
        UsageError: A folder holds no run, or one of another token hash than the board's; the client is not installed.
        QevalError: A run or the database is broken, nothing is on the board, or the client failed.
    """
    return update_board(runs, out=out, accept=accept, export=export).page


def update_board(
    runs: "Iterable[Run | PathLike]", *, out: PathLike, accept: bool, export: str | None = None
) -> "WrittenBoard":
    """Do what `board` does, and return the series of the board with its page."""
    from qeval.board.export import check_tracker, export_board  # noqa: PLC0415 - the statistics, as below
    from qeval.board.history import add_runs  # noqa: PLC0415 - the statistics take a second to import
    from qeval.board.page import write_board  # noqa: PLC0415
    from qeval.paths import check_place  # noqa: PLC0415

    folders = [folder_of(run) for run in runs]
    place = read.path(out)
    check_place(place, "the board")
    if export is not None:
        check_tracker(export)  # before anything is written
    add_runs(place, folders, accept=accept)
    written = write_board(place)
    return written if export is None else written._replace(exported=export_board(place, export))

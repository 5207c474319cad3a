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


def board(runs: "Iterable[Run | PathLike]" = (), *, out: PathLike, accept: bool = False) -> Path:
    """Put finished runs on a board and write its page: trends with intervals, and where they change.

    Args:
        runs: The runs to add, or their folders; none: the page alone is written again.
        out: The board's folder; its database keeps what was added before.
        accept: Whether the runs are accepted; `gate(..., against=BOARD)` compares with the last that is.

    Returns:
        The page's path.

    Raises:
        UsageError: A folder holds no run, or one of another token hash than the board's.
        QevalError: A run or the database is broken, or nothing is on the board.
    """
    return update_board(runs, out=out, accept=accept).page


def update_board(runs: "Iterable[Run | PathLike]", *, out: PathLike, accept: bool) -> "WrittenBoard":
    """Do what `board` does, and return the series of the board with its page."""
    from qeval.board.history import add_runs  # noqa: PLC0415 - the statistics take a second to import
    from qeval.board.page import write_board  # noqa: PLC0415
    from qeval.paths import check_place  # noqa: PLC0415

    folders = [folder_of(run) for run in runs]
    place = read.path(out)
    check_place(place, "the board")
    add_runs(place, folders, accept=accept)
    return write_board(place)

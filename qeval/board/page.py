"""A board as a table, and as a static page: trends with their intervals, and where they change."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qeval.board.history import BoardFigure, BoardRun, board_runs, read_figures
from qeval.errors import UsageError
from qeval.files.atomic import write_text
from qeval.report import formatting, style
from qeval.report.document import Heading, Plot, Section, Table, TableCell, metric_cell
from qeval.report.model import Metric
from qeval.report.render import html_page, write_plots
from qeval.stats.change_points import FEWEST_RUNS, ChangePoint, change_point
from qeval.stats.flips import holm

FALSE_ALARMS = 0.05
"""The rate of false alarms over all series of a board together."""
_PLOTS_AT_MOST = 12


class Series(NamedTuple):
    """One figure of one variant over the runs, the oldest first, and its likeliest change with p after Holm."""

    variant: str
    metric: str
    figures: tuple[BoardFigure, ...]
    change: ChangePoint | None
    p_adjusted: float | None

    @property
    def is_changed(self) -> bool:
        """Return whether the change is one at the board's false-alarm rate."""
        return self.p_adjusted is not None and self.p_adjusted <= FALSE_ALARMS


def read_series(board: Path) -> list[Series]:
    """Return the series of a board, with their changes tested together."""
    groups = [list(rows) for _, rows in groupby(read_figures(board), key=lambda f: (f.variant, f.metric))]
    changes = [change_point([figure.value for figure in rows]) for rows in groups]
    adjusted = iter(holm([change.p_value for change in changes if change]))
    return [
        Series(rows[0].variant, rows[0].metric, tuple(rows), change, next(adjusted) if change else None)
        for rows, change in zip(groups, changes, strict=True)
    ]


class WrittenBoard(NamedTuple):
    """The page of a board, the series on it, and how many runs a tracker was given; None: none was asked for."""

    page: Path
    series: list[Series]
    exported: int | None = None


def write_board(board: Path) -> WrittenBoard:
    """Write board.html, board.md and the plots of a board.

    Raises:
        UsageError: There is no run on it.
    """
    runs = board_runs(board)
    if not runs:
        raise UsageError(f"There is no run on the board '{board}'; name the folders of finished runs to add.")
    series = read_series(board)
    with style.styled():
        plots = list(_trends(series))
    write_plots(plots, board)
    sections = [
        Section(id="changes", title="Changes", sentences=tuple(change_sentences(series))),
        Section(id="runs", title="Runs", tables=(runs_table(runs), latest_table(series))),
        Section(id="trends", title="Trends", plots=tuple(plots)),
    ]
    first, last = runs[0], runs[-1]
    heading = Heading(
        f"{last.model}: {len(runs)} runs of one token hash",
        (f"{first.started[:10]} to {last.started[:10]}", f"token hash {last.token_hash}"),
    )
    write_text(board / "board.md", html_page("report.md.j2", heading, sections))
    write_text(board / "board.html", html_page("report.html.j2", heading, sections))
    return WrittenBoard(board / "board.html", series)


def runs_table(runs: Sequence[BoardRun]) -> Table:
    """Return the table of the runs, the newest first."""
    rows = tuple(
        (TableCell(run.name), TableCell(run.started[:19]), TableCell(run.model), TableCell(_accepted(run)))
        for run in reversed(runs)
    )
    return Table("Runs, the newest first", ("Run", "Started", "Baseline", "Accepted"), rows)


def latest_table(series: Sequence[Series]) -> Table:
    """Return the table of each series' last figure and how far it is from the one before."""
    rows = tuple(
        (
            TableCell(each.variant),
            TableCell(each.metric),
            TableCell(str(len(each.figures))),
            metric_cell(_metric(each.figures[-1])),
            TableCell(_step(each.figures)),
            TableCell(formatting.MISSING if each.p_adjusted is None else f"{each.p_adjusted:.2g}"),
        )
        for each in series
    )
    columns = ("Variant", "Figure", "Runs", "Last", "Since the run before", "p of a change, adjusted")
    note = (
        f"Brackets hold 95 % intervals. p is that of one change of level (a permutation test), after Holm over all "
        f"series; of fewer than {FEWEST_RUNS} runs it is not asked."
    )
    return Table("Figures", columns, rows, note)


def change_sentences(series: Sequence[Series]) -> list[str]:
    """Return the changes in words, with the rate of false alarms."""
    changed = [each for each in series if each.is_changed and each.change]
    tested = sum(each.change is not None for each in series)
    rate = f"false alarms: at most {FALSE_ALARMS:.0%} of boards on which nothing changed, over all {tested} series"
    if not tested:
        return [f"No change is looked for in fewer than {FEWEST_RUNS} runs."]
    if not changed:
        return [f"No series changed its level ({rate})."]
    return [*(_change(each, each.change) for each in changed if each.change), rate[0].upper() + rate[1:] + "."]


def _change(series: Series, change: ChangePoint) -> str:
    first = series.figures[change.place].run
    unit = series.figures[0]
    before, after = (formatting.value_text(_plain(unit, value)) for value in (change.before, change.after))
    return (
        f"{series.variant}, {series.metric}: from {before} to {after} with the run '{first.name}' of "
        f"{first.started[:10]} (p = {series.p_adjusted:.2g})."
    )


def _trends(series: Sequence[Series]) -> Iterator[Plot]:
    """Draw a plot a metric, one line a variant, with intervals."""
    by_metric = sorted((each for each in series if len(each.figures) > 1), key=lambda each: each.metric)
    for number, (metric, group) in enumerate(groupby(by_metric, key=lambda each: each.metric)):
        if number == _PLOTS_AT_MOST:
            return
        figure, axes = style.figure(2.8)
        members = list(group)
        names = [run.name for run in dict.fromkeys(f.run for each in members for f in each.figures)]
        places = {name: place for place, name in enumerate(names)}
        for index, each in enumerate(members):
            x = [places[f.run.name] for f in each.figures]
            y = np.array([f.value for f in each.figures])
            ends = np.array([[f.value if e is None else e for e in (f.low, f.high)] for f in each.figures])
            errors = np.abs(ends - y[:, None]).T
            axes.errorbar(
                x, y, yerr=errors, fmt=f"{style.marker(index)}-", color=style.colour(index), label=each.variant
            )
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_ylabel(metric)
        axes.grid(True)
        figure.legend(loc="outside lower center", ncols=3)
        lines = "; ".join(f"{each.variant} {each.figures[-1].value:.4g}" for each in members)
        alt = f"{metric} over {len(names)} runs with 95 % intervals; last: {lines}."
        yield style.Drawing(figure, f"trend-{metric}", f"{metric} over time", alt).plot()


def _metric(figure: BoardFigure) -> Metric:
    return Metric.model_validate(
        {
            "value": figure.value, "low": figure.low, "high": figure.high, "unit": figure.unit,
            "better": figure.better, "n": figure.n, "clusters": 0,
        }
    )  # fmt: skip


def _plain(figure: BoardFigure, value: float) -> Metric:
    return _metric(figure).model_copy(update={"value": value, "low": None, "high": None})


def _step(figures: Sequence[BoardFigure]) -> str:
    if len(figures) < 2:
        return formatting.MISSING
    return formatting.value_text(_plain(figures[-1], figures[-1].value - figures[-2].value), signed=True)


def _accepted(run: BoardRun) -> str:
    return "yes" if run.accepted else formatting.MISSING

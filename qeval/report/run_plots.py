"""The report's plots as figures of matplotlib, one method each; pyplot and its settings are left alone."""

from collections.abc import Callable
from functools import partial

from matplotlib.figure import Figure

from qeval.errors import UsageError, unknown
from qeval.report import loss_breakdown, plots, style
from qeval.report.model import Report


class RunPlots:
    """The plots of a report. One that the run holds nothing for is a UsageError that says what it needs."""

    def __init__(self, report: Report) -> None:
        """Draw nothing yet."""
        self._report = report

    def quality_size(self) -> Figure:
        """Draw KL (or the perplexity ratio) against size on disk (MB), the Pareto front joined."""
        return _drawn(partial(plots.quality_against_size, self._report), "two variants with KL or perplexity")

    def kl_distribution(self) -> Figure:
        """Draw the share of tokens that have at least a given KL (nats)."""
        return _drawn(partial(plots.kl_distribution, self._report), "a variant whose KL is above 0")

    def perplexity(self) -> Figure:
        """Draw the perplexity of the baseline and of every variant, with 95 % intervals."""
        return _drawn(partial(plots.perplexity_bars, self._report), "perplexities, by --tasks ppl")

    def loss_by_stage(self) -> Figure:
        """Draw what export, quantizer and kernel cost (KL, nats) where another runtime ran the variants."""
        return _drawn(partial(loss_breakdown.bars, self._report), "variants on another runtime beside torch")

    def categories(self, task: str | None = None) -> Figure:
        """Draw the accuracy of every model in every category.

        Args:
            task: A task's name; default: the run's first.

        Raises:
            UsageError: The run has no such task.
        """
        tasks = {each.record.name: each for each in self._report.tasks}
        if not tasks:
            raise UsageError("The run asked no questions; this plot needs answers, by --tasks mmlu.")
        name = next(iter(tasks)) if task is None else task
        if name not in tasks:
            raise unknown("task of the run", name, tasks)
        return _drawn(partial(plots.accuracy_by_category, self._report, tasks[name]), "two models with answers")

    def layers(self, variant: str) -> Figure:
        """Draw which groups a mixed variant holds at the higher width, or in which format, layer by kind of linear.

        Args:
            variant: The name of a mixed variant.

        Raises:
            UsageError: The run has no such variant, or it is not mixed.
        """
        places = {each.name: (place, each) for place, each in enumerate(self._report.variants)}
        if variant not in places:
            raise unknown("variant of the run", variant, places)
        return _drawn(partial(plots.layer_map, *places[variant]), "a variant of a mixed method")


def _drawn(draw: Callable[[], style.Drawing | None], needs: str) -> Figure:
    with style.styled():
        drawing = draw()
    if drawing is None:
        raise UsageError(f"The run holds nothing for this plot: it needs {needs}.")
    return drawing.figure

"""Find what a variant of a finished run loses by, and what its treatments gain."""

from pathlib import Path
from typing import TYPE_CHECKING

from qeval.api.folders import folder_of
from qeval.api.process import torch_settings_restored
from qeval.compare import arguments as read
from qeval.compare.arguments import PathLike
from qeval.compare.options import check_least
from qeval.progress import Logged, Progress

if TYPE_CHECKING:
    from qeval.results import AdvisedRun, Run

_LEAST_WINDOWS = 4


def advise(
    run: "Run | PathLike",
    variant: str | None = None,
    *,
    corpus: PathLike | None = None,
    max_windows: int = 16,
    offline: bool = False,
    threads: int | None = None,
    out: PathLike | None = None,
    progress: Progress | None = None,
) -> "AdvisedRun":
    """Find what a variant loses by, propose at most three treatments, and measure each on held-out windows.

    Args:
        run: A finished run, or its folder.
        variant: One of its variants; default: the one with the largest KL.
        corpus: A text that the run did not score; default: what follows its windows in its own text.
        max_windows: Held-out windows, four at least.
        offline: Ask nothing of the hub.
        threads: CPU threads; default: the run's.
        out: The folder; default: RUN/advice.
        progress: Hears of phases and warnings.

    Returns:
        The folder, the page, and the advice.

    Raises:
        UsageError: There is no such run or variant, it is of a kind that is not looked into, or no text is left.
        QevalError: The run can't be made again, or a figure is not finite.
    """
    from qeval.jobs.advise import AdviceChoice, advise_on  # noqa: PLC0415 - torch takes seconds to import
    from qeval.results import AdvisedRun  # noqa: PLC0415

    check_least("--max-windows", max_windows, _LEAST_WINDOWS)
    folder = folder_of(run)
    place = read.path(out) if out else Path(folder) / "advice"
    text = read.text_or_none(corpus)
    if text is not None and Path(text).is_file():
        text = str(Path(text).absolute())  # other paths of the run start where it was started
    choice = AdviceChoice(variant, text, max_windows, place, read.few_threads(threads), is_offline=offline)
    with torch_settings_restored():
        advice = advise_on(folder, choice, progress or Logged())
    return AdvisedRun(place, place / "advice.html", advice)

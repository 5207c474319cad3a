"""Compare several models with the same options, and write one page for all."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qeval.api.comparison import compare
from qeval.api.grid import grid_methods
from qeval.api.parallel import ComparisonProcess, run_all
from qeval.compare import arguments as read
from qeval.compare.arguments import Names, PathLike
from qeval.compare.options import check_least
from qeval.errors import QevalError, UsageError
from qeval.progress import Logged, Progress
from qeval.store.out import check_out

if TYPE_CHECKING:
    from qeval.compare.plan import Plan
    from qeval.results import ModelOutcome, Run, Sweep


class SweepListener:
    """Hears how a sweep goes; what a method is not overridden for is not shown."""

    def start(self, folders: Mapping[str, Path], at_once: int, options: Mapping[str, Any]) -> None:
        """Hear of the models with their runs' folders, how many are compared at a time, and what all share."""

    def start_model(self, place: int, count: int, name: str) -> None:
        """Hear that model `place` of `count` begins, where one is compared at a time."""

    def plan(self, plan: "Plan") -> None:
        """Hear what is done with the model that has begun."""

    def finish(self, run: "Run") -> None:
        """Hear of a run that is done."""

    def fail(self, name: str, error: QevalError) -> None:
        """Hear why a model has no run; called while the error is handled."""

    def watch(self, comparisons: Sequence[ComparisonProcess]) -> AbstractContextManager[None]:
        """Return a block in which several are compared at a time."""
        del comparisons
        return nullcontext()

    def end(self, comparison: ComparisonProcess) -> None:
        """Hear that one of several has ended."""


class _Task(NamedTuple):
    """The settings that all models of a sweep share, and each one's folder and recorded command."""

    folders: Mapping[str, Path]
    options: Mapping[str, Any]
    commands: Mapping[str, str]
    listener: SweepListener

    def keywords(self, name: str) -> dict[str, Any]:
        """Return the keywords of one model's `compare`, but for its folder."""
        return {**self.options, "command": self.commands.get(name)}


def sweep(
    models: Names,
    *,
    out: PathLike = "reports/sweep",
    bits: Names | None = None,
    groups: Names | None = None,
    budgets: Names | None = None,
    models_at_once: int | None = None,
    progress: Callable[[], Progress] = Logged,
    listener: SweepListener | None = None,
    commands: Mapping[str, str] | None = None,
    **options: Any,
) -> "Sweep":
    """Compare several models, each with its variants, and write one page for all.

    A model that fails is noted, and the others are done all the same; the same call goes on where it stopped.

    Args:
        models: What `compare` takes as a model, by name.
        out: A folder; each model's run goes into one of its own there.
        bits: Widths that every method is made at, such as "2,3,4".
        groups: Block sizes, "channel" or "tensor".
        budgets: Sizes of mixed variants in bits per weight.
        models_at_once: Models compared at a time, each in a process of its own where they are several; default: 1, on
            Ray as many as the cluster holds.
        progress: Makes what hears of a model's phases and warnings, where one is compared at a time.
        listener: Hears how the sweep goes.
        commands: What each model's record names as its command; default: its call of `compare`.
        **options: All other keywords of `compare`.

    Returns:
        The models in order, with folders and errors, and the page of all.

    Raises:
        UsageError: There is no model, two would share a folder, or none could be compared for what was asked.
        QevalError: No model could be compared.
    """
    folders = _folders(read.names(models), read.path(out))
    if bits or groups or budgets:
        options["methods"] = grid_methods(options.get("methods"), bits, groups, budgets)
    signature(compare).bind("", out=out, progress=None, **options)  # a wrong keyword is an error before any work
    check_least("--models-at-once", models_at_once, 1)
    task = _Task(folders, options, commands or {}, listener or SweepListener())
    with _room(options, models_at_once, len(folders)) as (at_once, environment):
        task.listener.start(folders, at_once, options)
        if at_once == 1:
            outcomes = [_compare_here(task, place, name, progress) for place, name in enumerate(folders, 1)]
        else:
            outcomes = _compare_at_once(task, at_once, environment)
    return _write(outcomes, read.path(out))


def _folders(names: Sequence[str], out: Path) -> dict[str, Path]:
    """Return each model's folder.

    Raises:
        UsageError: There is no model, or two would share a folder.
    """
    folders = {name: out / read.slug(name) for name in names}
    if not names:
        raise UsageError("Nothing to sweep over: give --models, for example --models demo,llama-3.2-1b.")
    if len(set(folders.values())) < len(names):
        raise UsageError(f"Two of the models {', '.join(names)} would share a folder; sweep them apart.")
    check_out(out, "the runs", below=True)
    return folders


@contextmanager
def _room(options: Mapping[str, Any], at_once: int | None, models: int) -> Iterator[tuple[int, dict[str, str]]]:
    """Return how many models are compared at a time, and the environment of their processes: of one Ray cluster.

    Raises:
        UsageError: Ray is asked for and isn't installed.
        QevalError: The cluster can't be reached.
    """
    if options.get("executor") != "ray" or models == 1:
        yield min(at_once or 1, models), dict(os.environ)
        return
    from qeval.executors.cluster import shared_cluster  # noqa: PLC0415 - an extra

    with shared_cluster() as (address, cpus):
        threads = options.get("threads") or os.cpu_count() or 1
        holds = max(1, cpus // max(options.get("workers", 1), threads))
        yield min(at_once or holds, holds, models), os.environ | {"RAY_ADDRESS": address}


def _compare_here(task: _Task, place: int, name: str, progress: Callable[[], Progress]) -> "ModelOutcome":
    """Compare one model here."""
    from qeval.results import ModelOutcome  # noqa: PLC0415 - the statistics and plots take a second to import

    folder, listener = task.folders[name], task.listener
    listener.start_model(place, len(task.folders), name)
    try:
        run = compare(name, **task.keywords(name), out=folder, progress=progress(), on_plan=listener.plan)
    except QevalError as error:
        listener.fail(name, error)
        return ModelOutcome(name, folder, error.exit_code, str(error))
    listener.finish(run)
    return ModelOutcome(name, folder, QevalError.exit_code if run.failed else 0, None)


def _compare_at_once(task: _Task, at_once: int, environment: Mapping[str, str]) -> "list[ModelOutcome]":
    """Compare several models at a time; on this machine they share the cores unless `threads` says otherwise."""
    from qeval.results import ModelOutcome  # noqa: PLC0415 - the statistics and plots take a second to import

    more: dict[str, Any] = {}
    if task.options.get("threads") is None and task.options.get("executor", "local") == "local":
        more["threads"] = max(1, (os.cpu_count() or 1) // at_once)
    if not task.options.get("workers"):
        more["workers"] = 1  # a worker on each GPU is for a model that has the machine to itself
    comparisons = [
        ComparisonProcess(name, folder, _plain({**task.keywords(name), **more}))
        for name, folder in task.folders.items()
    ]
    with task.listener.watch(comparisons):
        for comparison in run_all(comparisons, at_once, environment):
            task.listener.end(comparison)
    return [ModelOutcome(each.name, each.folder, each.code or 0, each.error) for each in comparisons]


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as JSON holds them: paths as texts."""
    return {name: _plain_value(value) for name, value in options.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {name: _plain_value(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(each) for each in value]
    return value


def _write(outcomes: "Sequence[ModelOutcome]", out: Path) -> "Sweep":
    """Write the page of all models.

    Raises:
        UsageError, QevalError: No model could be compared.
    """
    from qeval.report.sweep import Ended, write_sweep  # noqa: PLC0415 - matplotlib takes a second to import
    from qeval.results import Sweep  # noqa: PLC0415

    errors = [each.error for each in outcomes if each.error is not None]
    if len(errors) == len(outcomes):
        is_use = all(each.code == UsageError.exit_code for each in outcomes)
        raise (UsageError if is_use else QevalError)(f"No model could be compared: {errors[0]}")
    page = write_sweep([Ended(each.name, each.folder, each.error) for each in outcomes], out)
    return Sweep(tuple(outcomes), page)

"""Compare several models with the same options, and write one page for all."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from qeval.api.comparison import DEFAULT_TASKS, compare
from qeval.api.grid import grid_methods
from qeval.api.parallel import ComparisonProcess, run_all
from qeval.compare import arguments as read
from qeval.compare.arguments import Names, PathLike
from qeval.compare.defaults import calibration_choice, takes_shipped_texts
from qeval.compare.options import check_least
from qeval.errors import QevalError, UsageError
from qeval.progress import Logged, Progress
from qeval.store.out import check_out

if TYPE_CHECKING:
    from qeval.compare.calibration_draws import CalibrationDraw
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


class _Case(NamedTuple):
    """One comparison of a sweep: a model, its folder, and where calibration is swept over the draw of a text."""

    model: str
    folder: Path
    draw: "CalibrationDraw | None" = None
    own: Mapping[str, Any] = MappingProxyType({})
    """Keywords of `compare` that other cases have otherwise."""

    @property
    def words(self) -> str:
        """The draw in words; empty without one."""
        return f"({self.draw.text}, seed {self.draw.seed})" if self.draw else ""

    @property
    def name(self) -> str:
        """The model's name, with the draw."""
        return " ".join(filter(None, (self.model, self.words)))

    def outcome(self, code: int, error: str | None) -> "ModelOutcome":
        """Return how it ended."""
        from qeval.results import ModelOutcome  # noqa: PLC0415 - the statistics and plots take a second to import

        return ModelOutcome(self.name, self.folder, code, error, self.words)


class _Task(NamedTuple):
    """The comparisons of a sweep, the settings that all share, and the recorded command of each."""

    cases: Sequence[_Case]
    options: Mapping[str, Any]
    commands: Mapping[str, str]
    listener: SweepListener

    def keywords(self, case: _Case) -> dict[str, Any]:
        """Return the keywords of one `compare`, but for its folder."""
        return {**self.options, **case.own, "command": self.commands.get(case.name)}


def sweep(
    models: Names,
    *,
    out: PathLike = "reports/sweep",
    bits: Names | None = None,
    groups: Names | None = None,
    budgets: Names | None = None,
    calibration_seeds: int = 1,
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
        calibration_seeds: Draws of each calibration text, of which `calibration` may name several: their spread becomes
            a variance table. Seed 0 is the text as it is, others put its parts into another order.
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
    check_least("--calibration-seeds", calibration_seeds, 1)
    cases = _cases(folders, options, calibration_seeds, progress)
    task = _Task(cases, options, commands or {}, listener or SweepListener())
    with _room(options, models_at_once, len(cases)) as (at_once, environment):
        task.listener.start({case.name: case.folder for case in cases}, at_once, options)
        if at_once == 1:
            outcomes = [_compare_here(task, place, case, progress) for place, case in enumerate(cases, 1)]
        else:
            outcomes = _compare_at_once(task, at_once, environment)
    return _write(cases, outcomes, read.path(out))


def _cases(
    folders: Mapping[str, Path], options: Mapping[str, Any], seeds: int, progress: Callable[[], Progress]
) -> list[_Case]:
    """Return one case a model, or where calibration is swept over one a model and draw of a text.

    Raises:
        UsageError: A text is not there, or the sweep measures no KL, whose spread it is about.
    """
    from qeval.compare.calibration_draws import draw_calibrations, named_texts  # noqa: PLC0415 - the hub's client

    texts = named_texts(options.get("calibration"))
    if len(texts) < 2 and seeds == 1:
        return [_Case(name, folder) for name, folder in folders.items()]
    if "kl" not in read.names(options.get("tasks", DEFAULT_TASKS)):
        raise UsageError("A sweep over calibration is about the spread of KL; add kl to --tasks.")
    from qeval.compare.hub_access import hub_access, needs_of_calibration  # noqa: PLC0415 - the client of the hub

    cases = []
    for model, folder in folders.items():
        shipped = takes_shipped_texts(model, offline=bool(options.get("offline")))
        choices = [calibration_choice(text, options.get("calibration_samples"), 512, shipped=shipped) for text in texts]
        needs = [need for choice in choices for need in needs_of_calibration(choice)]
        with hub_access(needs, progress(), is_offline=bool(options.get("offline"))):
            draws = draw_calibrations(choices, seeds)
        for place, draw in enumerate(draws):
            own = {
                "calibration": draw.source, "calibration_samples": choices[place // seeds].samples,
                "seed": options.get("seed", 0) + draw.seed,
            }  # fmt: skip
            at = f"{read.slug(draw.text)}-seed{draw.seed}"
            cases.append(_Case(model, folder / at, draw, own))
    return cases


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


def _compare_here(task: _Task, place: int, case: _Case, progress: Callable[[], Progress]) -> "ModelOutcome":
    """Compare one model here."""
    listener = task.listener
    listener.start_model(place, len(task.cases), case.name)
    try:
        run = compare(case.model, **task.keywords(case), out=case.folder, progress=progress(), on_plan=listener.plan)
    except QevalError as error:
        listener.fail(case.name, error)
        return case.outcome(error.exit_code, str(error))
    listener.finish(run)
    return case.outcome(QevalError.exit_code if run.failed else 0, None)


def _compare_at_once(task: _Task, at_once: int, environment: Mapping[str, str]) -> "list[ModelOutcome]":
    """Compare several models at a time; on this machine they share the cores unless `threads` says otherwise."""
    more: dict[str, Any] = {}
    if task.options.get("threads") is None and task.options.get("executor", "local") == "local":
        more["threads"] = max(1, (os.cpu_count() or 1) // at_once)
    if not task.options.get("workers"):
        more["workers"] = 1  # a worker on each GPU is for a model that has the machine to itself
    comparisons = [
        ComparisonProcess(case.name, case.folder, _plain({**task.keywords(case), **more}), model=case.model)
        for case in task.cases
    ]
    with task.listener.watch(comparisons):
        for comparison in run_all(comparisons, at_once, environment):
            task.listener.end(comparison)
    return [case.outcome(each.code or 0, each.error) for case, each in zip(task.cases, comparisons, strict=True)]


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


def _write(cases: Sequence[_Case], outcomes: "Sequence[ModelOutcome]", out: Path) -> "Sweep":
    """Write the page of all models.

    Raises:
        UsageError, QevalError: No model could be compared.
    """
    from qeval.report.calibration_spread import CalibrationCell, measure_spread  # noqa: PLC0415 - the statistics
    from qeval.report.sweep import Ended, write_sweep  # noqa: PLC0415 - matplotlib takes a second to import
    from qeval.results import Sweep  # noqa: PLC0415

    errors = [each.error for each in outcomes if each.error is not None]
    if len(errors) == len(outcomes):
        is_use = all(each.code == UsageError.exit_code for each in outcomes)
        raise (UsageError if is_use else QevalError)(f"No model could be compared: {errors[0]}")
    cells = [CalibrationCell(case.model, case.draw.text, case.draw.seed, case.folder) for case in cases if case.draw]
    spread = measure_spread(cells) if cells and not errors else None
    ended = [Ended(each.name, each.folder, each.error, case=each.case) for each in outcomes]
    return Sweep(tuple(outcomes), write_sweep(ended, out, spread), spread)

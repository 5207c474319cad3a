"""Tasks of lm-evaluation-harness by name, or of a user's YAML file; code is run where it is the harness's own alone.

A YAML file may name functions, classes and metrics of the hub, which are code, and its templates are Jinja. A user's
own file is taken where it names none of the first, and its templates are rendered in Jinja's sandbox.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import yaml
from datasets.exceptions import DatasetsError
from jinja2.exceptions import TemplateError
from jinja2.sandbox import SandboxedEnvironment
from lm_eval import utils
from lm_eval.api.metrics import mean  # noqa: F401 - fills the registry of metrics
from lm_eval.api.registry import metric_registry
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml as load_task_yaml

from qeval.errors import UsageError, first_line, in_a_line, unknown
from qeval.parsing import load_yaml

_SUFFIXES = (".yaml", ".yml")
_OWN = Path(lm_eval.__file__).resolve().parent
CHOICES = "multiple_choice"
_PICKLES = ("pandas", "webdataset", "cache")
"""Loaders of data sets that unpickle what they read."""
_LOAD_ERRORS = (OSError, RuntimeError, ValueError, KeyError, ImportError, TemplateError, DatasetsError)
RESPONSE_TYPES = ("generate_until", "loglikelihood", "loglikelihood_rolling")
"""The harness's types of requests that have no choices."""


class _Code(str):
    """A function that a YAML file names behind `!function`."""


class _Loader(yaml.SafeLoader):
    """A loader of plain values that runs nothing."""


def _read_code(loader: _Loader, node: yaml.ScalarNode) -> _Code:
    return _Code(loader.construct_scalar(node))


_Loader.add_constructor("!function", _read_code)


def is_task_file(name: str) -> bool:
    """Return whether a task is named by its file."""
    return name.endswith(_SUFFIXES)


def title_of_task(name: str) -> str:
    """Return what rows and reports call a task: its name, of a file the name in it.

    Raises:
        UsageError: The file can't be read, runs code, or names no task.
    """
    return _read_task_file(Path(name)) if is_task_file(name) else name


@cache
def task_index() -> TaskManager:
    """Return the harness's index of its own tasks: thousands of files, read once."""
    return TaskManager()


def load_harness_tasks(name: str) -> dict[str, Any]:
    """Return the tasks that a name or a user's YAML file stands for, by their own names, all of choices or none.

    Raises:
        UsageError: It is unknown, its data can't be loaded, or it runs code.
    """
    if is_task_file(name):
        _read_task_file(Path(name))
        _sandbox_templates()
        manager = TaskManager(include_defaults=False)  # a file includes others by their paths
    else:
        manager = task_index()
        if name not in manager.all_tasks:
            raise unknown("task", name, [*manager.all_tasks, "kl", "ppl"])
        for leaf in _leaves(manager, name):
            _refuse_programs(leaf, manager.task_index[leaf].cfg or {})
    try:
        tasks = dict(manager.load([name])["tasks"])
    except ModuleNotFoundError as error:
        raise UsageError(
            f"Task '{name}' needs the package '{error.name}', which is not installed: pip install {error.name}."
        ) from error
    except _LOAD_ERRORS as error:
        raise UsageError(f"The data of task '{name}' can't be loaded: {hub_reason(error)}") from error
    for leaf, task in tasks.items():
        if getattr(task, "MULTIMODAL", False):
            raise UsageError(f"Task '{leaf}' shows pictures or sounds; qeval scores text.")
        if task.OUTPUT_TYPE not in (CHOICES, *RESPONSE_TYPES):
            raise UsageError(f"Task '{leaf}' asks for {task.OUTPUT_TYPE}, which qeval does not score.")
    if len({task.OUTPUT_TYPE == CHOICES for task in tasks.values()}) > 1:
        raise UsageError(f"Task '{name}' holds tasks of choices and others; name those of one kind, one by one.")
    return tasks


def has_choices(tasks: Mapping[str, Any]) -> bool:
    """Return whether tasks are of multiple choice."""
    return all(task.OUTPUT_TYPE == CHOICES for task in tasks.values())


def hub_reason(error: Exception) -> str:
    """Return why the hub gave no data, in a line."""
    line = f"{first_line(error)}."
    return f"{line} Accept its terms there, then log in (`hf auth login`) or set HF_TOKEN." if "gated" in line else line


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Silence the remarks of the harness inside a `with` block; errors still show."""
    loggers = [getLogger(name) for name in ("lm_eval", "lm_eval.api.task", "datasets")]
    levels = [logger.level for logger in loggers]
    datasets.disable_progress_bars()
    try:
        for logger in loggers:
            logger.setLevel(ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _leaves(manager: TaskManager, name: str) -> Iterator[str]:
    """Yield the tasks of the index that a name stands for: its own, a tag's, or a group's, groups in it included."""
    entry = manager.task_index[name]
    children = sorted(entry.tags) if entry.kind.name == "TAG" else []
    if entry.kind.name == "GROUP":
        listed = (entry.cfg or {}).get("task") or []
        each = [listed] if isinstance(listed, str) else listed
        children = [child if isinstance(child, str) else child.get("task") or child.get("group") for child in each]
    if entry.kind.name in ("TASK", "PY_TASK"):
        yield name
    for child in children:
        if child in manager.task_index and child != name:
            yield from _leaves(manager, child)


def _refuse_programs(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a task whose metric runs the programs that a model writes."""
    if config.get("unsafe_code"):
        raise UsageError(
            f"Task '{name}' runs the programs that a model writes, which qeval never does; score it with lm-eval in a "
            "sandbox of yours, and have `qeval import` compare its samples."
        )


def _read_task_file(path: Path) -> str:
    """Return the name of the task in a user's file that runs no code.

    Raises:
        UsageError: It can't be read, runs code, or is no single task.
    """
    seen: set[Path] = set()
    _check_file(path, seen)
    try:
        config = load_task_yaml(path, resolve_func=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"--tasks {path}: {in_a_line(error)}") from error
    name = config.get("task")
    if not isinstance(name, str) or "group" in config:
        raise UsageError(f"--tasks {path}: no single task ('task: NAME'); name the tasks of a group one by one.")
    _refuse_programs(name, config)
    for metric in config.get("metric_list") or []:
        known = isinstance(metric, dict) and metric.get("metric") in metric_registry and not metric.get("hf_evaluate")
        if not known:
            raise UsageError(
                f"--tasks {path}: the metric {metric!r} is none of lm-eval's own, so it would run code of the hub; "
                f"choose one of {', '.join(sorted(metric_registry))}, or score the task with lm-eval and use "
                "`qeval import`."
            )
    return name


def _check_file(path: Path, seen: set[Path]) -> None:
    """Refuse a file, or one that it includes, that names code; the harness's own may name its own."""
    path = path.expanduser().resolve()
    if _OWN in path.parents or path in seen:
        return
    seen.add(path)
    config = load_yaml(path, _Loader)
    if not isinstance(config, dict):
        raise UsageError(f"--tasks {path} holds no task: a mapping with 'task: NAME' is expected.")
    code = next(_code_in(config), None)
    if code is not None or "class" in config:
        raise UsageError(
            f"--tasks {path} runs code ({code or 'a class'}), which qeval takes of lm-eval's own tasks alone; score it "
            "with lm-eval, and have `qeval import` compare its samples."
        )
    if config.get("dataset_path") in _PICKLES:
        raise UsageError(
            f"--tasks {path} reads its data by '{config['dataset_path']}', which may run code that lies in it; keep "
            "them as json, csv or parquet."
        )
    includes = config.get("include") or []
    for include in [includes] if isinstance(includes, str) else includes:
        _check_file(path.parent / str(include), seen)


def _code_in(value: Any) -> Iterator[str]:
    """Yield what a value names behind `!function`, however deep."""
    if isinstance(value, _Code):
        yield f"!function {value}"
    elif isinstance(value, dict):
        for each in value.values():
            yield from _code_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from _code_in(each)


def _sandbox_templates() -> None:
    """Have the harness render templates in Jinja's sandbox from now on: an expression may reach no code."""
    if not isinstance(utils.env, SandboxedEnvironment):
        env = SandboxedEnvironment(loader=utils.env.loader, undefined=utils.env.undefined, keep_trailing_newline=True)
        env.filters.update(utils.env.filters)
        utils.env = env

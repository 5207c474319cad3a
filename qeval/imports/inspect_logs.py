"""Inspect's logs (`.eval`, or `.json`), read by inspect_ai itself: a score an item and epoch, by scorer.

Letter grades count as Inspect's own accuracy counts them: C is 1, P a half, I and N are 0.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qeval.errors import UsageError
from qeval.identity import digest_bytes
from qeval.imports.foreign_rows import Declarations, ForeignRows, TextArray
from qeval.parsing import error_reason
from qeval.tasks.directions import direction_of

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalSample

_FORMAT = "inspect"
_GRADES = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}


def is_inspect_log(path: Path) -> bool:
    """Return whether a file's name is that of a log of Inspect's."""
    return path.suffix in (".eval", ".json")


def read_inspect(path: Path, model: str | None, declarations: Declarations) -> list[ForeignRows]:
    """Return the rows of a log, one part a scorer.

    Args:
        path: The log.
        model: What the model is called; None: as the log calls it.
        declarations: What the user says of it.

    Raises:
        UsageError: inspect_ai isn't installed, the file is no finished log, or a score is no number.
    """
    log = _read(path)
    if log.status != "success" or not log.samples:
        raise UsageError(f"{path} is no finished log of Inspect's (its status is {log.status}); run it to its end.")
    scorers = dict.fromkeys(name for sample in log.samples for name in sample.scores or {})
    if not scorers:
        raise UsageError(f"{path} holds no score.")
    task = declarations.task or log.eval.task.rpartition("/")[2]
    name = model or log.eval.model.replace("/", "__")
    return [_rows(log, log.samples, scorer, (name, task, path), declarations) for scorer in scorers]


def _rows(
    log: "EvalLog", samples: "list[EvalSample]", scorer: str, named: tuple[str, str, Path], declarations: Declarations
) -> ForeignRows:
    model, task, path = named
    values = [
        None if each.scores is None or scorer not in each.scores else each.scores[scorer].value for each in samples
    ]
    graded = all(value is None or isinstance(value, bool | str) for value in values)
    return ForeignRows(
        model=model, file=path, format=_FORMAT, task=task, metric=scorer, filter=None,
        better=direction_of(scorer, "higher" if graded else None, declarations.better, path.name), unit=None,
        subjects=_texts([task] * len(samples)), items=_texts([each.id for each in samples]),
        repeats=_texts([each.epoch for each in samples]),
        scores=np.asarray([_number(value, scorer, path) for value in values], np.float64),
        hashes={
            "prompt_hash": _texts([_sha256(each.input) for each in samples]),
            "target_hash": _texts([_sha256(each.target) for each in samples]),
        },
    )  # fmt: skip


def _number(value: object, scorer: str, path: Path) -> float:
    """Return a score as a number; NaN where the item was not scored, which is counted later."""
    if value is None:
        return float("nan")
    if isinstance(value, str) and value in _GRADES:
        return _GRADES[value]
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: the score {str(value)[:40]!r} of '{scorer}' is no number and no grade.") from error


def _sha256(value: object) -> str:
    """Return the sha256 of an input or a target: a text, or messages without what is new in each run (their ids)."""
    plain = value if isinstance(value, str) else [getattr(each, "content", each) for each in value]  # type: ignore[attr-defined]
    return digest_bytes([repr(plain).encode()])


def _texts(values: Sequence[object]) -> TextArray:
    return np.asarray([str(value) for value in values], np.object_)


def _read(path: Path) -> "EvalLog":
    try:
        from inspect_ai.log import read_eval_log  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UsageError(f"Reading {path.name} takes inspect_ai; pip install 'qeval[inspect]'.") from error
    try:
        return read_eval_log(str(path), resolve_attachments=True)
    except Exception as error:  # its reader raises errors of zip, JSON and pydantic, which have no common base
        raise UsageError(f"{path} can't be read as a log of Inspect's ({error_reason(error)}).") from error

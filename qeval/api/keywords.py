"""A function's keywords as settings, with the texts that it takes where they name none."""

from collections.abc import Mapping
from typing import Any

from qeval.compare.defaults import calibration_choice, corpus_choice, question_choice
from qeval.compare.options import from_keywords, parse_keywords
from qeval.compare.settings import CalibrationChoice, CorpusChoice, Settings
from qeval.compare.task_choice import TaskChoice


def run_settings(values: Mapping[str, Any], *, shipped: bool, **fixed: Any) -> Settings:
    """Return the settings of a run.

    Args:
        values: The function's arguments by name.
        shipped: Whether texts that they do not name are those that are shipped.
        **fixed: Fields of the settings that are known already.

    Raises:
        UsageError: A value is not what the setting may be, or the run could not say anything.
    """
    return from_keywords(
        Settings,
        values,
        corpus=corpus_choice(from_keywords(CorpusChoice, values), shipped=shipped),
        questions=question_choice(from_keywords(TaskChoice, values), shipped=shipped),
        calibration=calibration_of_keywords(values, shipped=shipped),
        **fixed,
    )


def calibration_of_keywords(values: Mapping[str, Any], *, shipped: bool) -> CalibrationChoice:
    """Return what quantizers may see.

    Args:
        values: The function's arguments by name.
        shipped: Whether a text that they do not name is the one that is shipped.

    Raises:
        UsageError: A number is below one.
    """
    return calibration_choice(**parse_keywords(CalibrationChoice, values), shipped=shipped)

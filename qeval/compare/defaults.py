"""Default texts, where a command's flags name none: published ones from the hub, or those that are shipped.

`demo` takes the shipped ones (the Python reference, and a sample of questions) so that it needs no hub, and so does
every model with `--offline`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from qeval.compare.options import Option
from qeval.compare.settings import CalibrationChoice, CorpusChoice
from qeval.compare.task_choice import TaskChoice
from qeval.models.source import resolve

CORPUS, PROTOCOL = "wikitext2", "wikitext2-1024/512"
"""What is scored, and by which protocol where no windows of one's own are asked for."""
QUESTIONS = Path("hub")
CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH = "pile-val", 128, 512
"""AWQ's own calibration text: many kinds of text, and no protocol scores any of it. WikiText-2's train split would be
the kind of text that is scored, and flatter what is calibrated on it."""
_SHIPPED_CALIBRATION, SHIPPED_SAMPLES = "pydoc", 16
"""That half of the Python reference holds too few tokens for 128 samples: 47 thousand of the demo's."""


@dataclass(frozen=True)
class HubChoice:
    """The permission to ask the hub; no part of a run's settings."""

    offline: Annotated[
        bool,
        Option("Ask nothing of the hub: by default the Python reference and the sample of questions, as for demo."),
    ] = False


def takes_shipped_texts(model: str, *, offline: bool) -> bool:
    """Return whether a command on `model` takes the texts that are shipped.

    Raises:
        UsageError: Nothing goes by the model's name.
    """
    return resolve(model).kind == "demo" or offline


def corpus_choice(choice: CorpusChoice, *, shipped: bool) -> CorpusChoice:
    """Return the choice of a corpus, with the default where it names none; WikiText-2 by itself means its protocol."""
    if choice.protocol is not None or choice.corpus not in ((CORPUS,) if shipped else (None, CORPUS)):
        return choice
    own_windows = (choice.window, choice.stride, choice.convention) != (None, None, None)
    return replace(choice, corpus=CORPUS) if own_windows else replace(choice, corpus=None, protocol=PROTOCOL)


def question_choice(choice: TaskChoice, *, shipped: bool) -> TaskChoice:
    """Return the choice of questions, with the default where it names none."""
    if shipped or choice.mmlu_dir is not None:
        return choice
    return replace(choice, mmlu_dir=QUESTIONS)


def calibration_choice(
    source: str | None, samples: int | None, length: int, *, shipped: bool, all_experts: bool = False
) -> CalibrationChoice:
    """Return the choice of a calibration text, with the defaults for what is None."""
    named = source or (_SHIPPED_CALIBRATION if shipped else CALIBRATION)
    default = SHIPPED_SAMPLES if named == _SHIPPED_CALIBRATION else CALIBRATION_SAMPLES
    return CalibrationChoice(named, default if samples is None else samples, length, all_experts)

"""What a run was asked for, as plain values: kept with its record, so that the run can be made again and checked."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qeval.compare.settings import Settings
from qeval.errors import QevalError
from qeval.identity import digest
from qeval.store.run import RunRecord

_SETTINGS = TypeAdapter(Settings)
_CHANGES_NO_ROW = ("command", "out", "threads", "batch_tokens", "workers", "executor", "worker_gpus")
"""What two commands that work on one run may differ in: rows depend on it by rounding at most."""


def settings_json(settings: Settings) -> dict[str, Any]:
    """The settings as plain JSON values, and the folder that paths among them start from."""
    return {"folder": str(Path.cwd()), "settings": _SETTINGS.dump_python(settings, mode="json")}


def settings_of(record: RunRecord) -> tuple[Path, Settings]:
    """The folder that a run was started in, and its settings.

    Raises:
        QevalError: the record holds none (another kind of run, or an older qeval), or settings of another version.
    """
    if record.settings is None:
        raise QevalError(
            "The run's record does not say how to make it again: it is an older qeval's, or that of a gate that may "
            "stop early."
        )
    try:
        return Path(record.settings["folder"]), _SETTINGS.validate_python(record.settings["settings"])
    except (KeyError, ValidationError) as error:
        raise QevalError(f"The run's settings are of another version of qeval ({error}).") from error


def identity_of(settings: Settings) -> str:
    """What all processes that work on one run at once must agree on."""
    asked = _SETTINGS.dump_python(settings, mode="json")
    return digest({name: value for name, value in asked.items() if name not in _CHANGES_NO_ROW})

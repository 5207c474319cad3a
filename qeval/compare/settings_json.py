"""A run's settings as plain values: stored with its record, so that the run can be repeated and checked."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from qeval.compare.chat_choice import ChatChoice
from qeval.compare.endpoint_choice import EndpointChoice
from qeval.compare.generation_choice import TraceChoice
from qeval.compare.needle_choice import NeedleChoice
from qeval.compare.settings import Settings
from qeval.compare.vllm_choice import VllmChoice
from qeval.config import PART_FIELDS
from qeval.errors import QevalError
from qeval.identity import digest
from qeval.store.run import RunRecord

_SETTINGS = TypeAdapter(Settings)
_CHANGES_NO_ROW = ("command", "out", "threads", "batch_tokens", "workers", "executor", "worker_gpus")
"""What two commands that work on one run may differ in: rows depend on it by rounding at most."""
_DEFAULTS: Mapping[str, Any] = {
    "external_parts": "split",
    "kv_types": [],
    "split": False,
    "sampling": None,
    "needle": TypeAdapter(NeedleChoice).dump_python(NeedleChoice(), mode="json"),
    "chat": TypeAdapter(ChatChoice).dump_python(ChatChoice(), mode="json"),
    "traces": TypeAdapter(TraceChoice).dump_python(TraceChoice(), mode="json"),
    "endpoint": TypeAdapter(EndpointChoice).dump_python(EndpointChoice(), mode="json"),
    "vllm": TypeAdapter(VllmChoice).dump_python(VllmChoice(), mode="json"),
}
"""Settings that older runs don't have."""
_DEFAULTS_OF_QUESTIONS = {"apply_chat_template": False, "fewshot_as_multiturn": "true", "system_instruction": None}
"""Those among the settings of tasks."""


def settings_json(settings: Settings) -> dict[str, Any]:
    """Return the settings as plain JSON values, with the folder that paths among them start from."""
    return {"folder": str(Path.cwd()), "settings": _plain(settings)}


def settings_of(record: RunRecord, out: Path | None = None) -> tuple[Path, Settings]:
    """Return the folder that a run was started in, and its settings.

    Args:
        record: The run's record.
        out: Where the run is to be written when it is made again; where it was, without it.

    Raises:
        QevalError: The record holds none (another kind of run, or an older qeval), or settings of another version.
    """
    if record.settings is None:
        raise QevalError(
            "The run's record does not say how to make it again: it is an older qeval's, that of a gate that may stop "
            "early, or that of a model that was in memory."
        )
    try:
        values = dict(record.settings["settings"])
        if out is not None:
            values["out"] = str(out)
        return Path(record.settings["folder"]), _SETTINGS.validate_python(values)
    except (KeyError, TypeError, ValueError) as error:
        raise QevalError(f"The run's settings are of another version of qeval ({error}).") from error


def identity_of(settings: Settings) -> str:
    """Return a digest of everything that processes which work on one run at once must agree on."""
    # Each worker has a GPU and a limit on memory of its own, layers may lie on several, and none of that changes a row.
    device = settings.model.device.partition(":")[0]
    model = replace(settings.model, device=device, max_memory=None, device_map=None)
    values = _plain(replace(settings, model=model))
    return digest({name: value for name, value in values.items() if name not in _CHANGES_NO_ROW})


def _plain(settings: Settings) -> dict[str, Any]:
    """Return settings as plain values, without fields that are not used and older runs don't have."""
    values: dict[str, Any] = _SETTINGS.dump_python(settings, mode="json")
    if values["model"]["device_map"] is None:
        del values["model"]["device_map"]
    for name, default in _DEFAULTS.items():
        if values[name] == default:
            del values[name]
    for name, default in _DEFAULTS_OF_QUESTIONS.items():
        if values["questions"][name] == default:
            del values["questions"][name]
    for recipe in values["recipes"]:
        for part in ("alpha", *PART_FIELDS):
            if recipe[part] is None:
                del recipe[part]
        for part in ("fold_only", "formats"):
            if not recipe[part]:
                del recipe[part]
    return values

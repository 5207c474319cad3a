"""All checks, in the order of the table."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

from qeval.doctor.checks import Diagnosis, DoctorCheck
from qeval.doctor.hub import hub_checks
from qeval.doctor.machine import machine_checks
from qeval.doctor.model import model_checks
from qeval.doctor.packages import package_checks
from qeval.hub import OFFLINE_FLAG, offline


def diagnose(model: str | None = None, revision: str | None = None, *, is_offline: bool = False) -> Diagnosis:
    """Look at the machine, its packages, the hub and, where one is named, at a model.

    Args:
        model: What `compare` takes as --model.
        revision: Of a model on the hub.
        is_offline: Whether the hub is not to be asked.

    Raises:
        UsageError: Nothing goes by the model's name.
    """
    with offline(OFFLINE_FLAG) if is_offline else nullcontext():
        checks = list(_checks(model, revision))
    return Diagnosis(ok=all(check.status != "wrong" for check in checks), checks=checks)


def _checks(model: str | None, revision: str | None) -> Iterator[DoctorCheck]:
    yield from machine_checks()
    yield from package_checks()
    hub = list(hub_checks())
    yield from hub
    if model is not None:
        silent = hub[0].name == "hub" and hub[0].status != "ok"
        # a hub that does not answer is not asked again, for half a minute a file
        quietly: AbstractContextManager[None] = offline(hub[0].value) if silent else nullcontext()
        with quietly:
            yield from model_checks(model, revision)

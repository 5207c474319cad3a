"""The hub, the token, and the caches with the disk that they lie on."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import get_token

from qeval.doctor.checks import DoctorCheck
from qeval.errors import UsageError
from qeval.hub import OFFLINE_FLAG, data_offline_reason, endpoint, hub_home, token_owner, why_silent
from qeval.paths import HOME, home, nearest_existing
from qeval.tasks.hub_data import mmlu_data_set

LEAST_FREE_BYTES = 5 * 10**9
"""A small model and its variants."""


def hub_checks() -> Iterator[DoctorCheck]:
    """Yield whether the hub answers, whether it takes the token, and where what it gives is kept."""
    hub, answers = _hub()
    yield hub
    yield _token(answers=answers)
    yield from _cache("hub's cache", hub_home(), "HF_HOME")
    yield from _cache("qeval's cache", home(), HOME)


def _hub() -> tuple[DoctorCheck, bool]:
    """Return whether the hub answers; a refusal of the token is an answer."""
    try:
        why = why_silent(mmlu_data_set(), "anything")
    except UsageError:
        why = None
    if why is None:
        return DoctorCheck(part="hub", name="hub", value=f"{endpoint()} answers"), True
    if variable := data_offline_reason():
        fix = None if variable == OFFLINE_FLAG else f"unset {variable.split()[0]}"
        return DoctorCheck(part="hub", name="hub", value=f"not asked: {variable}", status="note", fix=fix), False
    fix = "connect, or set HF_ENDPOINT to a mirror; with --offline no hub is needed"
    return DoctorCheck(part="hub", name="hub", value=why, status="wrong", fix=fix), False


def _token(*, answers: bool) -> DoctorCheck:
    if not get_token():
        value = "none, so models whose licence must be accepted (Llama, Gemma) can't be fetched"
        return DoctorCheck(part="hub", name="token", value=value, status="note", fix="hf auth login")
    if not answers:
        return DoctorCheck(part="hub", name="token", value="there is one; whether it is valid only the hub can say")
    name, error = token_owner()
    if error is not None:
        return DoctorCheck(part="hub", name="token", value=error, status="wrong", fix="hf auth login")
    return DoctorCheck(part="hub", name="token", value=f"valid, {name}'s")


def _cache(name: str, folder: Path, variable: str) -> Iterator[DoctorCheck]:
    """Yield where a cache lies, whether it can be written, and the room on its disk."""
    above = nearest_existing(folder)
    move = f"export {variable}=/a/folder/on/a/larger/disk"
    if not above.is_dir() or not os.access(above, os.W_OK):
        value = f"{folder}, which can't be written"
        yield DoctorCheck(part="hub", name=name, value=value, status="wrong", fix=move)
        return
    free = shutil.disk_usage(above).free
    value = f"{folder}, {free / 1e9:.0f} GB free"
    if free < LEAST_FREE_BYTES:
        yield DoctorCheck(part="hub", name=name, value=value, status="wrong", fix=f"make room, or: {move}")
    else:
        yield DoctorCheck(part="hub", name=name, value=value)

"""The hub: asked once, with a short limit, whether it answers; a hub that is silent is not asked again.

Libraries of the hub try a host that isn't there again and again, half a minute for each file. The hub, its token and
its caches are huggingface_hub's own: `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError

from qeval.errors import UsageError, first_line

OFFLINE = "HF_HUB_OFFLINE"
OFFLINE_FLAG = "--offline is given"
"""Why the hub is not asked, where the user says so."""
REFUSED_TOKEN = (
    "The hub does not take your token, so {what} can't be fetched: log in again (`hf auth login`), or correct HF_TOKEN."
)
_TIMEOUT = "HF_HUB_ETAG_TIMEOUT"
"""The variable by which users of slow networks have the hub's client wait longer."""
_SECONDS = float(constants.HF_HUB_ETAG_TIMEOUT) if _TIMEOUT in os.environ else 3.0
"""How long the hub may take to answer; resolving a name counts."""
_TRUE = ("1", "ON", "YES", "TRUE")
_SERVER_ERROR = 500
_T = TypeVar("_T")
_reasons: list[str] = []
"""Why the hub is not asked, of each `offline` block that is open."""


def endpoint() -> str:
    """Return the address of the hub."""
    return str(constants.ENDPOINT)


def hub_home() -> Path:
    """Return the folder of the hub's caches and of its token."""
    return Path(constants.HF_HOME).expanduser()


def offline_reason() -> str | None:
    """Return why the hub is not to be asked at all, or None where it may be."""
    if constants.HF_HUB_OFFLINE:
        return _reasons[-1] if _reasons else f"{OFFLINE} is set"
    return None


def data_offline_reason() -> str | None:
    """Return the same for data sets, which have a variable of their own, `HF_DATASETS_OFFLINE`."""
    if os.environ.get("HF_DATASETS_OFFLINE", "").upper() in _TRUE:
        return offline_reason() or "HF_DATASETS_OFFLINE is set"
    return offline_reason()


def data_sets_cache() -> Path:
    """Return the cache of the `datasets` library, as that library finds it."""
    if (config := sys.modules.get("datasets.config")) is not None:
        return Path(config.HF_DATASETS_CACHE)
    return Path(os.environ.get("HF_DATASETS_CACHE") or hub_home() / "datasets").expanduser()


def why_silent(data_set: str, what: str, seconds: float = _SECONDS) -> str | None:
    """Ask the hub for a data set, once; return why there is no answer, or None where there is one.

    Args:
        data_set: Any id, such as `cais/mmlu`; a hub that does not know it answers too.
        what: What is wanted, for the sentence about a token that is refused.
        seconds: How long to wait.

    Raises:
        UsageError: The hub refuses the token.
    """
    if reason := data_offline_reason():
        return reason
    answer = _within(seconds, lambda: HfApi().dataset_info(data_set, timeout=seconds))
    if isinstance(answer, HfHubHTTPError):
        status = answer.response.status_code
        if status == 401 and get_token():
            raise UsageError(REFUSED_TOKEN.format(what=what))
        return f"{endpoint()} answers with the error {status}" if status >= _SERVER_ERROR else None
    if isinstance(answer, TimeoutError):
        return f"{endpoint()} did not answer within {seconds:g} s ({_TIMEOUT}=30 would wait longer)"
    return f"{endpoint()} can't be reached ({first_line(answer)})" if isinstance(answer, Exception) else None


def token_owner(seconds: float = _SECONDS) -> tuple[str | None, str | None]:
    """Ask the hub whose the user's token is; return the name, and why it is of no use. Neither: there is no token."""
    if not get_token():
        return None, None
    answer = _within(seconds, lambda: str(HfApi().whoami()["name"]))
    if isinstance(answer, HfHubHTTPError) and answer.response.status_code == 401:
        return None, "the hub does not take it"
    if isinstance(answer, Exception):
        return None, f"the hub does not say whose it is ({first_line(answer)})"
    return answer, None


def _within(seconds: float, ask: Callable[[], _T]) -> _T | Exception:
    """Return what is answered, or what went wrong; in a thread, as no client's limit counts resolving a name."""
    answers: SimpleQueue[_T | Exception] = SimpleQueue()

    def put() -> None:
        try:
            answers.put(ask())
        except Exception as error:  # noqa: BLE001 - the clients' own errors share no base class
            answers.put(error)

    Thread(target=put, daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except Empty:
        return TimeoutError(f"no answer within {seconds:g} s")


@contextmanager
def offline(why: str) -> Iterator[None]:
    """Keep every library from asking the hub for the length of a block; child processes too.

    Args:
        why: The reason, as `offline_reason` returns it meanwhile.
    """
    _reasons.append(why)
    environment = os.environ.get(OFFLINE)
    places = [(constants, "HF_HUB_OFFLINE"), *_data_sets_switches()]
    before = [(place, name, getattr(place, name)) for place, name in places]

    os.environ[OFFLINE] = "1"
    for place, name in places:
        setattr(place, name, True)

    try:
        yield
    finally:
        _reasons.pop()
        for place, name, value in before:
            setattr(place, name, value)
        for place, name in _data_sets_switches():  # read from the environment where it was imported meanwhile
            if (place, name) not in places:
                setattr(place, name, constants.HF_HUB_OFFLINE)
        os.environ.pop(OFFLINE)
        if environment is not None:
            os.environ[OFFLINE] = environment


def _data_sets_switches() -> list[tuple[Any, str]]:
    config = sys.modules.get("datasets.config")
    return [] if config is None else [(config, "HF_HUB_OFFLINE"), (config, "HF_DATASETS_OFFLINE")]

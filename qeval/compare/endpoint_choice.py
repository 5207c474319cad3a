"""The endpoints that `--backend` names by their address, and how they are asked."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from qeval.compare.options import Checked, Option
from qeval.errors import UsageError

_SCHEMES = ("http", "https")


@dataclass(frozen=True)
class EndpointChoice(Checked):
    """The served model, the log-probabilities that are asked for, and how."""

    model: Annotated[
        str | None,
        Option(
            "Of --backend http://HOST:PORT: the served model's name, where it serves several.", keyword="endpoint_model"
        ),
    ] = None
    top: Annotated[
        int,
        Option(
            "Of --backend http://HOST:PORT: likeliest tokens to ask for at each position; more tighten the lower bound "
            "of KL (vLLM gives 20 unless served with --max-logprobs).",
            keyword="endpoint_top",
            least=1,
        ),
    ] = 20
    key_variable: Annotated[
        str,
        Option(
            "Of --backend http://HOST:PORT: the environment variable that holds the key, where it wants one.",
            keyword="endpoint_key_variable",
        ),
    ] = "OPENAI_API_KEY"
    timeout: Annotated[
        float,
        Option("Of --backend http://HOST:PORT: seconds that an answer may take.", keyword="endpoint_timeout", least=0),
    ] = 120.0
    requests: Annotated[
        int,
        Option(
            "Of --backend http://HOST:PORT: requests that are under way at once.", keyword="endpoint_requests", least=1
        ),
    ] = 8


def is_address(name: str) -> bool:
    """Return whether a backend's name is an endpoint's address.

    >>> is_address("http://localhost:8000"), is_address("torch")
    (True, False)
    """
    return "://" in name


def endpoint_url(name: str) -> str:
    """Return an endpoint's address as requests begin with it: without `/v1`, which they add.

    >>> endpoint_url("http://localhost:8000/v1/")
    'http://localhost:8000'

    Raises:
        UsageError: It is no address over HTTP, or holds a key or a password.
    """
    parts = urlsplit(name)
    if parts.username or parts.password or parts.query:
        raise UsageError(
            "An endpoint's address holds no user, password or key: it is written into records. Give the key in an "
            "environment variable, which --endpoint-key-variable names."
        )
    if parts.scheme not in _SCHEMES or not parts.hostname:
        raise UsageError(f"--backend {name} is no address of an endpoint; it is http://HOST:PORT or https://HOST.")
    return name.rstrip("/").removesuffix("/v1").rstrip("/")


def endpoint_urls(names: Iterable[str]) -> tuple[str, ...]:
    """Return the addresses among backends' names.

    Raises:
        UsageError: As `endpoint_url`.
    """
    return tuple(endpoint_url(name) for name in names if is_address(name))


def check_endpoint_run(names: Iterable[str], flags: Iterable[tuple[str, bool]], choice: EndpointChoice) -> None:
    """Refuse what a run with endpoints can't do, and how they are asked where there is none.

    Args:
        names: The backends' names.
        flags: What needs a session, and whether the run has it.
        choice: How endpoints are asked.

    Raises:
        UsageError: It names the flag.
    """
    if not endpoint_urls(names):
        if choice != EndpointChoice():
            raise UsageError("--endpoint-... flags are for --backend http://HOST:PORT; add it, or leave them out.")
        return
    for flag in (flag for flag, is_given in flags if is_given):
        raise UsageError(
            f"{flag} needs a model that qeval opens, and an endpoint is asked from outside; leave one out."
        )
    if not choice.key_variable.isidentifier():
        raise UsageError("--endpoint-key-variable takes the name of an environment variable, not a key.")
    if choice.timeout <= 0:
        raise UsageError(f"--endpoint-timeout must be above 0, not {choice.timeout:g}.")
    if choice.key_variable != EndpointChoice().key_variable and not os.environ.get(choice.key_variable):
        raise UsageError("The environment variable that --endpoint-key-variable names is not set.")

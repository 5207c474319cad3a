"""HTTP to a serving endpoint: JSON in and out, tried again where that helps, every failure one sentence.

The key comes from an environment variable and goes into one header of the requests. No error, record or log holds it.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2

from qeval.errors import QevalError, UsageError
from qeval.escape import cut_text

_Input = TypeVar("_Input")
_Answer = TypeVar("_Answer")

_TRIES = 5
_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 30.0
_BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
"""Answers that another try may not get again."""
_NO_KEY = (401, 403)


class RefusedError(QevalError):
    """A request that the endpoint takes in no such form: another form may do."""


@dataclass(frozen=True)
class Access:
    """The address of an endpoint, and how it is asked.

    Attributes:
        url: As it was typed, without what follows the host but for a path before `/v1`.
        key_variable: The environment variable that holds the key, where the endpoint wants one.
        timeout_seconds: How long one answer may take.
        requests: How many requests are under way at once.
    """

    url: str
    key_variable: str
    timeout_seconds: float
    requests: int

    @property
    def flag(self) -> str:
        """The opening of errors: `--backend http://host:8000`."""
        return f"--backend {self.url}"


class Client:
    """An open connection to an endpoint."""

    def __init__(self, access: Access, http: httpx2.Client, sleep: Callable[[float], None] = time.sleep) -> None:
        """`sleep` waits between tries."""
        self.access, self._http, self._sleep = access, http, sleep

    def get(self, path: str) -> Any:
        """Return what a path answers, as `post`."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the JSON that the endpoint answers a request with.

        Raises:
            UsageError: It wants a key, or another.
            RefusedError: It takes no such request.
            QevalError: It did not answer, with so many tries, or not in JSON.
        """
        return self._ask("POST", path, body)

    def each(self, do: Callable[[_Input], _Answer], inputs: Sequence[_Input]) -> Iterator[_Answer]:
        """Yield what `do` returns for each input, in their order; as many as `Access.requests` run at once."""
        with ThreadPoolExecutor(self.access.requests) as threads:
            futures = [threads.submit(do, each) for each in inputs]
            try:
                for future in futures:
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        url = f"{self.access.url.rstrip('/')}{path}"
        reason = ""
        for attempt in range(_TRIES):
            if attempt:
                self._sleep(min(_FIRST_WAIT_SECONDS * 2 ** (attempt - 1), _LONGEST_WAIT_SECONDS))
            try:
                response = self._http.request(method, url, json=body)
            except httpx2.TimeoutException:
                reason = f"no answer within {self.access.timeout_seconds:g} s"
                continue
            except httpx2.TransportError as error:
                reason = str(error) or type(error).__name__
                continue
            if response.status_code in _BUSY:
                reason = f"it answered {response.status_code}, {self._said(response)}"
                self._wait_as_told(response)
                continue
            return self._content(response, path)
        raise QevalError(f"{self.access.flag} failed {_TRIES} times at {path}: {reason}.")

    def _content(self, response: httpx2.Response, path: str) -> Any:
        status = response.status_code
        if status in _NO_KEY:
            variable = self.access.key_variable
            has_key = "refuses the key in" if os.environ.get(variable) else "wants a key; set"
            raise UsageError(
                f"{self.access.flag} {has_key} the environment variable {variable} (it answered {status})."
            )
        if status != 200:
            raise RefusedError(f"{self.access.flag} answered {status} at {path}: {self._said(response)}.")
        try:
            return response.json()
        except ValueError as error:
            raise QevalError(f"{self.access.flag} did not answer in JSON at {path}.") from error

    def _wait_as_told(self, response: httpx2.Response) -> None:
        """Wait for as long as the endpoint says, where it says it in seconds."""
        told = response.headers.get("retry-after", "")
        if told.isdigit():
            self._sleep(min(float(told), _LONGEST_WAIT_SECONDS))

    def _said(self, response: httpx2.Response) -> str:
        """Return the message of an answer that is an error, cut short; without the key, should it repeat that."""
        try:
            content = response.json()
            error = content.get("error", content) if isinstance(content, dict) else content
            message = str(error.get("message", error) if isinstance(error, dict) else error)
        except ValueError:
            message = response.text
        if key := os.environ.get(self.access.key_variable):
            message = message.replace(key, "***")
        return cut_text(" ".join(message.split()).rstrip("."), 200) or "without a word"


@contextmanager
def connect_endpoint(access: Access) -> Iterator[Client]:
    """Open a connection for the length of the block."""
    key = os.environ.get(access.key_variable, "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx2.Limits(max_connections=access.requests)
    with httpx2.Client(headers=headers, timeout=access.timeout_seconds, limits=limits) as http:
        yield Client(access, http)

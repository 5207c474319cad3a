"""The backend `endpoint`: a model that a server runs, asked for the log-probabilities of given tokens over HTTP.

It is not opened: the server has one model open already, whatever it is. So it scores that model and no variant.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from qeval.backends.base import Target
from qeval.backends.endpoint.client import Access, Client, RefusedError, connect_endpoint
from qeval.backends.endpoint.predictions import Query, Reader, find_reader
from qeval.backends.endpoint.token_texts import TokenTexts
from qeval.errors import QevalError, UsageError, unknown
from qeval.progress import Advance, Progress
from qeval.types import Prediction, Request, TokenIds

ENDPOINT = "endpoint"
"""The name that rows carry."""
_PROBED = 32
"""Tokens whose log-probabilities tell one served model from another behind the same address."""
_DIGITS = 2
"""Digits that they are rounded to: servers repeat themselves to about 0.001 nats."""


@dataclass(frozen=True, eq=False)
class Endpoint:
    """An endpoint that was found to answer: what it serves, and the form of request that it takes.

    Attributes:
        access: Its address.
        query: What every request asks for, the served model's name among it.
        reader: The form of request.
        facts: What it says of the model, in records: who owns it, its context.
        probe: Log-probabilities of a few tokens, which tell another model behind the same address.
    """

    access: Access
    query: Query
    reader: Reader
    facts: Mapping[str, str]
    probe: Sequence[float] = ()
    name = ENDPOINT
    fake_quantizes = False
    warnings: Sequence[str] = field(default=(), init=False)

    @property
    def label(self) -> str:
        """The served model's name without the folders that it lies in."""
        return self.query.model.rstrip("/").rpartition("/")[2]

    def identity(self, target: Target) -> dict[str, Any]:
        """Return what tells the served model and the way it is asked."""
        asked = {"url": self.access.url, "model": self.query.model, "top": self.query.top, "form": self.reader.name}
        return {"endpoint": {**asked, "probe": list(self.probe)}}

    def prepare(self, progress: Progress) -> None:
        """Do nothing: the server runs already."""

    def open(self, target: Target) -> NoReturn:
        """Refuse: what a server runs is not chosen here.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"{self.access.flag} runs its own model alone; variants need another --backend beside it.")

    def describe(self, session: object, target: Target) -> None:
        """Return None: the record's details say how it is asked."""

    def next_predictions(self, prompts: Sequence[TokenIds]) -> list[Prediction]:
        """Return the likeliest next tokens after each prompt, in order; empty where only `predictions` tells of them.

        Raises:
            QevalError: The endpoint failed, or refused a prompt.
        """
        if (read := self.reader.read_next) is None:
            return [{} for _ in prompts]
        with connect_endpoint(self.access) as client:
            return [*client.each(partial(read, client, self.query), prompts)]

    def predictions(
        self, requests: Sequence[Request], advance: Advance, *, top: int | None = None
    ) -> list[list[Prediction]]:
        """Return the predictions after each position of each request, in order; several requests run at once.

        Args:
            requests: Token ids and positions.
            advance: Hears of the tokens that are done.
            top: How many of the likeliest tokens are wanted, where not as many as the query says.

        Raises:
            QevalError: The endpoint failed, or refused a request, which may be longer than its context.
        """
        found = []
        query = self.query if top is None else self.query._replace(top=top)
        with connect_endpoint(self.access) as client:
            read = partial(self.reader.read, client, query)
            for request, each in zip(requests, client.each(read, requests), strict=True):
                found.append(each)
                advance(len(request.tokens))
        return found


def find_endpoint(access: Access, model: str | None, top: int, texts: TokenTexts, tokens: TokenIds) -> Endpoint:
    """Ask an endpoint what it serves, and find how it gives log-probabilities.

    Args:
        access: Its address.
        model: The served model's name; None where it serves one alone.
        top: How many of the likeliest tokens to ask for.
        texts: The baseline's tokens.
        tokens: Token ids of the run to try it on.

    Raises:
        UsageError: It does not serve the model, gives no log-probabilities, or has other tokens.
        QevalError: It does not answer.
    """
    with connect_endpoint(access) as client:
        served = _served(client, model)
        query = Query(str(served["id"]), top, texts)
        reader = find_reader(client, query, tokens)
        probed = tokens[: _PROBED + 1]
        request = Request(probed, tuple(range(len(probed) - 1)))
        predictions = reader.read(client, query, request)
    probe = [round(each[token], _DIGITS) for each, token in zip(predictions, probed[1:], strict=True)]
    facts = {"served by": str(served.get("owned_by") or "unknown"), "log-probabilities by": reader.name}
    return Endpoint(access, query, reader, facts, probe)


def _served(client: Client, model: str | None) -> Mapping[str, Any]:
    """Return what the endpoint tells of the model that is asked for."""
    try:
        answer = client.get("/v1/models")
        models = {str(each["id"]): each for each in answer["data"]}
    except (RefusedError, KeyError, TypeError) as error:
        raise UsageError(f"{client.access.flag} lists no models at /v1/models, so it is no OpenAI endpoint.") from error
    if not models:
        raise QevalError(f"{client.access.flag} serves no model.")
    if model is None and len(models) > 1:
        raise UsageError(f"{client.access.flag} serves {', '.join(models)}; choose one by --endpoint-model.")
    if model is not None and model not in models:
        raise unknown(f"model of {client.access.flag}", model, models)
    return models[model] if model is not None else next(iter(models.values()))

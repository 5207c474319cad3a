"""The log-probabilities that an endpoint reports after given tokens, in every server's own words.

Four forms of request are known, tried in this order on a few tokens until one answers. The first three take token ids
and give token ids back, so that nothing is tokenized twice:

- `prompt_logprobs` at `/v1/completions`: vLLM, TensorRT-LLM;
- `input_ids` at `/generate`: SGLang;
- `n_probs` at `/completion`: llama-server, a request for each position, since it tells of the next token alone;
- `echo` with `logprobs` at `/v1/completions`: others. Texts come back, matched to ids by the baseline's tokenizer; the
  texts of all tokens must be those that were sent. Where ids are refused, text is sent.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from qeval.backends.endpoint.client import Client, RefusedError
from qeval.backends.endpoint.token_texts import TOKEN_ID, TokenTexts
from qeval.errors import QevalError, UsageError
from qeval.types import Prediction, Request, TokenIds

_FEW = 2
_FEWEST = 5
"""Likeliest tokens that are asked for where one that follows is sought among them."""
_FACTOR = 16
"""The factor by which the number of likeliest tokens grows where the one that follows is not among them."""


class Query(NamedTuple):
    """The rest of what a form needs: the served model's name, the likeliest tokens to report, the tokenizer."""

    model: str
    top: int
    texts: TokenTexts


ReadForm = Callable[[Client, Query, Request], list[Prediction]]
ReadNext = Callable[[Client, Query, TokenIds], Prediction]


@dataclass(frozen=True)
class Reader:
    """The form of request that an endpoint answers: its name in records, and what reads predictions by it.

    `read_next` reads the likeliest next tokens after a prompt alone, where the form has that for less: the server keeps
    what prompts have in common, and sends one distribution.
    """

    name: str
    read: ReadForm
    read_next: ReadNext | None = None


def find_reader(client: Client, query: Query, tokens: TokenIds) -> Reader:
    """Return the form that the endpoint answers, tried on a few tokens.

    Raises:
        UsageError: It gives no log-probabilities of given tokens, or its tokens are not the baseline's.
    """
    request = Request(tokens[: _FEW + 1], tuple(range(min(_FEW, len(tokens) - 1))))
    refusals = []
    for reader in READERS:
        try:
            found = reader.read(client, query, request)
        except _OtherFormError:
            continue
        except RefusedError as error:
            refusals.append(str(error))
            continue
        if all(found):
            return reader
    said = f" ({refusals[0].removeprefix(client.access.flag).strip().rstrip('.')})" if refusals else ""
    raise UsageError(
        f"{client.access.flag} gives no log-probabilities of given tokens{said}: neither by prompt_logprobs or echo at "
        "/v1/completions, nor by /generate (SGLang) or /completion (llama-server). Serve the model by one of vLLM, "
        "SGLang, TensorRT-LLM, llama-server, with as many as --endpoint-top asks for, or measure files by --variant."
    )


class _OtherFormError(Exception):
    """An answer without what the form asked for: the endpoint knows another."""


def _by_prompt_logprobs(client: Client, query: Query, request: Request) -> list[Prediction]:
    """Read predictions of vLLM's `prompt_logprobs`: an entry for each token of the prompt, null for the first."""
    prompt = _with_next(request)
    body = {**_generating(query, prompt), "prompt_logprobs": query.top, "add_special_tokens": False}
    choice = _choice(client.post("/v1/completions", body))
    entries = choice.get("prompt_logprobs")
    if not isinstance(entries, list):
        raise _OtherFormError
    _check_count(client, len(entries), len(prompt))
    return [_by_id(client, entries[place + 1], prompt[place + 1]) for place in request.positions]


def _next_by_completions(client: Client, query: Query, prompt: TokenIds) -> Prediction:
    """Read the next token's likeliest of vLLM; empty where it does not write tokens as ids."""
    body = {**_generating(query, list(prompt)), "logprobs": query.top, "return_tokens_as_token_ids": True}
    choice = _choice(client.post("/v1/completions", {**body, "add_special_tokens": False}))
    top = ((choice.get("logprobs") or {}).get("top_logprobs") or [None])[0] or {}
    return query.texts.by_id(top, len(top)) if all(text.startswith(TOKEN_ID) for text in top) else {}


def _by_input_ids(client: Client, query: Query, request: Request) -> list[Prediction]:
    """Read predictions of SGLang's own route: entries (log-probability, id, text) from the first position on."""
    prompt, first = _with_next(request), request.positions[0]
    sampling = {"max_new_tokens": 1, "temperature": 0}
    asked = {"return_logprob": True, "logprob_start_len": first, "top_logprobs_num": query.top}
    answer = client.post("/generate", {"input_ids": prompt, "sampling_params": sampling, **asked})
    meta = answer.get("meta_info", {}) if isinstance(answer, dict) else {}
    own, top = meta.get("input_token_logprobs"), meta.get("input_top_logprobs")
    if not own or not top:
        raise _OtherFormError
    _check_count(client, len(own), len(prompt) - first)
    found = []
    for place in request.positions:
        entries = [own[place + 1 - first], *(top[place + 1 - first] or ())]
        found.append(_by_id(client, {entry[1]: {"logprob": entry[0]} for entry in entries}, prompt[place + 1]))
    return found


def _by_next_token(client: Client, query: Query, request: Request) -> list[Prediction]:
    """Read predictions of llama-server, which tells of the next token alone and keeps the prompt between requests."""
    found = []
    for place in request.positions:
        prompt, top = list(request.tokens[: place + 1]), max(query.top, _FEWEST)
        follows = request.tokens[place + 1] if place + 1 < len(request.tokens) else None
        while True:
            prediction = _next_token(client, prompt, top)
            if follows is None or follows in prediction:
                break
            if len(prediction) < top or top >= query.texts.size:
                raise QevalError(f"{client.access.flag} gives no log-probability of token {follows}.")
            top = min(top * _FACTOR, query.texts.size)
        found.append(prediction)
    return found


def _next_token(client: Client, prompt: list[int], top: int) -> Prediction:
    body = {"prompt": prompt, "n_predict": 1, "n_probs": top, "cache_prompt": True, "temperature": 0}
    answer = client.post("/completion", body)
    entries = answer.get("completion_probabilities") if isinstance(answer, dict) else None
    if not entries or "top_logprobs" not in entries[0]:
        raise _OtherFormError
    return {int(entry["id"]): float(entry["logprob"]) for entry in entries[0]["top_logprobs"]}


def _by_echo(client: Client, query: Query, request: Request) -> list[Prediction]:
    """Read predictions of OpenAI's `echo`, whose tokens are texts."""
    prompt = _with_next(request)
    body = {**_generating(query, prompt), "echo": True, "logprobs": query.top}
    try:
        choice = _choice(client.post("/v1/completions", body))
    except RefusedError:
        text = query.texts.as_text(client.access.flag, prompt)
        choice = _choice(client.post("/v1/completions", {**body, "prompt": text}))
    logprobs = choice.get("logprobs") or {}
    texts, own, top = (logprobs.get(name) for name in ("tokens", "token_logprobs", "top_logprobs"))
    if not texts or not own or not top or len(texts) < len(prompt):
        raise _OtherFormError
    query.texts.check(client.access.flag, texts[: len(prompt)], prompt)
    found: list[Prediction] = []
    for place in request.positions:
        prediction, value = query.texts.by_id(top[place + 1] or {}, query.top), float(own[place + 1])
        others = {token: each for token, each in prediction.items() if token >= 0 or each != value}
        found.append({**others, prompt[place + 1]: value})
    return found


READERS = (
    Reader("prompt_logprobs", _by_prompt_logprobs, _next_by_completions),
    Reader("generate", _by_input_ids),
    Reader("completion", _by_next_token),
    Reader("echo", _by_echo),
)


def _generating(query: Query, prompt: list[int]) -> dict[str, Any]:
    return {"model": query.model, "prompt": prompt, "max_tokens": 1, "temperature": 0}


def _with_next(request: Request) -> list[int]:
    """Return the tokens, and one more where the last is a position: servers tell of tokens that follow one."""
    is_last = request.positions[-1] == len(request.tokens) - 1
    return [*request.tokens, *(request.tokens[-1:] if is_last else ())]


def _choice(answer: Any) -> Mapping[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not choices or not isinstance(choices[0], dict):
        raise _OtherFormError
    first: Mapping[str, Any] = choices[0]
    return first


def _by_id(client: Client, entry: Mapping[Any, Any] | None, follows: int) -> Prediction:
    """Return an entry by id; the token that follows must be in it, else the endpoint read other tokens."""
    prediction = {int(token): float(value["logprob"]) for token, value in (entry or {}).items()}
    if follows not in prediction:
        raise UsageError(
            f"{client.access.flag} read other tokens than it was sent: token {follows} is not where it was put. Its "
            "model has another tokenizer or vocabulary than the baseline."
        )
    return prediction


def _check_count(client: Client, count: int, sent: int) -> None:
    if count != sent:
        raise UsageError(
            f"{client.access.flag} tells of {count} tokens where {sent} were sent: it adds or cuts some, so its "
            "log-probabilities are not of the baseline's tokens. Serve the model with a context that holds a whole "
            "window, and let the server add no tokens."
        )

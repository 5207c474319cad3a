"""Models behind endpoints as models of a run: what they are on record, and their jobs."""

from collections.abc import Sequence
from dataclasses import dataclass

from qeval.backends.endpoint.backend import ENDPOINT, Endpoint, find_endpoint
from qeval.backends.endpoint.client import Access
from qeval.backends.endpoint.token_texts import TokenTexts
from qeval.compare.endpoint_choice import endpoint_urls
from qeval.compare.record import failed_record
from qeval.compare.settings import Settings
from qeval.errors import UsageError
from qeval.models.info import LoadedModel
from qeval.score.corpus import Shard
from qeval.store.run import VariantRecord
from qeval.tasks.harness import Suite
from qeval.types import TokenIds


@dataclass(frozen=True, eq=False)
class ServedVariant:
    """A model behind an endpoint: nothing is known of its weights, and it is scored as it is served."""

    name: str
    endpoint: Endpoint
    method = "served"
    target = None

    def record(self, name: str, backend: str, seconds: float) -> VariantRecord:
        """Return what a run says of it, scored in so many seconds."""
        asked = {
            "served model": self.endpoint.label,
            "likeliest tokens asked for": str(self.endpoint.query.top),
            "KL": "a lower bound, from these tokens",
        }
        return failed_record(name, self.method, backend, "").model_copy(
            update={
                "status": "done", "error": None, "grid": "unknown", "granularity": "unknown", "symmetric": None,
                "bits_per_weight": None, "bits_per_weight_model": None, "size_bytes": None, "quantized_weights": None,
                "quantized_parameters": None, "score_seconds": seconds, "details": {**self.endpoint.facts, **asked},
            }
        )  # fmt: skip


def find_endpoints(
    settings: Settings, loaded: LoadedModel, vocabulary: int, shards: Sequence[Shard], suites: Sequence[Suite]
) -> tuple[ServedVariant, ...]:
    """Ask every endpoint of a run what it serves and how it gives log-probabilities, before any long work.

    Args:
        settings: The run's.
        loaded: The baseline.
        vocabulary: The number of ids that the baseline has logits of.
        shards: The windows of the run.
        suites: The questions of the run.

    Raises:
        UsageError, QevalError: An endpoint does not answer, serves no such model, or gives no log-probabilities.
    """
    urls = endpoint_urls(settings.backends.names)
    if not urls:
        return ()
    choice, texts = settings.endpoint, TokenTexts(loaded.tokenizer, vocabulary)
    tokens = _first_tokens(shards, suites)
    found: dict[str, Endpoint] = {}
    for url in urls:
        access = Access(url, choice.key_variable, choice.timeout, choice.requests)
        endpoint = find_endpoint(access, choice.model, choice.top, texts, tokens)
        name = f"{endpoint.label}@{ENDPOINT}"
        found[f"{name}-{len(found) + 1}" if name in found else name] = endpoint
    taken = {recipe.name for recipe in settings.every_recipe} | {name for name, _ in settings.variants}
    if twice := taken & found.keys():
        raise UsageError(f"'{min(twice)}' is the name of a model behind an endpoint; rename the variant.")
    return tuple(ServedVariant(name, endpoint) for name, endpoint in found.items())


def _first_tokens(shards: Sequence[Shard], suites: Sequence[Suite]) -> TokenIds:
    """Return the token ids of the first window, or question, of a run."""
    if shards:
        return tuple(shards[0].windows[0].tokens)
    context, rest = suites[0].parts()[0][0].pairs[0]
    return (*context, *rest)

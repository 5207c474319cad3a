"""The direction of the metrics that are widely used; of any other it must be said."""

from typing import Literal

from qeval.errors import UsageError

Direction = Literal["higher", "lower"]

NATS = {"perplexity": "item", "word_perplexity": "word", "byte_perplexity": "byte", "bits_per_byte": "byte"}
"""Metrics that are perplexities of all items together; an item's row is its negative log-likelihood a word or byte."""

_HIGHER = (
    "acc", "acc_norm", "acc_mutual_info", "exact_match", "quasi_exact_match", "em", "f1", "pass@1", "pass_at_1",
    "accuracy", "rouge1", "rouge2", "rougeL", "prompt_level_strict_acc", "prompt_level_loose_acc", "match", "includes",
)  # fmt: skip
_LOWER = ("brier_score", "nll", "loss", "wer", "cer", "ter", *NATS)
DIRECTIONS: dict[str, Direction] = {**dict.fromkeys(_HIGHER, "higher"), **dict.fromkeys(_LOWER, "lower")}


def direction_of(metric: str, file_says: Direction | None, choice: Direction | None, where: str) -> Direction:
    """Return which way a metric is better: as the file says, as everybody knows, else as the user says.

    Args:
        metric: Its name in the file.
        file_says: What the file's own record says.
        choice: What the user says of metrics whose direction is not known.
        where: The file, for the error.

    Raises:
        UsageError: Nothing says so.
    """
    better = file_says or DIRECTIONS.get(metric) or choice
    if better is None:
        raise UsageError(
            f"Whether more of '{metric}' in {where} is better isn't known; say --higher-is-better or --lower-is-better."
        )
    return better

"""Names of scores: a task's metric under a filter, as rows and policies have it, and as a reader does."""

_PLAIN = ("acc", "score")
"""Metrics that a score is not named after, so that policies say TASK_acc_drop."""
_NO_FILTER = (None, "none")


def score_name(task: str, metric: str, filter_name: str | None) -> str:
    """Return the score's name in rows and policies.

    >>> score_name("gsm8k", "exact_match", "strict-match"), score_name("lambada", "acc", "none")
    ('gsm8k_exact_match_strict_match', 'lambada')
    """
    parts = [task, *_told_apart_by(metric, filter_name)]
    return "_".join("".join(c if c.isalnum() else "_" for c in part) for part in parts)


def score_title(task: str, metric: str, filter_name: str | None) -> str:
    """Return the score in words.

    >>> score_title("gsm8k", "exact_match", "strict-match")
    'gsm8k, exact_match, strict-match'
    """
    return ", ".join([task, *_told_apart_by(metric, filter_name)])


def _told_apart_by(metric: str, filter_name: str | None) -> list[str]:
    """Return the metric and the filter, where they say more than that an answer is right."""
    return ([] if metric in _PLAIN else [metric]) + ([filter_name] if filter_name not in _NO_FILTER else [])

"""Score rows of tasks without choices, from generated answers or log-likelihoods."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from qeval.score.choices import Score, count_pair_tokens
from qeval.score.generate import GeneratedAnswer
from qeval.store.rows import concat
from qeval.store.run import ResponseRecord, ScoreRecord
from qeval.store.schema import constant_column
from qeval.tasks.directions import NATS
from qeval.tasks.responses import ROLLING, Response, ResponseItem, ResponseSuite

RESPONSES_VERSION = 1
"""Part of every key: raise it when a response or its score changes its meaning."""
_ONLY_REPEAT = "0"


def response_tokens(items: Sequence[ResponseItem]) -> int:
    """Return the tokens that are run for some items, before prefixes are shared; generated ones don't count."""
    prompts = {(item.prompt, item.ending) for item in items if item.ending}
    scored = [pair for item in items if not item.ending for pair in item.pairs]
    return sum(len(prompt) for prompt, _ in prompts) + count_pair_tokens(scored)


def summed_responses(suite: ResponseSuite, items: Sequence[ResponseItem], scores: Sequence[Score]) -> list[Response]:
    """Return each item's response: the log-likelihood of all its windows, or that of its continuation and greediness.

    Args:
        suite: The task.
        items: Some of its items.
        scores: Those of the items' pairs, one after the other.
    """
    left = iter(scores)
    responses: list[Response] = []
    for item in items:
        own = [next(left) for _ in item.pairs]
        is_whole_text = suite.tasks[item.subject].OUTPUT_TYPE == ROLLING
        responses.append(sum(loglikelihood for loglikelihood, _ in own) if is_whole_text else own[0])
    return responses


def response_columns(
    suite: ResponseSuite,
    items: Sequence[ResponseItem],
    responses: Sequence[Response | GeneratedAnswer],
    variant: str,
    backend: str,
) -> dict[str, Any]:
    """Return the score rows of some items of a task: one a metric and filter of each."""
    rows: list[dict[str, Any]] = []
    for item, response in zip(items, responses, strict=True):
        said, plain = (response, response.text) if isinstance(response, GeneratedAnswer) else (None, response)
        for score, value, answer in suite.judge(item, plain):
            rows.append(
                {
                    "task": score.name,
                    "subject": item.subject,
                    "item": str(item.item),
                    "repeat": _ONLY_REPEAT,
                    "score": value if np.isfinite(value) else None,
                    "prompt_sha256": item.sha256,
                    "answer": answer,
                    "response": said.text if said else None,
                    "response_tokens": said.tokens if said else None,
                    "is_cut": said.is_cut if said else None,
                }
            )
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    names = {"variant": constant_column(variant, len(rows)), "backend": constant_column(backend, len(rows))}
    return names | columns


def score_records(suites: Sequence[ResponseSuite], shards: Sequence[Path]) -> list[ScoreRecord]:
    """Return the records of all scores, whose unit the rows of all models decide: shares lie between 0 and 1."""
    if not suites:
        return []
    rows = concat("scores", shards, ["task", "score"])
    names, values = (np.asarray(rows[column].to_pylist(), object) for column in ("task", "score"))
    values = np.asarray([np.nan if value is None else value for value in values], np.float64)
    records = []
    for suite in suites:
        for score in suite.scores:
            own = values[(names == score.name) & np.isfinite(values)]
            is_share = len(own) and bool(((own >= 0) & (own <= 1)).all())
            items = [item for item in suite.items if item.subject in score.lengths]
            records.append(
                ScoreRecord(
                    name=score.name,
                    title=score.title,
                    better=score.better,
                    unit="nats" if score.metric in NATS else "fraction" if is_share else "score",
                    subjects=list(score.lengths),
                    items=len(items),
                    harness=suite.info.harness,
                    task=ResponseRecord(**asdict(suite.info)),
                )
            )
    return records

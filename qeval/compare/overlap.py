"""The calibration text against all that a run scores: its windows and its questions."""

from collections.abc import Sequence

from qeval.score.corpus import Shard
from qeval.store.run import OverlapRecord
from qeval.tasks.harness import Suite
from qeval.tasks.overlap import NGRAM, find_overlap

_Ids = tuple[int, ...]


def overlap_of(samples: Sequence[_Ids], shards: Sequence[Shard], suites: Sequence[Suite]) -> OverlapRecord:
    """What the calibration samples share with a run's windows and questions (the first choice's prompt of each)."""
    scored: list[tuple[str, _Ids]] = [
        (f"window {number}", window.tokens)
        for shard in shards
        for number, window in enumerate(shard.windows, shard.first)
    ]
    for suite in suites:
        scored += [
            (f"question {q.item} of {suite.info.name} {q.subject}", sum(q.pairs[0], ())) for q in suite.questions
        ]
    found = find_overlap(samples, [ids for _, ids in scored])
    where = None if found.first is None else scored[found.first][0]
    return OverlapRecord(ngram=NGRAM, shared_tokens=found.shared_tokens, tokens=found.tokens, where=where)

"""The calibration text against all that a run scores: its windows and its questions."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from qeval.compare.variants import VariantEntry
from qeval.score.corpus import Shard
from qeval.store.run import OverlapRecord
from qeval.store.variants import MANIFEST, read_manifest
from qeval.tasks.contamination import NGRAM, Fingerprint, Overlap, find_overlap
from qeval.tasks.harness import Suite

_Ids = tuple[int, ...]
_Find = Callable[[Sequence[_Ids]], Overlap]


def overlap_of(samples: Sequence[_Ids], shards: Sequence[Shard], suites: Sequence[Suite]) -> OverlapRecord:
    """Return what the calibration samples share with windows and questions (the first choice's prompt of each)."""
    return _record(partial(find_overlap, samples), NGRAM, shards, suites)


def with_overlap(entry: VariantEntry, shards: Sequence[Shard], suites: Sequence[Suite]) -> VariantEntry:
    """Add to a variant made before what its calibration text shares with the run's, where its manifest tells that.

    Raises:
        BrokenRecordError: its manifest's fingerprint is torn.
    """
    manifest = None if entry.folder is None else read_manifest(entry.folder)
    data = (manifest.calibration or {}).get("fingerprint") if manifest else None
    if data is None:
        return entry
    fingerprint = Fingerprint.read(data, f"{entry.folder}/{MANIFEST}")
    return replace(entry, overlap=_record(fingerprint.overlap, fingerprint.ngram, shards, suites))


def _record(find: _Find, ngram: int, shards: Sequence[Shard], suites: Sequence[Suite]) -> OverlapRecord:
    scored: list[tuple[str, _Ids]] = [
        (f"window {number}", window.tokens)
        for shard in shards
        for number, window in enumerate(shard.windows, shard.first)
    ]
    for suite in suites:
        scored += [
            (f"question {q.item} of {suite.info.name} {q.subject}", sum(q.pairs[0], ())) for q in suite.questions
        ]
    overlap = find([ids for _, ids in scored])
    where = None if overlap.first is None else scored[overlap.first][0]
    return OverlapRecord(ngram=ngram, shared_tokens=overlap.shared_tokens, tokens=overlap.tokens, where=where)

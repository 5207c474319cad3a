"""The calibration text against all that a run scores: its windows and its questions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from qeval.compare.variants import VariantEntry
from qeval.score.corpus import Shard
from qeval.store.run import OverlapRecord
from qeval.store.variants import MANIFEST, read_manifest
from qeval.tasks.contamination import NGRAM, Fingerprint, Overlap, find_overlap
from qeval.tasks.harness import Suite
from qeval.tasks.responses import ResponseSuite

_Ids = tuple[int, ...]
_Find = Callable[[Sequence[_Ids]], Overlap]


@dataclass(frozen=True, eq=False)
class ScoredTexts:
    """All that a run scores: windows, questions, and items of tasks without choices."""

    shards: Sequence[Shard]
    suites: Sequence[Suite]
    responses: Sequence[ResponseSuite] = ()

    def named(self) -> list[tuple[str, _Ids]]:
        """Return the ids of each text with its name; of a question those of its first choice."""
        texts: list[tuple[str, _Ids]] = [
            (f"window {number}", window.tokens)
            for shard in self.shards
            for number, window in enumerate(shard.windows, shard.first)
        ]
        for suite in self.suites:
            texts += [
                (f"question {q.item} of {suite.info.name} {q.subject}", sum(q.pairs[0], ())) for q in suite.questions
            ]
        for each in self.responses:
            texts += [(f"item {i.item} of {each.info.name} {i.subject}", sum(i.pairs[0], ())) for i in each.items]
        return texts


def overlap_of(samples: Sequence[_Ids], scored: ScoredTexts) -> OverlapRecord:
    """Return what the calibration samples share with what is scored."""
    return _record(partial(find_overlap, samples), NGRAM, scored)


def with_overlap(entry: VariantEntry, scored: ScoredTexts) -> VariantEntry:
    """Add to a variant made before what its calibration text shares with the run's, where its manifest tells that.

    Raises:
        BrokenRecordError: its manifest's fingerprint is torn.
    """
    manifest = None if entry.folder is None else read_manifest(entry.folder)
    data = (manifest.calibration or {}).get("fingerprint") if manifest else None
    if data is None:
        return entry
    fingerprint = Fingerprint.read(data, f"{entry.folder}/{MANIFEST}")
    return replace(entry, overlap=_record(fingerprint.overlap, fingerprint.ngram, scored))


def _record(find: _Find, ngram: int, scored: ScoredTexts) -> OverlapRecord:
    texts = scored.named()
    overlap = find([ids for _, ids in texts])
    where = None if overlap.first is None else texts[overlap.first][0]
    return OverlapRecord(ngram=ngram, shared_tokens=overlap.shared_tokens, tokens=overlap.tokens, where=where)

"""What the calibration text and the scored text have in common: runs of 32 tokens that stand in both.

A quantizer that saw what it is scored on is flattered by it (Llama-3-8B under GPTQ at one width, WikiText-2: perplexity
6.62 calibrated on WikiText, 17.5 on C4; AutoGPTQ issue 650), so a shared run voids the comparison. Runs are found by a
hash of each, and each find is compared token by token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

NGRAM = 32
"""Tokens of a run: longer than what two texts on one subject share by chance, shorter than a sentence or two."""

_BASE = np.uint64(0x9E3779B97F4A7C15)
_AT_ONCE = 1 << 20
"""Tokens that are hashed at a time."""

_Hashes = NDArray[np.uint64]
_Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Overlap:
    """How many of `tokens` scored tokens lie in shared runs, and the first sequence that has one; None where none."""

    shared_tokens: int
    tokens: int
    first: int | None


def find_overlap(calibration: Sequence[Sequence[int]], scored: Sequence[Sequence[int]], ngram: int = NGRAM) -> Overlap:
    """The tokens of `scored` sequences that lie in a run of `ngram` tokens which a calibration sequence holds too.

    >>> find_overlap([[1, 2, 3, 4]], [[9, 2, 3, 9], [8, 8]], ngram=2)
    Overlap(shared_tokens=2, tokens=6, first=0)
    """
    known = _Known(calibration, ngram)
    shared, total, first = 0, 0, None
    for number, ids in enumerate(scored):
        found = known.covered(np.asarray(ids, np.int64))
        total += len(ids)
        shared += found
        first = number if found and first is None else first
    return Overlap(shared, total, first)


class _Known:
    """The runs of the calibration text, to be looked up."""

    def __init__(self, sequences: Sequence[Sequence[int]], ngram: int) -> None:
        self._ngram = ngram
        parts = [np.asarray(ids, np.int64) for ids in sequences if len(ids) >= ngram]
        runs = [np.lib.stride_tricks.sliding_window_view(part, ngram) for part in parts]
        self._runs: list[_Ids] = runs
        hashes = np.concatenate([np.empty(0, np.uint64), *(_hashes(part, ngram) for part in parts)])
        places = [(i, j) for i, part in enumerate(runs) for j in range(len(part))]
        order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[order]
        self._places = np.array(places, np.int64).reshape(-1, 2)[order]

    def covered(self, ids: _Ids) -> int:
        """How many of the tokens lie in a known run."""
        mask = np.zeros(len(ids), np.bool_)
        for start in range(0, max(len(ids) - self._ngram + 1, 0), _AT_ONCE):
            part = ids[start : start + _AT_ONCE + self._ngram - 1]
            for at in self._found(part):
                mask[start + at : start + at + self._ngram] = True
        return int(mask.sum())

    def _found(self, ids: _Ids) -> list[int]:
        """Where known runs begin."""
        if not len(self._hashes):
            return []
        hashes = _hashes(ids, self._ngram)
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        likely = np.flatnonzero(self._hashes[places] == hashes)
        return [int(at) for at in likely if self._is_run(places[at], ids[at : at + self._ngram])]

    def _is_run(self, place: int, run: _Ids) -> bool:
        """Whether one of the calibration text's runs with the hash at `place` is this one."""
        alike = islice(self._places, int(place), None)
        for (part, at), found in zip(alike, self._hashes[place:], strict=False):
            if found != self._hashes[place]:
                return False
            if np.array_equal(self._runs[part][at], run):
                return True
        return False


def _hashes(ids: _Ids, ngram: int) -> _Hashes:
    """A polynomial hash of every run of `ngram` tokens, [len(ids) - ngram + 1], modulo 2^64."""
    count = max(len(ids) - ngram + 1, 0)
    values = ids.astype(np.uint64) + np.uint64(1)
    found = np.zeros(count, np.uint64)
    for offset in range(ngram):
        found = found * _BASE + values[offset : offset + count]
    return found

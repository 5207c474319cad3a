"""Find what the calibration text and the scored text share: runs of 32 tokens that stand in both.

A quantizer that saw what it is scored on is flattered by it (Llama-3-8B under GPTQ at one width, WikiText-2: perplexity
6.62 calibrated on WikiText, 17.5 on C4; AutoGPTQ issue 650), so a shared run voids the comparison. Runs are found by a
hash of each, and each find is compared token by token. Of a calibration text that is not at hand a fingerprint can be:
hashes of some of its runs, which say nothing else of the text.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qeval.errors import BrokenRecordError

NGRAM = 32
"""Tokens of a run: longer than what two texts on one subject share by chance, shorter than a sentence or two."""

_BASE = np.uint64(0x9E3779B97F4A7C15)
_STRIDE, _MOST_HASHES = 16, 1 << 16
"""A fingerprint has the runs that begin at every 16th token, of very long texts at fewer; at most half a MiB of hashes.

So a shared run of 47 tokens is found for certain; two texts' runs have one hash by chance once in 2^64 pairs.
"""
_AT_ONCE = 1 << 20
"""Tokens that are hashed at a time."""

_Hashes = NDArray[np.uint64]
_Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Overlap:
    """The number of the `tokens` scored tokens in shared runs, and the first sequence that has one; None where none."""

    shared_tokens: int
    tokens: int
    first: int | None


def find_overlap(calibration: Sequence[Sequence[int]], scored: Sequence[Sequence[int]], ngram: int = NGRAM) -> Overlap:
    """Count the scored tokens that lie in a run of tokens which a calibration sequence holds too.

    Args:
        calibration: Token ids of each calibration sequence.
        scored: Token ids of each scored sequence.
        ngram: Tokens of a run.

    >>> find_overlap([[1, 2, 3, 4]], [[9, 2, 3, 9], [8, 8]], ngram=2)
    Overlap(shared_tokens=2, tokens=6, first=0)
    """
    return _overlap(_TextRuns(calibration, ngram), scored)


class Fingerprint(BaseModel):
    """Hashes of the runs of `ngram` tokens at every `stride`-th token of each sequence: little-endian, in base64."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    ngram: int = Field(ge=1)
    stride: int = Field(ge=1)
    hashes: str

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], ngram: int = NGRAM) -> "Fingerprint":
        """Return the fingerprint of a calibration text's sequences of token ids."""
        stride = max(_STRIDE, -(-sum(map(len, sequences)) // _MOST_HASHES))
        hashes = [_hashes(np.asarray(ids, np.int64), ngram)[::stride] for ids in sequences]
        distinct = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))
        return cls(ngram=ngram, stride=stride, hashes=base64.b64encode(distinct.astype("<u8").tobytes()).decode())

    @classmethod
    def read(cls, data: Mapping[str, Any], where: str) -> "Fingerprint":
        """Read a stored fingerprint; `where` is what an error names.

        Raises:
            BrokenRecordError: It is torn or of another version.
        """
        try:
            fingerprint = cls.model_validate(data)
            fingerprint.values()
        except (ValidationError, binascii.Error, ValueError) as error:
            raise BrokenRecordError(f"{where} holds a fingerprint that is torn or of another version.") from error
        return fingerprint

    def values(self) -> _Hashes:
        """Return the hashes, ascending."""
        return np.frombuffer(base64.b64decode(self.hashes, validate=True), "<u8").astype(np.uint64)

    def overlap(self, scored: Sequence[Sequence[int]]) -> Overlap:
        """Count as `find_overlap`, by the runs in the fingerprint: at least so many tokens are shared."""
        return _overlap(_Runs(self.values(), self.ngram), scored)


def _overlap(runs: "_Runs", scored: Sequence[Sequence[int]]) -> Overlap:
    shared, total, first = 0, 0, None
    for number, ids in enumerate(scored):
        covered = runs.covered(np.asarray(ids, np.int64))
        total += len(ids)
        shared += covered
        first = number if covered and first is None else first
    return Overlap(shared, total, first)


class _Runs:
    """Runs of a text by their hashes, ascending, to be looked up."""

    def __init__(self, hashes: _Hashes, ngram: int) -> None:
        self._hashes, self._ngram = hashes, ngram

    def covered(self, ids: _Ids) -> int:
        """Return how many of the tokens lie in a known run."""
        mask = np.zeros(len(ids), np.bool_)
        for start in range(0, max(len(ids) - self._ngram + 1, 0), _AT_ONCE):
            part = ids[start : start + _AT_ONCE + self._ngram - 1]
            for at in self._starts(part):
                mask[start + at : start + at + self._ngram] = True
        return int(mask.sum())

    def _starts(self, ids: _Ids) -> list[int]:
        """Return where known runs begin."""
        if not len(self._hashes):
            return []
        hashes = _hashes(ids, self._ngram)
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        likely = np.flatnonzero(self._hashes[places] == hashes)
        return [int(at) for at in likely if self._is_run(places[at], ids[at : at + self._ngram])]

    def _is_run(self, place: int, run: _Ids) -> bool:
        """Return whether a run whose hash stands at `place` is one of the text's: there is but the hash to tell."""
        del place, run
        return True


class _TextRuns(_Runs):
    """All runs of a text that is at hand."""

    def __init__(self, sequences: Sequence[Sequence[int]], ngram: int) -> None:
        parts = [np.asarray(ids, np.int64) for ids in sequences if len(ids) >= ngram]
        runs = [np.lib.stride_tricks.sliding_window_view(part, ngram) for part in parts]
        self._runs: list[_Ids] = runs
        hashes = np.concatenate([np.empty(0, np.uint64), *(_hashes(part, ngram) for part in parts)])
        places = [(i, j) for i, part in enumerate(runs) for j in range(len(part))]
        order = np.argsort(hashes, kind="stable")
        super().__init__(hashes[order], ngram)
        self._places = np.array(places, np.int64).reshape(-1, 2)[order]

    def _is_run(self, place: int, run: _Ids) -> bool:
        """Return whether one of the calibration text's runs with the hash at `place` is this one."""
        alike = islice(self._places, int(place), None)
        for (part, at), value in zip(alike, self._hashes[place:], strict=False):
            if value != self._hashes[place]:
                return False
            if np.array_equal(self._runs[part][at], run):
                return True
        return False


def _hashes(ids: _Ids, ngram: int) -> _Hashes:
    """Return a polynomial hash of every run of `ngram` tokens, [len(ids) - ngram + 1], modulo 2^64."""
    count = max(len(ids) - ngram + 1, 0)
    values = ids.astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(count, np.uint64)
    for offset in range(ngram):
        hashes = hashes * _BASE + values[offset : offset + count]
    return hashes

"""Score needles in haystacks: the log-probability and the rank of each forced answer, a haystack read once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qeval.backends.base import Session
from qeval.identity import digest
from qeval.progress import Advance
from qeval.score.choices import count_pair_tokens, pair_calls, rank_pairs
from qeval.score.jobs import ScoringJob
from qeval.store.schema import constant_column
from qeval.tasks.needle import Haystack
from qeval.types import Call

NEEDLE_VERSION = 1
"""Part of every key: raise it when what a row of a needle says changes."""


@dataclass(frozen=True, eq=False)
class NeedleJob(ScoringJob):
    """Rows of one haystack, one a needle."""

    kind = "needle"
    haystack: Haystack

    @property
    def units(self) -> int:
        """The tokens of the distinct sequences."""
        return count_pair_tokens(self.haystack.pairs)

    def identity(self) -> dict[str, Any]:
        """Return the token ids, and how they are scored."""
        haystack = self.haystack
        told = {"length": haystack.length, "number": haystack.number, "depths": haystack.depths}
        return {"needle": NEEDLE_VERSION, **told, "pairs": haystack.pairs}

    def require_baseline(self) -> None:
        """Do nothing: answers are compared when they are reported."""

    def calls(self, session: Session) -> list[Call]:
        """Return the haystack's sequences in batches, what they share first."""
        return pair_calls(self.haystack.pairs, self.work.batch_tokens, packs=session.packs)

    def run(self, advance: Advance) -> Path:
        """Score the answer at every depth."""
        haystack, rows = self.haystack, len(self.haystack.pairs)
        scores = rank_pairs(self.model.session(), haystack.pairs, self.work.batch_tokens, advance)
        columns = {
            "variant": constant_column(self.model.name, rows),
            "backend": constant_column(self.model.backend_name, rows),
            "length": np.full(rows, haystack.length, np.int32),
            "haystack": np.full(rows, haystack.number, np.int32),
            "depth": list(haystack.depths),
            "log_p": [score.log_p for score in scores],
            "rank": [score.rank for score in scores],
            "answer_tokens": [len(answer) for _, answer in haystack.pairs],
            "prompt_tokens": [len(prompt) for prompt, _ in haystack.pairs],
            "prompt_sha256": [digest({"pair": pair})[:32] for pair in haystack.pairs],
        }
        return self.work.rows.write(self.kind, self.id.key, columns)

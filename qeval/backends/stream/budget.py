"""Divide the memory that a streamed model may take."""

from dataclasses import dataclass

from qeval.errors import UsageError

_STATE_BYTES = 4
_RESERVE = 6
"""One part in so many is left for what is not counted: rows, records, the allocator's own."""


@dataclass(frozen=True)
class Budget:
    """`total` bytes for weights, activations and logits, beyond what the program itself takes.

    While layers run: one layer's parameters and the next one's bytes, a batch's activations, and the hidden states of
    every token of the pass. While logits are made: states, a part of the head, and a block of logits.
    """

    total: int
    layer: int
    resident: int
    width: int
    token_activations: int
    state_bytes: int = 0
    """Bytes of a job's final states: the baseline's are there while layers run, a variant's too while logits are."""
    handed_bytes: int = 0
    """Bytes a token that layers hand on, where that is more than states in fp32."""

    @property
    def head(self) -> int:
        """Bytes of the head's matrix that may be in memory at a time."""
        return self._without_layers // 3

    @property
    def logits(self) -> int:
        """Bytes of all arrays that are as large as a block of logits."""
        return self._without_layers // 3

    @property
    def batch_tokens(self) -> int:
        """Tokens whose activations take a third of what a layer leaves."""
        return max(1, self._spare // 3 // self.token_activations)

    def pass_tokens(self, batch_tokens: int) -> int:
        """Return the tokens, padding included, whose hidden states and results fit beside a layer and a batch."""
        spare = self._spare - batch_tokens * self.token_activations
        results = self.width * _STATE_BYTES
        return max(0, spare // (results + max(results, self.handed_bytes)))

    @property
    def _without_layers(self) -> int:
        return self.total - self.total // _RESERVE - self.resident - 2 * self.state_bytes

    @property
    def _spare(self) -> int:
        return self.total - self.total // _RESERVE - self.resident - self.state_bytes - self.layer

    def left_for_states(self, working: int) -> int:
        """Return the bytes left beside a layer and what working on it takes; below 0 where that does not fit."""
        return self.total - self.total // _RESERVE - self.resident - self.layer - working

    def least_for(self, working: int) -> int:
        """Return the smallest total that leaves room for working on a layer."""
        return (self.resident + self.layer + working) * _RESERVE // (_RESERVE - 1) + _RESERVE

    def check(self) -> None:
        """Refuse a limit that one layer and a few tokens do not fit in.

        Raises:
            UsageError: it names the least that would do.
        """
        least = self.resident + self.state_bytes + max(self.state_bytes, self.layer) + 64 * self.token_activations
        least = least * _RESERVE // (_RESERVE - 1)
        if self.total < least:
            raise UsageError(
                f"--max-memory {self.total / 2**20:.0f}MiB is less than one decoder layer and a few tokens take; "
                f"give at least {least * 4 // 3 / 2**20 + 1:.0f}MiB."
            )

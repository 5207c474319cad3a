"""What every backend offers: a `Session`, a model that answers token ids with final states.

A *state* is what is kept of a scored position: the final hidden state before the head, [d_model], where the
backend can give it (then `logits` is the head's matrix product), or the logits themselves, [vocab] (then
`logits` returns them as they are).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from qeval.quant.variant import Variant
from qeval.types import Call, Request


class Prefix(Protocol):
    """The keys and values of a token prefix, computed once; opaque but for its length in tokens."""

    @property
    def length(self) -> int:
        """How many tokens the prefix holds."""
        ...


class Session(Protocol):
    """A model that answers. Results depend neither on how requests are batched nor on whether a prefix is shared
    (within 1e-4 nats in fp32); a sequence longer than `max_length` and a forward that fails raise."""

    @property
    def max_length(self) -> int:
        """The longest sequence, prefix included, that the model takes."""
        ...

    @property
    def vocab_size(self) -> int:
        """The width of a row of logits."""
        ...

    @property
    def packs(self) -> bool:
        """Whether the requests of a batch may be of any lengths, none being filled up to the longest."""
        ...

    @property
    def block_rows(self) -> int:
        """The positions whose logits are made at a time: what is fast on the device, and bounds memory."""
        ...

    def prefill(self, tokens: Sequence[int], outer: Prefix | None = None) -> Prefix:
        """Run a prefix once and keep its keys and values for any number of `states` calls.

        With `outer`, the tokens continue that prefix, whose keys and values are not computed again.
        """
        ...

    def states(self, requests: Sequence[Request], prefix: Prefix | None = None) -> list[Tensor]:
        """The final states at each request's positions, [positions, width] fp32 each, in the requests' order.

        With `prefix`, every request continues it: `tokens` then hold only what follows the prefix, and
        positions count from the first token after it. The requests of one call are run as one batch.
        """
        ...

    def logits(self, states: Tensor) -> Tensor:
        """The fp32 logits [n, vocab] of states [n, width]; soft caps and logit scales applied."""
        ...


@runtime_checkable
class LooksAhead(Protocol):
    """A session that runs more at a time when it is told what it will be asked for."""

    def expect(self, calls: Sequence[Call]) -> None:
        """The calls to come, in their order. Others may come, and some of these may not."""
        ...


class Backend(Protocol):
    """Where variants run. One weight set is held; a variant is installed for the length of a `with` block."""

    @property
    def name(self) -> str:
        """The name that rows carry: `torch`."""
        ...

    def open(self, variant: Variant | None) -> AbstractContextManager[Session]:
        """A session of `variant`, or of the baseline; the baseline is restored bit for bit when the block ends."""
        ...

    def open_saved(self, folder: Path) -> AbstractContextManager[Session]:
        """A session of the variant that lies in `folder`."""
        ...

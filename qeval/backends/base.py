"""The Protocols of backends: a `Backend` opens models as `Session`s, which answer token ids with final states.

A *state* is what is kept of a scored position: the final hidden state before the head, [d_model], where the
backend can give it (then `logits` is the head's matrix product), or the logits themselves, [vocab] (then
`logits` returns them as they are).
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from qeval.backends.decoding import Decoding
from qeval.errors import QevalError
from qeval.progress import Progress
from qeval.quant.scheme import Scheme, scheme_of
from qeval.quant.variant import Variant
from qeval.store.run import RuntimeRecord
from qeval.store.variants import load_variant, read_manifest
from qeval.types import Call, Request, TokenIds


class Prefix(Protocol):
    """The keys and values of a token prefix, computed once; opaque but for its length in tokens."""

    @property
    def length(self) -> int:
        """The prefix's length in tokens."""
        ...


@runtime_checkable
class Session(Protocol):
    """A model that answers token ids.

    Results depend neither on how requests are batched nor on whether a prefix is shared (within 1e-4 nats in fp32).
    A sequence longer than `max_length` and a forward that fails raise.
    """

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
        """Return whether the requests of a batch may be of any lengths, none being filled up to the longest."""
        ...

    @property
    def block_rows(self) -> int:
        """The positions whose logits are made at a time: what is fast on the device, and bounds memory."""
        ...

    def halve_blocks(self) -> bool:
        """Make half as many positions' logits at a time from now on; False where it can't (`SessionDefaults`)."""
        ...

    def prefill(self, tokens: Sequence[int], outer: Prefix | None = None) -> Prefix:
        """Run a prefix once and keep its keys and values for any number of `states` calls.

        With `outer`, the tokens continue that prefix, whose keys and values are not computed again.
        """
        ...

    def states(self, requests: Sequence[Request], prefix: Prefix | None = None) -> list[Tensor]:
        """Return the final states at each request's positions, [positions, width] fp32 each, in the requests' order.

        With `prefix`, every request continues it: `tokens` then hold only what follows the prefix, and
        positions count from the first token after it. The requests of one call are run as one batch.
        """
        ...

    def logits(self, states: Tensor) -> Tensor:
        """Return the fp32 logits [n, vocab] of states [n, width]; soft caps and logit scales applied."""
        ...

    def expect(self, calls: Iterable[Call]) -> None:
        """Note the calls to come, in their order. Others may come, and some of these may not.

        A session that gains nothing by running calls together looks at none of them (`SessionDefaults`), so that a lazy
        iterable costs nothing there.
        """
        ...

    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> Tensor:
        """Return the `count` tokens [prompts, count] that prompts go on with, the likeliest each.

        Raises:
            QevalError: The session scores and doesn't generate (`SessionDefaults`).
        """
        ...

    def generate(
        self,
        prompts: Sequence[TokenIds],
        count: int,
        decoding: Decoding,
        stops: Collection[int],
        is_done: Callable[[Sequence[int]], bool] | None = None,
    ) -> list[TokenIds]:
        """Return what each prompt goes on with: up to `count` tokens, the first of `stops` among them the last.

        `is_done` ends a continuation too, by all of its tokens so far.

        Raises:
            QevalError: As `greedy`.
        """
        ...


class SessionDefaults:
    """A session's methods where it runs each call when it comes, and scores without generating."""

    def halve_blocks(self) -> bool:
        """Return False: the size of a block is the backend's."""
        return False

    def expect(self, calls: Iterable[Call]) -> None:
        """Do nothing: each call is run when it comes."""

    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> Tensor:
        """Refuse to generate.

        Raises:
            QevalError: Always.
        """
        raise QevalError("This backend can't generate the baseline's continuations; leave drift out of --tasks.")

    def generate(
        self,
        prompts: Sequence[TokenIds],
        count: int,
        decoding: Decoding,
        stops: Collection[int],
        is_done: Callable[[Sequence[int]], bool] | None = None,
    ) -> list[TokenIds]:
        """Refuse to generate.

        Raises:
            QevalError: Always.
        """
        raise QevalError(
            "This backend scores and can't generate answers; leave chat out of --corpus, and tasks that generate out "
            "of --tasks."
        )


@dataclass(frozen=True)
class Saved:
    """A model on disk: a variant's folder, or an ONNX folder that another tool made.

    `gguf` is the GGUF file that the variant was read from, where it was, and `checkpoint` the folder of a checkpoint.
    `scheme` is what is rounded beside its weights where that is not what the variant itself says.
    """

    folder: Path
    gguf: Path | None = None
    scheme: Scheme | None = None
    checkpoint: Path | None = None

    @property
    def effective_scheme(self) -> Scheme:
        """The scheme that is run: the variant's own unless another stands in its place."""
        return scheme_of(read_manifest(self.folder).scheme) if self.scheme is None else self.scheme

    def variant(self, place: Callable[[str], torch.device] | None = None) -> Variant:
        """Read the variant; `place` says on which device the codes of each weight are unpacked."""
        variant = load_variant(self.folder, place)
        return variant if self.scheme is None else replace(variant.weights_alone, scheme=self.scheme)


Target = Variant | Saved | None
"""What a backend opens: a variant in memory, a model on disk, or the baseline (None)."""

S = TypeVar("S", bound=Session)


class Backend(Protocol[S]):
    """A runner of models of one kind. Every backend of a run satisfies it; `compare/backends.py` holds their table."""

    @property
    def name(self) -> str:
        """The name that rows carry: `torch`, `ort`, `ort-acc4`, `llama.cpp`."""
        ...

    @property
    def fake_quantizes(self) -> bool:
        """Return whether dequantized weights are multiplied in floating point, and no kernel for quantized ones."""
        ...

    @property
    def warnings(self) -> Sequence[str]:
        """Sentences on what must be known of its numbers before a run."""
        ...

    def identity(self, target: Target) -> dict[str, Any]:
        """Return what of a prepared backend changes a target's numbers, as entries of the key of its rows."""
        ...

    def prepare(self, progress: Progress) -> str | None:
        """Do once what all models on this backend need; return why it can't be done, if it can't."""
        ...

    def open(self, target: Target) -> AbstractContextManager[S]:
        """Open a model for the length of a `with` block; afterwards everything is as it was before.

        Raises:
            QevalError, UsageError: The backend can't open the target, or not while another model is open.
        """
        ...

    def describe(self, session: S, target: Target) -> RuntimeRecord | None:
        """Return how an open target is run; None where the run's own record says all of it (torch)."""
        ...


class HasLogits(Protocol):
    """A head: the last step from final states to logits."""

    def logits(self, states: Tensor) -> Tensor:
        """Return the fp32 logits [n, vocab] of states [n, d_model]."""
        ...


class BaselineBackend(Backend[S], Protocol[S]):
    """A backend that runs the baseline itself, from the checkpoint's weights: torch, in memory or streamed."""

    @property
    def batch_tokens(self) -> int:
        """Tokens a batch that suit the device and its free memory."""
        ...

    @property
    def shares_prefixes(self) -> bool:
        """Return whether what questions have in common is run once; else each is run whole."""
        ...

    @property
    def memory_limit(self) -> int | None:
        """Bytes that weights, activations and logits may take; None where the whole model is in memory."""
        ...

    def head_for(self, target: Target) -> HasLogits:
        """Return the head that a target's stored states go through."""
        ...

    def reserve(self, positions: int, schemes: Sequence[Scheme] = ()) -> None:
        """Count the final states of a job of so many positions among what memory holds, and schemes' roundings.

        Raises:
            UsageError: Too little is left.
        """
        ...

    def change_weights(self, change: Callable[[str, Tensor], None]) -> None:
        """Change the baseline's weights in place and for good: `change` is called with each one's name and tensor."""
        ...

"""Scoring on ONNX Runtime: token ids in, final states out, through the file's own kernels.

Padding is on the right only: a causal graph can't see it there, while GroupQueryAttention gives wrong answers to
padding on the left without a word. Log-softmax and everything after it is the caller's, in fp32, outside the graph.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qeval.backends.base import Prefix, SessionDefaults
from qeval.backends.onnx.decoder import COUNT, HIDDEN, LOGITS, SCORED, STATES, Decoder
from qeval.backends.onnx.packages import first_line_of, runtime_errors
from qeval.backends.onnx.values import DeviceValues, Feeds
from qeval.errors import QevalError
from qeval.metrics.tokens import block_rows
from qeval.types import Request

GraphSharing = Literal["batch", "one", "none"]
"""How a graph continues a prefix: several rows at once, one at a time, or not at all (it is run again then)."""

_CLOSE = 1e-2
"""Share of the largest state: beyond it a continuation is not a rounding but another answer."""
_PREFIX, _REST = (1, 2, 3), (4, 5)


@dataclass(frozen=True, eq=False)
class OrtPrefix:
    """The keys and values of the prefix `tokens`, on the device, by input name; `owner` is its session's."""

    owner: object
    tokens: tuple[int, ...]
    values: Feeds
    spread: dict[int, Feeds] = field(default_factory=dict)
    """The same for a batch of several rows, of the size last asked for."""

    @property
    def length(self) -> int:
        """The prefix's length in tokens."""
        return len(self.tokens)


class OrtSession(SessionDefaults):
    """A decoder's body and head as two ONNX Runtime sessions; states are final hidden states, fp32."""

    def __init__(
        self,
        decoder: Decoder,
        body: Any,
        head: Any,
        values: DeviceValues,
        max_length: int,
        *,
        rope_limit: float = math.inf,
    ) -> None:
        """`body` and `head` are open sessions of the decoder's two graphs; `values` makes what they are fed with.

        A sequence longer than `rope_limit` is turned by other rotary frequencies from its first token on (LongRoPE).
        """
        self._decoder, self._body, self._head, self._values = decoder, body, head, values
        self._max_length, self._rope_limit, self._width = max_length, rope_limit, decoder.vocab_size
        self._owner = object()
        self.packs = False
        self.sharing: GraphSharing = "none"
        """How prefixes are shared; `find_sharing` tries what the graph can do."""
        self.nodes: Mapping[str, int] = {}
        """Nodes by execution provider."""
        self.facts: Sequence[str] = ()
        """What the folder holds, in sentences."""
        self._empty = {
            past.name: values.from_array(np.zeros((1, past.heads, 0, past.head_size), past.dtype))
            for past in decoder.pasts
        }

    @property
    def max_length(self) -> int:
        """The context length that the folder's configuration states."""
        return self._max_length

    @property
    def vocab_size(self) -> int:
        """The width of a row of logits."""
        return self._width

    def leave_out_padding(self, ids: int) -> None:
        """Give logits of the first `ids` tokens alone: those beyond are padding."""
        self._width = ids

    def find_sharing(self) -> None:
        """Try a short continuation against the whole: attention kernels differ in what they take, and in silence."""
        request = Request(_REST, tuple(range(len(_REST))))
        whole = self._batch([Request(_PREFIX + _REST, (len(_PREFIX), len(_PREFIX) + 1))], None)[0]
        if not torch.isfinite(whole).all():
            return  # nothing can be compared, and whoever scores it says so
        tried: tuple[tuple[GraphSharing, int], ...] = (("batch", 2), ("one", 1)) if self._decoder.pasts else ()
        for sharing, rows in tried:
            try:
                found = self._batch([request] * rows, self._filled(_PREFIX))
            except QevalError:
                continue  # this kernel refuses it, which is the answer
            if all(torch.allclose(each, whole, rtol=0, atol=_CLOSE * float(whole.abs().max())) for each in found):
                self.sharing = sharing
                return

    @property
    def block_rows(self) -> int:
        """The positions whose logits are made at a time."""
        return block_rows(self.vocab_size)

    def prefill(self, tokens: Sequence[int], outer: Prefix | None = None) -> OrtPrefix:
        """Run a prefix once and keep its keys and values; where the graph can't continue one, only its tokens.

        Raises:
            QevalError: it is longer than the context, or the forward failed.
        """
        before = self._cast_prefix(outer)
        whole = (*(before.tokens if before else ()), *tokens)
        if self.sharing == "none":
            return OrtPrefix(self._owner, whole, {})
        if before and before.length <= self._rope_limit < len(whole):
            return self._filled(whole)  # the outer one's keys were turned otherwise
        return self._filled(tokens, before)

    def _filled(self, tokens: Sequence[int], before: OrtPrefix | None = None) -> OrtPrefix:
        names = [past.present for past in self._decoder.pasts]
        found = self._forward([tokens], [0], before, [COUNT, *names])[1:]
        whole = (*(before.tokens if before else ()), *tokens)
        return OrtPrefix(self._owner, whole, dict(zip(self._empty, found, strict=True)))

    def _cast_prefix(self, prefix: Prefix | None) -> OrtPrefix | None:
        if prefix is not None and (not isinstance(prefix, OrtPrefix) or prefix.owner is not self._owner):
            raise TypeError("A prefix belongs to the session that made it.")
        return prefix

    def states(self, requests: Sequence[Request], prefix: Prefix | None = None) -> list[Tensor]:
        """Return the final hidden states at each request's positions, [positions, d_model] fp32.

        Raises:
            QevalError: a sequence is longer than the context, the forward failed, or gave fewer positions than asked.
        """
        kept = self._cast_prefix(prefix)
        skip = kept.length if kept else 0
        found: dict[int, Tensor] = {}
        for is_long in (False, True):
            part = [i for i, r in enumerate(requests) if (skip + len(r.tokens) > self._rope_limit) == is_long]
            if part:
                found.update(zip(part, self._one_side([requests[i] for i in part], kept), strict=True))
        return [found[index] for index in range(len(requests))]

    def logits(self, states: Tensor) -> Tensor:
        """Return the fp32 logits [n, vocab] of states [n, d_model]."""
        if not len(states):
            return torch.empty(0, self.vocab_size)
        rows = states.float().contiguous().unsqueeze(0)
        (found,) = self._run(self._head, [LOGITS], {HIDDEN: self._values.from_tensor(rows)})
        return self._values.to_tensor(found).reshape(len(states), -1)[:, : self._width]

    def _one_side(self, requests: Sequence[Request], prefix: OrtPrefix | None) -> list[Tensor]:
        """Return the states of requests that lie on one side of the rotary limit."""
        if prefix is not None and (self.sharing == "none" or self._turns(prefix, requests[0])):
            requests, prefix = [request.after(prefix.tokens) for request in requests], None
        if prefix is not None and self.sharing == "one":
            return [self._batch([request], prefix)[0] for request in requests]
        return self._batch(requests, prefix)

    def _turns(self, prefix: OrtPrefix, request: Request) -> bool:
        """Return whether a request is so long that the prefix's keys would have been turned otherwise."""
        return prefix.length <= self._rope_limit < prefix.length + len(request.tokens)

    def _batch(self, requests: Sequence[Request], prefix: OrtPrefix | None) -> list[Tensor]:
        longest = max(len(request.tokens) for request in requests)
        padded = [[*request.tokens, *[0] * (longest - len(request.tokens))] for request in requests]
        wanted = [row * longest + position for row, r in enumerate(requests) for position in r.positions]
        states = self._values.to_tensor(self._forward(padded, wanted, prefix, [COUNT, STATES])[1])
        return list(torch.split(states, [len(request.positions) for request in requests]))

    def _forward(
        self, tokens: Sequence[Sequence[int]], wanted: Sequence[int], prefix: OrtPrefix | None, outputs: Sequence[str]
    ) -> list[Any]:
        """Return the outputs of one forward pass over [batch, length] tokens; the first, `COUNT`, has been checked."""
        past = prefix.length if prefix else 0
        batch, length = len(tokens), len(tokens[0])
        if past + length > self.max_length:
            raise QevalError(f"A sequence of {past + length} tokens is longer than the context of {self.max_length}.")
        feeds = {SCORED: self._integers(SCORED, wanted), **self._past(prefix, batch)}
        feeds[self._decoder.ids] = self._integers(self._decoder.ids, tokens)
        if mask := self._decoder.mask:
            feeds[mask] = self._integers(mask, np.ones((batch, past + length)))
        if positions := self._decoder.positions:
            feeds[positions] = self._integers(positions, np.tile(np.arange(past, past + length), (batch, 1)))
        found = self._run(self._body, outputs, feeds)
        rows = int(found[0].numpy()[0])
        if rows != batch * length:
            raise QevalError(
                f"The graph gave states of {rows} positions for {batch} x {length} tokens; it can't be scored."
            )
        return found

    def _past(self, prefix: OrtPrefix | None, batch: int) -> Feeds:
        if prefix is None and batch == 1:
            return self._empty
        if prefix is None:
            return {
                past.name: self._values.from_array(np.zeros((batch, past.heads, 0, past.head_size), past.dtype))
                for past in self._decoder.pasts
            }
        if batch == 1:
            return prefix.values
        if batch not in prefix.spread:
            prefix.spread.clear()  # one size at a time: a copy of a long prefix for each row is large
            prefix.spread[batch] = {
                name: self._values.from_tensor(self._values.to_tensor(value).repeat_interleave(batch, dim=0))
                for name, value in prefix.values.items()
            }
        return prefix.spread[batch]

    def _integers(self, name: str, values: Sequence[Any] | NDArray[Any]) -> Any:
        """Return a value for the input of that name, in the type that the graph takes it in."""
        return self._values.from_array(np.asarray(values, dtype=self._decoder.integers.get(name, np.int64)))

    def _run(self, session: Any, outputs: Sequence[str], feeds: Feeds) -> list[Any]:
        """Return the outputs of a session, on the device but for the count of positions."""
        try:
            return self._values.run(session, outputs, feeds, on_host=[COUNT])
        except runtime_errors() as error:
            raise QevalError(f"ONNX Runtime failed in a forward pass: {first_line_of(error)}.") from error

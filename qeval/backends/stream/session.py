"""A session that runs what it is asked for, and what it was told to expect, in one pass over the layers."""

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qeval.backends.base import Prefix, SessionDefaults
from qeval.backends.prefix import cache_of_layer, continued_layer, empty_cache, longer_layer
from qeval.backends.shared import shared_attention
from qeval.backends.sharing import Sharing
from qeval.backends.stream.budget import Budget
from qeval.backends.stream.head import StreamedHead
from qeval.backends.stream.layer_output import States
from qeval.backends.stream.layer_runner import Relay
from qeval.backends.stream.steps import Path, Step, is_inside, plan_steps
from qeval.backends.stream.weights import LayerWeights
from qeval.backends.torch import check_length, rope_limit
from qeval.models.structure.head import Head
from qeval.models.structure.kv_cache import KvChange, passing_cache
from qeval.models.structure.supported import context_length
from qeval.models.structure.trace import text_config
from qeval.types import Call, Request


@dataclass(frozen=True)
class StreamPrefix:
    """A prefix that is run, a layer at a time, when what continues it is."""

    path: Path

    @property
    def length(self) -> int:
        """The prefix's length in tokens."""
        return sum(len(part) for part in self.path)


class StreamSession(SessionDefaults):
    """A language model whose layers are read one after the other, each run over every token that memory holds."""

    def __init__(
        self,
        model: Any,
        relay: Relay,
        weights: LayerWeights,
        head: Head | StreamedHead,
        budget: Budget,
        sharing: Sharing,
        kv_changes: Sequence[KvChange] = (),
    ) -> None:
        """Answer with a model whose layers are read.

        Args:
            model: The weightless model.
            relay: Runs one of its layers.
            weights: What puts a layer's weights into it.
            head: Makes logits of final states.
            budget: The memory that a pass may take.
            sharing: What was proven that sequences may share.
            kv_changes: What rounds each layer's keys and values; none where they stay as they are.
        """
        config = model.config
        self._model, self._sharing, self._shares = model, sharing, sharing.apart
        self._config, self._relay, self._weights, self._head, self._budget = config, relay, weights, head, budget
        self._rope_limit = rope_limit(config)
        self._expected: deque[Call] = deque()
        self._done: dict[Call, deque[list[Tensor]]] = {}
        self._kv_changes = tuple(kv_changes)
        self.packs = False
        self.passes = 0
        """How often all layers were read."""

    @property
    def max_length(self) -> int:
        """The context length that the model's configuration states."""
        return context_length(text_config(self._model), type(self._model).__name__)

    @property
    def vocab_size(self) -> int:
        """The width of a row of logits."""
        return self._head.vocab_size

    @property
    def block_rows(self) -> int:
        """The positions whose logits are made at a time."""
        return max(1, self._budget.logits // (LOGIT_ARRAYS * 4 * self.vocab_size))

    def expect(self, calls: Iterable[Call]) -> None:
        """Note the calls to come, in their order: what a pass runs ahead. Others may come all the same."""
        self._expected, self._done = deque(calls), {}

    def prefill(self, tokens: Sequence[int], outer: Prefix | None = None) -> StreamPrefix:
        """Return a prefix; it is run with what continues it."""
        path = (*_path(outer), tuple(tokens))
        check_length(sum(len(part) for part in path), self.max_length)
        return StreamPrefix(path)

    @torch.inference_mode()
    def states(self, requests: Sequence[Request], prefix: Prefix | None = None) -> list[Tensor]:
        """Return the final hidden states at each request's positions, [positions, d_model] fp32, on the CPU.

        Raises:
            QevalError: a sequence is longer than the model's context.
        """
        call = Call(_path(prefix), tuple(requests))
        skip = sum(len(part) for part in call.path)
        check_length(skip + max(len(request.tokens) for request in requests), self.max_length)
        if call not in self._done:
            self._run(self._batch(call))
        found = self._done[call].popleft()
        if not self._done[call]:
            del self._done[call]
        return found

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """Return the fp32 logits [n, vocab] of states [n, d_model]."""
        return self._head.logits(states)

    def close(self) -> None:
        """Let go of everything that was read."""
        self._weights.close()
        self._done.clear()

    def _batch(self, first: Call) -> list[Call]:
        """Return the call, and as many of those expected after it as memory holds beside them."""
        if first not in self._expected:
            return [first]
        while self._expected.popleft() != first:
            pass
        calls, used = [first], _tokens(first)
        largest = used
        while self._expected:
            more = _tokens(self._expected[0])
            largest = max(largest, more)
            used += more
            if used > self._budget.pass_tokens(largest):
                break
            calls.append(self._expected.popleft())
        return calls

    def _run(self, calls: Sequence[Call]) -> None:
        """Run one pass: every layer over every step."""
        self.passes += 1
        steps = plan_steps(calls, self._rope_limit, prefixes=self._sharing.prefixes)
        found: list[dict[int, Tensor]] = [{} for _ in calls]
        for index in range(self._weights.count):
            last = index + 1 == self._weights.count
            self._weights.install(index, None if last else index + 1)
            prefixes: dict[Path, Any] = {}
            for step in steps:
                prefixes = {path: layer for path, layer in prefixes.items() if is_inside(path, step.path)}
                output = self._step(index, step, prefixes)
                if last:
                    _answer(step, output[0], found)
                else:
                    step.states = _moved(output, step.states)
            self._weights.remove(index)
        self._weights.release()
        for call, rows in zip(calls, found, strict=True):
            self._done.setdefault(call, deque()).append([rows[row] for row in range(len(call.requests))])

    def _step(self, index: int, step: Step, prefixes: dict[Path, Any]) -> States:
        outer = prefixes.get(step.path)
        change = self._kv_changes[index] if self._kv_changes else None
        cache, layer = None if change is None else passing_cache(self._kv_changes), None
        if step.keeps or outer is not None:
            kinds = empty_cache(self._model).layers
            if step.keeps:
                layer = longer_layer(kinds[index], outer, apart=self._shares, change=change)
            else:
                layer = continued_layer(outer, len(step.sequences))
            cache = cache_of_layer(kinds, layer, sum(map(len, step.path)))
        with shared_attention(self._model) if outer and not step.keeps and self._shares else nullcontext():
            output = self._relay.run(index, step.states, cache, step.ids(self._weights.device))
        if step.keeps:
            prefixes[step.kept_path] = layer
        return output


LOGIT_ARRAYS = 3
"""Arrays of a block of logits' size that comparing two models keeps at once: both models' and parts of more."""


def _path(prefix: Prefix | None) -> Path:
    if prefix is None:
        return ()
    if not isinstance(prefix, StreamPrefix):
        raise TypeError("A prefix belongs to the session that made it.")
    return prefix.path


def _tokens(call: Call) -> int:
    """Return the tokens of a call's batch, padding and prefix included."""
    longest = max(len(request.tokens) for request in call.requests)
    return longest * len(call.requests) + sum(len(part) for part in call.path)


def _answer(step: Step, output: Tensor, found: list[dict[int, Tensor]]) -> None:
    for row, ((call, place), request) in enumerate(zip(step.places, step.requests, strict=True)):
        found[call][place] = output[row, list(request.positions)].float().cpu().clone()
    step.states = None


def _moved(output: States, before: States | None) -> States:
    """Return what a layer handed on in memory of its own: that of what it was given, where the two are alike."""
    kept = before or ()
    if len(output) != len(kept) or any(one.shape != other.shape for one, other in zip(output, kept, strict=True)):
        known = {id(tensor) for tensor in kept}
        return tuple(tensor if id(tensor) in known else tensor.clone() for tensor in output)
    for place, tensor in zip(kept, output, strict=True):
        if place is not tensor:
            place.copy_(tensor)
    return kept

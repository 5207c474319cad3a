"""PyTorch with fake-quantized weights: the integers' values, multiplied in floating point.

One weight set is held. A variant's matrices are dequantized into the model's own parameters for the length of a
`with` block, and the originals are put back bit for bit. Padding is on the right only, where a causal model
cannot see it.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from qeval.backends.base import Prefix
from qeval.errors import QevalError
from qeval.models.graph import Description
from qeval.models.head import Head, head_of
from qeval.quant.variant import Variant
from qeval.types import Request


class _PrefixLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values of a prefix, lent to any number of continuations and never grown by them."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Keep the prefix: keys and values of shape [1, heads, tokens, head size]."""
        self.keys, self.values, self.is_initialized = key_states, value_states, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The keys and values that attention sees: the prefix's own, or the prefix before each continuation's."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        batch = key_states.shape[0]
        keys = torch.cat([self.keys.expand(batch, -1, -1, -1), key_states], dim=-2)
        return keys, torch.cat([self.values.expand(batch, -1, -1, -1), value_states], dim=-2)

    def get_seq_length(self) -> int:
        """Tokens in the prefix."""
        return int(self.keys.shape[-2]) if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The keys that a mask covers, from the first token on: sliding windows are masked, not dropped."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


@dataclass(frozen=True, eq=False)
class TorchPrefix:
    """The keys and values of the prefix `tokens`."""

    tokens: tuple[int, ...]
    cache: Any

    @property
    def length(self) -> int:
        """How many tokens the prefix holds."""
        return len(self.tokens)

    def before(self, request: Request) -> Request:
        """The whole sequence of a request that continues the prefix."""
        return Request(self.tokens + request.tokens, tuple(p + self.length for p in request.positions))


class TorchSession:
    """A transformers causal language model that answers with final hidden states, [d_model] fp32 each."""

    def __init__(self, model: Any, head: Head | None = None) -> None:
        """`model` is in eval mode; `head` replaces its own (a quantized head does)."""
        self._model = model
        self._head = head_of(model) if head is None else head
        self._rope_limit = _rope_limit(model.config)

    @property
    def max_length(self) -> int:
        """The context length that the model's configuration states."""
        return int(self._model.config.max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        """The width of a row of logits."""
        return int(self._head.weight.shape[0])

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int]) -> TorchPrefix:
        """Run a prefix once and keep its keys and values.

        Raises:
            QevalError: it is longer than the model's context.
        """
        self._check_length(len(tokens))
        cache = Cache(layers=[_PrefixLayer() for _ in range(self._model.config.num_hidden_layers)])
        self._forward(self._ids([tokens]), cache)
        return TorchPrefix(tuple(tokens), cache)

    @torch.inference_mode()
    def states(self, requests: Sequence[Request], prefix: Prefix | None = None) -> list[Tensor]:
        """The final hidden states at each request's positions, [positions, d_model] fp32.

        Raises:
            QevalError: a sequence is longer than the model's context.
        """
        if prefix is not None and not isinstance(prefix, TorchPrefix):
            raise TypeError("A prefix belongs to the session that made it.")
        skip = prefix.length if prefix else 0
        self._check_length(skip + max(len(request.tokens) for request in requests))
        found: dict[int, Tensor] = {}
        for is_long in (False, True):
            part = [i for i, r in enumerate(requests) if (skip + len(r.tokens) > self._rope_limit) == is_long]
            if part:
                found.update(zip(part, self._run([requests[i] for i in part], prefix), strict=True))
        return [found[index] for index in range(len(requests))]

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """The fp32 logits [n, vocab] of states [n, d_model]."""
        return self._head.logits(states.to(self._model.device))

    def _run(self, requests: Sequence[Request], prefix: TorchPrefix | None) -> list[Tensor]:
        """The states of requests that lie on one side of the rotary limit, as one batch."""
        longest = max(len(request.tokens) for request in requests)
        if prefix is not None and prefix.length <= self._rope_limit < prefix.length + longest:
            return self._run([prefix.before(request) for request in requests], None)  # its keys were turned otherwise
        padded = [[*request.tokens, *[0] * (longest - len(request.tokens))] for request in requests]
        hidden = self._forward(self._ids(padded), prefix.cache if prefix else None)
        return [hidden[index, list(request.positions)].float().clone() for index, request in enumerate(requests)]

    def _check_length(self, total: int) -> None:
        if total > self.max_length:
            raise QevalError(f"A sequence of {total} tokens is longer than the context of {self.max_length}.")

    def _ids(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(sequences, dtype=torch.long, device=self._model.device)

    def _forward(self, ids: Tensor, cache: Any) -> Tensor:
        output = self._model.base_model(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
        hidden: Tensor = output.last_hidden_state
        return hidden


def _rope_limit(config: Any) -> float:
    """The length beyond which a sequence is turned by other rotary frequencies from its first token on (LongRoPE).

    Ding et al., arXiv 2402.13753; Phi-3's and Phi-4's. Infinite for models of one set of frequencies.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # some have a set a kind of layer
    limits = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(limits, default=math.inf)


class TorchBackend:
    """Installs variants in a transformers model, one at a time."""

    name = "torch"

    def __init__(self, model: Any, description: Description, head: Head, weight_dtype: torch.dtype) -> None:
        """`weight_dtype` is the checkpoint's: originals are kept in it while a variant is installed, where exact."""
        self._model = model
        self._head_name = description.head
        self._head = head
        self._weight_dtype = weight_dtype
        self._is_lent = False

    @property
    def head(self) -> Head:
        """The baseline's own head."""
        return self._head

    def head_for(self, variant: Variant) -> Head:
        """The head that a variant's states go through: its own where it quantizes one; a tied embedding stays."""
        if self._head_name not in variant.weights:
            return self._head
        return replace(self._head, weight=variant.weights[self._head_name].dequantize().to(self._head.weight))

    @contextmanager
    def open(self, variant: Variant | None) -> Iterator[TorchSession]:
        """A session of `variant`, or of the baseline with None; one variant at a time.

        Raises:
            QevalError: a variant is installed already, so neither it nor the baseline could be told apart.
        """
        if self._is_lent:
            raise QevalError("The model's weights are those of another variant; close its session first.")
        if variant is None:
            yield TorchSession(self._model, self._head)
            return
        head = self.head_for(variant)
        self._is_lent = True
        try:
            with installed(self._model, variant, skip=self._head_name, keep_dtype=self._weight_dtype):
                yield TorchSession(self._model, head)
        finally:
            self._is_lent = False


@contextmanager
def installed(model: Any, variant: Variant, *, skip: str, keep_dtype: torch.dtype) -> Iterator[None]:
    """The model with the variant's weights in place of its own, restored bit for bit at the end."""
    parameters = dict(model.named_parameters())
    weights = {name: weight for name, weight in variant.weights.items() if name != skip}
    saved: dict[str, Tensor] = {}
    with ExitStack() as stack, torch.inference_mode():
        try:
            for name, weight in weights.items():
                saved[name] = _compact(parameters[name], keep_dtype)
                parameters[name].copy_(weight.dequantize())
            for name, value in variant.floats.items():
                saved[name] = saved.get(name, _compact(parameters[name], keep_dtype))
                parameters[name].copy_(value)
            for name, scales in variant.input_scales.items():
                module = model.get_submodule(name.removesuffix(".weight"))
                stack.enter_context(_scaled_input(module, scales.to(model.device)))
            yield
        finally:
            for name, value in saved.items():
                parameters[name].copy_(value)


def _compact(parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """A copy in the checkpoint's type if that loses nothing, else in the parameter's own."""
    copy = parameter.detach().to(dtype, copy=True)
    return copy if torch.equal(copy.to(parameter.dtype), parameter) else parameter.detach().clone()


@contextmanager
def _scaled_input(module: nn.Module, scales: Tensor) -> Iterator[None]:
    def multiply(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * scales.to(args[0].dtype), *args[1:])

    handle = module.register_forward_pre_hook(multiply)
    try:
        yield
    finally:
        handle.remove()

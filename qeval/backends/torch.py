"""PyTorch with fake-quantized weights: the integers' values, multiplied in floating point.

One weight set is held. A variant's matrices are dequantized into the model's own parameters for the length of a
`with` block, and the originals are put back bit for bit. Padding is on the right only, where a causal model
cannot see it.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache

from qeval.backends.base import Prefix
from qeval.backends.memory import batch_tokens, with_half_on_lack
from qeval.backends.prefix import PrefixLayer, cache_of
from qeval.backends.shared import can_share, shared_attention
from qeval.errors import QevalError
from qeval.metrics.tokens import block_rows
from qeval.models.graph import Description
from qeval.models.head import Head, head_of
from qeval.quant.variant import Variant
from qeval.store.variants import load_variant
from qeval.types import Request


@dataclass(frozen=True, eq=False)
class TorchPrefix:
    """The keys and values of the prefix `tokens`."""

    tokens: tuple[int, ...]
    cache: Any

    @property
    def length(self) -> int:
        """How many tokens the prefix holds."""
        return len(self.tokens)


class TorchSession:
    """A transformers causal language model that answers with final hidden states, [d_model] fp32 each."""

    def __init__(self, model: Any, head: Head | None = None) -> None:
        """`model` is in eval mode; `head` replaces its own (a quantized head does)."""
        self._model = model
        self._head = head_of(model) if head is None else head
        self._rope_limit = rope_limit(model.config)
        self._shares = can_share(model)

    @property
    def max_length(self) -> int:
        """The context length that the model's configuration states."""
        return int(self._model.config.max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        """The width of a row of logits."""
        return int(self._head.weight.shape[0])

    @property
    def block_rows(self) -> int:
        """The positions whose logits are made at a time."""
        return block_rows(self.vocab_size, self._model.device)

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int], outer: Prefix | None = None) -> TorchPrefix:
        """Run a prefix once and keep its keys and values.

        Raises:
            QevalError: it is longer than the model's context.
        """
        before = _own(outer)
        whole = (*(before.tokens if before else ()), *tokens)
        check_length(len(whole), self.max_length)
        if before and before.length <= self._rope_limit < len(whole):
            before, tokens = None, whole  # the outer one's keys were turned otherwise
        outers = before.cache.layers if before else [None] * self._model.config.num_hidden_layers
        cache = cache_of([PrefixLayer(layer, apart=self._shares) for layer in outers])
        self._forward(self._ids([tokens]), cache)
        return TorchPrefix(whole, cache)

    @torch.inference_mode()
    def states(self, requests: Sequence[Request], prefix: Prefix | None = None) -> list[Tensor]:
        """The final hidden states at each request's positions, [positions, d_model] fp32.

        Raises:
            QevalError: a sequence is longer than the model's context.
        """
        kept = _own(prefix)
        skip = kept.length if kept else 0
        check_length(skip + max(len(request.tokens) for request in requests), self.max_length)
        found: dict[int, Tensor] = {}
        for rows, shares in one_sided(requests, skip, self._rope_limit):
            part = [requests[row] if shares or kept is None else requests[row].after(kept.tokens) for row in rows]
            own = kept if shares else None
            found.update(zip(rows, with_half_on_lack(partial(self._run, prefix=own), part), strict=True))
        return [found[index] for index in range(len(requests))]

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """The fp32 logits [n, vocab] of states [n, d_model]."""
        return self._head.logits(states.to(self._model.device))

    @torch.inference_mode()
    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> Tensor:
        """The `count` tokens [prompts, count] that prompts of one length go on with, keys and values kept.

        Raises:
            QevalError: they would be longer than the model's context, or turned by two sets of rotary frequencies.
        """
        length = len(prompts[0])
        check_length(length + count, self.max_length)
        if length <= self._rope_limit < length + count:
            raise QevalError(
                f"A continuation from {length} to {length + count} tokens crosses the model's rotary limit of "
                f"{self._rope_limit:g}; generate fewer tokens."
            )
        cache, fed, said = DynamicCache(config=self._model.config), self._ids(prompts), []
        for _ in range(count):
            fed = self._head.logits(self._forward(fed, cache)[:, -1]).argmax(dim=-1, keepdim=True)
            said.append(fed)
        return torch.cat(said, dim=1).cpu()

    def _run(self, requests: Sequence[Request], prefix: TorchPrefix | None) -> list[Tensor]:
        """The states of requests that lie on one side of the rotary limit, as one batch."""
        longest = max(len(request.tokens) for request in requests)
        padded = [[*request.tokens, *[0] * (longest - len(request.tokens))] for request in requests]
        with shared_attention(self._model) if prefix and self._shares else nullcontext():
            hidden = self._forward(self._ids(padded), prefix.cache if prefix else None)
        return [hidden[index, list(request.positions)].float().clone() for index, request in enumerate(requests)]

    def _ids(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(sequences, dtype=torch.long, device=self._model.device)

    def _forward(self, ids: Tensor, cache: Any) -> Tensor:
        output = self._model.base_model(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
        hidden: Tensor = output.last_hidden_state
        return hidden


def _own(prefix: Prefix | None) -> TorchPrefix | None:
    if prefix is not None and not isinstance(prefix, TorchPrefix):
        raise TypeError("A prefix belongs to the session that made it.")
    return prefix


def check_length(total: int, most: int) -> None:
    """Refuse a sequence of more tokens than the context.

    Raises:
        QevalError: it says how many.
    """
    if total > most:
        raise QevalError(f"A sequence of {total} tokens is longer than the context of {most}.")


def one_sided(requests: Sequence[Request], skip: int, limit: float) -> Iterator[tuple[list[int], bool]]:
    """The indices of the requests on either side of a rotary limit, and whether they can continue their prefix.

    `skip` is the prefix's length in tokens. What crosses the limit can't: the prefix's keys were turned otherwise.
    """
    for is_long in (False, True):
        rows = [i for i, r in enumerate(requests) if (skip + len(r.tokens) > limit) == is_long]
        if rows:
            yield rows, not (is_long and skip <= limit)


def rope_limit(config: Any) -> float:
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
    def batch_tokens(self) -> int:
        """Tokens a batch that suit the device and its free memory."""
        itemsize = self._head.weight.element_size()
        return batch_tokens(self._model.config.get_text_config(), itemsize, self._model.device)

    @property
    def head(self) -> Head:
        """The baseline's own head."""
        return self._head

    def head_for(self, variant: Variant) -> Head:
        """The head that a variant's states go through: its own where it quantizes one; a tied embedding stays."""
        return _head_for(variant, self._head, self._head_name)

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
    def open_saved(self, folder: Path) -> Iterator[TorchSession]:
        """A session of the variant that lies in `folder`."""
        with self.open(load_variant(folder)) as session:
            yield session


def _head_for(variant: Variant, head: Head, name: str) -> Head:
    if name not in variant.weights:
        return head
    return replace(head, weight=variant.weights[name].dequantize().to(head.weight))


@torch.inference_mode()
def install(model: Any, variant: Variant, *, head: Head, head_name: str) -> Head:
    """Put the variant's weights in place of the model's own for good, which takes no copy of these; its head."""
    parameters = dict(model.named_parameters())
    for name, weight in variant.weights.items():
        if name != head_name:
            parameters[name].copy_(weight.dequantize())
    for name, value in variant.floats.items():
        parameters[name].copy_(value)
    for name, scales in variant.input_scales.items():
        _scale_input(model.get_submodule(name.removesuffix(".weight")), scales.to(model.device))
    return _head_for(variant, head, head_name)


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
                stack.enter_context(scaled_input(module, scales.to(model.device)))
            yield
        finally:
            for name, value in saved.items():
                parameters[name].copy_(value)


def _compact(parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """A copy in the checkpoint's type if that loses nothing, else in the parameter's own."""
    copy = parameter.detach().to(dtype, copy=True)
    return copy if torch.equal(copy.to(parameter.dtype), parameter) else parameter.detach().clone()


@contextmanager
def scaled_input(module: nn.Module, scales: Tensor) -> Iterator[None]:
    """A linear whose input is multiplied by `scales` [columns]."""
    handle = _scale_input(module, scales)
    try:
        yield
    finally:
        handle.remove()


def _scale_input(module: nn.Module, scales: Tensor) -> RemovableHandle:
    def multiply(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * scales.to(args[0].dtype), *args[1:])

    return module.register_forward_pre_hook(multiply)

"""PyTorch with fake-quantized weights: the integers' values, multiplied in floating point.

One weight set is held. A variant's matrices are dequantized into the model's own parameters for the length of a
`with` block, and the originals are put back bit for bit. Padding is on the right only, where a causal model
cannot see it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qeval.backends.base import Prefix
from qeval.backends.memory import batch_tokens, with_half_on_lack
from qeval.backends.prefix import PrefixLayer, cache_of
from qeval.backends.shared import can_pack, can_share, packing, shared_attention
from qeval.errors import QevalError
from qeval.metrics.tokens import block_rows
from qeval.models.graph import Description
from qeval.models.head import Head, head_of
from qeval.models.matrices import weights_of
from qeval.models.trace import text_config
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
        self._rope_limit = rope_limit(text_config(model))
        self._shares = can_share(model)
        self.packs = can_pack(model)

    @property
    def max_length(self) -> int:
        """The context length that the model's configuration states."""
        return int(text_config(self._model).max_position_embeddings)

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
        outers = before.cache.layers if before else [None] * text_config(self._model).num_hidden_layers
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

    def _run(self, requests: Sequence[Request], prefix: TorchPrefix | None) -> list[Tensor]:
        """The states of requests that lie on one side of the rotary limit, as one batch."""
        if self.packs and len({len(request.tokens) for request in requests}) > 1:
            return self._run_packed(requests, prefix)
        longest = max(len(request.tokens) for request in requests)
        padded = [[*request.tokens, *[0] * (longest - len(request.tokens))] for request in requests]
        with shared_attention(self._model) if prefix and self._shares else nullcontext():
            hidden = self._forward(self._ids(padded), prefix.cache if prefix else None)
        return [hidden[index, list(request.positions)].float().clone() for index, request in enumerate(requests)]

    def _run_packed(self, requests: Sequence[Request], prefix: TorchPrefix | None) -> list[Tensor]:
        """The same with one sequence behind the other, so that none is filled up."""
        lengths = [len(request.tokens) for request in requests]
        skip = prefix.length if prefix else 0
        places = self._ids([[skip + place for length in lengths for place in range(length)]])
        ids = self._ids([[token for request in requests for token in request.tokens]])
        with shared_attention(self._model, packing(lengths, ids.device)):
            hidden = self._forward(ids, prefix.cache if prefix else None, position_ids=places)[0]
        parts = zip(requests, torch.split(hidden, lengths), strict=True)
        return [part[list(request.positions)].float().clone() for request, part in parts]

    def _ids(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(sequences, dtype=torch.long, device=self._model.device)

    def _forward(self, ids: Tensor, cache: Any, **places: Tensor) -> Tensor:
        output = self._model.base_model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, **places)
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
        weights = installed(self._model, variant, skip=self._head_name, keep_dtype=self._weight_dtype)
        del variant  # its integers need not lie in memory beside what they stand for
        self._is_lent = True
        try:
            with weights:
                yield TorchSession(self._model, head)
        finally:
            self._is_lent = False

    @contextmanager
    def open_saved(self, folder: Path) -> Iterator[TorchSession]:
        """A session of the variant that lies in `folder`."""
        with self.open(load_variant(folder)) as session:
            yield session


@contextmanager
def installed(model: Any, variant: Variant, *, skip: str, keep_dtype: torch.dtype) -> Iterator[None]:
    """The model with the variant's weights in place of its own, restored bit for bit at the end."""
    parameters = weights_of(model)
    saved: dict[str, Tensor] = {}

    def keep(name: str) -> None:
        if name not in saved:
            saved[name] = _compact(parameters[name], keep_dtype)

    with ExitStack() as stack, torch.inference_mode():
        try:
            _put(parameters, variant, skip, keep)
            for name, scales in variant.input_scales.items():
                module = model.get_submodule(name.removesuffix(".weight"))
                stack.enter_context(scaled_input(module, scales.to(model.device)))
            del variant
            yield
        finally:
            for name, value in saved.items():
                parameters[name].copy_(value)


def _put(parameters: Mapping[str, Tensor], variant: Variant, skip: str, keep: Callable[[str], None]) -> None:
    """Write a variant's weights over the parameters, each of which `keep` is told before."""
    for name, weight in variant.weights.items():
        if name != skip:
            keep(name)
            parameters[name].copy_(weight.dequantize())
    for name, value in variant.floats.items():
        keep(name)
        parameters[name].copy_(value)


def _compact(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in the checkpoint's type if that loses nothing, else in the parameter's own."""
    copy = parameter.detach().to(dtype, copy=True)
    return copy if torch.equal(copy.to(parameter.dtype), parameter) else parameter.detach().clone()


@contextmanager
def scaled_input(module: nn.Module, scales: Tensor) -> Iterator[None]:
    """A linear whose input is multiplied by `scales` [columns]."""

    def multiply(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * scales.to(args[0].dtype), *args[1:])

    handle = module.register_forward_pre_hook(multiply)
    try:
        yield
    finally:
        handle.remove()

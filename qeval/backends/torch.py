"""PyTorch with fake-quantized weights: the integers' values, multiplied in floating point.

One weight set is held. A variant's matrices are dequantized into the model's own parameters for the length of a
`with` block, and the originals are put back bit for bit. Padding is on the right only, where a causal model
cannot see it.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qeval.backends.base import Prefix, Saved, SessionDefaults, Target
from qeval.backends.decoding import Decoding, Greedy
from qeval.backends.generation import Generation, IsDone
from qeval.backends.install import installed, variant_head, without_room
from qeval.backends.memory import FittingBatches, batch_tokens
from qeval.backends.parts import part_tokens
from qeval.backends.prefix import continued_cache, prefix_cache
from qeval.backends.schemes import kv_changes, rounded_inputs
from qeval.backends.shared import PackedRow, shared_attention
from qeval.backends.sharing import Sharing, sharing_of
from qeval.errors import QevalError
from qeval.metrics.sweep import sweep_warning
from qeval.metrics.tokens import block_rows
from qeval.models.device_map import tightest_device
from qeval.models.structure.forward import FinalStates
from qeval.models.structure.graph import Description
from qeval.models.structure.head import Head, head_of
from qeval.models.structure.kv_cache import KvChange, passing_cache
from qeval.models.structure.supported import context_length
from qeval.models.structure.trace import text_config
from qeval.models.structure.weight_views import weights_of
from qeval.progress import Progress
from qeval.quant.scheme import Scheme
from qeval.store.variants import read_manifest
from qeval.types import Request, TokenIds


@dataclass(frozen=True, eq=False)
class TorchPrefix:
    """The keys and values of the prefix `tokens`."""

    tokens: tuple[int, ...]
    cache: Any

    @property
    def length(self) -> int:
        """The tokens of the prefix."""
        return len(self.tokens)


class TorchSession(SessionDefaults):
    """A transformers causal language model that answers with final hidden states, [d_model] fp32 each."""

    def __init__(
        self,
        model: Any,
        head: Head | None = None,
        sharing: Sharing | None = None,
        kv_changes: Sequence[KvChange] = (),
        batches: FittingBatches | None = None,
    ) -> None:
        """Answer with a model.

        Args:
            model: In eval mode.
            head: Replaces its own; a quantized head does.
            sharing: What sequences may share; proven by default.
            kv_changes: What rounds each layer's keys and values; none where they stay as they are.
            batches: What is known of the batches that memory holds, from sessions before this one.
        """
        self._batches = batches or FittingBatches()
        self._model = model
        self._kv_changes = tuple(kv_changes)
        self._head = head_of(model) if head is None else head
        self._rope_limit = rope_limit(text_config(model))
        self._final_states = FinalStates(model)
        self.sharing = sharing or sharing_of(model, partial(TorchSession, model, self._head))
        self._shares, self.packs = self.sharing.apart, self.sharing.packs

    @property
    def max_length(self) -> int:
        """The context length that the model's configuration states."""
        return context_length(text_config(self._model), type(self._model).__name__)

    @property
    def vocab_size(self) -> int:
        """The width of a row of logits."""
        return int(self._head.weight.shape[0])

    @property
    def block_rows(self) -> int:
        """The positions whose logits are made at a time."""
        return self._batches.block_rows or block_rows(self.vocab_size, self._head.weight.device)

    def halve_blocks(self) -> bool:
        """Make half as many positions' logits at a time from now on; False where it is one already."""
        can = self.block_rows > 1
        self._batches.block_rows = max(1, self.block_rows // 2)
        return can

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int], outer: Prefix | None = None) -> TorchPrefix:
        """Run a prefix once and keep its keys and values.

        Raises:
            QevalError: it is longer than the model's context.
        """
        before = _cast_prefix(outer)
        whole = (*(before.tokens if before else ()), *tokens)
        check_length(len(whole), self.max_length)
        if before and before.length <= self._rope_limit < len(whole):
            before, tokens = None, whole  # the outer one's keys were turned otherwise
        if not self.sharing.prefixes:
            return TorchPrefix(whole, None)
        if self.sharing.stepwise:
            return TorchPrefix(whole, self._longer_cache(None, whole))  # one long pass is faster than many of a token
        cache = before.cache if before else None
        if len(whole) <= self._rope_limit:
            most = self._part_tokens(len(whole), continues=cache is not None)
            return TorchPrefix(whole, self._batches.run_on(self._longer_cache, cache, tokens, most))
        return TorchPrefix(whole, self._longer_cache(cache, tokens))  # in parts it would be turned otherwise

    @torch.inference_mode()
    def states(self, requests: Sequence[Request], prefix: Prefix | None = None) -> list[Tensor]:
        """Return the final hidden states at each request's positions, [positions, d_model] fp32.

        Raises:
            QevalError: a sequence is longer than the model's context.
        """
        kept = _cast_prefix(prefix)
        skip = kept.length if kept else 0
        check_length(skip + max(len(request.tokens) for request in requests), self.max_length)
        found: dict[int, Tensor] = {}
        for rows, fits in one_sided(requests, skip, self._rope_limit):
            shares = fits and self.sharing.prefixes
            part = [requests[row] if shares or kept is None else requests[row].after(kept.tokens) for row in rows]
            own = kept if shares else None
            found.update(zip(rows, self._batches.run(partial(self._run, prefix=own), part), strict=True))
        return [found[index] for index in range(len(requests))]

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """Return the fp32 logits [n, vocab] of states [n, d_model]."""
        return self._head.logits(states)

    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> Tensor:
        """Return the `count` tokens [prompts, count] that prompts go on with, keys and values kept.

        Raises:
            QevalError: As `generate`.
        """
        return torch.tensor(self.generate([tuple(prompt) for prompt in prompts], count, Greedy(), ()))

    def generate(
        self,
        prompts: Sequence[TokenIds],
        count: int,
        decoding: Decoding,
        stops: Collection[int],
        is_done: IsDone | None = None,
    ) -> list[TokenIds]:
        """Return what each prompt goes on with: up to `count` tokens, the first of `stops` among them the last.

        `is_done` ends a continuation too, by all of its tokens so far.

        Raises:
            QevalError: One would be longer than the model's context, or turned by two sets of rotary frequencies.
        """
        for length in map(len, prompts):
            check_length(length + count, self.max_length)
            if length <= self._rope_limit < length + count:
                raise QevalError(
                    f"A continuation from {length} to {length + count} tokens crosses the model's rotary limit of "
                    f"{self._rope_limit:g}; generate fewer tokens."
                )
        grows = self.sharing.prefixes and not self._kv_changes  # rounded ones are computed anew for each token
        changed = partial(passing_cache, self._kv_changes) if self._kv_changes else None
        generation = Generation(self._model, self._head.logits, grows, changed, self._rope_limit)
        return generation.run(prompts, count, decoding, stops, is_done)

    def _longer_cache(self, cache: Any, tokens: Sequence[int]) -> Any:
        """Return what a prefix leaves that goes on from `cache`, or begins with None, by `tokens`."""
        return self._extended(cache, tokens)[0]

    def _extended(self, cache: Any, tokens: Sequence[int]) -> tuple[Any, Tensor]:
        """Return the same, and the final states of the tokens, [tokens, d_model]."""
        longer = prefix_cache(self._model, cache, apart=self._shares, changes=self._kv_changes)
        return longer, self._forward(self._ids([tokens]), longer)[0]

    def _part_tokens(self, total: int, *, continues: bool) -> int | None:
        """Return how many tokens of a sequence one pass may hold, None for all of them."""
        runs_in_parts = self.sharing.prefixes and not self.sharing.stepwise and total <= self._rope_limit
        return part_tokens(self._model, total, self._model.device, continues=continues) if runs_in_parts else None

    def _run_in_parts(self, request: Request, prefix: TorchPrefix | None, most: int) -> Tensor:
        """Return the states of one request, run so many tokens at a time, each part after those before it."""
        cache, found = prefix.cache if prefix else None, list[Tensor]()
        for start in range(0, len(request.tokens), most):
            part = request.tokens[start : start + most]
            cache, hidden = self._extended(cache, part)
            wanted = [place - start for place in request.positions if start <= place < start + len(part)]
            found.append(hidden[wanted].float())
        return torch.cat(found)

    def _run(self, requests: Sequence[Request], prefix: TorchPrefix | None) -> list[Tensor]:
        """Return the states of requests that lie on one side of the rotary limit, as one batch or each in parts."""
        lengths = [len(request.tokens) for request in requests]
        total = max(lengths) + (prefix.length if prefix else 0)
        apart = self._shares and prefix is not None
        most = None if apart else self._part_tokens(total, continues=prefix is not None)
        if most is not None and most < max(lengths):
            return [self._run_in_parts(request, prefix, most) for request in requests]
        if self.packs and len({len(request.tokens) for request in requests}) > 1:
            return self._run_packed(requests, prefix)
        longest = max(len(request.tokens) for request in requests)
        padded = [[*request.tokens, *[0] * (longest - len(request.tokens))] for request in requests]
        with shared_attention(self._model) if prefix and self._shares else nullcontext():
            cache = continued_cache(prefix.cache, len(padded), grows=self.sharing.stepwise) if prefix else None
            hidden = self._continued(self._ids(padded), cache)
        return [self._scored(hidden[index], request) for index, request in enumerate(requests)]

    def _run_packed(self, requests: Sequence[Request], prefix: TorchPrefix | None) -> list[Tensor]:
        """Return the same with one sequence behind the other, so that none is filled up."""
        lengths = [len(request.tokens) for request in requests]
        skip = prefix.length if prefix else 0
        places = self._ids([[skip + place for length in lengths for place in range(length)]])
        ids = self._ids([[token for request in requests for token in request.tokens]])
        with shared_attention(self._model, PackedRow(tuple(lengths), ids.device)):
            hidden = self._forward(ids, prefix.cache if prefix else None, position_ids=places)[0]
        parts = zip(requests, torch.split(hidden, lengths), strict=True)
        return [self._scored(part, request) for request, part in parts]

    def _scored(self, hidden: Tensor, request: Request) -> Tensor:
        """Return a copy of the states [tokens, d_model] that a request asks for, fp32, on the head's device."""
        return hidden[list(request.positions)].float().clone().to(self._head.weight.device)

    def _continued(self, ids: Tensor, cache: Any) -> Tensor:
        """Return the final states of a batch after what `cache` holds, a token at a time where the model needs that."""
        if cache is None or not self.sharing.stepwise:
            return self._forward(ids, cache)
        return torch.cat([self._forward(column, cache) for column in torch.split(ids, 1, dim=1)], dim=1)

    def _ids(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(sequences, dtype=torch.long, device=self._model.device)

    def _forward(self, ids: Tensor, cache: Any, **places: Tensor) -> Tensor:
        if cache is None and self._kv_changes:
            cache = passing_cache(self._kv_changes)
        return self._final_states(ids, cache, **places)


def _cast_prefix(prefix: Prefix | None) -> TorchPrefix | None:
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
    """Yield the indices of the requests on either side of a rotary limit, and whether they can continue their prefix.

    `skip` is the prefix's length in tokens. What crosses the limit can't: the prefix's keys were turned otherwise.
    """
    for is_long in (False, True):
        rows = [i for i, r in enumerate(requests) if (skip + len(r.tokens) > limit) == is_long]
        if rows:
            yield rows, not (is_long and skip <= limit)


def rope_limit(config: Any) -> float:
    """Return the length beyond which a whole sequence is turned by other rotary frequencies (LongRoPE).

    Ding et al., arXiv 2402.13753; Phi-3's and Phi-4's. Infinite for models of one set of frequencies.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # some have a set a kind of layer
    limits = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(limits, default=math.inf)


class TorchBackend:
    """Installs variants in a transformers model, one at a time."""

    name = "torch"
    fake_quantizes = True
    memory_limit = None

    def __init__(self, model: Any, description: Description, head: Head, weight_dtype: torch.dtype) -> None:
        """`weight_dtype` is the checkpoint's: originals are kept in it while a variant is installed, where exact."""
        self._model = model
        self._head_name = description.head
        self._head = head
        self._weight_dtype = weight_dtype
        self._is_lent = False
        self._batches = FittingBatches()
        self.sharing = TorchSession(model, head).sharing

    @property
    def warnings(self) -> list[str]:
        """Sentences on the trials that failed: of shared prefixes, of packed batches, of the sweep's kernel."""
        return [each for each in (self.sharing.warning, sweep_warning(self._head.weight.device)) if each]

    @property
    def shares_prefixes(self) -> bool:
        """Return whether the trial at load found a way to share prefixes."""
        return self.sharing.prefixes

    @property
    def batch_tokens(self) -> int:
        """Tokens a batch that suit the device and its free memory."""
        itemsize = self._head.weight.element_size()
        return batch_tokens(text_config(self._model), itemsize, tightest_device(self._model))

    @property
    def head(self) -> Head:
        """The baseline's own head."""
        return self._head

    def head_for(self, target: Target) -> Head:
        """Return the head that a target's states go through: a variant's own, or that of its tied embedding."""
        variant = target.variant() if isinstance(target, Saved) else target
        return self._head if variant is None else variant_head(self._model, variant, self._head, self._head_name)

    def reserve(self, positions: int, schemes: Sequence[Scheme] = ()) -> None:
        """Do nothing: the whole model is in memory, and states lie in the host's."""

    def change_weights(self, change: Callable[[str, Tensor], None]) -> None:
        """Change each of the model's weights in place and for good."""
        for name, weight in weights_of(self._model).items():
            change(name, weight)

    def identity(self, target: Target) -> dict[str, Any]:
        """Return nothing: the baseline's key names the type and the device that torch computes with."""
        return {}

    def prepare(self, progress: Progress) -> None:
        """Do nothing: the model is loaded."""

    def describe(self, session: TorchSession, target: Target) -> None:
        """Return None: the run's environment says how torch runs."""

    @contextmanager
    def open(self, target: Target) -> Iterator[TorchSession]:
        """Open a variant, or the baseline with None; one variant at a time.

        Raises:
            QevalError: A variant is installed already, so neither it nor the baseline could be told apart.
        """
        if self._is_lent:
            raise QevalError("The model's weights are those of another variant; close its session first.")
        if target is None:
            yield TorchSession(self._model, self._head, batches=self._batches)
            return
        variant = target
        if isinstance(variant, Saved):
            variant = variant.variant(self._place_of_codes(variant.folder))
        head = self.head_for(variant)
        weights = installed(self._model, variant, skip=self._head_name, keep_dtype=self._weight_dtype)
        changes = kv_changes(self._model, variant.scheme, variant.ranges, self._model.device)
        rounded = rounded_inputs(self._model, variant.rounded_inputs, variant.ranges, self._model.device)
        del variant, target  # its integers need not lie in memory beside what they stand for
        self._is_lent = True
        try:
            with weights, rounded:
                yield TorchSession(self._model, head, kv_changes=changes, batches=self._batches)
        finally:
            self._is_lent = False

    def _place_of_codes(self, folder: Path) -> Callable[[str], torch.device] | None:
        """Return where each weight is unpacked, a byte a number: on its CUDA GPU with room for it, else on the host."""
        host = torch.device("cpu")
        if self._model.device.type != "cuda":
            return None
        places = {name: weight.device for name, weight in weights_of(self._model).items()}
        sizes: Counter[torch.device] = Counter()
        for entry in read_manifest(folder).weights:
            sizes[places.get(entry.name, self._model.device)] += entry.rows * entry.columns
        crowded = without_room(sizes)

        def place(name: str) -> torch.device:
            device: torch.device = places.get(name, self._model.device)
            return host if device in crowded else device

        return place

"""Memory of batches: how much one takes, how much there is, and what to do when it was not enough."""

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from qeval.errors import QevalError, UsageError, is_out_of_memory
from qeval.models.device import free_bytes, release_cached
from qeval.models.structure.supported import layer_configs
from qeval.quant.scheme import Scheme
from qeval.types import Request

_CPU_BATCH, _GPU_BATCH = 2048, 32768
"""Tokens a batch beyond which nothing gets faster."""
_LEAST_BATCH = 128
_ROUNDED_ARRAYS = 8
"""fp32 arrays of a tensor's size while it is rounded (ggml's types take the most), and those that stay."""
_SHARE = 4
"""A batch's activations may take one part in so many of what is free: keys, values and logits come beside."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of parameters in glibc's malloc.h."""
_LARGE_BYTES = 1 << 18

_T = TypeVar("_T")
_Part = TypeVar("_Part")


def return_large_blocks() -> None:
    """Have the C library give large blocks back to the system when they are freed (glibc; elsewhere nothing is done).

    It would keep blocks of up to 32 MiB for later use, and a limit on memory could not be kept.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_TRIM_THRESHOLD, _LARGE_BYTES)


def batch_tokens(config: Any, itemsize: int, device: torch.device) -> int:
    """Return the tokens a batch that suit the device and fit in its free memory: a power of two, which hides noise."""
    fits = free_bytes(device) // _SHARE // token_activations(config, itemsize)
    most = _GPU_BATCH if device.type == "cuda" else _CPU_BATCH
    return max(_LEAST_BATCH, min(most, 1 << max(fits.bit_length() - 1, 0)))


def token_activations(config: Any, itemsize: int) -> int:
    """Return the bytes that a token's activations take at most inside a decoder layer (an upper estimate).

    The MLP's gate, up, product and activation; the normed, rotated, attended and residual states beside. In a mixture a
    token goes to several experts at once: each has its own.
    """
    return max(_layer_activations(each, itemsize) for each in layer_configs(config))


def _layer_activations(config: Any, itemsize: int) -> int:
    inner = _inner_size(config)
    chosen = getattr(config, "num_experts_per_tok", None) or 0
    each = getattr(config, "moe_intermediate_size", None) or inner
    inner = max(inner, chosen * each + (getattr(config, "shared_expert_intermediate_size", None) or 0))
    heads = (getattr(config, "num_attention_heads", None) or 0) * (getattr(config, "head_dim", None) or 0)
    width = int(config.hidden_size)
    return itemsize * (4 * inner + (6 + 3 * chosen) * width + 4 * max(int(heads), width))


def _inner_size(config: Any) -> int:
    """Return the width of a layer's feed-forward, the largest where the configuration lists one a layer (Gemma 3n)."""
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return int(max(inner) if isinstance(inner, Sequence) else inner)


def rounding_bytes(config: Any, scheme: Scheme) -> int:
    """Return the bytes that rounding a scheme's tensors takes a token beside its activations (an upper estimate).

    One linear's input, or one layer's keys or values, in fp32: scaled, rounded, its parts and its scales by blocks; the
    input that was rounded last and the rounded keys stay beside.
    """
    width = int(config.hidden_size)
    inputs = max(*map(_inner_size, layer_configs(config)), width) if scheme.activations else 0
    cached = max(map(_cached_width, layer_configs(config))) if scheme.caches else 0
    return 4 * _ROUNDED_ARRAYS * (inputs + cached)


def _cached_width(config: Any) -> int:
    """Return the numbers that a token's keys take in a layer."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or int(config.hidden_size) // heads
    return int(getattr(config, "num_key_value_heads", None) or heads) * int(size)


def has_bf16() -> bool:
    """Return whether this processor multiplies bf16 matrices itself (AVX512-BF16, AMX, or Arm's BF16)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _bf16_instructions()


def _bf16_instructions() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # before torch 2.10
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))


def require_bf16() -> None:
    """Refuse bf16 on a processor that has no instructions for it: it would compute hundreds of times slower.

    Raises:
        UsageError: it says what to do.
    """
    if not has_bf16():
        raise UsageError(
            "--compute bf16: this processor has no bf16 instructions (AVX512-BF16 or AMX), so it would be many times "
            "slower than fp32; leave --compute out."
        )


def reason_of(error: Exception, doing: str, device: torch.device) -> str:
    """Say in a sentence why `doing` something failed; lack of memory with what was free and what helps."""
    if not (isinstance(error, RuntimeError) and is_out_of_memory(error)):
        return str(error)
    free = free_bytes(device) / 2**30
    return (
        f"{device} ran out of memory while {doing} ({free:.1f} GiB are free now); give a smaller --batch-tokens, close "
        "what else uses it, or take --stream, which holds one layer at a time."
    )


def with_room_made(compute: Callable[[], _T], make_room: Callable[[], None]) -> _T:
    """Return `compute()`; where memory lacks, `make_room` is called and it is tried once more."""
    try:
        return compute()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    make_room()  # outside of the handler, whose error holds what the frames held
    release_cached()
    return compute()


class HasBlocks(Protocol):
    """A session as far as it makes logits of some positions at a time."""

    @property
    def block_rows(self) -> int:
        """The positions whose logits are made at a time."""
        ...

    def halve_blocks(self) -> bool:
        """Make half as many at a time from now on; False where that can't be."""
        ...


def with_fitting_blocks(session: HasBlocks, compute: Callable[[int], _T]) -> _T:
    """Return `compute(rows)` of the rows of a block of logits: half as many, and remembered, wherever memory lacked.

    Raises:
        RuntimeError: As `compute`, also of memory that lacks where the session can't make fewer rows.
    """
    while (found := _tried(compute, session.block_rows, may_fail=session.halve_blocks)) is None:
        release_cached()
    return found


class FittingBatches:
    """Runs batches as large as memory holds; a size that it did not hold is not tried again."""

    def __init__(self) -> None:
        """Start without limits."""
        self.limit: int | None = None
        """The most tokens of a batch, each sequence counted as long as the longest; None where all have fitted."""
        self.block_rows: int | None = None
        """The most positions whose logits are made at a time; None where all blocks have fitted."""

    def run(self, run: Callable[[Sequence[Request]], list[_T]], requests: Sequence[Request]) -> list[_T]:
        """Return `run(requests)`, in as many parts as memory makes necessary.

        Raises:
            QevalError: Memory lacks for a single sequence.
        """
        waiting, results = self._parts(requests), list[_T]()
        while waiting:
            part = waiting.pop(0)
            of_part = _tried(run, part)
            if of_part is not None:
                results += of_part
                continue

            # half of what did not fit is the limit from now on, for this call's other parts too
            release_cached()
            if len(part) == 1:
                raise QevalError(
                    f"There is not enough memory for a batch of one sequence of {len(part[0].tokens)} tokens; give a "
                    "smaller --window, close what else uses the device, or take --stream."
                )
            self.limit = _padded_tokens(part) // 2
            waiting = [half for each in (part, *waiting) for half in self._parts(each)]
        return results

    def run_on(
        self,
        run: Callable[[_Part, Sequence[int]], _Part],
        state: _Part,
        tokens: Sequence[int],
        most: int | None = None,
    ) -> _Part:
        """Return the state after all tokens of one sequence, in as many parts as memory makes necessary.

        Args:
            run: Makes of a state and some tokens the state after them; it leaves the one that it is given as it was.
            state: The state before the sequence.
            tokens: The sequence's ids.
            most: The tokens of a part at most, where memory holds them.

        Raises:
            QevalError: Memory lacks for a single token.
        """
        while tokens:
            part = tokens[: min(self.limit or len(tokens), most or len(tokens))]
            after = _tried(partial(run, state), part)
            if after is not None:
                state, tokens = after, tokens[len(part) :]
                continue
            release_cached()
            if len(part) == 1:
                raise QevalError(
                    "There is not enough memory for one more token of a prefix; close what else uses the device, or "
                    "take --stream."
                )
            self.limit = len(part) // 2
        return state

    def _parts(self, requests: Sequence[Request]) -> list[Sequence[Request]]:
        """Cut requests, in their order, into batches within the limit; a longer sequence is a batch of its own."""
        if self.limit is None:
            return [requests]
        parts: list[list[Request]] = []
        longest = 0
        for request in requests:
            longest = max(longest, len(request.tokens))
            if not parts or (len(parts[-1]) + 1) * longest > self.limit:
                parts.append([])
                longest = len(request.tokens)
            parts[-1].append(request)
        return list(parts)


def _padded_tokens(requests: Sequence[Request]) -> int:
    return len(requests) * max(len(request.tokens) for request in requests)


def _tried(run: Callable[[_Part], _T], part: _Part, *, may_fail: Callable[[], bool] = lambda: True) -> _T | None:
    """Return None where memory lacked and that `may_fail`: the error is let go of, and with it what its frames hold."""
    try:
        return run(part)
    except RuntimeError as error:
        if not (is_out_of_memory(error) and may_fail()):
            raise
        return None

"""How much memory a batch takes, how much there is, and what to do when it was not enough."""

import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import psutil
import torch

from qeval.errors import QevalError, UsageError
from qeval.types import Request

_CPU_BATCH, _GPU_BATCH = 2048, 32768
"""Tokens a batch beyond which nothing gets faster."""
_LEAST_BATCH = 128
_SHARE = 4
"""A batch's activations may take one part in so many of what is free: keys, values and logits come beside."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of parameters in glibc's malloc.h."""
_LARGE_BYTES = 1 << 18

_T = TypeVar("_T")


def return_large_blocks() -> None:
    """Have the C library give large blocks back to the system when they are freed (glibc; elsewhere nothing is done).

    It would keep blocks of up to 32 MiB for later use, and a limit on memory could not be kept.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_TRIM_THRESHOLD, _LARGE_BYTES)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; what other programs may take meanwhile is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def batch_tokens(config: Any, itemsize: int, device: torch.device) -> int:
    """Tokens a batch that suit the device and fit in its free memory; a power of two, so that noise rarely shows."""
    fits = free_bytes(device) // _SHARE // token_activations(config, itemsize)
    most = _GPU_BATCH if device.type == "cuda" else _CPU_BATCH
    return max(_LEAST_BATCH, min(most, 1 << max(fits.bit_length() - 1, 0)))


def token_activations(config: Any, itemsize: int) -> int:
    """Bytes that a token's activations take at most inside a decoder layer (an upper estimate).

    The MLP's gate, up, product and activation; the normed, rotated, attended and residual states beside. In a mixture a
    token goes to several experts at once: each has its own.
    """
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    chosen = getattr(config, "num_experts_per_tok", None) or 0
    each = getattr(config, "moe_intermediate_size", None) or inner
    inner = max(inner, chosen * each + (getattr(config, "shared_expert_intermediate_size", None) or 0))
    heads = config.num_attention_heads * (getattr(config, "head_dim", None) or 0)
    width = int(config.hidden_size)
    return itemsize * (4 * int(inner) + (6 + 3 * chosen) * width + 4 * max(int(heads), width))


def has_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices itself (AVX512-BF16, AMX, or Arm's BF16)."""
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


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory, on a GPU or on the CPU, where it says so in words alone."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def with_half_on_lack(run: Callable[[Sequence[Request]], list[_T]], requests: Sequence[Request]) -> list[_T]:
    """`run(requests)`; where memory lacks, once more in two halves.

    Raises:
        QevalError: memory lacked for a half too.
    """
    found = _tried(run, requests)
    if found is not None:
        return found
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = (len(requests) + 1) // 2
    halves = [_tried(run, part) for part in (requests[:middle], requests[middle:]) if part]
    if any(half is None for half in halves):
        tokens = sum(len(request.tokens) for request in requests)
        raise QevalError(
            f"There is not enough memory for a batch of {tokens} tokens in {len(requests)} sequences, nor for half of "
            "it; give a smaller --batch-tokens, or a smaller --window."
        )
    return [each for half in halves for each in half or ()]


def _tried(run: Callable[[Sequence[Request]], list[_T]], requests: Sequence[Request]) -> list[_T] | None:
    """None where memory lacked: the error is let go of, and with it what its frames hold."""
    try:
        return run(requests)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None

"""Arithmetic in half precision: products in bf16 or fp16, and sums in fp32.

A variant's KL-divergence is small beside what bf16 rounds away: with everything in bf16 the demo model against itself
in fp32 reads 0.0013 nats, and INT8 per channel 1.7 times its true KL. Most of that comes from the residual stream and
the logits, which are sums. So matrix products and attention run in the weights' type, by torch's own autocast, and
what lies between them (the residual stream, norms, softmaxes) in fp32; the head's logits are never rounded below fp32.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from qeval.arithmetic import dtype_name
from qeval.errors import first_line
from qeval.models.structure.forward import body_of

HALF = (torch.bfloat16, torch.float16)
"""The types whose sums are kept in fp32."""

_DEVICE_TYPES = ("cpu", "cuda", "mps")
_P = ParamSpec("_P")
_R = TypeVar("_R")

_OFF_GRID = 4 / 3
_BLOCK_NUMBERS = 1 << 22
"""Weights of a head that are widened to fp32 at a time where no kernel gives fp32 out of half-precision inputs."""


def set_exact_sums() -> None:
    """Have CUDA's matrix products add up in fp32, and multiply fp32 in fp32 (no TF32). Holds for the process."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def with_tf32() -> Iterator[None]:
    """Let CUDA multiply fp32 in TF32 for the length of the block: up to seven times as fast.

    Its inputs keep 11 bits of mantissa where bf16's keep 8, so of the noise that bf16 makes, a KL, a 64th is left:
    enough to measure that noise by.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def keep_sums_in_fp32(model: Any, device: torch.device) -> Callable[[], None]:
    """Make every forward pass of a half-precision `model` on `device` keep its residual stream in fp32.

    Nothing is done to a model in fp32. Returns what undoes it.
    """
    dtype = model.get_input_embeddings().weight.dtype
    if dtype not in HALF:
        return lambda: None
    # The residual stream starts at the embedding, and stays fp32 by type promotion from there on.
    hook = model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.float())
    norms = [module for module in model.modules() if _is_norm(module)]
    _set_type(norms, torch.float32)  # LayerNorm takes no fp32 input with bf16 gains
    wrapped = list({id(module): module for module in (model, body_of(model))}.values())
    hooked = {id(module): vars(module)["forward"] for module in wrapped if "forward" in vars(module)}
    for module in wrapped:
        module.forward = _in_autocast(module.forward, device.type, dtype)

    def undo() -> None:
        hook.remove()
        _set_type(norms, dtype)
        for module in wrapped:
            del module.forward
            if id(module) in hooked:  # accelerate's, of a model on several GPUs
                module.forward = hooked[id(module)]

    return undo


@torch.inference_mode()
def sums_in_fp32_where_possible(model: Any) -> tuple[str, ...]:
    """Keep sums in fp32 as `keep_sums_in_fp32` does, if a few tokens pass.

    Where the model's code takes no fp32 between products it computes in its own type throughout; a note says so.
    """
    undo = keep_sums_in_fp32(model, model.device)
    rows = model.get_input_embeddings().weight.shape[0]
    try:
        model(input_ids=torch.arange(1, 9, device=model.device).unsqueeze(0) % rows, use_cache=False)
    except RuntimeError as error:
        undo()
        return (
            f"{type(model).__name__} computes wholly in {dtype_name(model.dtype)}, sums included: "
            f"its code takes no fp32 between products ({first_line(error)}); small KLs are inflated, --compute fp32 "
            "is exact.",
        )
    return ()


def wide_product(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `states @ weight.T + bias` in fp32: `states` [n, width], `weight` [vocab, width] in any float type."""
    if weight.dtype not in HALF:
        return torch.nn.functional.linear(states.to(weight.dtype), weight, bias).float()
    product = _half_product(states, weight)
    return product if bias is None else product.add_(bias)


def _half_product(states: Tensor, weight: Tensor) -> Tensor:
    if weight.device.type == "cuda" and _has_wide_output(weight.device, weight.dtype):
        return torch.mm(states.to(weight.dtype), weight.T, out_dtype=torch.float32)
    product = torch.empty(len(states), len(weight), dtype=torch.float32, device=weight.device)
    rows = max(1, _BLOCK_NUMBERS // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        product[:, part] = torch.nn.functional.linear(states.float(), weight[part].float())
    return product


def with_rounding(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `weight` with an error such as a variant's values have when they are installed in `dtype`.

    A variant's values don't lie on the type's grid, the checkpoint's do: so they are rounded at 4/3 of their size.
    """
    return (weight.float() * _OFF_GRID).to(dtype).float().div_(_OFF_GRID).to(weight.dtype)


def outside_autocast(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return `function` as one that a forward pass may call and that computes in the types of what it is given."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with ExitStack() as stack:
            for device_type in _DEVICE_TYPES:
                if torch.is_autocast_enabled(device_type):
                    stack.enter_context(torch.autocast(device_type, enabled=False))
            return function(*args, **kwargs)

    return run


@functools.cache
def _has_wide_output(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this torch multiplies half-precision matrices into fp32 on the device (CUDA, from torch 2.8)."""
    one = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        return torch.mm(one, one, out_dtype=torch.float32).dtype == torch.float32
    except (TypeError, RuntimeError):  # an older torch has no such argument, another build no such kernel
        return False


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module's only parameters are vectors, its gain among them."""
    parameters = dict(module.named_parameters())
    return "weight" in parameters and all(parameter.dim() == 1 for parameter in parameters.values())


def _set_type(modules: Sequence[nn.Module], dtype: torch.dtype) -> None:
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)


def _in_autocast(forward: Callable[..., Any], device_type: str, dtype: torch.dtype) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _autocast(device_type, dtype):
            return forward(*args, **kwargs)

    return run


def _autocast(device_type: str, dtype: torch.dtype) -> AbstractContextManager[Any]:
    # Without autocast's cache of weights: variants are written over the weights between two passes.
    return torch.autocast(device_type, dtype=dtype, cache_enabled=False)

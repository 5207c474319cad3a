"""The caller's process as a call must leave it, and how a call is written down."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

_NOT_RECORDED = ("progress", "on_plan", "command")


@contextmanager
def torch_settings_restored() -> Iterator[None]:
    """Put torch's number of threads and its ways to multiply back when the block ends."""
    import torch  # noqa: PLC0415 - takes seconds

    cuda = torch.backends.cuda.matmul
    reduced = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "allow_tf32")
    threads, products = torch.get_num_threads(), {name: getattr(cuda, name) for name in reduced}
    convolutions = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = convolutions
        for name, value in products.items():
            setattr(cuda, name, value)


def call_text(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """Return a call as Python writes it, without what is left at its default: what a run's record names as its command.

    Args:
        function: A function of `qeval.api`.
        arguments: Its parameters' values by name.

    >>> def quantize(model, *, method, seed=0): ...
    >>> call_text(quantize, {"model": "demo", "method": "rtn", "seed": 0})
    "qeval.quantize(model='demo', method='rtn')"
    """
    defaults = {name: parameter.default for name, parameter in signature(function).parameters.items()}
    words = [
        f"{name}={_value_text(arguments[name])}"
        for name, default in defaults.items()
        if name not in _NOT_RECORDED and arguments[name] is not default and arguments[name] != default
    ]
    return f"qeval.{function.__name__}({', '.join(words)})"


def _value_text(value: Any) -> str:
    if isinstance(value, Path):
        return repr(str(value))
    plain = value is None or isinstance(value, str | int | float | list | tuple | dict)
    return repr(value) if plain else f"<{type(value).__name__}>"

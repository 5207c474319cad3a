"""The words of a checkpoint's configuration for how activations, keys and values are rounded, as qeval's formats.

A static scale s of a file stands for a largest magnitude: s times the largest value of its type (127, 448; 448 * 6 for
the second scale of NVFP4), which is what `fake_quantize_rows` takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qeval.quant.scheme import PartName, TensorFormat, parse_format

_LARGEST = {"fp8": 448.0, "nvfp4": 448.0 * 6.0}
_MICRO_SIZE, _NVFP4_SIZE = 32, 16


@dataclass(frozen=True)
class TensorRounding:
    """The way in which a configuration rounds tensors of one kind.

    Attributes:
        how: The format; None where qeval has none.
        reason: What it is in words, where qeval has no format for it.
        scale: The name of a static scale below its module; empty where the format is dynamic.
        divides: Whether the file holds the scale's inverse, as compressed-tensors' `input_global_scale` is.
        default: The scale where the file has none, as engines have it; None where none goes without saying.
        limits: What of it is not applied although there is a format.
    """

    how: TensorFormat | None
    reason: str = ""
    scale: str = ""
    divides: bool = False
    default: float | None = None
    limits: str = ""

    @property
    def largest(self) -> float:
        """The largest magnitude that a static scale of 1 stands for."""
        assert self.how is not None
        return _LARGEST.get(self.how.kind, float((1 << (self.how.bits - 1)) - 1))


def rounding_to(
    name: str, part: PartName, *, scale: str = "", divides: bool = False, limits: str = ""
) -> TensorRounding:
    """Return the rounding to a format of qeval's by its name."""
    return TensorRounding(parse_format(name, part), scale=scale, divides=divides, limits=limits)


def no_format(reason: str) -> TensorRounding:
    """Return a rounding that qeval has no format for."""
    return TensorRounding(None, reason)


def rounding_of(arguments: Mapping[str, Any], part: PartName, scale: str) -> TensorRounding:
    """Return what compressed-tensors' `QuantizationArgs` mean.

    Integers are symmetric with the largest magnitude at 127, as vLLM's and SGLang's kernels have it; the forward pass
    of compressed-tensors itself has it at 127.5.

    Args:
        arguments: `num_bits`, `type`, `strategy`, `dynamic`, `group_size`, `symmetric`, `scale_dtype`.
        part: What they are of.
        scale: The name of a static scale below its module: `input_scale`.
    """
    name = _format_name(arguments)
    if name == "nvfp4":
        return rounding_to(name, part, scale=scale.replace("_scale", "_global_scale"), divides=True)
    if name:
        return rounding_to(name, part, scale=scale if name.endswith("tensor") else "")
    kind, size = f"{arguments.get('type', 'int')}{arguments.get('num_bits', 8)}", arguments.get("group_size")
    words = f"{kind} by {_strategy(arguments)}{f' of {size}' if size else ''}"
    if not arguments.get("symmetric", True):
        return no_format(f"{words} with zero points, which qeval's formats of activations have not")
    if not arguments.get("dynamic"):
        return no_format(f"{words}, static")
    why = ": a scale over a batch would make a score depend on what is beside it" if "tensor" in words else ""
    return no_format(f"{words}, dynamic{why}")


def _format_name(arguments: Mapping[str, Any]) -> str:
    """Return the name of qeval's format; empty where it has none."""
    bits, kind = int(arguments.get("num_bits", 8)), str(arguments.get("type", "int")).lower()
    is_dynamic, size = bool(arguments.get("dynamic")), arguments.get("group_size")
    if not arguments.get("symmetric", True):
        return ""
    if is_dynamic and _is_micro(arguments):
        return f"mxfp{bits}-even" if kind == "float" and bits in (4, 8) else ""
    if kind == "float" and bits == 4:
        return "nvfp4" if _strategy(arguments) == "tensor_group" and size == _NVFP4_SIZE else ""
    number = f"int{bits}" if kind == "int" and 2 <= bits <= 8 else "fp8" if kind == "float" and bits == 8 else ""
    spans = {("tensor", False): "tensor", ("token", True): "token", ("group", True): f"g{size}"}
    span = spans.get((_strategy(arguments), is_dynamic))
    return f"{number}-{span}" if number and span else ""


def _strategy(arguments: Mapping[str, Any]) -> str:
    """Return what shares a scale; a configuration that does not say it means groups where it gives their size."""
    size = arguments.get("group_size")
    return str(arguments.get("strategy") or ("group" if size and size > 0 else "tensor")).lower()


def _is_micro(arguments: Mapping[str, Any]) -> bool:
    """Return whether blocks share a power of two; older configurations name no type of the scales for FP4."""
    is_byte = "uint8" in str(arguments.get("scale_dtype"))
    is_fp4 = arguments.get("num_bits") == 4 and _strategy(arguments) == "group"
    return arguments.get("group_size") == _MICRO_SIZE and arguments.get("type") == "float" and (is_byte or is_fp4)

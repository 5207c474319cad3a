"""The roundings of inputs that an exported graph computes itself, and what of a scheme ONNX Runtime runs."""

from qeval.backends.onnx.cache_format import cache_format
from qeval.errors import UsageError
from qeval.quant.scheme import Scheme, TensorFormat

_SPANS = ("token", "tensor")
_CPU = "cpu"


def check_graph_scheme(scheme: Scheme, ep: str = _CPU) -> None:
    """Refuse a scheme that no exported graph computes.

    Args:
        scheme: What a variant rounds beside its weights.
        ep: The execution provider.

    Raises:
        UsageError: It rounds inputs, keys or values otherwise than operators of the CPU do.
    """
    if scheme.activations is not None:
        check_input_format(scheme.activations)
        if ep != _CPU:
            raise UsageError(
                f"products of integers were tried on the CPU's kernel alone, not on {ep}; say --ep {_CPU}."
            )
    cache_format(scheme, ep)


def check_input_format(how: TensorFormat) -> None:
    """Refuse a format of inputs that is not one of integers with a scale a token or tensor.

    Raises:
        UsageError: ONNX Runtime's products of integers have no such inputs.
    """
    if how.element is not None or how.span not in _SPANS:
        raise UsageError(
            f"its products of integers (MatMulInteger) have inputs of int8 or less with a scale a token or tensor, not "
            f"{how}; say int8-w8a8, +a-int8-token or +a-int8-tensor."
        )

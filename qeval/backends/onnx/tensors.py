"""The floats of a graph's tensors, as torch has them."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qeval.backends.onnx.files import array_of

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def floats_of(tensor: Any) -> Tensor:
    """Return the values of a tensor of floats, in its own type where torch has that, else in fp32."""
    array = array_of(tensor)
    if tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE):
        return torch.from_numpy(array.copy())
    values = torch.from_numpy(array.astype(np.float32))
    return values.bfloat16() if tensor.dtype == ir.DataType.BFLOAT16 else values


def vectors_of(graph: ir.Graph, length: int) -> Iterator[Tensor]:
    """Yield the float initializers of so many numbers (gains of norms, biases), fp32 [length]; no other is read."""
    for value in graph.initializers.values():
        held = value.const_value
        if held is not None and held.dtype in _FLOATS and math.prod(held.shape.numpy()) == length:
            yield floats_of(held).float().reshape(-1)

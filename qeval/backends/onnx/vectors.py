"""The vectors of floats that a graph holds: gains of norms, biases."""

import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qeval.backends.onnx.files import Files, load_graph

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def vectors_of(files: Files, length: int) -> Iterator[NDArray[np.float32]]:
    """Every float initializer of so many numbers, as fp32 [length]; nothing else is read."""
    for value in load_graph(files.model).graph.initializers.values():
        held = value.const_value
        if held is not None and held.dtype in _FLOATS and math.prod(held.shape.numpy()) == length:
            yield held.numpy().astype(np.float32).reshape(-1)

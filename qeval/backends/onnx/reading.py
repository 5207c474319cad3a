"""A graph's stored matrices, as the readers of checkpoints return theirs: integers on a grid, else values.

Also by what a graph multiplies the input of a product.

Zero points that a graph leaves out are what the kernels take: 2^(bits-1) for MatMulNBits and packed bytes of
GatherBlockQuantized, 0 for everything with a type of its own (INT4, UINT4, INT8).
Sources: com.microsoft's MatMulNBits and GatherBlockQuantized (onnxruntime/docs/ContribOperators.md), DequantizeLinear
(onnx/docs/Operators.md, opset 21).
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qeval.backends.onnx.files import array_of
from qeval.backends.onnx.matrices import Stored, integer
from qeval.backends.onnx.tensors import floats_of
from qeval.formats.base import DecodedMatrix, Values, on_grid, read_bits

_GAINS = {
    "SimplifiedLayerNormalization": 1, "LayerNormalization": 1, "RMSNormalization": 1,
    "SkipSimplifiedLayerNormalization": 2, "SkipLayerNormalization": 2,
}  # fmt: skip
"""Norms, and which of their inputs is the gain."""
_UNCHANGED = frozenset({"Cast", "DequantizeLinear", "DynamicQuantizeLinear", "Identity", "QuantizeLinear"})
"""What changes the scale of no channel."""


def why_unread(stored: Stored) -> str | None:
    """Say why a matrix's numbers are not read; None where `read` does."""
    matrix, parts = stored
    if matrix.op not in _READERS:
        return f"{matrix.op} is not read"
    if parts.scales is None and parts.values.dtype.is_integer():
        return f"the scales of {matrix.op} were not found"
    if not parts.plain:
        return "reshaped after it was stored"
    if matrix.op == "MatMulNBits" and len(parts.node.inputs) > 4 and parts.node.inputs[4] is not None:
        return "in groups by g_idx"
    if matrix.op == "GatherBlockQuantized" and (integer(parts.node, "quantize_axis", 1), matrix.role) != (
        1, "embedding",
    ):  # fmt: skip
        return "in blocks across its rows"
    return None


def read(stored: Stored) -> DecodedMatrix:
    """Return the matrix [rows, columns] of what `why_unread` has nothing against.

    Raises:
        ValueError: its tensors do not fit each other.
    """
    return _READERS[stored.matrix.op](stored)


def input_gain(node: ir.Node, columns: int) -> Tensor | None:
    """Return what the input of a product is multiplied by, fp32 [columns]: a norm's gain, scales, both.

    None where nothing is found to. What comes before a norm is not its business.
    """
    value, gain = node.inputs[0], None
    while value is not None and (before := value.producer()) is not None:
        if before.op_type in _GAINS:
            found = _vector(before.inputs[_GAINS[before.op_type]], columns)
            return found if gain is None or found is None else gain * found
        if before.op_type in _UNCHANGED:
            value = before.inputs[0]
        elif (split := _constant_side(before, columns)) is not None:
            value, vector = split
            if before.op_type == "Mul":
                gain = vector if gain is None else gain * vector
        else:
            break
    return gain


def _constant_side(node: ir.Node, columns: int) -> tuple[ir.Value | None, Tensor] | None:
    """Return the input that is computed, and the vector that it is multiplied by or that is added (a norm's bias)."""
    if node.op_type not in ("Mul", "Add"):
        return None
    for place in (0, 1):
        vector = _vector(node.inputs[place], columns)
        if vector is not None:
            return node.inputs[1 - place], vector
    return None


def _vector(value: ir.Value | None, columns: int) -> Tensor | None:
    """Return the constant floats [columns] behind a value, fp32; None if it is something else."""
    while value is not None and (tensor := ir.convenience.get_const_tensor(value)) is None:
        before = value.producer()
        value = before.inputs[0] if before is not None and before.op_type in ("Cast", "Identity") else None
    if value is None or tensor is None or not tensor.dtype.is_floating_point() or tensor.size != columns:
        return None
    return floats_of(tensor).float().reshape(-1)


def _blocks(stored: Stored) -> DecodedMatrix:
    """MatMulNBits and GatherBlockQuantized: blocks along a row, codes packed or of a type of their own."""
    matrix, parts = stored
    how = matrix.quantization
    assert how is not None and how.block is not None
    blocks = -(-matrix.columns // how.block)
    codes = _unpacked(parts.values, how.bits, matrix.rows, matrix.columns)
    scales = floats_of(parts.scales).float().reshape(matrix.rows, blocks)
    if parts.zeros is not None and parts.zeros.dtype.is_floating_point():
        zeros = floats_of(parts.zeros).float().reshape(matrix.rows, blocks)
        return _values(stored, _spread(codes, zeros, scales, how.block), "with float zero points")
    if parts.zeros is not None:
        return on_grid(codes, scales, _unpacked(parts.zeros, how.bits, matrix.rows, blocks), how.bits, how.block)
    typed = parts.values.dtype.bitwidth < 8 and not parts.values.dtype.is_signed()
    return on_grid(codes, scales, torch.zeros(scales.shape) if typed else None, how.bits, how.block)


def _unpacked(tensor: Any, bits: int, rows: int, count: int) -> Tensor:
    """Return codes [rows, count] uint8 from 0 to 2^bits - 1; signed ones are moved up."""
    array = array_of(tensor).reshape(rows, -1)
    if tensor.dtype.bitwidth < 8 or tensor.dtype.is_signed():
        return _unsigned(array, tensor.dtype)[:, :count].contiguous()
    return read_bits(torch.from_numpy(array.copy()), bits, count)


def _unsigned(array: Any, dtype: ir.DataType) -> Tensor:
    return torch.from_numpy((array.astype(np.int16) + _middle(dtype)).astype(np.uint8))


def _middle(dtype: ir.DataType) -> int:
    """Return by how much the codes of a type are moved up."""
    return 1 << (dtype.bitwidth - 1) if dtype.is_signed() else 0


def _spread(codes: Tensor, zeros: Tensor, scales: Tensor, block: int) -> Tensor:
    """Values of codes whose scales and zero points each stand for a block of a row."""
    columns = codes.shape[1]
    zeros, scales = (each.repeat_interleave(block, dim=1)[:, :columns] for each in (zeros, scales))
    return (codes.float() - zeros) * scales


def _dense(stored: Stored) -> DecodedMatrix:
    return _values(stored, _turned(stored, floats_of(stored.parts.values)))


def _dequantized(stored: Stored) -> DecodedMatrix:
    """Return a DequantizeLinear's matrix: integers that lie either way, with a scale for all, a row, or a block."""
    matrix, parts = stored
    kind = parts.values.dtype
    if kind.is_floating_point() and kind.bitwidth > 8:  # rounded in the graph itself: its floats are what is stored
        return _dense(stored)
    whole = not kind.is_floating_point() and kind.bitwidth <= 8
    scales = _along(stored, floats_of(parts.scales).float())
    zeros = torch.zeros(scales.shape) if parts.zeros is None else _along(stored, _numbers(parts.zeros))
    if not whole or (scales.numel() > 1 and len(scales) != matrix.rows):
        return _values(stored, _by_repeating(_turned(stored, _numbers(parts.values)), zeros, scales))
    codes = _unsigned(_turned(stored, array_of(parts.values)), kind).contiguous()
    block = integer(parts.dequantizer, "block_size", 0) or -(-matrix.columns // scales.shape[1])
    return on_grid(codes, scales, zeros + _middle(kind), kind.bitwidth, block)


def _integers(stored: Stored) -> DecodedMatrix:
    """Return the codes [columns, rows] that an integer product multiplies by, with a scale for all or a row."""
    matrix, parts = stored
    kind = parts.values.dtype
    codes = _unsigned(array_of(parts.values).T, kind).contiguous()
    scales = floats_of(parts.scales).float().reshape(-1, 1)
    zeros = torch.zeros(1, 1) if parts.zeros is None else _numbers(parts.zeros).reshape(-1, 1)
    return on_grid(codes, scales, (zeros + _middle(kind)).expand_as(scales), kind.bitwidth, matrix.columns)


def _along(stored: Stored, tensor: Tensor) -> Tensor:
    """Return scales or zero points as [1 or rows or blocks of rows, 1 or columns or blocks of columns]."""
    if tensor.numel() == 1:
        return tensor.reshape(1, 1)
    parts = stored.parts
    if tensor.dim() == 1:
        axis = integer(parts.dequantizer, "axis", 1) % 2
        tensor = tensor.reshape(-1, 1) if axis == 0 else tensor.reshape(1, -1)
    return tensor.T.contiguous() if parts.turned else tensor


def _by_repeating(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    for axis in (0, 1):
        times = -(-codes.shape[axis] // scales.shape[axis])
        spread = [
            each.repeat_interleave(times, dim=axis).narrow(axis, 0, codes.shape[axis]) for each in (zeros, scales)
        ]
        zeros, scales = spread
    return (codes - zeros) * scales


def _numbers(tensor: Any) -> Tensor:
    """Return any numbers, fp32."""
    return torch.from_numpy(array_of(tensor).astype(np.float32))


def _turned(stored: Stored, values: Any) -> Any:
    return values.T if stored.parts.turned else values


def _values(stored: Stored, values: Tensor, how: str = "") -> Values:
    form = f"{stored.matrix.dtype.lower()} {how}".rstrip()
    return Values(values.contiguous(), form, 8 * stored.matrix.size_bytes)


_READERS: Mapping[str, Callable[[Stored], DecodedMatrix]] = {
    "MatMulNBits": _blocks,
    "GatherBlockQuantized": _blocks,
    "DequantizeLinear": _dequantized,
    "MatMul": _dense,
    "FusedMatMul": _dense,
    "Gemm": _dense,
    "Gather": _dense,
    "DynamicQuantizeMatMul": _integers,
    "MatMulInteger": _integers,
    "MatMulIntegerToFloat": _integers,
    "QLinearMatMul": _integers,
}

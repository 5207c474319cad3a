"""The matrices that a graph multiplies by or looks up in, and how each is stored; of weights, zero points are read.

Read from the operators themselves: com.microsoft's MatMulNBits, MatMulBnb4, GatherBlockQuantized and (Q)MoE, the
integer products, and DequantizeLinear (TensorRT's of the same use too) before a MatMul, Gemm or Gather. What is counted
as stored is what the file holds: codes with their padding, scales in their own type, zero points.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx_ir as ir

from qeval.backends.onnx.files import array_of

GraphGranularity = Literal["block", "channel", "tensor"]
Role = Literal["body", "head", "embedding"]

_PASS = frozenset({"Cast", "Identity", "Reshape", "Transpose"})
"""What may stand between a stored matrix and the operator that uses it."""
_AFTER_HEAD = frozenset({
    "Add", "Cast", "Div", "Gather", "GatherND", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Tanh", "Unsqueeze",
})  # fmt: skip
"""What may stand between the head's product and the logits: soft caps, scales, a bias, a choice of positions."""
_BEFORE_LOOKUP = frozenset({"Cast", "Clip", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_DEQUANTIZERS = frozenset({"DequantizeLinear", "TRT_INT4DequantizeLinear", "TRT_FP8DequantizeLinear"})
_QUANTIZERS = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "TRT_FP8QuantizeLinear"})


@dataclass(frozen=True)
class Quantization:
    """The rule by which a matrix's integers are read."""

    bits: int
    granularity: GraphGranularity
    """What shares a scale: a block of a row, a row (an output channel), or the whole matrix."""
    block: int | None
    """Weights in a block, along the input dimension; None for coarser scales."""
    symmetric: bool
    """No zero points, or all of them in the middle of the range."""
    accuracy_level: int | None
    """MatMulNBits': 0 and 1 multiply in fp32, 4 rounds activations to int8. None where the operator has none; a
    DequantizeLinear that ONNX Runtime fuses gets it from the session (4 by default)."""


@dataclass(frozen=True)
class GraphMatrix:
    """A stored matrix [rows, columns] (output, input; for an embedding vocabulary, width; experts stacked)."""

    node: str
    """The node that multiplies by it or looks up in it."""
    op: str
    """The operator that reads what is stored: MatMulNBits, DequantizeLinear, or MatMul for floats."""
    weight: str
    """The initializer of its codes or floats."""
    rows: int
    columns: int
    dtype: str
    """ONNX's type of the codes or floats: `UINT8`, `INT4`, `FLOAT16`."""
    size_bytes: int
    """Codes or floats, scales and zero points as stored."""
    role: Role
    quantization: Quantization | None
    """None for floats."""

    @property
    def parameters(self) -> int:
        """Weights, padding left out."""
        return self.rows * self.columns


@dataclass(frozen=True, eq=False)
class GraphMatrixParts:
    """The tensors that a matrix is stored in, none of them read, and how they lie."""

    node: ir.Node
    """Multiplies by the matrix, or looks up in it."""
    values: Any
    """Codes or floats."""
    scales: Any = None
    zeros: Any = None
    dequantizer: ir.Node | None = None
    turned: bool = False
    """Stored as [columns, rows]."""
    plain: bool = True
    """The stored tensor has the shape and order that its dequantizer, or else its product, is given."""

    @property
    def size_bytes(self) -> int:
        """As stored."""
        return sum(int(part.nbytes) for part in (self.values, self.scales, self.zeros) if part is not None)


class Stored(NamedTuple):
    """A matrix and where its numbers are."""

    matrix: GraphMatrix
    parts: GraphMatrixParts


def stored_in(graph: ir.Graph, ids: str, logits: str) -> tuple[Stored, ...]:
    """Return every matrix of a decoder graph in its order; `ids` and `logits` are the names of its input and output."""
    nodes = list(graph.all_nodes())
    head = _head_of(next((value for value in graph.outputs if value.name == logits), None))

    def role(node: ir.Node, matrix: "_Read") -> Role:
        if matrix.indices is not None:
            return "embedding"
        return "head" if node is head else "body"

    return tuple(
        Stored(_matrix(read, role(read.parts.node, read)), read.parts)
        for node in nodes for read in _read(node) if read.indices is None or _root(read.indices).name == ids
    )  # fmt: skip


def _matrix(read: "_Read", role: Role) -> GraphMatrix:
    parts = read.parts
    return GraphMatrix(
        node=parts.node.name or "",
        op=read.op,
        weight=read.weight,
        rows=read.rows,
        columns=read.columns,
        dtype=parts.values.dtype.name,
        size_bytes=parts.size_bytes,
        role=role,
        quantization=read.quantization,
    )


def quantized_activations(graph: ir.Graph) -> int:
    """Return how many inputs are rounded to integers in the graph itself, by one node or, up to a Cast, by several."""
    return sum(
        node.op_type == "DynamicQuantizeMatMul"
        or (node.op_type in _QUANTIZERS and (first := _input(node, 0)) is not None and _traced(first).tensor is None)
        or (node.op_type == "Cast" and any(use.op_type == "MatMulInteger" for use, _ in node.outputs[0].uses()))
        for node in graph.all_nodes()
    )


@dataclass(frozen=True)
class _Read:
    op: str
    weight: str
    rows: int
    columns: int
    quantization: Quantization | None
    parts: GraphMatrixParts
    indices: ir.Value | None = None
    """What is looked up, for an embedding."""


@dataclass(frozen=True)
class _Trace:
    """The origin of a value: a constant, perhaps dequantized, perhaps transposed."""

    tensor: Any
    name: str
    dequantizer: ir.Node | None
    transposed: bool
    plain: bool = True


def _read(node: ir.Node) -> Iterable[_Read]:
    reader = _READERS.get(node.op_type)
    return reader(node) if reader else ()


def _nbits(node: ir.Node) -> Iterator[_Read]:
    codes, scales, zeros = (_constant(node, index) for index in (1, 2, 3))
    if codes is None:
        return
    bits, block = integer(node, "bits", 4), integer(node, "block_size", 0)
    rows, columns = integer(node, "N", 0), integer(node, "K", 0)
    level = integer(node, "accuracy_level", 0)
    how = Quantization(bits, "block", block, _is_middle(zeros, bits, -(-columns // block)), level)
    yield _Read(node.op_type, _weight_name(node, 1), rows, columns, how, GraphMatrixParts(node, codes, scales, zeros))


def _bnb4(node: ir.Node) -> Iterator[_Read]:
    codes, scales = _constant(node, 1), _constant(node, 2)
    if codes is None:
        return
    how = Quantization(4, "block", integer(node, "block_size", 0), True, None)
    rows, columns = integer(node, "N", 0), integer(node, "K", 0)
    yield _Read(node.op_type, _weight_name(node, 1), rows, columns, how, GraphMatrixParts(node, codes, scales))


def _gather_blocks(node: ir.Node) -> Iterator[_Read]:
    codes, scales, zeros = (_constant(node, index) for index in (0, 2, 3))
    if codes is None or scales is None:
        return
    bits = codes.dtype.bitwidth if codes.dtype.bitwidth < 8 else integer(node, "bits", 4)
    rows = int(scales.shape[0])
    columns = codes.nbytes * 8 // bits // rows
    block = integer(node, "block_size", 128)
    if zeros is None and codes.dtype == ir.DataType.UINT4:
        symmetric = False  # the kernel takes 0 then
    else:
        symmetric = _is_middle(zeros, bits, -(-columns // block))
    how = Quantization(bits, "block", block, symmetric, None)
    parts = GraphMatrixParts(node, codes, scales, zeros)
    yield _Read(node.op_type, _weight_name(node, 0), rows, columns, how, parts, _input(node, 1))


def _experts(node: ir.Node) -> Iterator[_Read]:
    """QMoE's up to three stacks of experts, each [experts, rows, columns * bits / 8]."""
    for part, (weight, zero) in enumerate(((2, 11), (5, 12), (8, 13)), start=1):
        codes, scales, zeros = (_constant(node, index) for index in (weight, weight + 1, zero))
        if codes is None:
            continue
        bits = integer(node, f"fc{part}_expert_weight_bits", integer(node, "expert_weight_bits", 4))
        rows = int(np.prod([int(size) for size in codes.shape[:-1]]))
        columns = codes.nbytes * 8 // bits // rows
        block = integer(node, "block_size", 0) or None
        symmetric = _is_middle(zeros, bits, -(-columns // block) if block else 1)
        level = integer(node, "accuracy_level", 0)
        how = Quantization(bits, "block" if block else "channel", block, symmetric, level)
        parts = GraphMatrixParts(node, codes, scales, zeros)
        yield _Read(node.op_type, _weight_name(node, weight), rows, columns, how, parts)


def _float_experts(node: ir.Node) -> Iterator[_Read]:
    for index in (2, 4, 6):
        stack = _constant(node, index)
        if stack is not None:
            rows, columns = int(stack.shape[0] * stack.shape[1]), int(stack.shape[2])
            yield _Read("MoE", _weight_name(node, index), rows, columns, None, GraphMatrixParts(node, stack))


_INTEGER_INPUTS = {
    "MatMulInteger": (1, None, 3),
    "DynamicQuantizeMatMul": (1, 2, 3),
    "MatMulIntegerToFloat": (1, 3, 5),
    "QLinearMatMul": (3, 4, 5),
}
"""Of operators that multiply integers: the inputs of the codes [columns, rows], their scales and zero points.
MatMulInteger's scales follow it."""


def _integers(node: ir.Node) -> Iterator[_Read]:
    place, scale, zero = _INTEGER_INPUTS[node.op_type]
    codes, zeros = _constant(node, place), _constant(node, zero)
    scales = _scales_after(node) if scale is None else _constant(node, scale)
    if codes is None or len(codes.shape) != 2:
        return
    coarse = scales if scales is not None else zeros
    granularity: GraphGranularity = "channel" if coarse is not None and coarse.size > 1 else "tensor"
    how = Quantization(codes.dtype.bitwidth, granularity, None, _is_centred(codes, zeros), None)
    columns, rows = (int(size) for size in codes.shape)
    parts = GraphMatrixParts(node, codes, scales, zeros, turned=True)
    yield _Read(node.op_type, _weight_name(node, place), rows, columns, how, parts)


def _scales_after(node: ir.Node) -> Any:
    """Return the scales of a MatMulInteger's codes: its result is multiplied by them and by its input's scale.

    By both at once (onnxruntime/quantization/operators/matmul.py, 1.31) or in turn. None where it is used otherwise.
    """
    for use, place in node.outputs[0].uses():
        if use.op_type == "Cast":
            return _scales_after(use)
        if use.op_type != "Mul" or (other := _input(use, 1 - place)) is None:
            continue
        if (scales := _constant(use, 1 - place)) is not None and scales.size > 1:
            return scales
        factor = other.producer()
        if factor is not None and factor.op_type == "Mul":
            return next((found for each in (0, 1) if (found := _constant(factor, each)) is not None), None)
        return _scales_after(use)
    return None


def _dense(node: ir.Node) -> Iterator[_Read]:
    """Yield a product by, or a lookup in, a constant of floats, or one that a DequantizeLinear makes."""
    is_lookup = node.op_type == "Gather"
    value = _input(node, 0 if is_lookup else 1)
    trace = _traced(value) if value is not None else None
    if trace is None or trace.tensor is None or len(trace.tensor.shape) != 2:
        return
    if trace.dequantizer is None and not trace.tensor.dtype.is_floating_point():
        return
    first, second = (int(size) for size in trace.tensor.shape)
    by_rows = is_lookup or bool(integer(node, "transB", 0))
    rows, columns = (first, second) if by_rows != trace.transposed else (second, first)
    indices = _input(node, 1) if is_lookup else None
    parts = GraphMatrixParts(node, trace.tensor, turned=by_rows == trace.transposed, plain=trace.plain)
    op, how = node.op_type, None
    if (dequantizer := trace.dequantizer) is not None:
        scales, zeros = _constant(dequantizer, 1), _constant(dequantizer, 2)
        parts = replace(parts, scales=scales, zeros=zeros, dequantizer=dequantizer)
        op, how = "DequantizeLinear", _dequantized(parts, dequantizer)
    yield _Read(op, trace.name, rows, columns, how, parts, indices)


def _dequantized(parts: GraphMatrixParts, node: ir.Node) -> Quantization:
    """Return how a DequantizeLinear's matrix is read."""
    codes, scales, zeros = parts.values, parts.scales, parts.zeros
    block = integer(node, "block_size", 0) or None
    coarse: GraphGranularity = "tensor" if scales is None or scales.size == 1 else "channel"
    stored = zeros if codes.dtype.is_floating_point() and codes.dtype.bitwidth > 8 else codes  # rounded in the graph
    bits = stored.dtype.bitwidth if stored is not None else 8
    symmetric = _is_centred(stored, zeros) if stored is not None else False
    return Quantization(bits, "block" if block else coarse, block, symmetric, None)


_READERS: Mapping[str, Callable[[ir.Node], Iterator[_Read]]] = {
    "MatMulNBits": _nbits,
    "MatMulBnb4": _bnb4,
    "GatherBlockQuantized": _gather_blocks,
    "QMoE": _experts,
    "MoE": _float_experts,
    "MatMul": _dense,
    "FusedMatMul": _dense,
    "Gemm": _dense,
    "Gather": _dense,
} | dict.fromkeys(_INTEGER_INPUTS, _integers)


def _traced(value: ir.Value) -> _Trace:
    """Return the constant behind a value; `tensor` is None if it depends on the inputs."""
    dequantizer, transposed, plain = None, False, True
    while (tensor := ir.convenience.get_const_tensor(value)) is None:
        node = value.producer()
        source = _input(node, 0) if node is not None else None
        if node is None or source is None or node.op_type not in _PASS | _DEQUANTIZERS | _QUANTIZERS:
            return _Trace(None, "", None, False)
        if node.op_type in _DEQUANTIZERS:
            dequantizer = dequantizer or node
        transposed ^= node.op_type == "Transpose"
        plain &= node.op_type != "Reshape" and not (node.op_type == "Transpose" and dequantizer is not None)
        value = source
    return _Trace(tensor, value.name or "", dequantizer, transposed, plain)


def _head_of(logits: ir.Value | None) -> ir.Node | None:
    """Return the node whose matrix makes the logits, None if something else does."""
    waiting = [logits] if logits is not None else []
    while waiting:
        node = waiting.pop(0).producer()
        if node is None:
            continue
        if any(read.indices is None for read in _read(node)):
            return node
        if node.op_type in _AFTER_HEAD:
            waiting += [value for value in node.inputs if value is not None]
    return None


def _root(value: ir.Value) -> ir.Value:
    """Return the value that another is a cast or a view of."""
    node = value.producer()
    while node is not None and node.op_type in _BEFORE_LOOKUP and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _constant(node: ir.Node, index: int) -> Any:
    """Return the tensor of a constant input; None if it has none, or one that depends on the inputs."""
    value = _input(node, index)
    return None if value is None else _traced(value).tensor


def _weight_name(node: ir.Node, index: int) -> str:
    value = _input(node, index)
    return "" if value is None else _traced(value).name


def integer(node: ir.Node | None, name: str, default: int) -> int:
    """Return an attribute of a node, or what it is where it, or the node, is left out."""
    attribute = None if node is None else node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _is_middle(zeros: Any, bits: int, count: int) -> bool:
    """Return whether zero points, packed or not, `count` a row, are all mid-range; absent ones are."""
    if zeros is None:
        return True
    values = array_of(zeros)
    if zeros.dtype.is_floating_point() or zeros.dtype.bitwidth < 8 or bits == 8:
        middle = 0 if zeros.dtype.is_signed() and not zeros.dtype.is_floating_point() else 1 << (bits - 1)
        return bool((values.astype(np.float32) == middle).all())
    rows = values.reshape(-1, -(-count * bits // 8))
    unpacked = (rows[:, :, None] >> np.arange(0, 8, bits, dtype=np.uint8)) & ((1 << bits) - 1)
    return bool((unpacked.reshape(len(rows), -1)[:, :count] == 1 << (bits - 1)).all())


def _is_centred(codes: Any, zeros: Any) -> bool:
    """Return whether the zero points of unpacked codes (0 where absent) are in the middle of the codes' range."""
    is_unsigned = not codes.dtype.is_floating_point() and not codes.dtype.is_signed()
    middle = 1 << (codes.dtype.bitwidth - 1) if is_unsigned else 0
    values = np.zeros(1, np.float32) if zeros is None else array_of(zeros).astype(np.float32)
    return bool((values == middle).all())

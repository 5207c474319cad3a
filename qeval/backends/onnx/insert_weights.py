"""A variant put into an exported float graph: its integers for the matrices, its floats for what its method changed.

Everything that the variant says is in the graph afterwards, or an error names what has no place there.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from qeval.backends.onnx.match_parameters import Held, MatMulMatrix, Places, as_floats
from qeval.backends.onnx.nbits import NBits, to_nbits
from qeval.errors import QevalError
from qeval.quant.variant import Variant
from qeval.types import OnnxFormat

NBITS = "MatMulNBits"
_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class Style:
    """The form of quantized matrices: MatMulNBits with an accuracy level, or DequantizeLinear + MatMul.

    `accuracy_level` 1 computes in fp32; 4 rounds activations to int8, a row and block at a time.
    """

    format: OnnxFormat = "nbits"
    accuracy_level: int = 1


def make_exact(places: Places, parameters: Mapping[str, Tensor]) -> None:
    """Give every initializer that holds a parameter the parameter's own values, where an exporter rounded."""
    for name, tensor in parameters.items():
        for held in places.held.get(name, ()):
            exact = held.of(as_floats(tensor))
            if not np.array_equal(_values(held), exact.astype(_values(held).dtype)):
                _set(held, exact)


Meant = Counter[tuple[int, int, int, int]]
"""How many quantized matrices of which rows, columns, bits and block a graph is meant to hold."""


def apply(graph: ir.Graph, places: Places, variant: Variant, style: Style) -> Meant:
    """Swap a variant's weights, floats and input scales in; what was written is counted.

    Raises:
        QevalError: something of the variant has no place in the graph; it is named.
        UsageError: the kernel takes no block of a grid's size.
    """
    for name, tensor in variant.floats.items():
        if not places.held.get(name):
            raise QevalError(f"The exported graph has no initializer that holds {name}; it can't take this variant.")
        for held in places.held[name]:
            _set(held, held.of(as_floats(tensor)))
    meant: Meant = Counter()
    for name, weight in variant.weights.items():
        if not places.covers(name, len(weight.codes)):
            raise QevalError(f"The exported graph has no MatMul by {name}; it can't take this variant.")
        for matrix in places.matrices[name]:
            packed = to_nbits(name, weight, matrix.rows)
            _replace(graph, matrix, name, packed, style, variant.input_scales.get(name))
            meant[packed.rows, packed.columns, packed.bits, packed.block] += 1
    for name in variant.input_scales:
        if name not in variant.weights:
            raise QevalError(f"{name} has input scales but stays in float, which no export writes.")
    _drop_unused(graph)
    return meant


def _values(held: Held) -> NDArray[Any]:
    assert held.value.const_value is not None
    return held.value.const_value.numpy()


def _set(held: Held, values: NDArray[np.float32]) -> None:
    kind = held.value.dtype or ir.DataType.FLOAT
    held.value.const_value = ir.tensor(values.astype(kind.numpy()), name=held.value.name)


def _replace(
    graph: ir.Graph, matrix: MatMulMatrix, name: str, packed: NBits, style: Style, input_scales: Tensor | None
) -> None:
    """Replace the node of a matrix product by one that reads codes; a Gemm's bias follows as an Add."""
    node = matrix.node
    source = node.inputs[0]
    assert source is not None
    kind = _float_type(node)
    maker = _Maker(graph, node, name, kind)
    if input_scales is not None:
        scale = maker.constant("input_scale", as_floats(input_scales).astype(kind.numpy()))
        source = maker.node("Mul", [source, scale], "input")
    if style.format == "nbits":
        result = _nbits(maker, source, packed, style.accuracy_level)
    else:
        result = _qdq(maker, source, packed)
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    if bias is not None:
        result = maker.node("Add", [result, bias], "bias")
    _take_over(graph, node, result)


def _float_type(node: ir.Node) -> ir.DataType:
    weight = node.inputs[1]
    if weight is not None and weight.const_value is not None:
        return weight.const_value.dtype
    producer = weight.producer() if weight is not None else None
    first = producer.inputs[0] if producer is not None else None
    return first.const_value.dtype if first is not None and first.const_value is not None else ir.DataType.FLOAT


class _Maker:
    """New nodes and constants in front of the node they replace, named after it."""

    def __init__(self, graph: ir.Graph, before: ir.Node, weight: str, kind: ir.DataType) -> None:
        self._graph, self._before, self._weight, self.kind = graph, before, weight, kind
        self._base = before.name or weight

    def constant(self, what: str, array: NDArray[Any], dtype: ir.DataType | None = None) -> ir.Value:
        name = f"{self._base}.{what}"
        value = ir.Value(name=name, const_value=ir.tensor(array, dtype=dtype, name=name))
        self._graph.register_initializer(value)
        return value

    def node(
        self, op: str, inputs: list[ir.Value | None], what: str, *, domain: str = "", **attributes: int
    ) -> ir.Value:
        name = f"{self._base}_{what}"
        made = ir.node(op, inputs, attributes, domain=domain, name=name)
        made.outputs[0].name = f"{name}/output_0"
        self._graph.insert_before(self._before, made)
        return made.outputs[0]


def _nbits(maker: _Maker, source: ir.Value, packed: NBits, accuracy_level: int) -> ir.Value:
    inputs: list[ir.Value | None] = [
        source,
        maker.constant(f"Q{packed.bits}", packed.packed_codes()),
        maker.constant("scales", packed.scales.astype(maker.kind.numpy())),
    ]
    zeros = packed.packed_zeros()
    if zeros is not None:
        inputs.append(maker.constant("zero_points", zeros))
    return maker.node(
        NBITS,
        inputs,
        f"Q{packed.bits}",
        domain=_DOMAIN,
        K=packed.columns,
        N=packed.rows,
        bits=packed.bits,
        block_size=packed.block,
        accuracy_level=accuracy_level,
    )


def _qdq(maker: _Maker, source: ir.Value, packed: NBits) -> ir.Value:
    """DequantizeLinear in blocks along axis 0 of a [columns, rows] matrix, which ONNX Runtime fuses to MatMulNBits."""
    dtype = ir.DataType.UINT4 if packed.bits == 4 else ir.DataType.UINT8
    kind = ml_dtypes.uint4 if packed.bits == 4 else np.uint8
    codes = packed.codes.reshape(packed.rows, -1)[:, : packed.columns].T
    zeros = np.full(packed.scales.shape, 1 << (packed.bits - 1), np.uint8) if packed.zeros is None else packed.zeros
    inputs: list[ir.Value | None] = [
        maker.constant(f"Q{packed.bits}", np.ascontiguousarray(codes).astype(kind), dtype),
        maker.constant("scales", np.ascontiguousarray(packed.scales.T).astype(maker.kind.numpy())),
        maker.constant("zero_points", np.ascontiguousarray(zeros.T).astype(kind), dtype),
    ]
    weight = maker.node("DequantizeLinear", inputs, "DequantizeLinear", axis=0, block_size=packed.block)
    return maker.node("MatMul", [source, weight], "MatMul_QDQ")


def _take_over(graph: ir.Graph, old: ir.Node, new: ir.Value) -> None:
    """Put `new` in the place of `old`'s output, its name, type and shape included."""
    output = old.outputs[0]
    name, new.type, new.shape = output.name, output.type, output.shape
    output.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    output.name = f"{name}.replaced"
    new.name = name


def _drop_unused(graph: ir.Graph) -> None:
    """Transposes and initializers that nothing reads any more."""
    for node in reversed(list(graph)):
        if node.op_type == "Transpose" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]

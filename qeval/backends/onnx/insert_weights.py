"""A variant put into an exported float graph: its integers for the matrices, its floats for what its method changed.

Everything that the variant says is in the graph afterwards, or an error names what has no place there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from qeval.backends.onnx.insert_experts import MatrixCounts, insert_experts
from qeval.backends.onnx.insert_inputs import VariantInputs, integer_product
from qeval.backends.onnx.insert_nodes import NodeMaker, take_over
from qeval.backends.onnx.insert_rotation import turned_input
from qeval.backends.onnx.match_parameters import Held, MatMulMatrix, Places, as_floats
from qeval.backends.onnx.matrices import integer
from qeval.backends.onnx.nbits import NBits, to_nbits
from qeval.errors import QevalError
from qeval.models.structure.weight_views import is_expert
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


def apply(graph: ir.Graph, places: Places, variant: Variant, style: Style, head: str = "") -> MatrixCounts:
    """Swap a variant's weights and floats in, with what it does to their inputs; what was written is counted.

    Args:
        graph: The float graph, which changes.
        places: The places of the model's parameters in it.
        variant: The variant.
        style: The form of matrices whose product is one of floats.
        head: The name of the head's weight, whose input is never rounded.

    Raises:
        QevalError: something of the variant has no place in the graph; it is named.
        UsageError: the kernel takes no block of a grid's size, or no such inputs.
    """
    meant = insert_experts(graph, variant, style.accuracy_level)
    variant = _without_experts(variant)
    for name, tensor in variant.floats.items():
        if not places.held.get(name):
            raise QevalError(f"The exported graph has no initializer that holds {name}; it can't take this variant.")
        if name == head and places.is_shared(name):
            _untie(graph, places, name, tensor)
            continue
        for held in places.held[name]:
            _set(held, held.of(as_floats(tensor)))
    for name in variant.input_scales:
        if name not in variant.weights:
            raise QevalError(f"{name} has input scales but stays in float, which no export writes.")
    inputs = VariantInputs(graph, variant, head)
    for name, weight in variant.weights.items():
        for matrix in _products(places, name, len(weight.codes)):
            meant[_replace(graph, matrix, name, variant, inputs, style)] += 1
    for name in variant.input_rotations:
        if name not in variant.weights:
            raise QevalError(f"{name} has a turned input but stays in float, which no export writes.")
    for name in inputs.formats.keys() - variant.weights.keys():
        for matrix in _products(places, name, None):
            _round_input(matrix.node, name, inputs)
    _drop_unused(graph)
    return meant


def _without_experts(variant: Variant) -> Variant:
    """Return what a variant says of all weights that aren't experts'."""
    weights = {name: weight for name, weight in variant.weights.items() if not is_expert(name)}
    floats = {name: tensor for name, tensor in variant.floats.items() if not is_expert(name)}
    return replace(variant, weights=weights, floats=floats)


def _untie(graph: ir.Graph, places: Places, name: str, tensor: Tensor) -> None:
    """Give the products by a parameter an initializer of their own, where others share theirs."""
    for matrix in _products(places, name, len(tensor)):
        node, rows = matrix.node, as_floats(tensor)[matrix.rows]
        values = rows if integer(node, "transB", 0) else np.ascontiguousarray(rows.T)
        maker = NodeMaker(graph, node, node.name or name)
        node.replace_input_with(1, maker.constant("own", values.astype(_float_type(node).numpy())))


def _products(places: Places, name: str, rows: int | None) -> list[MatMulMatrix]:
    """Return the products by a parameter, which has to be all of its `rows`, once each, where they are known."""
    if not (places.matrices.get(name) if rows is None else places.covers(name, rows)):
        raise QevalError(f"The exported graph has no MatMul by {name}; it can't take this variant.")
    return places.matrices[name]


def _round_input(node: ir.Node, name: str, inputs: VariantInputs) -> None:
    """Have the input of a product by floats rounded."""
    source = node.inputs[0]
    assert source is not None
    node.replace_input_with(0, inputs.as_floats(name, source, _float_type(node)))


def _values(held: Held) -> NDArray[Any]:
    assert held.value.const_value is not None
    return held.value.const_value.numpy()


def _set(held: Held, values: NDArray[np.float32]) -> None:
    kind = held.value.dtype or ir.DataType.FLOAT
    held.value.const_value = ir.tensor(values.astype(kind.numpy()), name=held.value.name)


def _replace(
    graph: ir.Graph, matrix: MatMulMatrix, name: str, variant: Variant, inputs: VariantInputs, style: Style
) -> tuple[int, int, int, int]:
    """Replace the node of a matrix product by one that reads codes, and return its key in `MatrixCounts`.

    A Gemm's bias follows as an Add.
    """
    node, weight = matrix.node, variant.weights[name]
    source = node.inputs[0]
    assert source is not None
    kind = _float_type(node)
    base = node.name or name
    if name in variant.input_rotations:
        source = turned_input(graph, source, variant.input_rotations[name], weight.codes.shape[1], base)
    if name in variant.input_scales:
        before = NodeMaker(graph, source.producer(), base)
        scale = before.constant("input_scale", as_floats(variant.input_scales[name]).astype(kind.numpy()))
        source = before.node("Mul", [source, scale], "input")
    maker = NodeMaker(graph, node, base)
    if inputs.multiplies_integers(name):
        result = integer_product(maker, inputs.as_integers(name, source), weight, matrix.rows, kind)
        key = (len(weight.codes[matrix.rows]), weight.codes.shape[1], 8, 0)
    else:
        packed = to_nbits(name, weight, matrix.rows)
        source = inputs.as_floats(name, source, kind)
        result = _nbits(maker, source, packed, style, kind)
        key = (packed.rows, packed.columns, packed.bits, packed.block)
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    if bias is not None:
        result = maker.node("Add", [result, bias], "bias")
    take_over(graph, node, result)
    return key


def _float_type(node: ir.Node) -> ir.DataType:
    weight = node.inputs[1]
    if weight is not None and weight.const_value is not None:
        return weight.const_value.dtype
    producer = weight.producer() if weight is not None else None
    first = producer.inputs[0] if producer is not None else None
    return first.const_value.dtype if first is not None and first.const_value is not None else ir.DataType.FLOAT


def _nbits(maker: NodeMaker, source: ir.Value, packed: NBits, style: Style, kind: ir.DataType) -> ir.Value:
    if style.format == "qdq":
        return _qdq(maker, source, packed, kind)
    inputs: list[ir.Value | None] = [
        source,
        maker.constant(f"Q{packed.bits}", packed.packed_codes()),
        maker.constant("scales", packed.scales.astype(kind.numpy())),
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
        accuracy_level=style.accuracy_level,
    )


def _qdq(maker: NodeMaker, source: ir.Value, packed: NBits, kind: ir.DataType) -> ir.Value:
    """DequantizeLinear in blocks along axis 0 of a [columns, rows] matrix, which ONNX Runtime fuses to MatMulNBits."""
    dtype = ir.DataType.UINT4 if packed.bits == 4 else ir.DataType.UINT8
    code = ml_dtypes.uint4 if packed.bits == 4 else np.uint8
    codes = packed.codes.reshape(packed.rows, -1)[:, : packed.columns].T
    zeros = np.full(packed.scales.shape, 1 << (packed.bits - 1), np.uint8) if packed.zeros is None else packed.zeros
    inputs: list[ir.Value | None] = [
        maker.constant(f"Q{packed.bits}", np.ascontiguousarray(codes).astype(code), dtype),
        maker.constant("scales", np.ascontiguousarray(packed.scales.T).astype(kind.numpy())),
        maker.constant("zero_points", np.ascontiguousarray(zeros.T).astype(code), dtype),
    ]
    weight = maker.node("DequantizeLinear", inputs, "DequantizeLinear", axis=0, block_size=packed.block)
    return maker.node("MatMul", [source, weight], "MatMul_QDQ")


def _drop_unused(graph: ir.Graph) -> None:
    """Transposes and initializers that nothing reads any more."""
    for node in reversed(list(graph)):
        if node.op_type == "Transpose" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]

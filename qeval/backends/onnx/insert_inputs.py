"""Inputs rounded in an exported graph, and products by them: on integers where the weights' scales allow it.

An input x is rounded as torch has it: `codes = clamp(round(x * (qmax / amax)))`, half to even, by standard operators in
fp32. QuantizeLinear divides by a scale instead, and DynamicQuantizeLinear takes one scale for a whole batch and a zero
point. Where weights have one scale a channel or tensor, MatMulInteger multiplies the codes, exactly, and two factors
follow; elsewhere the product is that of floats, by `codes * (amax / qmax)`. QLinearMatMul rounds its output too, which
no scheme says.
"""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from qeval.backends.onnx.input_format import check_input_format
from qeval.backends.onnx.insert_nodes import NodeMaker
from qeval.backends.onnx.match_parameters import as_floats
from qeval.quant.floats import TINY
from qeval.quant.grid import Grid
from qeval.quant.qweight import QWeight
from qeval.quant.rtn import inverse_and_scale
from qeval.quant.scheme import TensorFormat
from qeval.quant.variant import Variant

MATMUL_INTEGER = "MatMulInteger"
_MIDDLE = 128
"""Added to codes, so that both factors are unsigned: those products are exact on every x86 CPU, while a pair of an
unsigned and a signed one saturates at 16 bits where it has no VNNI (onnxruntime, docs/performance/quantization)."""


class IntegerInput(NamedTuple):
    """A rounded input: codes in bytes, 128 being zero, and what they are multiplied by, one a token or one alone."""

    codes: ir.Value
    scale: ir.Value


class VariantInputs:
    """The inputs of a variant's products in one graph; products that round one input in one way share the nodes."""

    def __init__(self, graph: ir.Graph, variant: Variant, head: str) -> None:
        """Take the inputs from a variant; that of the `head`, a weight's name, stays in float."""
        self._graph, self._variant = graph, variant
        self.formats = {name: how for name, how in variant.rounded_inputs.items() if name != head}
        for how in set(self.formats.values()):
            check_input_format(how)
        self._integers: dict[_Key, IntegerInput] = {}
        self._floats: dict[_Key, ir.Value] = {}

    def multiplies_integers(self, name: str) -> bool:
        """Return whether a weight's product is one of integers: its input is rounded, its rows have one scale each."""
        weight = self._variant.weights[name]
        return name in self.formats and isinstance(weight.grid, Grid) and weight.scales.shape[1] == 1

    def as_integers(self, name: str, source: ir.Value) -> IntegerInput:
        """Return the rounded input of a weight's product, for `integer_product`."""
        key = self._key(name, source)
        if key not in self._integers:
            maker = NodeMaker(self._graph, source.producer(), f"{source.name}.codes{len(self._integers)}")
            codes, scale = _round(maker, source, self.formats[name], self._variant.ranges.get(name))
            middle = maker.constant("middle", np.array(_MIDDLE, np.float32))
            shifted = maker.node("Add", [codes, middle], "shifted")
            self._integers[key] = IntegerInput(maker.node("Cast", [shifted], "bytes", to=ir.DataType.UINT8), scale)
        return self._integers[key]

    def as_floats(self, name: str, source: ir.Value, kind: ir.DataType) -> ir.Value:
        """Return the input of a weight's product in floats of a type, rounded where the variant says so."""
        if name not in self.formats:
            return source
        key = self._key(name, source)
        if key not in self._floats:
            maker = NodeMaker(self._graph, source.producer(), f"{source.name}.rounded{len(self._floats)}")
            codes, scale = _round(maker, source, self.formats[name], self._variant.ranges.get(name))
            self._floats[key] = _narrow(maker, maker.node("Mul", [codes, scale], "values"), kind)
        return self._floats[key]

    def _key(self, name: str, source: ir.Value) -> "_Key":
        amax = self._variant.ranges.get(name)
        return _Key(id(source), self.formats[name], None if amax is None else float(amax))


class _Key(NamedTuple):
    """The value that is rounded, and the way."""

    source: int
    how: TensorFormat
    amax: float | None


def _round(maker: NodeMaker, source: ir.Value, how: TensorFormat, amax: Tensor | None) -> tuple[ir.Value, ir.Value]:
    """Return an input's codes, whole numbers in fp32, and their scale."""
    wide = maker.node("Cast", [source], "wide", to=ir.DataType.FLOAT)
    if amax is None:
        steps = maker.constant("steps", np.array(how.steps, np.float32))
        axis = maker.constant("axis", np.array([-1], np.int64))
        largest = maker.node("ReduceMax", [maker.node("Abs", [wide], "abs"), axis], "largest", keepdims=1)
        largest = maker.node("Max", [largest, maker.constant("tiny", np.array(TINY, np.float32))], "amax")
        inverse = maker.node("Div", [steps, largest], "inverse")
        scale = maker.node("Div", [largest, steps], "scale")
    else:
        by_division = (as_floats(each).reshape(()) for each in inverse_and_scale(amax.float(), how.steps))
        inverse, scale = (maker.constant(n, each) for n, each in zip(("inverse", "scale"), by_division, strict=True))
    whole = maker.node("Round", [maker.node("Mul", [wide, inverse], "scaled")], "whole")
    least, most = (np.array(end, np.float32) for end in (-(1 << (how.bits - 1)), (1 << (how.bits - 1)) - 1))
    ends = [maker.constant("least", least), maker.constant("most", most)]
    return maker.node("Clip", [whole, *ends], "codes"), scale


def integer_product(
    maker: NodeMaker, source: IntegerInput, weight: QWeight, rows: slice, kind: ir.DataType
) -> ir.Value:
    """Return the product of a rounded input and some rows of a weight, by MatMulInteger.

    Args:
        maker: Makes its nodes.
        source: The input.
        weight: [rows, columns], each row on one scale.
        rows: The rows.
        kind: The float type of the product.
    """
    inputs: list[ir.Value | None] = [
        source.codes,
        maker.constant("Q8", np.ascontiguousarray(weight.codes[rows].cpu().numpy().T)),
        maker.constant("input_zero", np.array(_MIDDLE, np.uint8)),
        maker.constant("zero_points", _zeros(weight, rows)),
    ]
    sums = maker.node("Cast", [maker.node(MATMUL_INTEGER, inputs, MATMUL_INTEGER)], "sums", to=ir.DataType.FLOAT)
    scales = as_floats(weight.scales.expand(len(weight.codes), -1)[rows, 0])
    by_token = maker.node("Mul", [sums, source.scale], "by_token")
    by_channel = maker.node("Mul", [by_token, maker.constant("scales", np.ascontiguousarray(scales))], "by_channel")
    return _narrow(maker, by_channel, kind)


def _narrow(maker: NodeMaker, values: ir.Value, kind: ir.DataType) -> ir.Value:
    return values if kind == ir.DataType.FLOAT else maker.node("Cast", [values], "narrow", to=kind)


def _zeros(weight: QWeight, rows: slice) -> NDArray[np.uint8]:
    """Return a weight's zero points: one for all rows where the grid is symmetric, else one a row."""
    if weight.zeros is None:
        assert isinstance(weight.grid, Grid)
        return np.array(weight.grid.zero, np.uint8)
    zeros: NDArray[np.uint8] = weight.zeros.expand(len(weight.codes), -1)[rows, 0].cpu().numpy().copy()
    return zeros

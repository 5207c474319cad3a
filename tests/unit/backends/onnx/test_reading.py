"""Stored matrices as they are read, against ONNX Runtime's own kernels: an identity times the matrix is the matrix."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")

import torch
from onnxruntime.quantization import quantize_dynamic

from qeval.backends.onnx.matrices import stored_in
from qeval.backends.onnx.reading import input_gain, read, why_unread
from qeval.formats.base import Values
from qeval.formats.misreadings import compare_matrix, values_of
from qeval.quant.qweight import QWeight
from tests.fixtures.onnx import answers, graph_of, held, product_graph, value

ROWS, COLUMNS = 24, 80
MS = "com.microsoft"
DRAW = np.random.default_rng(0)


def const(name, array, dtype=None):
    tensor = ir.tensor(array, name=name) if dtype is None else ir.Tensor(array.astype(dtype.numpy()), name=name)
    return ir.Value(name=name, const_value=tensor)


def graph_with(nodes, constants, given):
    output = nodes[-1].outputs[0]
    output.name, output.type = "logits", ir.TensorType(ir.DataType.FLOAT)
    output.shape = ir.Shape([None, None])
    return graph_of([given], [output], nodes, constants)


def product(op, constants, given=None, **attributes):
    x = given or value("x", ["n", COLUMNS])
    node = ir.node(op, [x, *constants], attributes, domain=MS, name="product")
    return graph_with([node], [each for each in constants if each is not None], x)


def found_in(graph, **feeds):
    """The one matrix as it is read, and as the kernel has it [rows, columns]."""
    (stored,) = stored_in(graph, "input_ids", "logits")
    assert why_unread(stored) is None
    assert (stored.matrix.rows, stored.matrix.columns) == (ROWS, COLUMNS)
    return read(stored), answers(graph, 1, **(feeds or {"x": torch.eye(COLUMNS)}))


def scales(*shape):
    return DRAW.uniform(0.5, 2, shape).astype(np.float32)


def codes(bits, *shape):
    return DRAW.integers(0, 1 << bits, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("bits", "block", "zeros"),
    [
        *((4, block, zeros) for block in (16, 32, 128) for zeros in ("none", "packed", "float")),
        (8, 32, "none"),
        (8, 32, "packed"),  # no kernel takes 8 bits with zero points in floats
    ],
)
def test_blocks_of_codes(bits, block, zeros):
    blocks = -(-COLUMNS // block)
    constants = [const("q", codes(8, ROWS, blocks, block * bits // 8)), const("s", scales(ROWS, blocks))]
    if zeros == "packed":
        constants.append(const("z", codes(8, ROWS, -(-blocks * bits // 8))))
    if zeros == "float":
        constants.append(const("z", 7 * scales(ROWS, blocks)))
    graph = product("MatMulNBits", constants, K=COLUMNS, N=ROWS, bits=bits, block_size=block, accuracy_level=1)
    matrix, kernel = found_in(graph)
    assert isinstance(matrix, Values if zeros == "float" else QWeight)
    torch.testing.assert_close(values_of(matrix), kernel.T, rtol=1e-5, atol=1e-3)


LAYOUTS = {
    "blocks along columns": ("turned", 0, 16, (COLUMNS // 16, ROWS), QWeight),
    "a scale a row": ("turned", 1, 0, (ROWS,), QWeight),
    "a scale for all": ("turned", 1, 0, (), QWeight),
    "a scale a column": ("turned", 0, 0, (COLUMNS,), Values),
    "blocks along rows": ("turned", 1, 8, (COLUMNS, ROWS // 8), Values),
    "as torch has it": ("straight", 1, 16, (ROWS, COLUMNS // 16), QWeight),
    "a row's, as torch has it": ("straight", 0, 0, (ROWS,), QWeight),
}
KINDS = {"INT4": ir.DataType.INT4, "UINT4": ir.DataType.UINT4, "INT8": ir.DataType.INT8, "UINT8": ir.DataType.UINT8}


@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dequantized_products(layout, kind, has_zeros):
    way, axis, block, shape, expected = LAYOUTS[layout]
    dtype, low = KINDS[kind], 0 if kind.startswith("U") else -(1 << (KINDS[kind].bitwidth - 1))
    array = codes(dtype.bitwidth, *((COLUMNS, ROWS) if way == "turned" else (ROWS, COLUMNS))).astype(np.int16) + low
    constants = [const("q", array, dtype), const("s", scales(*shape))]
    if has_zeros:
        constants.append(const("z", codes(dtype.bitwidth, *shape).astype(np.int16) + low, dtype))
    settings = {"axis": axis, **({"block_size": block} if block else {})}
    nodes = [ir.node("DequantizeLinear", constants, settings, name="floats")]
    if way == "straight":
        nodes.append(ir.node("Transpose", nodes[0].outputs, {"perm": [1, 0]}, name="turn"))
    x = value("x", ["n", COLUMNS])
    nodes.append(ir.node("MatMul", [x, nodes[-1].outputs[0]], name="product"))
    matrix, kernel = found_in(graph_with(nodes, constants, x))
    assert isinstance(matrix, expected)
    torch.testing.assert_close(values_of(matrix), kernel.T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("kind", "bits"), [("UINT8", 4), ("UINT8", 8), ("INT4", 4), ("UINT4", 4)])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_lookups_in_blocks(kind, bits, has_zeros):
    packed, blocks = bits == 4 and kind == "UINT8", COLUMNS // 16
    low = -8 if kind == "INT4" else 0
    array = codes(8, ROWS, COLUMNS // 2) if packed else codes(bits, ROWS, COLUMNS).astype(np.int16) + low
    ids = value("input_ids", ["n"], ir.DataType.INT64)
    constants = [const("q", array, KINDS[kind]), const("s", scales(ROWS, blocks))]
    inputs = [constants[0], ids, constants[1]]
    if has_zeros:
        zeros = codes(8, ROWS, -(-blocks // 2)) if packed else codes(bits, ROWS, blocks).astype(np.int16) + low
        constants.append(const("z", zeros, KINDS[kind]))
        inputs.append(constants[2])
    settings = {"bits": bits, "block_size": 16, "quantize_axis": 1, "gather_axis": 0}
    node = ir.node("GatherBlockQuantized", inputs, settings, domain=MS, name="lookup")
    matrix, kernel = found_in(graph_with([node], constants, ids), input_ids=torch.arange(ROWS))
    torch.testing.assert_close(values_of(matrix), kernel, rtol=1e-5, atol=1e-3)


def test_integer_products_that_scale_by_themselves():
    constants = [
        const("q", codes(8, COLUMNS, ROWS).astype(np.int16) - 128, ir.DataType.INT8), const("s", scales(ROWS)),
        const("z", codes(4, ROWS), ir.DataType.INT8),
    ]  # fmt: skip
    matrix, kernel = found_in(product("DynamicQuantizeMatMul", constants))
    torch.testing.assert_close(values_of(matrix), kernel.T, rtol=1e-2, atol=0.05)


@pytest.mark.parametrize("per_channel", [False, True])
def test_onnxruntimes_dynamic_quantization(tmp_path, per_channel):
    weight = torch.from_numpy(DRAW.normal(size=(ROWS, COLUMNS)).astype(np.float32))
    ir.save(ir.Model(product_graph(weight), ir_version=10), tmp_path / "floats.onnx")
    quantize_dynamic(tmp_path / "floats.onnx", tmp_path / "codes.onnx", per_channel=per_channel)
    graph = ir.load(tmp_path / "codes.onnx").graph
    matrix, kernel = found_in(graph)
    assert isinstance(matrix, QWeight)
    torch.testing.assert_close(values_of(matrix), kernel.T, rtol=1e-2, atol=1e-3)
    assert compare_matrix(matrix, weight, torch.ones(COLUMNS)).ok


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_floats_keep_their_type(dtype):
    x, weight = value("x", ["n", COLUMNS]), const("w", DRAW.normal(size=(COLUMNS, ROWS)).astype(dtype))
    (stored,) = stored_in(graph_with([ir.node("MatMul", [x, weight], name="p")], [weight], x), "input_ids", "logits")
    matrix = read(stored)
    assert matrix.values.dtype == torch.from_numpy(np.zeros(1, dtype)).dtype
    assert torch.equal(matrix.values, torch.from_numpy(weight.const_value.numpy().T))


def gain_of(*makers):
    """What `input_gain` says of a product whose input went through these: (op, inputs after the first)."""
    x, weight = value("x", ["n", COLUMNS]), held("w", torch.zeros(COLUMNS, ROWS))
    nodes, constants, last = [], [weight], x
    for place, (op, *arrays) in enumerate(makers):
        own = [const(f"c{place}{number}", np.asarray(array, np.float32)) for number, array in enumerate(arrays)]
        constants += own
        nodes.append(ir.node(op, [last, *own], name=f"n{place}"))
        last = nodes[-1].outputs[0]
    nodes.append(ir.node("MatMul", [last, weight], name="product"))
    graph_with(nodes, constants, x)
    return input_gain(nodes[-1], COLUMNS)


def test_what_multiplies_an_input_is_found_up_to_its_norm():
    one, two, other = scales(3, COLUMNS)
    assert gain_of() is None
    assert gain_of(("Mul", other), ("Sigmoid",)) is None
    assert gain_of(("Mul", np.float32(3))) is None
    assert gain_of(("SimplifiedLayerNormalization", one)).tolist() == one.tolist()
    assert gain_of(("Mul", other), ("LayerNormalization", one, other), ("Cast",)).tolist() == one.tolist()
    assert gain_of(("SkipSimplifiedLayerNormalization", other, one)).tolist() == one.tolist()
    assert gain_of(("Softmax",), ("Mul", one), ("Add", other), ("Mul", two)).tolist() == (one * two).tolist()

"""How a graph's matrices are stored, on graphs made by hand: every layout that an exporter of the field writes."""

import numpy as np
import pytest

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnx")

from qeval.backends.onnx.matrices import Quantization, quantized_activations, stored_in

WIDTH, ROWS, VOCAB = 48, 8, 10
MS = "com.microsoft"


class Sketch:
    """A graph under construction: `ids` and `x` [n, 48] are its inputs."""

    def __init__(self):
        self.ids = ir.val("input_ids", ir.DataType.INT64, ["n"])
        self.x = ir.val("x", ir.DataType.FLOAT, ["n", WIDTH])
        self.nodes, self.initializers = [], []

    def const(self, name, array, dtype=None):
        array = np.asarray(array)
        tensor = ir.tensor(array, name=name) if dtype is None else _typed(array, dtype, name)
        value = ir.val(name, const_value=tensor)
        self.initializers.append(value)
        return value

    def node(self, op, inputs, name=None, domain="", **attributes):
        node = ir.node(op, inputs, attributes, domain=domain, name=name or op)
        node.outputs[0].name = f"{node.name}_out"
        self.nodes.append(node)
        return node.outputs[0]

    def graph(self, output):
        output.name = "logits"
        imports = {"": 21, MS: 1, "trt": 1}
        return ir.Graph(
            [self.ids, self.x], [output], nodes=self.nodes, initializers=self.initializers, opset_imports=imports
        )

    def matrices(self, output):
        return matrices_of(self.graph(output))


def matrices_of(graph):
    return tuple(each.matrix for each in stored_in(graph, "input_ids", "logits"))


def _typed(array, dtype, name):
    """A tensor of a type that numpy lacks, such as INT4."""
    return ir.Tensor(array.astype(dtype.numpy()), name=name)


def zeros(*shape):
    return np.zeros(shape, np.float32)


@pytest.fixture
def sketch():
    return Sketch()


@pytest.mark.parametrize(("transb", "shape"), [(0, (WIDTH, ROWS)), (1, (ROWS, WIDTH))])
def test_a_gemm_of_floats(sketch, transb, shape):
    (matrix,) = sketch.matrices(sketch.node("Gemm", [sketch.x, sketch.const("w", zeros(*shape))], transB=transb))
    assert (matrix.rows, matrix.columns, matrix.op, matrix.dtype) == (ROWS, WIDTH, "Gemm", "FLOAT")
    assert (matrix.size_bytes, matrix.parameters, matrix.quantization) == (ROWS * WIDTH * 4, ROWS * WIDTH, None)


def test_a_transposed_half_precision_matrix_behind_a_cast(sketch):
    weight = sketch.const("w", np.zeros((ROWS, WIDTH), np.float16))
    turned = sketch.node("Transpose", [sketch.node("Cast", [weight], to=1)], perm=[1, 0])
    (matrix,) = sketch.matrices(sketch.node("MatMul", [sketch.x, turned]))
    assert (matrix.rows, matrix.columns, matrix.dtype, matrix.weight) == (ROWS, WIDTH, "FLOAT16", "w")


def test_head_and_embedding_are_told_by_what_they_do(sketch):
    table = sketch.const("any", zeros(VOCAB, WIDTH))
    states = sketch.node("Gather", [table, sketch.node("Cast", [sketch.ids], to=6)], name="lookup")
    hidden = sketch.node("MatMul", [states, sketch.const("lm_head", zeros(WIDTH, WIDTH))], name="not_the_head")
    normed = sketch.node("LayerNormalization", [hidden, sketch.const("g", zeros(WIDTH))])
    product = sketch.node("MatMul", [normed, sketch.node("Transpose", [table], name="t", perm=[1, 0])], name="tied")
    capped = sketch.node("Mul", [sketch.node("Tanh", [product]), sketch.const("cap", np.float32(30))])
    roles = {matrix.node: (matrix.role, matrix.weight, matrix.rows) for matrix in sketch.matrices(capped)}
    assert roles == {
        "lookup": ("embedding", "any", VOCAB),
        "not_the_head": ("body", "lm_head", WIDTH),
        "tied": ("head", "any", VOCAB),
    }


def test_a_graph_that_ends_in_a_norm_has_no_head(sketch):
    hidden = sketch.node("MatMul", [sketch.x, sketch.const("w", zeros(WIDTH, WIDTH))])
    normed = sketch.node("LayerNormalization", [hidden, sketch.const("g", zeros(WIDTH))])
    assert [matrix.role for matrix in sketch.matrices(normed)] == ["body"]


def test_lookups_of_positions_and_products_of_inputs_are_no_matrices(sketch):
    angles = sketch.node("Gather", [sketch.const("cos", zeros(99, WIDTH)), sketch.node("Shape", [sketch.x])])
    assert sketch.matrices(sketch.node("MatMul", [sketch.x, angles])) == ()


def nbits(sketch, bits, block, zero_points=None, **attributes):
    blocks = -(-WIDTH // block)
    codes = sketch.const("q", np.zeros((ROWS, blocks, block * bits // 8), np.uint8))
    inputs = [sketch.x, codes, sketch.const("s", zeros(ROWS, blocks))]
    if zero_points is not None:
        inputs.append(sketch.const("z", zero_points))
    settings = {"K": WIDTH, "N": ROWS, "bits": bits, "block_size": block, **attributes}
    (matrix,) = sketch.matrices(sketch.node("MatMulNBits", inputs, domain=MS, **settings))
    return matrix


@pytest.mark.parametrize(("bits", "block"), [(2, 16), (4, 32), (8, 16)])
def test_nbits_counts_what_is_stored(sketch, bits, block):
    matrix = nbits(sketch, bits, block, accuracy_level=4)
    blocks = -(-WIDTH // block)  # 48 fills one and a half blocks of 32: the padding is stored too
    assert matrix.quantization == Quantization(bits, "block", block, True, 4)
    assert matrix.size_bytes == ROWS * blocks * (block * bits // 8 + 4)
    assert (matrix.rows, matrix.columns, matrix.op, matrix.dtype) == (ROWS, WIDTH, "MatMulNBits", "UINT8")


def test_an_accuracy_level_that_is_not_given_is_the_kernels_default(sketch):
    assert nbits(sketch, 4, 16).quantization.accuracy_level == 0


@pytest.mark.parametrize(
    ("bits", "row", "symmetric"),
    [
        (4, [0x88, 0x08], True),  # three blocks: the last half byte is padding
        (4, [0x88, 0xF8], True),
        (4, [0x88, 0x09], False),
        (4, [0x78, 0x08], False),
        (2, [0b101010], True),
        (2, [0b101011], False),
        (8, [128, 128, 128], True),
        (8, [128, 127, 128], False),
    ],
)
def test_zero_points_in_the_middle_are_symmetric(sketch, bits, row, symmetric):
    matrix = nbits(sketch, bits, 16, np.tile(np.array(row, np.uint8), (ROWS, 1)))
    assert matrix.quantization.symmetric is symmetric
    assert matrix.size_bytes == ROWS * (48 * bits // 8 + 3 * 4 + len(row))


@pytest.mark.parametrize(("value", "symmetric"), [(8.0, True), (7.5, False)])
def test_zero_points_in_floats(sketch, value, symmetric):
    assert nbits(sketch, 4, 16, np.full((ROWS, 3), value, np.float32)).quantization.symmetric is symmetric


@pytest.mark.parametrize(
    ("dtype", "shape", "zero", "block", "wanted"),
    [
        (ir.DataType.INT4, (3, ROWS), None, 16, Quantization(4, "block", 16, True, None)),
        (ir.DataType.UINT4, (3, ROWS), 8, 16, Quantization(4, "block", 16, True, None)),
        (ir.DataType.UINT4, (3, ROWS), 7, 16, Quantization(4, "block", 16, False, None)),
        (ir.DataType.UINT4, (3, ROWS), None, 16, Quantization(4, "block", 16, False, None)),
        (ir.DataType.INT8, (ROWS,), 0, 0, Quantization(8, "channel", None, True, None)),
        (ir.DataType.INT8, (ROWS,), 3, 0, Quantization(8, "channel", None, False, None)),
        (ir.DataType.UINT8, (), 128, 0, Quantization(8, "tensor", None, True, None)),
        (ir.DataType.FLOAT8E4M3FN, (), None, 0, Quantization(8, "tensor", None, True, None)),
    ],
)
def test_dequantize_linear(sketch, dtype, shape, zero, block, wanted):
    codes = sketch.const("q", zeros(WIDTH, ROWS), dtype)
    inputs = [codes, sketch.const("s", np.zeros(shape, np.float16))]
    if zero is not None:
        inputs.append(sketch.const("z", np.full(shape, zero), dtype))
    floats = sketch.node("DequantizeLinear", inputs, axis=0 if block else 1, **({"block_size": block} if block else {}))
    (matrix,) = sketch.matrices(sketch.node("MatMul", [sketch.x, floats], name="product"))
    assert matrix.quantization == wanted
    assert (matrix.node, matrix.op, matrix.weight, matrix.rows, matrix.columns) == (
        "product", "DequantizeLinear", "q", ROWS, WIDTH,
    )  # fmt: skip
    scales = int(np.prod(shape))
    zero_bytes = 0 if zero is None else -(-scales * dtype.bitwidth // 8)
    assert matrix.size_bytes == WIDTH * ROWS * dtype.bitwidth // 8 + 2 * scales + zero_bytes


def test_model_optimizers_own_dequantizer_in_the_transposed_layout(sketch):
    codes = sketch.const("w_i4", zeros(ROWS, WIDTH), ir.DataType.INT4)
    scales = sketch.const("w_scale", np.zeros((ROWS, 3), np.float16))
    floats = sketch.node("TRT_INT4DequantizeLinear", [codes, scales], domain="trt", axis=1, block_size=16)
    turned = sketch.node("Transpose", [sketch.node("Cast", [floats], to=1)], perm=[1, 0])
    smoothed = sketch.node("Mul", [sketch.x, sketch.const("w_awq_scale", zeros(WIDTH))])
    (matrix,) = sketch.matrices(sketch.node("MatMul", [smoothed, turned]))
    assert matrix.quantization == Quantization(4, "block", 16, True, None)
    assert (matrix.rows, matrix.columns, matrix.weight) == (ROWS, WIDTH, "w_i4")


def test_floats_that_the_graph_rounds_itself_are_counted_as_floats(sketch):
    scales, middle = sketch.const("s", zeros(ROWS)), sketch.const("z", zeros(ROWS), ir.DataType.INT8)
    rounded = sketch.node("QuantizeLinear", [sketch.const("w", zeros(WIDTH, ROWS)), scales, middle], axis=1)
    floats = sketch.node("DequantizeLinear", [rounded, scales, middle], axis=1)
    output = sketch.node("MatMul", [sketch.x, floats])
    (matrix,) = sketch.matrices(output)
    assert matrix.quantization == Quantization(8, "channel", None, True, None)
    assert matrix.size_bytes == WIDTH * ROWS * 4 + ROWS * (4 + 1)
    assert matrix.dtype == "FLOAT"


def test_an_embedding_of_dequantized_rows(sketch):
    codes = sketch.const("q", zeros(VOCAB, WIDTH), ir.DataType.INT8)
    floats = sketch.node("DequantizeLinear", [codes, sketch.const("s", zeros(VOCAB))], axis=0)
    (matrix,) = sketch.matrices(sketch.node("Gather", [floats, sketch.ids]))
    assert (matrix.role, matrix.rows, matrix.columns, matrix.quantization.bits) == ("embedding", VOCAB, WIDTH, 8)


@pytest.mark.parametrize(
    ("dtype", "packed", "symmetric"), [(None, 2, True), (ir.DataType.INT4, 1, True), (ir.DataType.UINT4, 1, False)]
)
def test_an_embedding_in_blocks(sketch, dtype, packed, symmetric):
    array = np.zeros((VOCAB, WIDTH // packed), np.uint8)
    codes = sketch.const("q", array, dtype)
    inputs = [codes, sketch.ids, sketch.const("s", zeros(VOCAB, 3))]
    output = sketch.node("GatherBlockQuantized", inputs, domain=MS, bits=4, block_size=16, quantize_axis=1)
    (matrix,) = sketch.matrices(output)
    assert matrix.quantization == Quantization(4, "block", 16, symmetric, None)
    assert (matrix.role, matrix.rows, matrix.columns) == ("embedding", VOCAB, WIDTH)
    assert matrix.size_bytes == VOCAB * (WIDTH // 2 + 12)


def test_dynamically_quantized_products(sketch):
    rounded = sketch.node("DynamicQuantizeLinear", [sketch.x])
    codes, zero = sketch.const("q", np.zeros((WIDTH, ROWS), np.int8)), sketch.const("z", np.zeros((), np.int8))
    output = sketch.node("MatMulInteger", [rounded, codes, None, zero])
    graph = sketch.graph(output)
    (matrix,) = matrices_of(graph)
    assert matrix.quantization == Quantization(8, "tensor", None, True, None)
    assert (matrix.rows, matrix.columns, matrix.size_bytes) == (ROWS, WIDTH, ROWS * WIDTH + 1)
    assert quantized_activations(graph) == 1


def test_a_fused_dynamically_quantized_product_by_channel(sketch):
    codes = sketch.const("q", np.zeros((WIDTH, ROWS), np.uint8))
    inputs = [sketch.x, codes, sketch.const("s", zeros(ROWS)), sketch.const("z", np.full(ROWS, 128, np.uint8))]
    graph = sketch.graph(sketch.node("DynamicQuantizeMatMul", inputs, domain=MS))
    (matrix,) = matrices_of(graph)
    assert matrix.quantization == Quantization(8, "channel", None, True, None)
    assert quantized_activations(graph) == 1


def test_experts(sketch):
    experts = 3
    router = sketch.const("router", zeros(1, experts))
    first = sketch.const("q1", np.zeros((experts, ROWS, WIDTH // 2), np.uint8))
    second = sketch.const("q2", np.zeros((experts, WIDTH, ROWS // 2), np.uint8))
    scales = [sketch.const(name, zeros(experts, rows)) for name, rows in (("s1", ROWS), ("s2", WIDTH))]
    inputs = [sketch.x, router, first, scales[0], None, second, scales[1]]
    found = sketch.matrices(sketch.node("QMoE", inputs, domain=MS, expert_weight_bits=4, k=1))
    assert [(m.weight, m.rows, m.columns) for m in found] == [
        ("q1", experts * ROWS, WIDTH), ("q2", experts * WIDTH, ROWS),
    ]  # fmt: skip
    assert {m.quantization for m in found} == {Quantization(4, "channel", None, True, 0)}
    assert found[0].size_bytes == experts * ROWS * (WIDTH // 2 + 4)


def test_experts_in_floats(sketch):
    inputs = [sketch.x, sketch.const("router", zeros(1, 3)), sketch.const("w1", zeros(3, ROWS, WIDTH)), None]
    (matrix,) = sketch.matrices(sketch.node("MoE", inputs, domain=MS, k=1))
    assert (matrix.op, matrix.rows, matrix.columns, matrix.quantization) == ("MoE", 3 * ROWS, WIDTH, None)


def test_bitsandbytes(sketch):
    codes, scales = (
        sketch.const("q", np.zeros(WIDTH * ROWS // 2, np.uint8)),
        sketch.const("a", zeros(WIDTH * ROWS // 16)),
    )
    settings = {"K": WIDTH, "N": ROWS, "block_size": 16, "quant_type": 1}
    (matrix,) = sketch.matrices(sketch.node("MatMulBnb4", [sketch.x, codes, scales], domain=MS, **settings))
    assert (matrix.rows, matrix.columns, matrix.quantization.bits, matrix.quantization.block) == (ROWS, WIDTH, 4, 16)

"""Weights are found in a graph by content, and a variant put there answers as the fake-quantized model does."""

import json

import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

import onnx_ir as ir

from qeval.backends.onnx.insert_weights import Style, apply, make_exact
from qeval.backends.onnx.match_parameters import locate, read_places
from qeval.errors import QevalError, UsageError
from qeval.quant.grid import parse
from qeval.quant.rtn import quantize_rtn
from tests.fixtures.onnx import answers, apart, graph_of, held, value, variant_of

ROWS, COLUMNS = 48, 64
GRID = parse("int4-g32-asym")
TOLERANCE = 1e-5


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def node(op, inputs, output, **attributes):
    made = ir.node(op, inputs, attributes, name=f"node_{output}")
    made.outputs[0].name = output
    return made


def network(nodes, initializers, *, width=COLUMNS):
    """A graph from `x` [n, width] to the last node's output."""
    last = nodes[-1].outputs[0]
    last.type, last.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", "rows"])
    x = next(v for each in nodes for v in each.inputs if v.name == "x")
    return graph_of([x], [last], nodes, initializers)


def x_input(width=COLUMNS):
    return value("x", ["n", width])


def put(graph, parameters, variant, style=None):
    apply(graph, locate(graph, parameters), variant, style or Style())
    return graph


def ops(graph):
    return [each.op_type for each in graph]


X = noise(5, COLUMNS, seed=9)


def stored_as(form, weight, name="w"):
    """The product by `weight` [rows, columns] in the forms that exporters write it."""
    x = x_input()
    if form == "MatMul":
        w = held(name, weight.T.contiguous())
        nodes = [node("MatMul", [x, w], "y")]
    elif form == "Transpose":
        w = held(name, weight)
        turned = node("Transpose", [w], "turned", perm=[1, 0])
        nodes = [turned, node("MatMul", [x, turned.outputs[0]], "y")]
    else:
        w = held(name, weight if form == "Gemm-transB" else weight.T.contiguous())
        bias = held("b", noise(len(weight), seed=3))
        nodes = [node("Gemm", [x, w, bias], "y", transB=int(form == "Gemm-transB"))]
        return network(nodes, [w, bias]), torch.from_numpy(bias.const_value.numpy())
    return network(nodes, [w]), 0.0


@pytest.mark.parametrize("style", [Style(), Style("qdq")], ids=["nbits", "qdq"])
@pytest.mark.parametrize("form", ["MatMul", "Transpose", "Gemm", "Gemm-transB"])
def test_a_weight_is_swapped_however_it_is_stored(form, style):
    weight = noise(ROWS, COLUMNS)
    graph, bias = stored_as(form, weight)
    q = quantize_rtn(weight, GRID)
    put(graph, {"p.weight": weight}, variant_of({"p.weight": q}), style)
    assert apart(answers(graph, 1, x=X), X @ q.dequantize().T + bias) < TOLERANCE
    assert "w" not in graph.initializers
    assert "Transpose" not in ops(graph) and "Gemm" not in ops(graph)
    assert [out.name for out in graph.outputs] == ["y"]


def test_a_square_weight_is_not_taken_for_its_transpose():
    weight = noise(COLUMNS, COLUMNS)
    x, w = x_input(), held("w", weight)
    graph = network([node("MatMul", [x, w], "y")], [w])  # x @ weight, where a linear computes x @ weight.T
    with pytest.raises(QevalError, match=r"no MatMul by p\.weight"):
        put(graph, {"p.weight": weight}, variant_of({"p.weight": quantize_rtn(weight, GRID)}))


def test_names_may_lie():
    one, two = noise(COLUMNS, COLUMNS, seed=1), noise(COLUMNS, COLUMNS, seed=2)
    x, first, second = x_input(), held("two.weight", one.T.contiguous()), held("one.weight", two.T.contiguous())
    middle = node("MatMul", [x, first], "middle")
    graph = network([middle, node("MatMul", [middle.outputs[0], second], "y")], [first, second])
    q = quantize_rtn(one, GRID)
    put(graph, {"one.weight": one, "two.weight": two}, variant_of({"one.weight": q}))
    assert apart(answers(graph, x=X), X @ q.dequantize().T @ two.T) < TOLERANCE


@pytest.mark.parametrize("grid", ["int4-g32", "int8-channel-asym", "int4-tensor", "int3-g48-asym"])
def test_a_fused_weight_may_lie_in_several_initializers(grid):
    """Rows 0-16, 16-32 and 32-48 are three products, each with its own rows of codes and scales."""
    weight, x = noise(ROWS, COLUMNS), x_input()
    parts = [held(f"part{i}", weight[i * 16 : i * 16 + 16].T.contiguous()) for i in range(3)]
    products = [node("MatMul", [x, part], f"y{i}") for i, part in enumerate(parts)]
    graph = network([*products, node("Concat", [p.outputs[0] for p in products], "y", axis=1)], parts)
    q = quantize_rtn(weight, parse(grid))
    places = locate(graph, {"qkv.weight": weight})
    assert sorted(m.rows.start for m in places.matrices["qkv.weight"]) == [0, 16, 32]
    apply(graph, places, variant_of({"qkv.weight": q}), Style())
    assert ops(graph).count("MatMulNBits") == 3
    assert apart(answers(graph, x=X), X @ q.dequantize().T) < TOLERANCE


def test_a_part_that_is_missing_is_noticed():
    weight, x = noise(ROWS, COLUMNS), x_input()
    parts = [held(f"part{i}", weight[i * 16 : i * 16 + 16].T.contiguous()) for i in (0, 2)]
    products = [node("MatMul", [x, part], f"y{i}") for i, part in enumerate(parts)]
    graph = network([*products, node("Concat", [p.outputs[0] for p in products], "y", axis=1)], parts)
    with pytest.raises(QevalError, match=r"^The exported graph has no MatMul by qkv.weight; it can't take this"):
        put(graph, {"qkv.weight": weight}, variant_of({"qkv.weight": quantize_rtn(weight, GRID)}))


def test_what_has_no_place_is_named():
    weight, x = noise(ROWS, COLUMNS), x_input()
    w = held("w", weight.T.contiguous())
    graph = network([node("MatMul", [x, w], "y")], [w])
    parameters = {"p.weight": weight, "q.weight": noise(ROWS, COLUMNS, seed=5), "norm.weight": noise(COLUMNS)}
    places = locate(graph, parameters)
    q = quantize_rtn(weight, GRID)
    for variant, reason in (
        (variant_of({"q.weight": q}), "has no MatMul by q.weight"),
        (variant_of({"p.weight": q}, {"norm.weight": noise(COLUMNS)}), "no initializer that holds norm.weight"),
        (variant_of({}, {}, {"p.weight": torch.ones(COLUMNS)}), "p.weight has input scales but stays in float"),
    ):
        with pytest.raises(QevalError, match=reason):
            apply(graph, places, variant, Style())
    with pytest.raises(UsageError, match=r"blocks of 24 \(p.weight is int4-g24\)"):
        apply(graph, places, variant_of({"p.weight": quantize_rtn(weight, parse("g24"))}), Style())


def norms(*gains, names):
    """y = x * gain_0 * gain_1 ..."""
    source, stored = x_input(), [held(name, gain) for name, gain in zip(names, gains, strict=True)]
    nodes = []
    for place, gain in enumerate(stored):
        nodes.append(node("Mul", [source, gain], f"y{place}"))
        source = nodes[-1].outputs[0]
    return network(nodes, stored)


def test_gains_of_ones_are_told_apart_by_their_names():
    """A fresh model's gains are all alike; AWQ changes each to something else, and none may go to another's place."""
    names = [f"model.layers.{i}.{kind}_layernorm.weight" for i in range(12) for kind in ("input", "post_attention")]
    parameters = {name: torch.ones(COLUMNS) for name in names}
    graph = norms(*parameters.values(), names=names)
    places = locate(graph, parameters)
    assert {name: [h.value.name for h in places.held[name]] for name in names} == {name: [name] for name in names}
    floats = {name: 1 + 0.1 * noise(COLUMNS, seed=i) for i, name in enumerate(names)}
    apply(graph, places, variant_of({}, floats), Style())
    for name, tensor in floats.items():
        assert torch.equal(torch.from_numpy(graph.initializers[name].const_value.numpy()), tensor)


def test_gains_that_nothing_tells_apart_are_not_guessed():
    parameters = {"a.weight": torch.ones(COLUMNS), "b.weight": torch.ones(COLUMNS)}
    graph = norms(*parameters.values(), names=["val_1", "val_2"])
    with pytest.raises(QevalError, match=r"no initializer that holds a\.weight"):
        put(graph, parameters, variant_of({}, {"a.weight": 2 * torch.ones(COLUMNS)}))


def test_a_gain_of_one_plus_weight_stays_one():
    gain, changed = 0.1 * noise(COLUMNS), 0.2 * noise(COLUMNS, seed=4)
    graph = norms(1 + gain, names=["model.norm.weight"])
    put(graph, {"norm.weight": gain}, variant_of({}, {"norm.weight": changed}))
    assert apart(answers(graph, x=X), X * (1 + changed)) < 1e-6


def tied_graph(embedding):
    """Logits of looked-up rows by the very matrix they were looked up in."""
    ids, w = value("ids", ["n"], ir.DataType.INT64), held("embed", embedding)
    looked = node("Gather", [w, ids], "looked", axis=0)
    turned = node("Transpose", [w], "turned", perm=[1, 0])
    head = node("MatMul", [looked.outputs[0], turned.outputs[0]], "y")
    head.outputs[0].type, head.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", ROWS])
    return graph_of([ids], [head.outputs[0]], [looked, turned, head], [w])


@pytest.mark.parametrize("style", [Style(), Style("qdq")], ids=["nbits", "qdq"])
def test_quantizing_a_tied_head_leaves_the_embedding(style):
    embedding, ids = noise(ROWS, COLUMNS), torch.tensor([3, 0, 47])
    graph, q = tied_graph(embedding), quantize_rtn(embedding, GRID)
    put(graph, {"embed.weight": embedding, "lm_head.weight": embedding}, variant_of({"lm_head.weight": q}), style)
    assert apart(answers(graph, 1, ids=ids), embedding[ids] @ q.dequantize().T) < TOLERANCE
    assert "Transpose" not in ops(graph)


def test_both_names_of_a_tied_matrix_have_its_places():
    embedding = noise(ROWS, COLUMNS)
    places = locate(tied_graph(embedding), {"embed.weight": embedding, "lm_head.weight": embedding})
    assert [len(places.matrices[name]) for name in ("embed.weight", "lm_head.weight")] == [1, 1]


def test_input_scales_are_a_mul_before_the_product():
    weight, scales = noise(ROWS, COLUMNS), 0.5 + torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1))
    graph, bias = stored_as("Gemm", weight)
    q = quantize_rtn(weight, GRID)
    put(graph, {"p.weight": weight}, variant_of({"p.weight": q}, {}, {"p.weight": scales}))
    assert ops(graph) == ["Mul", "MatMulNBits", "Add"]
    assert apart(answers(graph, x=X), (X * scales) @ q.dequantize().T + bias) < TOLERANCE


def test_what_an_exporter_rounded_is_made_exact():
    weight, gain = noise(ROWS, COLUMNS), 0.1 * noise(COLUMNS, seed=2)
    x = x_input()
    stored = [held("g", (1 + gain.half()).float()), held("w", weight.half().float().T.contiguous())]
    scaled = node("Mul", [x, stored[0]], "scaled")
    graph = network([scaled, node("MatMul", [scaled.outputs[0], stored[1]], "y")], stored)
    parameters = {"norm.weight": gain, "p.weight": weight}
    expected = (X * (1 + gain)) @ weight.T
    assert apart(answers(graph, x=X), expected) > 1e-5, "the test could tell"
    make_exact(locate(graph, parameters), parameters)
    assert apart(answers(graph, x=X), expected) < 1e-6


def test_places_can_be_written_down():
    weight, gain = noise(ROWS, COLUMNS), 0.1 * noise(COLUMNS, seed=2)
    x, g, w = x_input(), held("g", 1 + gain), held("w", weight.T.contiguous())
    scaled = node("Mul", [x, g], "scaled")
    graph = network([scaled, node("MatMul", [scaled.outputs[0], w], "y")], [g, w])
    places = locate(graph, {"norm.weight": gain, "p.weight": weight})
    again = read_places(graph, json.loads(json.dumps(places.spelled())))
    assert again.spelled() == places.spelled()
    assert again.covers("p.weight", ROWS)
    q = quantize_rtn(weight, GRID)
    apply(graph, again, variant_of({"p.weight": q}), Style())
    assert apart(answers(graph, x=X), (X * (1 + gain)) @ q.dequantize().T) < TOLERANCE

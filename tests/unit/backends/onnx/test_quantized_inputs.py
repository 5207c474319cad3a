"""Inputs rounded in an exported graph: products of integers beside torch, and beside the slow definition."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxruntime_genai")

from qeval.backends.onnx.backend import OrtBackend
from qeval.backends.onnx.input_format import check_graph_scheme
from qeval.backends.onnx.insert_weights import Style, apply
from qeval.backends.onnx.inspection import inspect_folder
from qeval.backends.onnx.match_parameters import locate
from qeval.backends.onnx.providers import choose_provider
from qeval.config import parse_method
from qeval.errors import QevalError, UsageError
from qeval.metrics.tokens import near_kl
from qeval.models.structure.forward import run_samples
from qeval.quant.fake_quant import fake_quantize_rows
from qeval.quant.grid import parse
from qeval.quant.rtn import quantize_rtn
from qeval.quant.scheme import parse_format, scheme_of
from qeval.quant.variant import LEFT_IN_FLOAT, FloatWeight, Variant
from qeval.quantize.ranges import collect_ranges
from qeval.types import Request
from tests.fixtures.onnx import (
    WEIGHT,
    answers,
    apart,
    exporter,
    loaded,
    made,
    ort_session,
    product_graph,
    shared_home,
    torch_backend,
    variant_of,
)

ROWS, COLUMNS = 48, 80
TOKENS = tuple(torch.randint(2, 250, (60,), generator=torch.Generator().manual_seed(5)).tolist())
REQUEST = Request(TOKENS, tuple(range(60)))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded_product(grid, how, x, amax=None, graph=None):
    """`x` times a weight on a grid, with rounded inputs, in a graph of one product; and the weight."""
    weight = drawn(ROWS, COLUMNS)
    graph = product_graph(weight) if graph is None else graph
    variant = Variant("key", {}, {}, {}, (FloatWeight(WEIGHT, weight.numel(), LEFT_IN_FLOAT),))
    if grid is not None:
        quantized = quantize_rtn(weight, parse(grid))
        variant, weight = variant_of({WEIGHT: quantized}), quantized.dequantize()
    ranges = {} if amax is None else {WEIGHT: amax}
    places = locate(graph, {WEIGHT: drawn(ROWS, COLUMNS)})
    apply(graph, places, replace(variant, scheme=scheme_of({"activations": how}), ranges=ranges), Style())
    return answers(graph, x=x), weight, [node.op_type for node in graph]


@pytest.mark.parametrize("how", ["int8-token", "int8-tensor", "int4-token"])
@pytest.mark.parametrize(
    ("grid", "product"),
    [
        ("int8-channel", "MatMulInteger"),
        ("int8-tensor", "MatMulInteger"),
        ("int8-channel-asym", "MatMulInteger"),
        ("int4-channel", "MatMulInteger"),
        ("int4-g16", "MatMulNBits"),
        (None, "MatMul"),
    ],
)
def test_a_product_is_that_of_rounded_inputs_and_weights(grid, product, how):
    x = drawn(7, COLUMNS, seed=1) * torch.logspace(-3, 3, 7).unsqueeze(1)
    x[3] = 0
    amax = torch.tensor(2.0) if "tensor" in how else None  # most rows saturate
    found, weight, operators = rounded_product(grid, how, x, amax)
    expected = fake_quantize_rows(x, parse_format(how, "activations"), amax).double() @ weight.double().T
    assert product in operators
    assert "MatMulInteger" not in operators or product == "MatMulInteger"
    for ours, theirs in zip(found, expected.float(), strict=True):
        assert not theirs.any() if not ours.any() else apart(ours, theirs) < 1e-6


def test_codes_are_torchs_on_ties_and_sums_are_exact():
    # Rows of one large number, whose scale is 1, and halves; the sum of a row's codes tells how each was rounded.
    codes = torch.randint(-127, 127, (400, COLUMNS), generator=torch.Generator().manual_seed(2))
    x = codes + 0.5
    x[:, 0] = 127.0
    ones = quantize_rtn(torch.ones(ROWS, COLUMNS), parse("int8-channel"))
    graph = product_graph(torch.ones(ROWS, COLUMNS))
    variant = replace(variant_of({WEIGHT: ones}), scheme=scheme_of({"activations": "int8-token"}))
    apply(graph, locate(graph, {WEIGHT: torch.ones(ROWS, COLUMNS)}), variant, Style())
    exact = torch.round(x).sum(-1) * 127 * ones.scales[0, 0]
    assert torch.equal(answers(graph, x=x)[:, 0], exact)


def test_the_largest_products_do_not_saturate():
    """Pairs of an unsigned and a signed byte overflow 16 bits on CPUs without VNNI; unsigned pairs do not."""
    x = torch.full((2, COLUMNS), 3.0)
    found, _, _ = rounded_product("int8-channel", "int8-token", x)
    ones = quantize_rtn(drawn(ROWS, COLUMNS), parse("int8-channel")).dequantize()
    assert apart(found, x @ ones.T) < 1e-6


@pytest.fixture
def home(monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(shared_home()))


def with_inputs(model, method):
    """A recipe's variant with its scheme, calibrated on half of the text."""
    variant, scheme = made(model, method), parse_method(method).scheme
    run = partial(run_samples, loaded(model).model, [TOKENS[:30]], lambda done: None)
    names = [name for name in variant.activation_inputs if name != "lm_head.weight"]
    return replace(variant, scheme=scheme, ranges=collect_ranges(loaded(model).model, names, scheme, run))


def kl_from_torch(model, variant, session):
    """The mean KL of a session from torch with the same scheme, in nats."""
    with torch_backend(model).open(variant) as ours, torch.inference_mode():
        states = ours.states([REQUEST])[0], session.states([REQUEST])[0]
        return float(near_kl(ours.logits, states[0], session.logits, states[1]).mean())


CASES = [
    ("llama", "int8-w8a8"),
    ("llama", "rtn:int8-channel+a-int8-tensor"),
    ("llama", "rtn:int8-channel-head+a-int8-token"),
    ("llama", "smoothquant"),
    ("llama", "rtn:int4-g32+a-int8-token"),
    ("llama", "fp16+a-int8-tensor"),
    ("tied", "int8-w8a8+kv-int8-tensor-ort"),
    ("qwen2", "int8-w8a8"),
]


@pytest.mark.parametrize(("model", "method"), CASES)
def test_an_exported_folder_answers_as_torch_does_with_the_same_scheme(model, method, home, tmp_path):
    variant, out = with_inputs(model, method), tmp_path / "out"
    exporter(model).write(variant, Style(), out)
    session = ort_session(out)
    assert kl_from_torch(model, variant, session) < 1e-6
    assert kl_from_torch(model, variant.weights_alone, session) > 1e-6


def test_a_folder_says_what_it_rounds_and_shares_prefixes(home, tmp_path):
    variant, out = with_inputs("llama", "int8-w8a8"), tmp_path / "out"
    exporter("llama").write(variant, Style(), out)
    facts = inspect_folder(out, needs_tokenizer=False)
    assert "14 of 14 matrices of the body are MatMulInteger: 8 bits, a scale a channel, symmetric." in facts.describe()
    # queries, keys and values share an input, gate and up too: 4 a layer
    assert "8 nodes round activations to integers in the graph." in facts.describe()
    stored = {matrix.size_bytes for matrix in facts.matrices if matrix.op == "MatMulInteger"}
    assert all(matrix.rows * (matrix.columns + 4) + 1 in stored for matrix in facts.quantized)

    session = ort_session(out)
    prefix = session.prefill(TOKENS[:20])
    continued = session.states([Request(TOKENS[20:], tuple(range(40)))], prefix)[0]
    whole = session.states([REQUEST])[0][20:]
    assert float(near_kl(session.logits, whole, session.logits, continued).mean()) < 1e-6


def test_the_runtime_generates_from_the_folder(home, tmp_path):
    og = pytest.importorskip("onnxruntime_genai")
    exporter("llama").write(with_inputs("llama", "int8-w8a8"), Style(), tmp_path / "out")
    parameters = og.GeneratorParams(model := og.Model(str(tmp_path / "out")))
    parameters.set_search_options(max_length=40, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([TOKENS[:30]], np.int32))
    session = ort_session(tmp_path / "out")
    expected = session.logits(session.states([Request(TOKENS[:30], (29,))])[0])[0].numpy()
    assert np.abs(generator.get_logits().flatten()[: len(expected)] - expected).max() < 1e-3


def test_the_backend_opens_such_a_variant_and_says_how_it_is_run(home):
    variant = with_inputs("llama", "int8-w8a8")
    with OrtBackend(exporter("llama"), Style(), choose_provider("cpu"), 1).open(variant) as session:
        assert any("MatMulInteger" in fact for fact in session.facts)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"activations": "fp8-token"}, "not fp8-token; say int8-w8a8"),
        ({"activations": "int8-g32"}, "a scale a token or tensor, not int8-g32"),
        ({"activations": "nvfp4"}, "not nvfp4"),
        ({"activations": "int8-token", "keys": "int8", "values": "int8"}, "its attention has keys and values"),
    ],
)
def test_what_no_operator_does_is_refused(names, says):
    with pytest.raises(UsageError, match=says):
        check_graph_scheme(scheme_of(names))


def test_other_providers_are_refused():
    with pytest.raises(UsageError, match="not on cuda; say --ep cpu"):
        check_graph_scheme(scheme_of({"activations": "int8-token"}), "cuda")


def test_a_product_that_the_graph_lacks_is_refused():
    with pytest.raises(QevalError, match=f"no MatMul by {WEIGHT}"):
        rounded_product(None, "int8-token", drawn(2, 4), graph=product_graph(torch.eye(4)))

"""A foreign graph's weights beside the baseline's: what tools make passes and is counted, what is broken is named."""

import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("onnxscript")

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig, MatMulNBitsQuantizer

from qeval.backends.onnx.inspection import parse_folder
from qeval.compare.external_graphs import check_weights
from qeval.errors import UsageError
from qeval.models.load import load_model
from qeval.models.source import resolve
from tests.fixtures.foreign import FOLDERS, anonymous, built, edit, exchange, numbers, put, uneven
from tests.fixtures.onnx import beside, loaded, shared_home
from tests.fixtures.tiny import tiny_llama

GATE = "model.layers.{}.mlp.gate_proj.MatMul.weight_"
DOWN, QKV = "model.layers.1.mlp.down_proj.MatMul.weight_", "model.layers.1.attn.qkv_proj.MatMul.weight_"


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(shared_home()))


@pytest.fixture(scope="module")
def baselines():
    """The baselines of `MODELS` and of the uneven Llama, by name; each traced once."""
    found = {}

    def get(name):
        if name not in found:
            model = (
                load_model(resolve(str(uneven()), None), device="cpu", dtype=None) if name == "uneven" else loaded(name)
            )
            found[name] = beside(model)
        return found[name]

    return get


def checked(folder, baseline):
    return check_weights(parse_folder(folder, needs_tokenizer=False), baseline)


def all_of(count):
    return f"{count} of its {count} matrices with the baseline's weights"


COUNTS = {"fp16": 16, "shared": 11, "mixed": 11, "apart": 16, "plus one": 11}
"""Matrices of the graphs: queries, keys and values are one in most, a tied head and its embedding in some."""


@pytest.mark.parametrize("names", ["kept", "lost"])
@pytest.mark.parametrize("name", FOLDERS)
def test_what_the_builder_makes_is_compared_whole(baselines, tmp_path, name, names):
    folder = built(name)
    if names == "lost":
        folder = shutil.copytree(folder, tmp_path / "copy")
        edit(folder, anonymous)
    assert checked(folder, baselines(FOLDERS[name][0])) == all_of(COUNTS.get(name, 12))


def nibbles(name):
    def change(graph):
        codes = numbers(graph, name)
        put(graph, name, (codes >> 4) | (codes << 4))

    return change


def one_too_high(graph):
    zeros = numbers(graph, DOWN + "zero_points")
    low, high = np.minimum(zeros & 15, 14) + 1, np.minimum(zeros >> 4, 14) + 1
    put(graph, DOWN + "zero_points", low | (high << 4))


def one_too_low(graph):
    """Where the kernel's default is 8, points of 7."""
    node = next(node for node in graph if "layers.1/mlp/down_proj/MatMul" in node.name)
    rows, blocks = node.inputs[2].shape.numpy()
    value = ir.Value(name="sevens", const_value=ir.tensor(np.full((rows, -(-blocks // 2)), 0x77, np.uint8)))
    graph.register_initializer(value)
    node.resize_inputs(4)
    node.replace_input_with(3, value)


def other_layers(graph):
    for part in ("Q4", "scales"):
        exchange(graph, GATE.format(0) + part, GATE.format(1) + part)


def other_scales(graph):
    exchange(graph, GATE.format(0) + "scales", GATE.format(1) + "scales")


def scaled(name, times):
    return lambda graph: put(graph, name, numbers(graph, name) * np.float32(times))


def not_finite(graph):
    scales = numbers(graph, DOWN + "scales")
    scales[3] = np.nan
    put(graph, DOWN + "scales", scales)


def other_rows(graph):
    codes = numbers(graph, QKV + "Q4")
    codes[100:104] = codes[20:24]
    put(graph, QKV + "Q4", codes)


ONE = "(nothing else of its 19 parameters is wrong)"
BROKEN = {
    "swapped nibbles": ("int4", nibbles(DOWN + "Q4"), "1.mlp.down_proj.weight is not the baseline's: the relative",
                        ": its nibbles are swapped along the columns " + ONE),
    "a zero point too high": ("zeros", one_too_high, "1.mlp.down_proj.weight is not", "zero points are one too high"),
    "a zero point too low": ("int4", one_too_low, "1.mlp.down_proj.weight is not", "zero points are one too low"),
    "exchanged layers": ("int4", other_layers, "0.mlp.gate_proj.weight is not the baseline's: the relative error is 1.",
                         ": it is the baseline's model.layers.1.mlp.gate_proj.weight (as in 1 more of its 19 param"),
    "exchanged scales": ("int4", other_scales, "0.mlp.gate_proj.weight is not the baseline's: the relative error is 1.",
                         ": its scales are those of other blocks (as in 1 more of its 19 parameters)."),
    "scales of twice the size": ("int4", scaled(QKV + "scales", 2), "layers.1.self_attn.q_proj.weight is not the",
                                 ": its scales are 2.02 times what its codes need (as in 2 more"),
    "scales that are no numbers": ("int4", not_finite, "1.mlp.down_proj.weight has 4 scales that are not finite."),
    "rows of another linear": ("int4", other_rows, "layers.1.self_attn.v_proj.weight is not the baseline's: rows of it "
                               "are nothing like it, 4 in all, the first of them row 4 " + ONE),
    "an embedding of another": ("int8", scaled("model.embed_tokens.weight", 1.01), "its model.embed_tokens.weight "
                                "differs from the baseline's by 1 %, which no quantizer changes: it was made from "),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_named(baselines, tmp_path, what):
    name, spoil, *words = BROKEN[what]
    folder = shutil.copytree(built(name), tmp_path / "copy")
    edit(folder, spoil)
    with pytest.raises(UsageError) as caught:
        checked(folder, baselines(FOLDERS[name][0]))
    for each in words:
        assert each in str(caught.value)


@pytest.mark.parametrize(
    "spoil", [other_layers, nibbles(DOWN + "Q4"), nibbles(QKV + "Q4")], ids=["layers", "one", "three"]
)
def test_what_is_broken_is_found_without_names(baselines, tmp_path, spoil):
    """By the order of the layers, and as the last of its shape that is left."""
    folder = shutil.copytree(built("int4"), tmp_path / "copy")
    edit(folder, spoil)
    with pytest.raises(UsageError) as named:
        checked(folder, baselines("uneven"))
    edit(folder, anonymous)
    with pytest.raises(UsageError) as nameless:
        checked(folder, baselines("uneven"))
    assert str(nameless.value) == str(named.value)


def turned(graph):
    """The rows of queries and keys in the order of an interleaved rotary kernel, of heads of 16."""
    order = np.arange(16).reshape(2, 8).T.reshape(-1)
    for name in [name for name in graph.initializers if re.search("[qk]_proj.MatMul.weight", name)]:
        columns = numbers(graph, name)
        heads = columns.reshape(len(columns), -1, 16)
        put(graph, name, np.ascontiguousarray(heads[:, :, order].reshape(columns.shape)))


def interleaved(graph):
    for node in graph:
        if node.op_type == "RotaryEmbedding":
            node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)


def test_rows_in_the_order_of_another_rotary_kernel_need_that_kernel(baselines, tmp_path):
    folder = shutil.copytree(built("fp16"), tmp_path / "copy")
    edit(folder, turned)
    with pytest.raises(UsageError, match=r"q_proj.weight is not .* in the other order of rotary positions \(pairs to"):
        checked(folder, baselines("uneven"))
    edit(folder, interleaved)
    told = "12 of its 16 matrices with the baseline's weights; 4 not (their rows may be in the order of an interleaved"
    assert checked(folder, baselines("uneven")).startswith(told)


def test_what_cannot_be_compared_is_counted_with_its_reason(baselines, tmp_path):
    folder = shutil.copytree(built("int4"), tmp_path / "copy")

    def more(graph):
        """A product of another shape, and one in a format that is not read; and a norm that comes from elsewhere."""
        states = next(node for node in graph if node.op_type == "MatMulNBits").inputs[0]
        odd = ir.Value(name="odd", const_value=ir.tensor(np.zeros((64, 7), np.float32), name="odd"))
        codes = ir.Value(name="nf4", const_value=ir.tensor(np.zeros(64 * 32, np.uint8), name="nf4"))
        scales = ir.Value(name="absmax", const_value=ir.tensor(np.zeros(64, np.float32), name="absmax"))
        for value in (odd, codes, scales):
            graph.register_initializer(value)
        settings = {"K": 64, "N": 64, "block_size": 64, "quant_type": 1}
        graph.append(ir.node("MatMul", [states, odd], name="more/MatMul"))
        graph.append(ir.node("MatMulBnb4", [states, codes, scales], settings, domain="com.microsoft", name="more/NF4"))
        norm = next(node for node in graph if "layers.1/post_attention_layernorm" in node.name)
        norm.op_type = "UnknownNormalization"

    edit(folder, more)
    assert checked(folder, baselines("uneven")) == (
        "9 of its 14 matrices with the baseline's weights; 2 not (their norms were not found); 1 not (MatMulBnb4 is "
        "not read); 1 not (of a shape that no linear of the baseline has); 1 not (after linears that are not compared)"
    )


@pytest.mark.filterwarnings("ignore")
def test_what_onnxruntimes_quantizers_make_is_compared(baselines, tmp_path):
    """Integer products whose inputs are rounded while running, an embedding that is looked up as codes."""
    for name in ("int4", "fp32"):
        shutil.copytree(built("fp32"), tmp_path / name, ignore=shutil.ignore_patterns("*.onnx*"))
    quantizer = MatMulNBitsQuantizer(
        str(built("fp32") / "model.onnx"), algo_config=HQQWeightOnlyQuantConfig(block_size=32)
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(tmp_path / "int4" / "model.onnx"))
    assert checked(tmp_path / "int4", baselines("uneven")) == all_of(12)
    quantize_dynamic(built("fp32") / "model.onnx", tmp_path / "fp32" / "model.onnx", per_channel=True)
    told = f"{all_of(11)}; none was found to be model.embed_tokens.weight"
    assert checked(tmp_path / "fp32", baselines("uneven")) == told


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({}, r"the relative error is 1\.\d* where its bits .* \(as in \d+ more of its"),
        (
            {"num_hidden_layers": 3},
            "none of its 10 matrices has the shape and the values of a linear of the baseline: it",
        ),
    ],
)
def test_the_weights_of_another_model_are_refused(other, words):
    baseline = beside(SimpleNamespace(model=tiny_llama(seed=9, **other)))
    with pytest.raises(UsageError, match=words):
        checked(built("shared"), baseline)


def test_a_graph_that_lacks_a_layer_is_refused(baselines):
    longer = tiny_llama(num_hidden_layers=3)
    longer.load_state_dict(dict(baselines("uneven").parameters), strict=False)
    with pytest.raises(
        UsageError, match=r"it lacks model.layers.2.self_attn.q_proj.weight, .*, which the baseline has"
    ):
        checked(built("int4"), beside(SimpleNamespace(model=longer)))


def test_linears_in_operators_that_nobody_knows_are_told(baselines, tmp_path):
    folder = shutil.copytree(built("int4"), tmp_path / "copy")

    def unknown(graph):
        for node in [node for node in graph if "layers.1/mlp/gate" in node.name]:
            node.op_type = "MatMulOfTomorrow"

    edit(folder, unknown)
    told = f"{all_of(11)}; none was found to be model.layers.1.mlp.gate_proj.weight"
    assert checked(folder, baselines("uneven")) == told


def test_an_embedding_with_its_models_multiplier_in_it_is_left_out(baselines, tmp_path):
    folder = shutil.copytree(built("int8"), tmp_path / "copy")
    edit(folder, scaled("model.embed_tokens.weight", 8))
    told = checked(folder, baselines("uneven"))
    assert told == (
        "11 of its 12 matrices with the baseline's weights; 1 not (8 times the baseline's, which is the root of its "
        "width: the multiplier is in it)"
    )


def test_a_streamed_baseline_is_told_to_hold_no_weights(baselines):
    held = baselines("uneven")
    streamed = replace(held, parameters={name: each.to("meta") for name, each in held.parameters.items()})
    assert checked(built("int4"), streamed) == "no matrix of it: --stream does not hold the baseline's weights"

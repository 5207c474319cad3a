"""Exported folders: the variant's own integers in a graph that answers as the fake-quantized model does."""

import json
import os
import re
import shutil
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("onnxscript")

import onnx_ir as ir

from qeval.backends.onnx import export
from qeval.backends.onnx.folder import opened
from qeval.backends.onnx.insert_weights import Style
from qeval.backends.onnx.inspection import inspect_folder, parse_folder
from qeval.backends.onnx.nbits import container_bits, kernel_block
from qeval.backends.onnx.providers import choose_provider
from qeval.backends.onnx.reference import round_activations
from qeval.backends.onnx.settings import QDQ_LEVEL, session_entries
from qeval.compare.external_graphs import check_weights
from qeval.errors import QevalError, UsageError
from qeval.metrics.tokens import near_kl
from qeval.quant.qweight import QWeight
from qeval.types import Request
from tests.fixtures.onnx import (
    MODELS,
    beside,
    exporter,
    exporter_of,
    float_folder,
    loaded,
    made,
    shared_home,
    torch_backend,
)  # fmt: skip

METHODS = (
    "rtn:g32",
    "rtn:g32-asym",
    "rtn:int8-channel",
    "rtn:g32-head",
    "awq:g32-asym",
    "mixed-rtn:g32-head",
    "mixed:int4-g32/bf16-12bpw",
    "gptq:g32",
)
CASES = [
    *(("llama", method, "nbits") for method in METHODS),
    ("llama", "rtn:int3-channel-asym", "nbits"),
    ("llama", "rtn:g32-head", "qdq"),
    ("llama", "rtn:int8-channel-asym", "qdq"),
    ("tied", "awq:g32-head", "nbits"),
    ("tied", "rtn:g32-asym-head", "qdq"),
    *(
        (name, method, "nbits")
        for name in ("gemma3", "qwen2", "phi3", "olmo2")
        for method in ("awq:g32", "rtn:g32-head")
    ),
    ("olmo2", "rtn:g32-asym", "qdq"),
]
TOKENS = tuple(torch.randint(2, 250, (100,), generator=torch.Generator().manual_seed(3)).tolist())
REQUEST = Request(TOKENS, tuple(range(100)))


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("QEVAL_HOME", str(shared_home()))


def distance(name, variant, folder):
    """Mean KL from the fake-quantized model, and the largest difference of a logit."""
    with (
        torch.inference_mode(),
        torch_backend(name).open(variant) as ours,
        opened(folder, choose_provider("cpu"), threads=1) as found,
    ):
        states, other = ours.states([REQUEST])[0], found.session.states([REQUEST])[0]
        kl = near_kl(ours.logits, states, found.session.logits, other)
        worst = (ours.logits(states) - found.session.logits(other)).abs().max()
    return float(kl.mean()), float(worst)


def compared(name, folder):
    """Whether all matrices of a graph were found to be the baseline's, as those of a graph made elsewhere are."""
    told = check_weights(parse_folder(folder), beside(loaded(name)))
    return re.fullmatch(r"(\d+) of its \1 matrices with the baseline's weights", told)


@pytest.mark.parametrize("name", MODELS)
def test_the_float_graph_is_the_model(name):
    kl, worst = distance(name, None, float_folder(name))
    assert kl <= 1e-8
    assert worst <= 1e-3
    assert compared(name, float_folder(name))


@pytest.mark.parametrize(("name", "method", "form"), CASES, ids=str)
def test_the_folder_answers_as_the_fake_quantized_model(name, method, form, tmp_path):
    variant, out = made(name, method), tmp_path / "out"
    exporter(name).write(variant, Style(form), out)
    kl, worst = distance(name, variant, out)
    assert kl <= 1e-8
    assert worst <= 1e-3
    assert distance(name, None, out)[0] > 1e-4, "the test could tell"
    assert compared(name, out), "scales that were folded are taken back"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("method", ["rtn:g32-head", "rtn:int8-channel-asym"])
def test_accuracy_level_4_is_the_reference_in_every_product(method, tmp_path):
    """The fake-quantized model with its linears' inputs rounded as the kernel rounds them; softer, since a rounding
    that an ulp upstream turns over is a step of 1/127 of a block's largest value."""
    variant, out = made("llama", method), tmp_path / "out"
    exporter("llama").write(variant, Style(accuracy_level=4), out)
    whole = distance("llama", variant, out)[0]
    model, handles = loaded("llama").model, []
    for name, weight in variant.weights.items():
        block = kernel_block(name, weight.grid, weight.codes.shape[1])
        hook = lambda _, args, block=block: (round_activations(args[0], block),)  # noqa: E731
        handles.append(model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook))
    try:
        with torch_backend("llama").open(variant) as ours, opened(out, choose_provider("cpu"), threads=1) as found:
            expected = torch.inference_mode()(model)(torch.tensor([TOKENS])).logits[0]
            if "lm_head.weight" in variant.weights:
                states = ours.states([REQUEST])[0]
                block = kernel_block("head", variant.weights["lm_head.weight"].grid, states.shape[1])
                expected = ours.logits(round_activations(states, block))
            answered = found.session.logits(found.session.states([REQUEST])[0])
    finally:
        for handle in handles:
            handle.remove()
    identity = lambda logits: logits  # noqa: E731
    kernel = float(near_kl(identity, expected, identity, answered).mean())
    assert kernel < whole / 10
    assert whole > 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_what_is_in_the_graph_is_what_the_variant_says(method, tmp_path):
    variant = made("llama", method)
    exporter("llama").write(variant, Style(accuracy_level=4), tmp_path / "out")
    model = ir.load(tmp_path / "out" / "model.onnx")
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits"]
    found = Counter(
        tuple(node.attributes[key].as_int() for key in ("N", "K", "bits", "block_size", "accuracy_level"))
        for node in nodes
    )
    expected = Counter(
        (*q.codes.shape, container_bits(q.grid), kernel_block(name, q.grid, q.codes.shape[1]), 4)
        for name, q in variant.weights.items()
    )
    assert found == expected
    assert model.graph.outputs[0].name == "logits"
    facts = inspect_folder(tmp_path / "out")
    assert len(facts.quantized) == len(variant.weights)
    assert (facts.head.quantization is not None) == ("lm_head.weight" in variant.weights)
    assert facts.embedding.quantization is None


def greedy(name, variant, prompt, count):
    ids = list(prompt)
    with torch.inference_mode(), torch_backend(name).open(variant) as session:
        for _ in range(count):
            logits = session.logits(session.states([Request(tuple(ids), (len(ids) - 1,))])[0])
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    ("name", "method", "form"),
    [
        ("llama", "awq:g32-asym", "nbits"), ("llama", "rtn:int8-channel-asym", "qdq"),
        ("tied", "awq:g32-head", "nbits"), ("gemma3", "rtn:g32-head", "nbits"), ("qwen2", "awq:g32", "nbits"),
        ("phi3", "rtn:g32-head", "nbits"),
    ],
    ids=str,
)  # fmt: skip
def test_onnxruntime_genai_generates_what_the_model_would(name, method, form, tmp_path):
    import onnxruntime_genai as og

    variant, prompt, count = made(name, method), TOKENS[:9], 6
    exporter(name).write(variant, Style(form), tmp_path / "out")
    model = og.Model(str(tmp_path / "out"))
    options = og.GeneratorParams(model)
    options.set_search_options(do_sample=False, max_length=len(prompt) + count, min_length=0)
    generator = og.Generator(model, options)
    generator.append_tokens(list(prompt))
    found = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    expected = greedy(name, variant, prompt, count)
    assert found == expected[: len(found)]
    assert len(found) == count or expected[len(found) - 1] == 0
    assert og.Tokenizer(model).encode("a").tolist() == loaded(name).tokenizer("a").input_ids


def test_the_folder_says_how_dequantize_linear_is_to_be_multiplied(tmp_path):
    variant = made("llama", "rtn:g32")
    for level in (1, 4):
        exporter("llama").write(variant, Style("qdq", level), tmp_path / f"{level}")
        entries = session_entries(inspect_folder(tmp_path / f"{level}"))
        assert entries[QDQ_LEVEL] == str(level)
    exact, rounded = (distance("llama", variant, tmp_path / f"{level}")[0] for level in (1, 4))
    assert exact <= 1e-8
    assert rounded > 1e-6


def test_a_dynamo_folder_says_it_too(tmp_path):
    """It has no genai_config.json, and ONNX Runtime's default is level 4."""
    variant = made("olmo2", "rtn:g32")
    exporter("olmo2").write(variant, Style("qdq", 4), tmp_path / "out")
    assert distance("olmo2", variant, tmp_path / "out")[0] > 1e-6


def test_the_float_model_can_be_written_too(tmp_path):
    exporter("tied").write(None, Style(), tmp_path / "out")
    assert distance("tied", None, tmp_path / "out")[0] <= 1e-8
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "config.json", "tokenizer.json"} <= names
    assert not {"places.json", "qeval.json"} & names


@pytest.mark.parametrize("name", MODELS)
def test_the_builder_makes_the_graphs_that_it_can(name):
    assert exporter(name).route == ("dynamo" if name == "olmo2" else "genai"), exporter(name).refused


def test_the_float_graph_is_made_once(monkeypatch):
    expected = float_folder("llama")

    def refuse(*_):
        raise AssertionError("it is in the cache")

    monkeypatch.setattr(export, "_run_builder", refuse)
    again = exporter_of("llama", "genai")
    assert again.float_folder() == expected
    assert again.route == "genai"


def test_another_configuration_or_tokenizer_is_another_graph(monkeypatch, tmp_path):
    """The weights alone don't say what a model computes, nor what its folder must hold."""
    first = exporter_of("llama", "genai")
    asked = []
    monkeypatch.setattr(export, "build_once", lambda name, notes, make: asked.append(name))
    copy = shutil.copytree(loaded("llama").folder, tmp_path / "copy")
    monkeypatch.setattr(first, "_loaded", replace(loaded("llama"), checkpoint=copy))
    first.float_folder()
    for file, key, value in (("config.json", "rope_theta", 1.0), ("tokenizer_config.json", "model_max_length", 5)):
        content = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps(content | {key: value}))
        first.float_folder()
    first.float_folder()
    assert len(set(asked)) == 3
    assert asked[2] == asked[3]


def test_auto_goes_on_to_torchs_exporter_once(monkeypatch):
    made_by = exporter("olmo2")
    assert made_by.route == "dynamo"
    assert made_by.refused.startswith("The model builder of onnxruntime-genai did not take '")
    assert made_by.refused.endswith("is not currently supported.") and "\n" not in made_by.refused
    calls = []
    monkeypatch.setattr(export, "_run_builder", lambda *_: calls.append(1))
    assert made_by.float_folder() == exporter_of("olmo2", "dynamo").float_folder()
    assert calls == []


def test_auto_does_not_ask_a_builder_again_that_refused_within_a_day(monkeypatch, tmp_path):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    asked = []

    def refuse(*_):
        asked.append(1)
        raise QevalError("The model builder of onnxruntime-genai did not take it.")

    monkeypatch.setattr(export, "_run_builder", refuse)
    monkeypatch.setattr(export.dynamo, "export_dynamo", refuse)
    for days, calls in ((0, 2), (0, 1), (2, 2)):  # without the builder, torch's exporter alone is asked
        for note in tmp_path.rglob("*.refused"):
            os.utime(note, (time.time() - days * 24 * 3600,) * 2)
        asked.clear()
        auto = exporter_of("llama", "auto")
        with pytest.raises(QevalError):
            auto.float_folder()
        assert auto.refused == "The model builder of onnxruntime-genai did not take it."
        assert len(asked) == calls


def test_a_graph_that_is_not_the_model_is_refused_and_not_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("QEVAL_HOME", str(tmp_path / "home"))
    other = float_folder("tied")
    monkeypatch.setattr(export, "_run_builder", lambda _, out, __: shutil.copytree(other, out))
    with pytest.raises(QevalError) as told:
        exporter_of("llama", "genai").float_folder()
    assert str(told.value).startswith("The genai export of LlamaForCausalLM is not the model: over 128 tokens its KL")
    assert [path.name for path in (tmp_path / "home" / "models").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("form", ["nbits", "qdq"])
def test_a_failure_leaves_nothing(form, tmp_path, monkeypatch):
    def fail(*_):
        raise QevalError("torn")

    monkeypatch.setattr(export, "_check_written", fail)
    with pytest.raises(QevalError, match="torn"):
        exporter("llama").write(made("llama", "rtn:g32"), Style(form), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_written_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "apply", lambda *_: Counter({(64, 64, 4, 32): 1}))
    with pytest.raises(QevalError, match=r"other quantized matrices than were meant: .*\(64, 64, 4, 32\): 1"):
        exporter("llama").write(made("llama", "rtn:g32"), Style(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(QevalError, match="Cannot write"):
        exporter("llama").write(made("llama", "rtn:g32"), Style(), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_block_that_no_kernel_takes_is_named_and_leaves_nothing(tmp_path):
    with pytest.raises(UsageError, match=r"no kernel for blocks of 24 \(model\.layers\.0\..* is int4-g24-signed\)"):
        exporter("llama").write(made("llama", "rtn:g24"), Style(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_the_graph_lacks_is_named(tmp_path):
    variant = made("llama", "rtn:g32")
    weight: QWeight = variant.weights["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(QevalError, match=r"has no MatMul by model\.other\.weight"):
        exporter("llama").write(replace(variant, weights={"model.other.weight": weight}), Style(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

"""What a decoder's folder holds: folders that the GenAI builder made of a tiny Llama, edited, and broken."""

import json
import os
import shutil
from importlib.util import find_spec
from math import ceil
from pathlib import Path

import pytest

from qeval.errors import UsageError
from tests.fixtures.hub import in_hub_cache
from tests.fixtures.tiny import save_tiny

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnx")
if find_spec("onnxruntime_genai") is None:
    pytest.skip("onnxruntime-genai isn't installed", allow_module_level=True)

from qeval.backends.onnx.inspection import inspect_folder
from qeval.backends.onnx.matrices import Quantization
from qeval.backends.onnx.providers import choose_provider, open_session, recorded_assignment
from tests.fixtures.foreign import build

SHAPES = [(128, 64), (64, 64), (112, 64), (112, 64), (64, 112)] * 2 + [(256, 64)]
"""[rows, columns] of the tiny model's matrices with q, k and v as one, the head last."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder of models of one builder process: tied ones share the head's and the embedding's integers."""
    root = tmp_path_factory.mktemp("built")
    ids = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    tied = save_tiny(root / "tied", tie_word_embeddings=True, **ids)
    untied = save_tiny(root / "untied", **ids)
    qdq = ["use_qdq=true", "op_types_to_quantize=MatMul", "shared_embeddings=false"]
    plain = ["nodes_to_exclude=/lm_head/MatMul", "op_types_to_quantize=MatMul", "accuracy_level=1"]
    jobs = [
        (str(tied), str(root / "int4"), "int4", []),
        (str(tied), str(root / "k_quant"), "int4", ["algo_config=k_quant_mixed"]),
        (str(untied), str(root / "int8"), "int8", []),
        (str(untied), str(root / "qdq"), "int4", qdq),
        (str(untied), str(root / "body"), "int4", [*plain, "block_size=16"]),
        (str(tied), str(root / "fp32"), "fp32", ["prune_lm_head=true"]),
        (str(untied), str(root / "fp16"), "fp16", []),
        (str(untied), str(root / "headless"), "fp32", ["exclude_lm_head=true"]),
        (str(untied), str(root / "no_ids"), "fp32", ["exclude_embeds=true"]),
    ]
    build(jobs)
    return root


@pytest.fixture
def copy(built, tmp_path):
    """A copy of the 4-bit folder, to break."""
    return Path(shutil.copytree(built / "int4", tmp_path / "model"))


def stored(bits, block, zero_bits=0):
    """Bytes of the matrices: codes with their padding, fp32 scales, zero points padded to bytes a row."""
    total = 0
    for rows, columns in SHAPES:
        blocks = ceil(columns / block)
        total += rows * (blocks * (block * bits // 8 + 4) + ceil(blocks * zero_bits / 8))
    return total


def weights():
    return sum(rows * columns for rows, columns in SHAPES)


class TestBuilder:
    def test_zero_points_are_seen_through_the_links_of_the_hubs_cache(self, built, tmp_path):
        facts, there = inspect_folder(built / "k_quant"), inspect_folder(in_hub_cache(built / "k_quant", tmp_path))
        assert not all(matrix.quantization.symmetric for matrix in facts.quantized)
        assert there.matrices == facts.matrices

    def test_int4_by_default_rounds_activations_and_the_embedding(self, built):
        facts = inspect_folder(built / "int4")
        how = Quantization(4, "block", 32, True, 4)
        assert {m.quantization for m in facts.matrices if m.role != "embedding"} == {how}
        assert [(m.rows, m.columns) for m in facts.matrices if m.role != "embedding"] == SHAPES
        assert (facts.embedding.op, facts.embedding.quantization.bits) == ("GatherBlockQuantized", 4)
        assert facts.embedding.weight == facts.head.weight
        assert facts.bits_per_weight == 8 * stored(4, 32) / weights()
        assert facts.size_bytes == (built / "int4" / "model.onnx.data").stat().st_size
        assert facts.kept == ()
        assert facts.producer.startswith("onnxruntime-genai ")

    def test_what_the_session_needs_to_know(self, built):
        facts = inspect_folder(built / "int4")
        assert (facts.head_size, facts.context_length, facts.vocab_size, facts.model_type) == (16, 256, 256, "llama")
        assert (facts.ports.ids.name, facts.ports.ids.dtype) == ("input_ids", "INT64")
        assert (facts.ports.mask.name, facts.ports.positions) == ("attention_mask", None)
        assert [(k.name, v.name) for k, v in facts.ports.past] == [
            (f"past_key_values.{i}.key", f"past_key_values.{i}.value") for i in range(2)
        ]
        assert facts.ports.past[0][0].shape == ("batch_size", 2, "past_sequence_length", "kv_cache_dim")
        assert [key.name for key, _ in facts.ports.present] == ["present.0.key", "present.1.key"]
        assert facts.ports.logits.shape == ("batch_size", "sequence_length", 256)
        assert facts.ports.other_inputs == ()
        assert facts.attention == {"GroupQueryAttention": 2}
        assert (facts.windows, facts.windowed_caches, facts.gives_last_position_only) == ({}, 0, False)

    def test_k_quant_mixes_widths_and_has_zero_points(self, built):
        facts = inspect_folder(built / "k_quant")
        assert {m.quantization.bits for m in facts.quantized} == {4, 8}
        assert not any(m.quantization.symmetric for m in facts.quantized)
        assert facts.head.quantization == Quantization(8, "block", 32, False, 4)
        assert any("8 bits, blocks of 32, asymmetric" in sentence for sentence in facts.describe())

    def test_int8_keeps_the_embedding(self, built):
        facts = inspect_folder(built / "int8")
        assert {m.quantization for m in facts.quantized} == {Quantization(8, "block", 32, True, 4)}
        assert [(m.node, reason) for m, reason in facts.kept] == [("/model/embed_tokens/Gather", "embedding")]
        assert facts.bits_per_weight == 8 * stored(8, 32) / weights()

    def test_qdq_has_no_padding_and_no_accuracy_level(self, built):
        facts = inspect_folder(built / "qdq")
        assert {m.quantization for m in facts.quantized} == {Quantization(4, "block", 32, True, None)}
        assert [(m.rows, m.columns) for m in facts.quantized] == SHAPES
        assert {(m.op, m.dtype) for m in facts.quantized} == {("DequantizeLinear", "INT4")}
        scales = sum(rows * ceil(columns / 32) * 4 for rows, columns in SHAPES)
        assert facts.bits_per_weight == 4 + 8 * scales / weights()
        assert any("no accuracy level of its own" in sentence for sentence in facts.describe())

    def test_a_head_in_floats_is_told_apart_from_the_body(self, built):
        facts = inspect_folder(built / "body")
        assert {m.quantization for m in facts.quantized} == {Quantization(4, "block", 16, True, 1)}
        assert [(m.role, m.dtype, reason) for m, reason in facts.kept] == [
            ("embedding", "FLOAT", "embedding"), ("head", "FLOAT", "head"),
        ]  # fmt: skip
        assert facts.describe()[1:] == [
            "10 of 10 matrices of the body are MatMulNBits: 4 bits, blocks of 16, symmetric, accuracy level 1.",
            f"That is {facts.bits_per_weight:.3f} bits per quantized weight, scales and zero points included.",
            "The head is in fp32.",
            "The embedding is in fp32.",
        ]

    def test_floats_share_a_tied_matrix_and_a_pruned_head_shows(self, built):
        facts = inspect_folder(built / "fp32")
        assert facts.quantized == ()
        assert facts.bits_per_weight is None
        assert (facts.head.weight, facts.head.rows, facts.head.columns) == (facts.embedding.weight, 256, 64)
        assert (facts.embedding.rows, facts.embedding.columns) == (256, 64)
        assert facts.gives_last_position_only
        assert {reason for m, reason in facts.kept if m.role == "body"} == {"left in fp32 by the exporter"}
        assert "No matrix is quantized." in facts.describe()

    def test_half_precision_has_caches_of_half_precision(self, built):
        facts = inspect_folder(built / "fp16")
        assert {m.dtype for m in facts.matrices} == {"FLOAT16"}
        assert len(facts.matrices) == 2 * 7 + 2  # q, k and v apart
        assert {port.dtype for pair in facts.ports.past for port in pair} == {"FLOAT16"}
        assert facts.attention == {"MultiHeadAttention": 2}
        assert facts.ports.positions.name == "position_ids"

    def test_a_graph_without_its_head_is_refused(self, built):
        with pytest.raises(UsageError, match="gives no 'logits' but 'hidden_states': export it with its head"):
            inspect_folder(built / "headless")

    def test_a_graph_that_takes_embeddings_is_refused(self, built):
        with pytest.raises(UsageError, match=r"takes no 'input_ids' but .*'inputs_embeds'.*: export it"):
            inspect_folder(built / "no_ids")


@pytest.mark.parametrize("name", ["int4", "k_quant", "qdq", "fp16"])
def test_onnxruntime_runs_as_many_products_and_attentions_as_were_found(built, name):
    facts = inspect_folder(built / name)
    session = open_session(str(facts.files.model), choose_provider("cpu"), threads=1, entries={})
    products = sum(matrix.role != "embedding" for matrix in facts.matrices)
    assert recorded_assignment(session).weighty == {"CPUExecutionProvider": products + sum(facts.attention.values())}


def edit(folder, change):
    """Change the graph of a folder in place; its weights become part of the file."""
    model = ir.load(folder / "model.onnx")
    ir.external_data.load_to_model(model)
    change(model.graph)
    ir.save(model, folder / "model.onnx")


class TestEdited:
    def test_windows_and_windowed_caches(self, copy):
        def change(graph):
            first = next(node for node in graph if node.op_type == "GroupQueryAttention")
            first.attributes["local_window_size"] = ir.AttrInt64("local_window_size", 64)
            first.attributes["sliding_window_cache"] = ir.AttrInt64("sliding_window_cache", 1)

        edit(copy, change)
        facts = inspect_folder(copy)
        assert (facts.windows, facts.windowed_caches) == ({64: 1}, 1)
        assert facts.describe()[-2:] == [
            "1 layers attend to a window of 64 tokens.",
            "1 layers cache no more than their window, so no empty past can be given.",
        ]

    def test_weights_inside_the_file_count_the_same(self, copy):
        before = inspect_folder(copy)
        edit(copy, lambda graph: None)
        (copy / "model.onnx.data").unlink()
        after = inspect_folder(copy)
        assert (after.size_bytes, after.matrices) == (before.size_bytes, before.matrices)

    def test_an_input_that_tokens_do_not_determine(self, copy):
        edit(copy, lambda graph: graph.inputs.append(ir.val("pixel_values", ir.DataType.FLOAT, [1, None])))
        (other,) = inspect_folder(copy).ports.other_inputs
        assert (other.name, other.dtype, other.shape) == ("pixel_values", "FLOAT", (1, None))

    def test_a_config_of_transformers_serves_too(self, copy, built):
        (copy / "genai_config.json").unlink()
        shutil.copy(built / "tied" / "config.json", copy)
        facts = inspect_folder(copy)
        assert (facts.head_size, facts.context_length, facts.vocab_size, facts.model_type) == (16, 256, 256, "llama")
        assert facts.files.config.name == "config.json"

    def test_names_come_from_the_configuration(self, copy):
        def change(graph):
            for value in (*graph.inputs, *graph.outputs):
                value.name = value.name.replace("past_key_values", "cache").replace("input_ids", "tokens")

        edit(copy, change)
        config = json.loads((copy / "genai_config.json").read_text())
        names = {"input_ids": "tokens", "past_key_names": "cache.%d.key", "past_value_names": "cache.%d.value"}
        config["model"]["decoder"]["inputs"].update(names)
        (copy / "genai_config.json").write_text(json.dumps(config))
        facts = inspect_folder(copy)
        assert (facts.ports.ids.name, facts.ports.past[1][0].name) == ("tokens", "cache.1.key")
        assert facts.embedding.node.endswith("GatherBlockQuantized")


class TestBroken:
    def refused(self, folder, words, **settings):
        with pytest.raises(UsageError, match=words) as caught:
            inspect_folder(folder, **settings)
        assert caught.value.exit_code == 2

    def test_no_folder(self, tmp_path):
        self.refused(tmp_path / "none", "There is no folder .*none: give one that holds an ONNX model")

    def test_no_model(self, tmp_path):
        self.refused(tmp_path, "holds no ONNX model: give the folder that holds model.onnx")

    def test_a_model_one_folder_below_is_pointed_to(self, copy):
        self.refused(copy.parent, "holds no ONNX model: there is one in model")

    def test_the_model_of_the_configuration_is_missing(self, copy):
        (copy / "model.onnx").rename(copy / "other.onnx")
        self.refused(copy, r"lacks model\.onnx, the model that its genai_config\.json names")

    def test_no_configuration(self, copy):
        (copy / "genai_config.json").unlink()
        self.refused(copy, r"has neither genai_config\.json nor config\.json")

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("{", "is not valid JSON"),
            ("[]", "holds no JSON object"),
            ('{"model": {"encoder": {}}}', "describes no decoder"),
            ('{"model": {"decoder": {"pipeline": []}}}', "splits the decoder into a pipeline"),
        ],
    )
    def test_a_configuration_that_does_not_serve(self, copy, text, words):
        (copy / "genai_config.json").write_text(text)
        self.refused(copy, f"genai_config.json'? {words}")

    def test_several_models_and_no_configuration_that_names_one(self, copy, built):
        (copy / "genai_config.json").unlink()
        shutil.copy(built / "tied" / "config.json", copy)
        shutil.copy(copy / "model.onnx", copy / "model_q4.onnx")
        self.refused(copy, r"holds several models \(model\.onnx, model_q4\.onnx\), and no genai_config\.json names one")

    def test_no_tokenizer_where_one_is_needed(self, copy):
        (copy / "tokenizer.json").unlink()
        self.refused(copy, r"has no tokenizer \(tokenizer\.json\): copy the one of the model it was made from")
        assert inspect_folder(copy, needs_tokenizer=False).files.tokenizer == ()

    def test_external_data_that_is_missing(self, copy):
        (copy / "model.onnx.data").unlink()
        self.refused(copy, r"model\.onnx\.data is missing, which holds weights of model\.onnx: copy it")

    def test_external_data_that_is_cut_short(self, copy):
        data = copy / "model.onnx.data"
        whole = data.stat().st_size
        os.truncate(data, whole - 1)
        self.refused(
            copy, rf"model\.onnx\.data is cut short: model\.onnx needs {whole:,} bytes.*has {whole - 1:,}: copy"
        )

    @pytest.mark.parametrize("location", ["../model.onnx.data", "/data/model.onnx.data"])
    def test_external_data_outside_the_folder(self, copy, location):
        import onnx

        model = onnx.load(copy / "model.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            next(entry for entry in tensor.external_data if entry.key == "location").value = location
        (copy / "model.onnx").write_bytes(model.SerializeToString())
        self.refused(copy, f"points to data outside its folder \\({location}\\)")

    @pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"\x00" * 9])
    def test_a_file_that_is_no_onnx(self, copy, content):
        (copy / "model.onnx").write_bytes(content)
        self.refused(copy, r"model\.onnx is no ONNX model, or is cut short")

    def test_a_graph_that_is_cut_short(self, copy):
        os.truncate(copy / "model.onnx", 5000)
        self.refused(copy, r"model\.onnx is no ONNX model, or is cut short")

    def test_an_empty_file(self, copy):
        (copy / "model.onnx").write_bytes(b"")
        self.refused(copy, r"model\.onnx holds no graph")

    def test_a_node_that_breaks_its_rules(self, copy):
        def change(graph):
            del next(node for node in graph if node.op_type == "MatMulNBits").attributes["block_size"]

        edit(copy, change)
        self.refused(copy, r"model\.onnx breaks the rules of its operators")

"""Defended: nothing in a folder that somebody else made runs; each way to name code is refused or ignored."""

import json
from pathlib import Path

import pytest

from qeval.backends.onnx.files import find_files, load_graph
from qeval.backends.onnx.inspection import inspect_folder
from qeval.backends.onnx.safety import check_graph_config
from qeval.bench.engines.genai import GenaiEngine
from qeval.bench.engines.onnxruntime import OrtEngine
from qeval.cli.app import run_program
from qeval.errors import UsageError
from qeval.models.load import load_model
from qeval.models.source import ModelSource
from qeval.models.trust import NO_HUB, clean_copy, hub_kernels, known_files, read_settings
from qeval.models.vocabulary import read_tokenizer
from tests.fixtures.doors import copied, sound
from tests.fixtures.tiny import save_tiny

ir = pytest.importorskip("onnx_ir")
PYTHON = "raise SystemExit('ran')\n"


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "m")


def changed(folder, name="config.json", **more):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return folder


def loaded(folder):
    return load_model(ModelSource(str(folder), "folder", path=folder))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["evil/kernel", "evil/kernel:attention", {"": "evil/kernel"}, "kernels\\evil"])
def test_a_repository_of_kernels_is_refused_by_name(folder, key, value):
    with pytest.raises(UsageError, match=rf"names a repository of code, {key}: 'kernels|evil"):
        loaded(changed(folder, **{key: value}))


def test_a_repository_of_kernels_is_refused_in_a_part_of_the_configuration(folder):
    with pytest.raises(UsageError, match="evil/kernel"):
        read_settings(changed(folder, text_config={"attn_implementation": "evil/kernel"}))


@pytest.mark.parametrize("value", ["flash_attention_2", "flex_attention", "eager", "sdpa", "paged|eager"])
def test_qeval_names_the_attention_itself(folder, value):
    found = loaded(changed(folder, attn_implementation=value))
    assert found.model.config._attn_implementation == "sdpa"


def test_kernels_of_the_hub_are_off_for_model_types_too():
    assert hub_kernels._kernels_enabled is False
    assert NO_HUB["USE_HUB_KERNELS"] == "NO"


def test_python_beside_a_known_architecture_is_not_read(folder):
    (folder / "modeling_evil.py").write_text(PYTHON)
    (folder / "tokenization_evil.py").write_text(PYTHON)
    classes = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    changed(folder, auto_map=classes)
    changed(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.T", None]})
    assert loaded(folder).info.architecture == "LlamaForCausalLM"


def test_an_architecture_that_is_python_of_its_own_is_refused(folder):
    (folder / "modeling_evil.py").write_text(PYTHON)
    changed(folder, model_type="evil", auto_map={"AutoConfig": "modeling_evil.C"})
    with pytest.raises(UsageError, match="needs Python code from its own repository, and qeval runs none"):
        loaded(folder)


def test_a_tokenizer_that_is_python_of_its_own_is_refused(folder):
    (folder / "tokenization_evil.py").write_text(PYTHON)
    changed(
        folder,
        "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["tokenization_evil.T", None]},
    )
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UsageError, match="tokenizer"):
        read_tokenizer(folder)


def test_a_chat_template_is_not_rendered(folder):
    changed(folder, "tokenizer_config.json", chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}{% raise %}")
    loaded(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickles_are_not_read(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UsageError, match="pickle"):
        loaded(folder)


@pytest.mark.parametrize(
    "kind", [{"quant_method": "evil/quantizer"}, {"quant_method": "custom", "auto_map": {"x": "y.py"}}]
)
def test_a_quantizer_of_ones_own_is_refused(folder, kind):
    with pytest.raises(UsageError, match="is quantized already"):
        loaded(changed(folder, quantization_config=kind))


def test_exporters_are_given_known_files_alone(folder, tmp_path):
    changed(folder, attn_implementation="flash_attention_2", auto_map={"AutoConfig": "modeling_evil.C"})
    for name in (
        "ops.so",
        "modeling_evil.py",
        "genai_config.json",
        "adapter_config.json",
        "x.dll",
        "run.sh",
        "tokenizer.py",
    ):
        (folder / name).write_text("x")
    (tmp_path / "clean").mkdir()
    clean = clean_copy(folder, tmp_path / "clean")
    assert {path.name for path in clean.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert not {"attn_implementation", "auto_map"} & json.loads((clean / "config.json").read_text()).keys()
    assert "tokenizer.py" not in {path.name for path in known_files(folder)}


@pytest.mark.slow
def test_an_export_carries_no_code(folder, tmp_path):
    (folder / "ops.so").write_bytes(b"\x7fELF")
    (folder / "modeling_evil.py").write_text(PYTHON)
    (folder / "genai_config.json").write_text(
        '{"model": {"decoder": {"session_options": {"custom_ops_library": "ops.so"}}}}'
    )
    out = tmp_path / "out"
    command = ["export", "--model", str(folder), "--method", "rtn:g32", "--exporter", "dynamo", "--threads", "1"]
    assert run_program([*command, "--out", str(out), "--quiet"]) == 0
    assert not {"ops.so", "modeling_evil.py", "genai_config.json"} & {path.name for path in out.iterdir()}


@pytest.fixture
def onnx():
    return copied(sound("onnx graph"))


def genai(onnx, **options):
    path = onnx / "genai_config.json"
    content = json.loads(path.read_text())
    content["model"]["decoder"]["session_options"] |= options
    path.write_text(json.dumps(content))
    return onnx


@pytest.mark.parametrize(
    "options",
    [
        {"custom_ops_library": "ops.so"},
        {"custom_ops_library": "/usr/lib/x"},
        {"provider_options": [{"qnn": {"backend_path": "./QnnHtp.so"}}]},
        {"provider_options": [{"NvTensorRtRtx": {"trt_extra_plugin_lib_paths": "a.so;b.so"}}]},
        {"provider_options": [{"x": {"library_path": "x"}}]},
        {"session.x": "evil.dll"},
        {"provider_options": [{"x": ["libevil.so.1"]}]},
        {"enable_profiling": "trace"},
        {"optimized_model_filepath": "x.onnx"},
        {"session.optimized_model_external_initializers_file_name": "../x"},
        {"session.model_external_initializers_file_folder_path": "/etc"},
        {"ep": {"ep_library": "evil"}},
    ],
)
def test_what_a_session_may_not_be_asked_for_is_named(onnx, options):
    with pytest.raises(UsageError, match=r"genai_config\.json names a (native library|file)"):
        inspect_folder(genai(onnx, **options), needs_tokenizer=False)


def test_a_library_in_another_section_is_named_too(onnx):
    path = onnx / "genai_config.json"
    content = json.loads(path.read_text())
    content["model"]["vision"] = {"session_options": {"custom_ops_library": "ops.so"}}
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="custom_ops_library"):
        find_files(onnx, needs_tokenizer=False)


def test_a_library_that_lies_in_the_folder_under_a_known_name_is_refused(onnx):
    options = {"provider_options": [{"qnn": {"backend_path": "QnnHtp.dll"}}]}
    assert inspect_folder(genai(onnx, **options), needs_tokenizer=False)
    (onnx / "QnnHtp.dll").write_bytes(b"MZ")
    with pytest.raises(UsageError, match="native library"):
        inspect_folder(onnx, needs_tokenizer=False)


def test_what_builders_write_is_taken():
    options = {
        "log_id": "onnxruntime-genai", "provider_options": [{"cuda": {"enable_cuda_graph": "0"}}],
        "session.qdq_matmulnbits_accuracy_level": "4", "intra_op_num_threads": 4,
        "graph_optimization_level": "ORT_ENABLE_ALL",
        "ep.share_ep_contexts": "1", "enable_profiling": False,
    }  # fmt: skip
    check_graph_config(
        {"model": {"decoder": {"session_options": options, "filename": "onnx/model.onnx"}}}, Path("genai_config.json")
    )


@pytest.mark.parametrize(
    "name", ["../model.onnx", "/etc/model.onnx", "a/../../m.onnx", "..\\m.onnx", 5, ["model.onnx"]]
)
def test_a_graph_outside_the_folder_is_not_opened(onnx, name):
    path = onnx / "genai_config.json"
    content = json.loads(path.read_text())
    content["model"]["decoder"]["filename"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"genai_config\.json"):
        inspect_folder(onnx, needs_tokenizer=False)


def edited(onnx, change):
    model = ir.load(onnx / "model.onnx")
    change(model)
    ir.save(model, onnx / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=1024)
    return onnx / "model.onnx"


@pytest.mark.parametrize(
    ("domain", "op"),
    [("ai.onnx.contrib", "PyOp"), ("evil", "Run"), ("com.microsoft", "PythonOp"), ("com.microsoft", "EPContext")],
)
def test_operators_of_others_are_named(onnx, domain, op):
    def change(model):
        node = ir.node(op, [model.graph.inputs[0]], domain=domain)
        model.graph.append(node)

    with pytest.raises(UsageError, match=rf"uses the operator {domain}\.{op}"):
        load_graph(edited(onnx, change))


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../b", "..\\secret", "C:\\x"])
def test_weights_outside_the_folder_are_not_read(onnx, location):
    proto = ir.serde.serialize_model(ir.load(onnx / "model.onnx"))
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (onnx / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(UsageError, match="points to data outside its folder"):
        load_graph(onnx / "model.onnx")


def test_no_engine_opens_a_folder_that_names_a_library(onnx):
    pytest.importorskip("onnxruntime_genai")
    genai(onnx, custom_ops_library="ops.so")
    (onnx / "ops.so").write_bytes(b"\x7fELF")
    for engine in (GenaiEngine, OrtEngine):
        with pytest.raises(UsageError, match="native library"):
            engine(onnx)

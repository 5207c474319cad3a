"""A session runs where it was asked to, or says what fell back and what to install.

The CPU provider is real. Others are made up from what onnxruntime returns where they are installed.
"""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from qeval.backends.onnx import packages, providers
from qeval.backends.onnx.providers import (
    PROVIDERS,
    Assignment,
    _register,
    assignment_of,
    check_assignment,
    choose_provider,
    open_session,
    recorded_assignment,
)
from qeval.errors import QevalError, UsageError

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
QNN_FALLEN = {(CPU, "GroupQueryAttention"): 2, (CPU, "MatMulNBits"): 11, (CPU, "Mul"): 4}
"""What a session of the QNN plugin recorded on an x86 processor, while get_providers() named QNN."""


def subgraphs(counts):
    """Counts as onnxruntime returns them: a subgraph for each node that isn't fused with others."""
    return [
        SimpleNamespace(ep_name=name, get_nodes=lambda op=op: [SimpleNamespace(op_type=op, name="n", domain="")])
        for (name, op), count in counts.items()
        for _ in range(count)
    ]


class TestNames:
    def test_every_name_of_the_flag_is_there(self):
        assert sorted(PROVIDERS) == ["cpu", "cuda", "dml", "openvino", "qnn", "tensorrt", "trt-rtx", "webgpu"]
        assert all(choose_provider(name).name == name for name in PROVIDERS)

    @pytest.mark.parametrize(
        ("wrong", "nearest"), [("cude", "cuda"), ("tensor-rt", "tensorrt"), ("open-vino", "openvino")]
    )
    def test_an_unknown_name_is_refused_with_the_nearest(self, wrong, nearest):
        with pytest.raises(UsageError, match=f"Unknown execution provider '{wrong}'; nearest: {nearest}") as caught:
            choose_provider(wrong)
        assert caught.value.exit_code == 2

    def test_names_are_onnxruntimes_own(self):
        runtime = pytest.importorskip("onnxruntime")
        builtin = {p.onnx_name for p in PROVIDERS.values() if p.plugin is None}
        assert builtin <= set(runtime.get_all_providers())

    @pytest.mark.parametrize("provider", [p for p in PROVIDERS.values() if p.plugin], ids=lambda p: p.name)
    def test_a_plugins_name_is_its_own(self, provider):
        """onnxruntime's list drops the name of a provider that has become a plugin, so the plugin says it."""
        plugin = pytest.importorskip(provider.plugin)
        assert provider.onnx_name in plugin.get_ep_names()

    def test_a_plugin_that_has_another_provider_is_refused(self, monkeypatch):
        plugin = SimpleNamespace(get_library_path=lambda: "lib.so", get_ep_names=lambda: ["OtherExecutionProvider"])
        monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", plugin)
        monkeypatch.setattr(providers, "find_spec", lambda _: object())
        with pytest.raises(
            QevalError, match="NvTensorRTRTXExecutionProvider, and the plugin has OtherExecutionProvider"
        ):
            _register(SimpleNamespace(register_execution_provider_library=lambda *_: None), choose_provider("trt-rtx"))

    def test_tf32_is_off(self):
        assert choose_provider("cuda").options["use_tf32"] == "0"
        assert choose_provider("tensorrt").options["trt_fp16_enable"] == "0"


class TestAssignment:
    def test_nodes_are_counted_by_provider_and_operator(self):
        counts = {(CPU, "Mul"): 4, (CUDA, "MatMul"): 11, (CUDA, "Mul"): 2}
        made = assignment_of(subgraphs(counts))
        assert dict(made.counts) == counts
        assert made.nodes == 17
        assert made.providers == {CPU: 4, CUDA: 13}
        assert made.weighty == {CUDA: 11}

    def test_a_fused_subgraph_counts_each_of_its_nodes(self):
        nodes = [SimpleNamespace(op_type=op) for op in ("MatMul", "Add", "MatMul")]
        fused = SimpleNamespace(ep_name="TensorrtExecutionProvider", get_nodes=lambda: nodes)
        assert assignment_of([fused]).weighty == {"TensorrtExecutionProvider": 2}

    def test_small_nodes_may_go_elsewhere(self):
        check_assignment(
            Assignment({(CUDA, "MatMulNBits"): 11, (CPU, "Gather"): 3, (CPU, "Shape"): 1}), choose_provider("cuda")
        )

    def test_a_whole_fall_back_is_told(self):
        with pytest.raises(QevalError) as caught:
            check_assignment(Assignment(QNN_FALLEN), choose_provider("qnn"))
        words = str(caught.value)
        assert "13 of 13 matrix and attention nodes fell back from QNNExecutionProvider" in words
        assert "CPUExecutionProvider has 2 GroupQueryAttention, 11 MatMulNBits." in words
        assert "pip install onnxruntime-qnn" in words
        assert caught.value.exit_code == 3

    @pytest.mark.parametrize(
        "op", ["MatMul", "MatMulNBits", "Gemm", "FusedMatMul", "GroupQueryAttention", "MultiHeadAttention", "Attention"]
    )
    def test_one_fallen_node_is_enough(self, op):
        counts = {(CUDA, "MatMul"): 40, (CPU, op): 1}
        with pytest.raises(QevalError, match=f"1 of 41 matrix .*{CPU} has 1 {op}\\."):
            check_assignment(Assignment(counts), choose_provider("cuda"))

    def test_a_companion_takes_no_matrix_product(self):
        trt = choose_provider("tensorrt")
        counts = {(trt.onnx_name, "MatMul"): 9, (CUDA, "GroupQueryAttention"): 2, (CPU, "MatMul"): 1}
        with pytest.raises(
            QevalError, match=f"3 of 12 .*{CUDA} has 2 GroupQueryAttention; {CPU} has 1 MatMul"
        ) as caught:
            check_assignment(Assignment(counts), trt)
        assert "--format qdq --exporter dynamo" in str(caught.value)

    @pytest.mark.parametrize("counts", [{}, {(CUDA, "Mul"): 3}])
    def test_no_recorded_node_proves_nothing(self, counts):
        with pytest.raises(QevalError, match="no matrix or attention node among them"):
            check_assignment(Assignment(counts), choose_provider("cuda"))


@dataclass(frozen=True)
class Device:
    """An OrtEpDevice."""

    ep_name: str
    kind: str

    @property
    def device(self):
        return SimpleNamespace(type=SimpleNamespace(name=self.kind))


class Options:
    """Session options that note what is set."""

    def __init__(self):
        self.entries, self.devices, self.device_options = {}, [], None

    def add_session_config_entry(self, key, value):
        self.entries[key] = value

    def add_provider_for_devices(self, devices, options):
        self.devices, self.device_options = devices, options


class Runtime(ModuleType):
    """An onnxruntime with these providers, whose sessions record this assignment."""

    __version__ = "1.31.1"
    SessionOptions = Options

    def __init__(self, available=(CPU,), devices=(), recorded=None, plugin_error=None):
        super().__init__("onnxruntime")
        self.available, self.devices = list(available), list(devices)
        self.recorded, self.plugin_error = recorded or {}, plugin_error
        self.opened, self.registered = [], []

    def get_available_providers(self):
        return self.available

    def get_ep_devices(self):
        return self.devices

    def set_default_logger_severity(self, level):
        self.severity = level

    def preload_dlls(self):
        print("Failed to load libcublasLt.so.13: no such file.\nPlease follow https://onnxruntime.ai")  # noqa: T201

    def register_execution_provider_library(self, name, path):
        if self.plugin_error:
            raise RuntimeError(self.plugin_error)
        self.registered.append((name, path))

    def InferenceSession(self, model, options, **kwargs):  # noqa: N802
        self.opened.append((model, options, kwargs))
        return SimpleNamespace(get_provider_graph_assignment_info=lambda: subgraphs(self.recorded))


@pytest.fixture
def runtime(monkeypatch):
    """Put a made-up runtime in place of onnxruntime."""

    def put(**settings):
        made = Runtime(**settings)
        monkeypatch.setattr(providers, "import_runtime", lambda: made)
        monkeypatch.setattr(providers, "runtime_errors", lambda: (RuntimeError, ValueError))
        return made

    return put


@pytest.fixture
def plugin(monkeypatch):
    """Install a plugin package that names a library."""

    def put(name):
        module = ModuleType(name)
        module.get_library_path = lambda: f"/lib/{name}.so"
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(providers, "find_spec", lambda asked: object() if asked == name else None)

    return put


CUDA_OPTIONS = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}


def opened(name, **kwargs):
    return open_session("m.onnx", choose_provider(name), threads=3, entries={"session.x": "y"}, **kwargs)


class TestMadeUpRuntime:
    def test_options_entries_and_threads_reach_the_session(self, runtime):
        made = runtime(available=[CUDA, CPU], recorded={(CUDA, "MatMul"): 1})
        opened("cuda", device_id=1, memory_limit=7 << 30)
        model, options, kwargs = made.opened[0]
        assert model == "m.onnx"
        assert kwargs["providers"] == [(CUDA, {**CUDA_OPTIONS, "device_id": "1", "gpu_mem_limit": str(7 << 30)})]
        assert kwargs["enable_fallback"] is False
        assert options.entries == {"session.x": "y", "session.record_ep_graph_assignment_info": "1"}
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
        assert (options.log_severity_level, made.severity) == (4, 4)

    def test_tensorrt_leaves_small_nodes_to_cuda(self, runtime):
        trt = choose_provider("tensorrt").onnx_name
        made = runtime(available=[trt, CUDA, CPU], recorded={(trt, "MatMul"): 1})
        opened("tensorrt", device_id=2)
        given = dict(made.opened[0][2]["providers"])
        assert list(given) == [trt, CUDA]
        assert given[CUDA] == {**CUDA_OPTIONS, "device_id": "2"}
        assert given[trt]["device_id"] == "2"

    def test_a_gpu_build_whose_libraries_are_missing_is_caught(self, runtime, capsys):
        runtime(available=[CUDA, CPU], recorded={(CPU, "MatMul"): 7})
        with pytest.raises(QevalError, match="7 of 7 matrix and attention nodes fell back from CUDA") as caught:
            opened("cuda")
        assert str(caught.value).endswith("Seen while loading: Failed to load libcublasLt.so.13: no such file.")
        assert capsys.readouterr().out == ""

    def test_a_build_without_the_provider_says_what_to_install(self, runtime):
        made = runtime(available=["AzureExecutionProvider", CPU])
        with pytest.raises(
            UsageError, match=r"onnxruntime 1\.31\.1 installed has no CUDA.*pip install 'qeval\[cuda\]'"
        ):
            opened("cuda")
        assert not made.opened

    @pytest.mark.parametrize(
        ("name", "package"),
        [
            ("openvino", "onnxruntime-ep-openvino"),
            ("qnn", "onnxruntime-qnn"),
            ("trt-rtx", "onnxruntime-ep-nv-tensorrt-rtx"),
            ("webgpu", "onnxruntime-ep-webgpu"),
        ],
    )
    def test_a_plugin_that_is_not_installed_is_named(self, runtime, plugin, name, package):
        runtime()
        plugin("another")
        with pytest.raises(
            UsageError, match=f"{name} provider is a plugin that isn't installed: pip install {package}"
        ):
            opened(name)

    def test_a_plugin_is_registered_once_and_used_on_its_preferred_device(self, runtime, plugin):
        qnn = choose_provider("qnn")
        devices = [Device(qnn.onnx_name, "CPU"), Device("Other", "NPU"), Device(qnn.onnx_name, "NPU")]
        made = runtime(devices=devices, recorded={(qnn.onnx_name, "MatMul"): 1})
        plugin("onnxruntime_qnn")
        opened("qnn")
        opened("qnn", device_id=1)
        assert made.registered == [(qnn.onnx_name, "/lib/onnxruntime_qnn.so")]
        assert [options.devices for _, options, _ in made.opened] == [[devices[2]], [devices[0]]]
        assert "providers" not in made.opened[0][2]

    def test_a_plugin_that_falls_back_is_caught(self, runtime, plugin):
        runtime(devices=[Device("QNNExecutionProvider", "CPU")], recorded=QNN_FALLEN)
        plugin("onnxruntime_qnn")
        with pytest.raises(QevalError, match="13 of 13"):
            opened("qnn")

    def test_openvino_is_asked_for_fp32(self, runtime, plugin):
        name = choose_provider("openvino").onnx_name
        made = runtime(devices=[Device(name, "GPU"), Device(name, "CPU")], recorded={(name, "MatMul"): 1})
        plugin("onnxruntime_ep_openvino")
        opened("openvino")
        options = made.opened[0][1]
        assert options.devices[0].kind == "CPU"
        precision = '{"INFERENCE_PRECISION_HINT": "f32"}'
        assert options.device_options == {"load_config": f'{{"CPU": {precision}, "GPU": {precision}}}'}

    @pytest.mark.parametrize(
        ("devices", "device_id", "words"),
        [
            ([], 0, "has no device 0: it finds none here, and needs an Intel CPU, GPU or NPU"),
            ([Device("OpenVINOExecutionProvider", "CPU")], 1, "has no device 1: it finds only 1 here"),
            ([Device("OpenVINOExecutionProvider", "CPU")], -1, "has no device -1"),
        ],
    )
    def test_a_device_that_is_not_there_is_refused(self, runtime, plugin, devices, device_id, words):
        runtime(devices=devices)
        plugin("onnxruntime_ep_openvino")
        with pytest.raises(UsageError, match=words):
            opened("openvino", device_id=device_id)

    def test_a_library_that_does_not_load_says_why(self, runtime, plugin):
        runtime(plugin_error="[ONNXRuntimeError] : 1 : FAIL : Failed to load it: libcuda.so.1: cannot open\nmore")
        plugin("onnxruntime_ep_nv_tensorrt_rtx")
        with pytest.raises(
            QevalError, match=r"can't be loaded here.*: Failed to load it: libcuda\.so\.1: cannot open\.$"
        ):
            opened("trt-rtx")

    def test_an_old_runtime_that_records_nothing_is_refused(self):
        with pytest.raises(QevalError, match="doesn't record which provider runs what"):
            recorded_assignment(SimpleNamespace())


def tiny_graph():
    """y = a @ w, [n, 4] by [4, 3], as a serialized model."""
    ir = pytest.importorskip("onnx_ir")
    pytest.importorskip("onnx")
    a = ir.val("a", ir.DataType.FLOAT, ["n", 4])
    w = ir.val("w", const_value=ir.tensor(np.arange(12, dtype=np.float32).reshape(4, 3), name="w"))
    node = ir.node("MatMul", [a, w])
    node.outputs[0].name = "y"
    node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(["n", 3])
    graph = ir.Graph([a], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 21})
    return ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString()


class TestRealRuntime:
    @pytest.fixture(autouse=True)
    def _needs_it(self):
        pytest.importorskip("onnxruntime")

    def test_the_cpu_runs_it_and_says_so(self):
        session = open_session(tiny_graph(), choose_provider("cpu"), threads=1, entries={})
        assert recorded_assignment(session) == Assignment({(CPU, "MatMul"): 1})
        a = np.ones((2, 4), np.float32)
        assert np.array_equal(session.run(None, {"a": a})[0], a @ np.arange(12, dtype=np.float32).reshape(4, 3))

    def test_a_provider_that_is_not_here_is_an_error_and_no_fall_back(self):
        runtime = packages.import_runtime()
        if CUDA in runtime.get_available_providers():
            pytest.skip("this onnxruntime has CUDA")
        with pytest.raises(QevalError, match=f"has no {CUDA}"):
            open_session(tiny_graph(), choose_provider("cuda"), threads=1, entries={})

    def test_an_assignment_to_the_cpu_fails_a_check_for_another(self):
        session = open_session(tiny_graph(), choose_provider("cpu"), threads=1, entries={})
        with pytest.raises(QevalError, match=f"1 of 1 matrix and attention nodes fell back from {CUDA}"):
            check_assignment(recorded_assignment(session), choose_provider("cuda"))

    def test_a_model_that_does_not_load_is_told_without_a_word_on_stderr(self, tmp_path, capfd):
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(b"no graph")
        with pytest.raises(QevalError, match=r"could not open the model on cpu: Load model from .*broken\.onnx failed"):
            open_session(str(broken), choose_provider("cpu"), threads=1, entries={})
        assert capfd.readouterr().err == ""

    def test_the_cpu_has_one_device(self):
        with pytest.raises(UsageError, match="cpu provider has no device 1"):
            open_session(tiny_graph(), choose_provider("cpu"), threads=1, entries={}, device_id=1)

"""ONNX Runtime's execution providers, and proof that the one asked for did the work.

ONNX Runtime falls back to the CPU in silence when a provider is unknown, its libraries are missing, or it takes no
node; `get_providers()` may go on naming it. So every session records which provider each node was given, and a
matrix or attention node that went elsewhere is an error. Nothing here imports ONNX Runtime but `open_session`.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

from qeval.backends.onnx.packages import first_line_of, import_runtime, runtime_errors
from qeval.errors import QevalError, UsageError, unknown

WEIGHTY = frozenset({
    "Attention", "DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention", "GroupQueryAttention",
    "LinearAttention", "MultiHeadAttention", "PagedAttention", "QAttention", "SparseAttention",
    "DynamicQuantizeMatMul", "FusedGemm", "FusedMatMul", "FusedMatMulActivation", "Gemm", "GemmFastGelu",
    "GemmFloat8", "MatMul", "MatMulBnb4", "MatMulFpQ4", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits",
    "QGemm", "QLinearMatMul", "TransposeMatMul", "MoE", "QMoE", "EPContext",
})  # fmt: skip
"""The operators that must run on the provider asked for: matrix products, attention, and graphs compiled ahead."""

_SILENT = 4
"""ONNX Runtime's severity 'fatal': errors come as exceptions, so they need not be printed in colour as well."""


@dataclass(frozen=True)
class Provider:
    """An execution provider: our name, ONNX Runtime's, and what it takes to have it."""

    name: str
    onnx_name: str
    install: str
    """The command that installs it."""
    needs: str
    """What it needs beyond Python packages."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Options of this provider, for parity rather than speed."""
    has_device_id: bool = False
    """It takes `device_id` as an option."""
    plugin: str | None = None
    """The module that brings the provider's library, for one that isn't built into onnxruntime."""
    devices: Sequence[str] = ()
    """The kinds of device (CPU, GPU, NPU) that a plugin is used on, the preferred first."""
    companions: Sequence[str] = ()
    """Providers that may take the nodes that this one leaves; never a matrix or attention node."""
    note: str = ""
    """What a reader of its numbers should know; for the report."""


_CUDA_OPTIONS = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
"""fp32 stays fp32; and the arena takes what is asked for, not the next power of two, since torch needs memory too."""
_INSTALL_CUDA = "pip uninstall onnxruntime onnxruntime-genai && pip install 'qeval[cuda]'"
_FP32_ON = '{"INFERENCE_PRECISION_HINT": "f32"}'

PROVIDERS: Mapping[str, Provider] = MappingProxyType({
    "cpu": Provider("cpu", "CPUExecutionProvider", "pip install 'qeval[cpu]'", "any processor"),
    "cuda": Provider(
        "cuda", "CUDAExecutionProvider", _INSTALL_CUDA,
        "an NVIDIA GPU and a driver for CUDA 13", _CUDA_OPTIONS, has_device_id=True,
        note="TF32 is off.",
    ),
    "tensorrt": Provider(
        "tensorrt", "TensorrtExecutionProvider", f"{_INSTALL_CUDA} 'tensorrt-cu13<11'",
        "an NVIDIA GPU, a driver for CUDA 13, and TensorRT 10 on the library path",
        {"trt_fp16_enable": "0", "trt_bf16_enable": "0", "trt_int8_enable": "0"},
        has_device_id=True, companions=("CUDAExecutionProvider",),
        note="TensorRT multiplies fp32 in TF32 unless NVIDIA_TF32_OVERRIDE=0 is set, and takes no com.microsoft "
        "operator: export with --format qdq --exporter dynamo.",
    ),
    "trt-rtx": Provider(
        "trt-rtx", "NvTensorRTRTXExecutionProvider", "pip install onnxruntime-ep-nv-tensorrt-rtx",
        "an NVIDIA RTX GPU and a driver for CUDA 13",
        plugin="onnxruntime_ep_nv_tensorrt_rtx", devices=("GPU",),
    ),
    "dml": Provider(
        "dml", "DmlExecutionProvider", "pip uninstall onnxruntime && pip install onnxruntime-directml",
        "Windows and a GPU with DirectX 12",
        has_device_id=True,
    ),
    "openvino": Provider(
        "openvino", "OpenVINOExecutionProvider", "pip install onnxruntime-ep-openvino",
        "an Intel CPU, GPU or NPU",
        {"load_config": f'{{"CPU": {_FP32_ON}, "GPU": {_FP32_ON}}}'},
        plugin="onnxruntime_ep_openvino", devices=("CPU", "GPU", "NPU"),
        note="Products are computed in fp32; OpenVINO's own default is bf16 or fp16 where the device has it.",
    ),
    "qnn": Provider(
        "qnn", "QNNExecutionProvider", "pip install onnxruntime-qnn",
        "a Qualcomm processor",
        plugin="onnxruntime_qnn", devices=("NPU", "GPU", "CPU"),
        note="The NPU computes fp32 graphs in fp16.",
    ),
    "webgpu": Provider(
        "webgpu", "WebGpuExecutionProvider", "pip install onnxruntime-ep-webgpu",
        "a GPU; on Linux Vulkan too (libvulkan.so.1)",
        plugin="onnxruntime_ep_webgpu", devices=("GPU", "CPU"),
    ),
})  # fmt: skip
"""Every provider that `--ep` takes."""


@dataclass(frozen=True)
class Assignment:
    """The number of nodes that ran on each provider, by (provider, operator).

    >>> Assignment({("CPUExecutionProvider", "MatMul"): 11, ("CPUExecutionProvider", "Mul"): 4}).weighty
    {'CPUExecutionProvider': 11}
    """

    counts: Mapping[tuple[str, str], int] = field(default_factory=dict)

    @property
    def nodes(self) -> int:
        """The number of recorded nodes."""
        return sum(self.counts.values())

    @property
    def providers(self) -> dict[str, int]:
        """Nodes by provider."""
        return _by_provider(self.counts)

    @property
    def weighty(self) -> dict[str, int]:
        """Matrix and attention nodes by provider."""
        return _by_provider({key: count for key, count in self.counts.items() if key[1] in WEIGHTY})


def choose_provider(name: str) -> Provider:
    """Return the provider of a name of ours.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in PROVIDERS:
        raise unknown("execution provider", name, PROVIDERS)
    return PROVIDERS[name]


def assignment_of(subgraphs: Iterable[Any]) -> Assignment:
    """Return the counts in what `InferenceSession.get_provider_graph_assignment_info()` returns.

    That is a list of subgraphs with `ep_name` and `get_nodes()`, each node with `op_type`: those of the graph after
    the optimizations that no provider owns, before a provider fuses or compiles its own.
    """
    found = Counter((part.ep_name, node.op_type) for part in subgraphs for node in part.get_nodes())
    return Assignment(dict(sorted(found.items())))


def check_assignment(assignment: Assignment, provider: Provider) -> None:
    """Check that every matrix and attention node went to `provider`.

    Raises:
        QevalError: some went elsewhere, or none was recorded, so that nothing is known.
    """
    weighty = assignment.weighty
    total = sum(weighty.values())
    if not total:
        raise QevalError(
            f"ONNX Runtime recorded {assignment.nodes} nodes and no matrix or attention node among them, so nothing "
            f"shows that {provider.onnx_name} runs this model: check that the graph is a language model's."
        )
    fallen = total - weighty.get(provider.onnx_name, 0)
    if fallen:
        raise QevalError(
            f"{fallen} of {total} matrix and attention nodes fell back from {provider.onnx_name}: "
            f"{_fallen(assignment, provider)}. {_remedy(provider)}"
        )


def open_session(
    model: str | bytes,
    provider: Provider,
    *,
    threads: int,
    entries: Mapping[str, str],
    device_id: int = 0,
    memory_limit: int | None = None,
) -> Any:
    """Return an `onnxruntime.InferenceSession` whose matrix and attention nodes all run on `provider`.

    `model` is a path, or a serialized graph; `entries` are session configuration entries; `device_id` counts the
    provider's devices from 0, a plugin's in the order of `Provider.devices`. The CPU alone is also given what a
    provider leaves (masks, shapes); `memory_limit` is the bytes of a CUDA device that the session may take. Sets ONNX
    Runtime's log to fatal errors for the process.

    Raises:
        UsageError: the provider isn't installed, or has no device of this number.
        QevalError: ONNX Runtime refuses the model or the provider, or matrix or attention nodes fell back.
    """
    runtime = import_runtime()
    runtime.set_default_logger_severity(_SILENT)
    options = _session_options(runtime, threads, entries)
    trouble = _preload(runtime) if provider.onnx_name == "CUDAExecutionProvider" or provider.companions else ""
    try:
        names = _attach(runtime, options, provider, device_id, memory_limit)
        session = runtime.InferenceSession(model, options, **names, enable_fallback=False)
        recorded = recorded_assignment(session)
    except runtime_errors() as error:
        raise QevalError(
            f"ONNX Runtime could not open the model on {provider.name}: {first_line_of(error)}."
        ) from error
    _check(recorded, provider, trouble)
    return session


def require_provider(provider: Provider, device_id: int = 0) -> None:
    """Refuse a provider that can't be had here, before a model is made for it.

    Whether it takes the nodes is seen when a model is opened.

    Raises:
        UsageError: the provider isn't installed, or has no device of this number.
        QevalError: its library can't be loaded.
    """
    runtime = import_runtime()
    runtime.set_default_logger_severity(_SILENT)
    try:
        _attach(runtime, runtime.SessionOptions(), provider, device_id)
    except runtime_errors() as error:
        raise QevalError(f"ONNX Runtime could not use {provider.name}: {first_line_of(error)}.") from error


def recorded_assignment(session: Any) -> Assignment:
    """Return the assignment that a session of `open_session` recorded.

    Raises:
        QevalError: this ONNX Runtime can't tell.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise QevalError(
            "This ONNX Runtime doesn't record which provider runs what: install onnxruntime 1.24 or newer."
        )
    return assignment_of(session.get_provider_graph_assignment_info())


def _session_options(runtime: Any, threads: int, entries: Mapping[str, str]) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    for key, value in {**entries, "session.record_ep_graph_assignment_info": "1"}.items():
        options.add_session_config_entry(key, value)
    return options


def _attach(
    runtime: Any, options: Any, provider: Provider, device_id: int, memory_limit: int | None = None
) -> dict[str, Any]:
    """Return what InferenceSession takes as providers; a plugin's devices go into `options` instead."""
    if provider.onnx_name not in runtime.get_available_providers():
        device = _device(runtime, provider, device_id)
        options.add_provider_for_devices([device], dict(provider.options))
        return {}
    number = {"device_id": str(device_id)} if provider.has_device_id else {}
    if device_id and not number:
        raise UsageError(f"The {provider.name} provider has no device {device_id}: leave the device id at 0.")
    limit = {"gpu_mem_limit": str(memory_limit)} if memory_limit and provider.name == "cuda" else {}
    wanted = [(provider.onnx_name, {**provider.options, **number, **limit})]
    companions = [(name, {**_CUDA_OPTIONS, **number}) for name in provider.companions]
    return {"providers": wanted + companions}


def _device(runtime: Any, provider: Provider, device_id: int) -> Any:
    """Return a device of a plugin provider, or of one that onnxruntime registered as a plugin itself."""
    if provider.plugin is not None:
        _register(runtime, provider)
    found = [device for device in runtime.get_ep_devices() if device.ep_name == provider.onnx_name]
    if not found and provider.plugin is None:
        raise UsageError(
            f"The onnxruntime {runtime.__version__} installed has no {provider.onnx_name}: {provider.install} "
            f"(it needs {provider.needs})."
        )
    kinds = {kind: place for place, kind in enumerate(provider.devices)}
    fit = [device for device in found if device.device.type.name in kinds or not kinds]
    fit.sort(key=lambda device: kinds.get(device.device.type.name, 0))
    if not 0 <= device_id < len(fit):
        count = f"only {len(fit)}" if fit else "none"
        found_here = f"it finds {count} here, and needs {provider.needs}"
        raise UsageError(f"The {provider.name} provider has no device {device_id}: {found_here}.")
    return fit[device_id]


def _register(runtime: Any, provider: Provider) -> None:
    """Load a plugin's library, once in a process."""
    plugin = str(provider.plugin)
    if find_spec(plugin) is None:
        raise UsageError(f"The {provider.name} provider is a plugin that isn't installed: {provider.install}.")
    failures: tuple[type[Exception], ...] = (*runtime_errors(), ImportError, OSError)
    try:
        _registered(runtime.register_execution_provider_library, provider.onnx_name, plugin)
    except failures as error:
        raise QevalError(
            f"The {provider.name} provider is installed and can't be loaded here, where it needs {provider.needs}: "
            f"{first_line_of(error)}."
        ) from error


@cache
def _registered(register: Any, onnx_name: str, plugin: str) -> None:
    module = import_module(plugin)
    names = list(module.get_ep_names()) if hasattr(module, "get_ep_names") else [onnx_name]
    if onnx_name not in names:
        raise QevalError(
            f"The module {plugin} should bring {onnx_name}, and the plugin has {', '.join(names)}: install a version "
            "of it that this qeval knows."
        )
    register(onnx_name, module.get_library_path())


def _preload(runtime: Any) -> str:
    """Load CUDA's libraries from the nvidia packages; what onnxruntime prints about those that it can't load."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runtime.preload_dlls()
    return " ".join(line.strip().rstrip(".") for line in printed.getvalue().splitlines()[:1])


def _check(assignment: Assignment, provider: Provider, trouble: str) -> None:
    try:
        check_assignment(assignment, provider)
    except QevalError as error:
        raise (QevalError(f"{error} Seen while loading: {trouble}.") if trouble else error) from None


def _by_provider(counts: Mapping[tuple[str, str], int]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for (provider, _), count in counts.items():
        found[provider] += count
    return dict(found)


def _fallen(assignment: Assignment, provider: Provider) -> str:
    others = [name for name in assignment.weighty if name != provider.onnx_name]
    ops = {
        name: [f"{count} {op}" for (owner, op), count in assignment.counts.items() if owner == name and op in WEIGHTY]
        for name in others
    }
    return "; ".join(f"{name} has {', '.join(ops[name])}" for name in others)


def _remedy(provider: Provider) -> str:
    note = f" {provider.note}" if provider.companions else ""
    return f"It needs {provider.needs}; install its packages with: {provider.install}. --ep cpu runs anywhere.{note}"

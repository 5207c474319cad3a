"""One ONNX Runtime, whole, or a sentence that says what to install; the metadata is made up here."""

import sys
from types import ModuleType

import pytest

from qeval.backends.onnx import packages
from qeval.errors import UsageError

CPU = {"onnxruntime": ["onnxruntime"], "onnxruntime_genai": ["onnxruntime-genai"]}
BOTH = {"onnxruntime": ["onnxruntime-gpu", "onnxruntime", "onnxruntime"]}


@pytest.fixture
def installed(monkeypatch):
    """Make these distributions of these folders the installed ones, all of version 1.31.1."""

    def install(owners):
        monkeypatch.setattr(packages.metadata, "packages_distributions", lambda: owners)
        monkeypatch.setattr(packages.metadata, "version", lambda name: "1.31.1")

    return install


@pytest.fixture
def module(monkeypatch):
    """Make a module of this name import as one with these attributes."""

    def put(name, **attributes):
        made = ModuleType(name)
        vars(made).update(attributes)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    return put


def test_the_distributions_and_versions_are_told(installed):
    installed(CPU)
    found = packages.require_runtime()
    assert found == packages.RuntimeVersions("onnxruntime", "1.31.1", "onnxruntime-genai", "1.31.1")
    assert packages.require_genai() == found


def test_genai_is_optional_for_the_runtime_alone(installed):
    installed({"onnxruntime": ["onnxruntime-gpu"]})
    assert packages.require_runtime() == packages.RuntimeVersions("onnxruntime-gpu", "1.31.1")


def test_without_a_runtime_both_extras_are_named(installed):
    installed({"onnxruntime_ep_webgpu": ["onnxruntime-ep-webgpu"]})
    with pytest.raises(UsageError, match=r"needs onnxruntime.*'qeval\[cpu\]'.*'qeval\[cuda\]'") as caught:
        packages.require_runtime()
    assert caught.value.exit_code == 2


def test_without_genai_both_extras_are_named(installed):
    installed({"onnxruntime": ["onnxruntime"]})
    with pytest.raises(UsageError, match=r"needs onnxruntime-genai.*'qeval\[cpu\]'.*'qeval\[cuda\]'"):
        packages.require_genai()


@pytest.mark.parametrize("check", [packages.require_runtime, packages.require_builder, packages.import_runtime])
def test_two_runtimes_in_one_folder_are_named_with_the_way_out(installed, check):
    installed(BOTH)
    with pytest.raises(UsageError, match="onnxruntime and onnxruntime-gpu are installed side by side") as caught:
        check()
    assert "silently won" in str(caught.value)
    assert "pip uninstall onnxruntime onnxruntime-gpu, then install one" in str(caught.value)


def test_two_genai_in_one_folder_are_named(installed):
    installed({**CPU, "onnxruntime_genai": ["onnxruntime-genai-cuda", "onnxruntime-genai"]})
    with pytest.raises(UsageError, match="onnxruntime-genai and onnxruntime-genai-cuda are installed side by side"):
        packages.require_runtime()


def test_a_folder_that_an_uninstall_emptied_is_told(installed, module):
    installed(CPU)
    module("onnxruntime")
    with pytest.raises(
        UsageError, match=r"onnxruntime 1\.31\.1 is broken: its folder has no InferenceSession"
    ) as caught:
        packages.import_runtime()
    assert "pip install --force-reinstall --no-deps onnxruntime==1.31.1" in str(caught.value)


def test_an_emptied_genai_is_told(installed, module):
    installed(CPU)
    module("onnxruntime", InferenceSession=object)
    module("onnxruntime_genai")
    with pytest.raises(UsageError, match=r"onnxruntime-genai 1\.31\.1 is broken: its folder has no Generator"):
        packages.import_genai()


def test_a_runtime_that_cannot_be_imported_says_why(installed, monkeypatch):
    installed(CPU)

    def fail(name):
        raise ImportError("libcudart.so.13: cannot open shared object file.\nmore")

    monkeypatch.setattr(packages, "import_module", fail)
    with pytest.raises(UsageError, match=r"can't be imported \(libcudart\.so\.13: cannot open shared object file\)"):
        packages.import_runtime()


def test_a_whole_runtime_is_given(installed, module):
    installed(CPU)
    whole = module("onnxruntime", InferenceSession=object)
    assert packages.import_runtime() is whole


@pytest.mark.parametrize(
    ("check", "absent", "words"),
    [
        (packages.require_builder, {"onnx_ir"}, "The model builder needs onnx-ir, which isn't installed"),
        (
            packages.require_builder,
            {"onnx", "ml_dtypes"},
            "onnx, ml-dtypes, which aren't installed: pip install onnx ml",
        ),
        (packages.require_dynamo, {"onnxscript"}, "torch.onnx.export needs onnxscript"),
        (packages.require_graphs, {"onnx"}, "Reading an ONNX folder needs onnx, "),
    ],
)
def test_what_an_exporter_needs_beyond_is_named(installed, monkeypatch, check, absent, words):
    installed(CPU)
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name in absent else object())
    with pytest.raises(UsageError) as caught:
        check()
    assert words in str(caught.value)


def test_nothing_missing_passes(installed, monkeypatch):
    installed(CPU)
    monkeypatch.setattr(packages, "find_spec", lambda name: object())
    packages.require_graphs()
    assert packages.require_builder() == packages.require_dynamo() == packages.require_runtime()


def test_the_real_metadata_agrees_with_the_module():
    runtime = pytest.importorskip("onnxruntime")
    versions = packages.require_runtime()
    assert packages.import_runtime() is runtime
    assert versions.version == runtime.__version__


def test_its_own_exceptions_are_caught():
    runtime = pytest.importorskip("onnxruntime")
    with pytest.raises(packages.runtime_errors(), match="NO_SUCHFILE") as caught:
        runtime.InferenceSession("nowhere.onnx", providers=["CPUExecutionProvider"])
    assert type(caught.value).__bases__ == (Exception,)
    assert packages.first_line_of(caught.value).startswith("Load model from nowhere.onnx failed")


def test_the_first_line_of_an_error():
    assert packages.first_line_of(ValueError("one.\ntwo")) == "one"
    assert packages.first_line_of(ValueError()) == "ValueError"
    nested = ValueError("/src/a.cc:71 Error creating it: [ONNXRuntimeError] : 1 : FAIL : No such device.")
    assert packages.first_line_of(nested) == "No such device"
    signed = ValueError("/src/b.cc:729 void ort::Register(Options&, const More&) Please install it.")
    assert packages.first_line_of(signed) == "Please install it"

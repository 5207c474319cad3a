"""The installed packages of ONNX Runtime: one runtime, whole, or one sentence that says what to install.

`onnxruntime`, `onnxruntime-gpu` and their like put their files into the same folder. pip installs two of them side
by side without a word: the last one wins, and removing either leaves a folder that imports and holds nothing. So
the distributions that own the folder are counted before it is imported. Nothing here imports ONNX Runtime but
`import_runtime`, `import_genai` and `runtime_errors`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

from qeval.errors import UsageError

RUNTIME = "onnxruntime"
GENAI = "onnxruntime_genai"
"""The folders that the distributions own; they are also what is imported."""

_INSTALL = "pip install 'qeval[cpu]', or pip install 'qeval[cuda]' for an NVIDIA GPU"
_CLASSES = {RUNTIME: "InferenceSession", GENAI: "Generator"}
"""A class that the whole package has and an emptied folder lacks."""

_BUILDER = ("onnx", "onnx_ir", "torch", "transformers", "safetensors", "tqdm", "huggingface_hub", "ml_dtypes")
_DYNAMO = ("onnx", "onnx_ir", "onnxscript", "torch", "transformers")
_GRAPHS = ("onnx", "onnx_ir")
_DISTRIBUTIONS = {"onnx_ir": "onnx-ir", "huggingface_hub": "huggingface-hub", "ml_dtypes": "ml-dtypes"}
"""The distributions of modules that bear another name."""

_CODE = re.compile(r".*\[ONNXRuntimeError\] : (\d+ : [A-Z_]+ : )?")
_SOURCE = re.compile(r"^/\S+:\d+ [^()]*\([^()]*\)( const)? ")
"""A file, a line and a C++ signature."""


@dataclass(frozen=True)
class RuntimeVersions:
    """The distributions that are installed: `onnxruntime-gpu`, `1.31.1`; of GenAI's None where there is none."""

    distribution: str
    version: str
    genai_distribution: str | None = None
    genai_version: str | None = None


def require_runtime() -> RuntimeVersions:
    """Return the one ONNX Runtime that is installed, and its GenAI if there is one; looks at metadata only.

    Raises:
        UsageError: there is none, or two distributions share its folder or GenAI's.
    """
    found = _one_owner(RUNTIME)
    if found is None:
        raise UsageError(f"The ONNX Runtime backend needs onnxruntime, which isn't installed: {_INSTALL}.")
    genai = _one_owner(GENAI) or (None, None)
    return RuntimeVersions(*found, *genai)


def require_genai() -> RuntimeVersions:
    """Do as `require_runtime`, and require onnxruntime-genai too.

    Raises:
        UsageError: either is missing or installed twice.
    """
    versions = require_runtime()
    if versions.genai_distribution is None:
        raise UsageError(f"The model builder needs onnxruntime-genai, which isn't installed: {_INSTALL}.")
    return versions


def require_builder() -> RuntimeVersions:
    """Do as `require_genai`, and require everything that GenAI's model builder imports beyond its own requirements.

    Raises:
        UsageError: names all that is missing.
    """
    versions = require_genai()
    _require(_BUILDER, "The model builder")
    return versions


def require_dynamo() -> RuntimeVersions:
    """Do as `require_runtime`, and require everything that `torch.onnx.export` imports.

    Raises:
        UsageError: names all that is missing.
    """
    versions = require_runtime()
    _require(_DYNAMO, "torch.onnx.export")
    return versions


def require_graphs() -> None:
    """Require what reading and editing a graph needs; no ONNX Runtime.

    Raises:
        UsageError: names all that is missing.
    """
    _require(_GRAPHS, "Reading an ONNX folder")


def require_onnx() -> None:
    """Refuse work on ONNX where its packages are missing.

    Raises:
        UsageError: it says which extra to install.
    """
    require_runtime()
    require_graphs()


def import_runtime() -> Any:
    """Return the module `onnxruntime`, known to be whole.

    Raises:
        UsageError: as `require_runtime`; or it can't be imported, or it is a folder that an uninstall emptied.
    """
    versions = require_runtime()
    return _imported(RUNTIME, versions.distribution, versions.version)


def import_genai() -> Any:
    """Return the module `onnxruntime_genai`, known to be whole.

    Raises:
        UsageError: as `require_genai`; or it can't be imported, or it is a folder that an uninstall emptied.
    """
    import_runtime()
    versions = require_genai()
    return _imported(GENAI, str(versions.genai_distribution), str(versions.genai_version))


def runtime_errors() -> tuple[type[Exception], ...]:
    """Return what ONNX Runtime raises: its own exceptions derive from nothing but `Exception`."""
    state = vars(import_module("onnxruntime.capi.onnxruntime_pybind11_state"))
    own = (value for value in state.values() if isinstance(value, type) and issubclass(value, Exception))
    return (*own, RuntimeError, ValueError)


def first_line_of(error: BaseException) -> str:
    """Return what an error says in its first line, without ONNX Runtime's code, its source lines and the full stop."""
    text = str(error).strip() or type(error).__name__
    return _SOURCE.sub("", _CODE.sub("", text.splitlines()[0])).rstrip(". ")


def owners(folder: str) -> list[str]:
    """Return the distributions that own a folder of site-packages, by name."""
    return sorted(set(_listed(metadata.packages_distributions).get(folder, ())))


def _one_owner(folder: str) -> tuple[str, str] | None:
    """Return the name and version of the distribution that owns a folder of site-packages; None if none does."""
    names = owners(folder)
    if len(names) > 1:
        raise UsageError(
            f"{' and '.join(names)} are installed side by side and own the same folder '{folder}', where the last one "
            f"installed has silently won: pip uninstall {' '.join(names)}, then install one ({_INSTALL})."
        )
    return (names[0], metadata.version(names[0])) if names else None


@cache
def _listed(listing: Callable[[], Mapping[str, list[str]]]) -> Mapping[str, list[str]]:
    """Return the distributions that own each folder; they are listed once a process, which takes a second."""
    return listing()


def _imported(folder: str, distribution: str, version: str) -> Any:
    again = f"pip install --force-reinstall --no-deps {distribution}=={version}"
    try:
        module = import_module(folder)
    except ImportError as error:
        raise UsageError(f"{distribution} {version} can't be imported ({first_line_of(error)}): {again}.") from error
    if not hasattr(module, _CLASSES[folder]):
        raise UsageError(
            f"{distribution} {version} is broken: its folder has no {_CLASSES[folder]}, as happens when another "
            f"distribution that shares it is removed: {again}."
        )
    return module


def _require(modules: Iterable[str], what: str) -> None:
    missing = [_DISTRIBUTIONS.get(name, name) for name in modules if find_spec(name) is None]
    if missing:
        verb = "isn't" if len(missing) == 1 else "aren't"
        raise UsageError(f"{what} needs {', '.join(missing)}, which {verb} installed: pip install {' '.join(missing)}.")

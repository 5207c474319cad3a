"""ONNX Runtime's packages, of which one environment holds one, and the optional extras."""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from qeval.backends.onnx.packages import GENAI, RUNTIME, import_runtime, owners
from qeval.backends.onnx.providers import PROVIDERS
from qeval.doctor.checks import DoctorCheck
from qeval.errors import UsageError
from qeval.models.device import resolve_device

_EXTRAS = (
    ("llama.cpp", "llama_cpp", "llama-cpp-python", "pip install 'qeval[llamacpp]'"),
    ("Ray", "ray", "ray", "pip install 'qeval[ray]'"),
    ("torchao", "torchao", "torchao", "pip install 'qeval[torchao]'"),
    ("HQQ", "hqq", "hqq", "pip install 'qeval[hqq]'"),
    ("GPTQModel", "gptqmodel", "gptqmodel", "pip install 'qeval[gptqmodel]'"),
    ("AutoRound", "auto_round", "auto-round", "pip install 'qeval[autoround]'"),
    ("Model Optimizer", "modelopt", "nvidia-modelopt", "pip install nvidia-modelopt"),
    ("llguidance", "llguidance", "llguidance", "pip install 'qeval[grammar]'"),
    ("Inspect", "inspect_ai", "inspect-ai", "pip install 'qeval[inspect]'"),
    ("MLflow", "mlflow", "mlflow-skinny", "pip install 'qeval[mlflow]'"),
    ("W&B", "wandb", "wandb", "pip install 'qeval[wandb]'"),
    ("NVML", "pynvml", "nvidia-ml-py", "pip install nvidia-ml-py"),
)
"""What it is called, its module, its distribution, and what installs it."""


def package_checks() -> Iterator[DoctorCheck]:
    """Yield what is installed of ONNX Runtime and of the extras; nothing optional is wrong by not being there."""
    yield _runtime()
    yield _genai()
    for title, module, distribution, install in _EXTRAS:
        if _has(module):
            yield DoctorCheck(part="packages", name=title, value=f"{distribution} {_version(distribution)}")
        else:
            yield DoctorCheck(part="packages", name=title, value="not installed", status="note", fix=install)


def _runtime() -> DoctorCheck:
    name, cuda = "ONNX Runtime", PROVIDERS["cuda"]
    on_gpu = resolve_device("auto").name == "cuda"

    distributions = owners(RUNTIME)
    if not distributions:
        return _not_installed(name, "pip install 'qeval[cuda]'" if on_gpu else "pip install 'qeval[cpu]'")
    if len(distributions) > 1:
        return _several_installed(name, distributions)

    try:
        providers = import_runtime().get_available_providers()
    except UsageError as error:
        sentence, _, fix = str(error).rstrip(".").rpartition(": ")
        return DoctorCheck(part="packages", name=name, value=sentence, status="wrong", fix=fix)

    value = f"{distributions[0]} {_version(distributions[0])}: {', '.join(providers)}"
    if on_gpu and cuda.onnx_name not in providers:
        value += f"; without {cuda.onnx_name}, so --backend ort can't use the GPU"
        return DoctorCheck(part="packages", name=name, value=value, status="note", fix=cuda.install)
    return DoctorCheck(part="packages", name=name, value=value)


def _genai() -> DoctorCheck:
    name, distributions = "ONNX Runtime GenAI", owners(GENAI)
    if not distributions:
        return _not_installed(name, "pip install 'qeval[cpu]'")
    if len(distributions) > 1:
        return _several_installed(name, distributions)
    return DoctorCheck(part="packages", name=name, value=f"{distributions[0]} {_version(distributions[0])}")


def _not_installed(name: str, fix: str) -> DoctorCheck:
    return DoctorCheck(part="packages", name=name, value="not installed", status="note", fix=fix)


def _several_installed(name: str, distributions: list[str]) -> DoctorCheck:
    """Return the check of two distributions that own one folder, of which the last one installed has won."""
    keep = next((each for each in distributions if "gpu" in each or "cuda" in each), distributions[-1])
    return DoctorCheck(
        part="packages",
        name=name,
        value=f"{' and '.join(distributions)} side by side, whose files overwrite each other",
        status="wrong",
        fix=f"pip uninstall -y {' '.join(distributions)} && pip install {keep}",
    )


def _has(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:
        return False  # a module that was put into sys.modules without a spec


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"

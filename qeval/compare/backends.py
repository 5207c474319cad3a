"""The backends of a run, by the names that --backend takes: a new one is a class of its own and a row here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from qeval.backends.base import Backend, BaselineBackend
from qeval.backends.llamacpp.backend import LlamaCppBackend, require_llama_cpp
from qeval.backends.llamacpp.gguf_writer import check_family
from qeval.backends.llamacpp.library import LLAMACPP as LLAMA_CPP
from qeval.backends.onnx.nbits import check_kernel
from qeval.backends.onnx.packages import require_onnx
from qeval.backends.vllm.backend import VLLM, VllmBackend, VllmOptions
from qeval.backends.vllm.process import default_python, vllm_version
from qeval.compare.external_paths import VariantPath, is_gguf
from qeval.compare.settings import Settings
from qeval.compare.variants import BaselineModel, FitsKernel
from qeval.errors import UsageError
from qeval.models.info import LoadedModel


class RunBackends(NamedTuple):
    """The backends that score every variant, in the order of the report, and the noise floor's."""

    variants: tuple[Backend[Any], ...]
    floors: tuple[Backend[Any], ...]


@dataclass(frozen=True, eq=False)
class BackendInputs:
    """The inputs that a run's backends are made from."""

    settings: Settings
    loaded: LoadedModel
    source: BaselineModel
    baseline: BaselineBackend[Any]
    places: Sequence[VariantPath]


@dataclass(frozen=True)
class BackendKind:
    """A row of `BACKEND_CLASSES`.

    Attributes:
        make: Makes the backends of this kind.
        require: Raises a UsageError, before a model is loaded, unless its packages are installed.
        check_grid: Raises a UsageError unless its kernels take a grid; None where any grid does.
    """

    make: Callable[[BackendInputs], RunBackends]
    require: Callable[[], None] | None = None
    check_grid: FitsKernel | None = None


def backends_of(inputs: BackendInputs) -> RunBackends:
    """Make the backends that the settings name, in the table's order.

    Raises:
        UsageError: Packages are missing, or a backend can't run the model here.
    """
    made = [kind.make(inputs) for kind in kinds_of(inputs.settings.backends.names)]
    return RunBackends(
        tuple(backend for each in made for backend in each.variants),
        tuple(backend for each in made for backend in each.floors),
    )


def kinds_of(names: Sequence[str]) -> list[BackendKind]:
    """Return the rows of `BACKEND_CLASSES` that `names` asks for, in the table's order."""
    return [kind for name, kind in BACKEND_CLASSES.items() if name in names]


def _torch(inputs: BackendInputs) -> RunBackends:
    return RunBackends((inputs.baseline,), ())


def _onnxruntime(inputs: BackendInputs) -> RunBackends:
    require_onnx()
    from qeval.compare.onnx import ort_backends  # noqa: PLC0415 - an extra

    choice = inputs.settings.backends
    made = ort_backends(choice, inputs.loaded, inputs.source.description)
    return RunBackends(tuple(made[level] for level in choice.accuracy_levels), (made[1],))


def _llama_cpp(inputs: BackendInputs) -> RunBackends:
    unwritten = None
    try:
        check_family(inputs.loaded)
    except UsageError as error:
        # A variant that was read from a GGUF file is scored from it; all others need one that is written.
        if inputs.settings.recipes or not all(is_gguf(place.path) for place in inputs.places):
            raise UsageError(f"--backend {LLAMA_CPP}: {error}") from error
        unwritten = str(error)
    backend = LlamaCppBackend(
        inputs.loaded,
        ids=int(inputs.source.head.weight.shape[0]),
        threads=torch.get_num_threads(),
        device=inputs.settings.model.device,
        unwritten=unwritten,
    )
    for recipe in inputs.settings.recipes:
        try:
            backend.types_of(recipe.scheme)
        except UsageError as error:
            raise UsageError(f"'{recipe.name}' on --backend {LLAMA_CPP}: {error}") from error
    return RunBackends((backend,), () if unwritten else (backend,))


def _vllm(inputs: BackendInputs) -> RunBackends:
    settings, choice = inputs.settings, inputs.settings.vllm
    options = VllmOptions(str(choice.python or default_python()), choice.dtype, choice.tensor_parallel, choice.kv_cache)
    vllm_version(options.python)
    if settings.recipes:
        raise UsageError(
            f"--backend {VLLM} runs checkpoints, and {', '.join(each.name for each in settings.recipes)} is none: "
            "write it by `qeval export --to hf --out FOLDER`, and give --variant NAME=FOLDER."
        )
    backend = VllmBackend(
        inputs.loaded, ids=int(inputs.source.head.weight.shape[0]), device=settings.model.device, options=options
    )
    return RunBackends((backend,), (backend,))


BACKEND_CLASSES: Mapping[str, BackendKind] = {
    "torch": BackendKind(_torch),
    "ort": BackendKind(_onnxruntime, check_grid=check_kernel),
    LLAMA_CPP: BackendKind(_llama_cpp, require=require_llama_cpp),
    VLLM: BackendKind(_vllm),
}

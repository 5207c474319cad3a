"""The fit of a model on this machine, and a comparison's time: from its configuration alone, without a weight."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qeval.arithmetic import dtype_name
from qeval.compare.cost import PROGRAM_BYTES, WORKING_BYTES, Shape, cost, flops_per_second
from qeval.compare.defaults import CALIBRATION_LENGTH, CALIBRATION_SAMPLES, SHIPPED_SAMPLES, takes_shipped_texts
from qeval.doctor.checks import CheckStatus, DoctorCheck
from qeval.errors import QevalError, UsageError
from qeval.hub import hub_home
from qeval.models.demo import cached_demo_folder
from qeval.models.device import free_bytes, resolve_device
from qeval.models.hub.fetch import fetch_config
from qeval.models.load import read_config
from qeval.models.silence_transformers import quiet
from qeval.models.source import ModelSource, resolve
from qeval.models.structure.trace import language_config
from qeval.paths import nearest_existing
from qeval.quantize import sensitivity


class _Texts(NamedTuple):
    """Tokens of the texts of a comparison by default: run and scored, run for questions, and to calibrate on."""

    title: str
    run: int
    scored: int
    question_tokens: int
    questions: int
    calibration: int


_PUBLISHED = _Texts(
    "WikiText-2 and MMLU", 574_000, 287_000, 1_523_000, 14_042, CALIBRATION_SAMPLES * CALIBRATION_LENGTH
)
"""`wikitext2-1024/512` in tokens of Llama 3; MMLU 5-shot, each subject's examples run once, in tokens of SmolLM2."""
_SHIPPED = _Texts("the texts that are shipped", 43_000, 43_000, 14_000, 280, SHIPPED_SAMPLES * CALIBRATION_LENGTH)
"""In the demo model's tokens."""
_MODELS = 4
"""The baseline and the three variants of `compare` by default."""
_STATES = 4096
"""Tokens of a job, whose final states a streamed model keeps beside its layers."""
_UNITS_A_LAYER = 4
"""Groups of linears that share an input, in a decoder like Llama's."""


@dataclass(frozen=True)
class Outline:
    """The sizes of a model by its configuration; `stored` is the type of its weights."""

    parameters: int
    layer_weights: int
    largest_layer: int
    layers: int
    head_weights: int
    width: int
    stored: torch.dtype

    def shape(self, compute: torch.dtype) -> Shape:
        """Return the same as an estimate takes it, computed in a type."""
        return Shape(self.layer_weights, self.head_weights, self.parameters, compute.itemsize)

    def streamed_bytes(self, compute: torch.dtype) -> int:
        """Return about the least bytes that `--stream` takes.

        These are a layer as it is computed with, the next as stored, and final states.
        """
        return self.largest_layer * (compute.itemsize + self.stored.itemsize) * 8 // 5 + 2 * _STATES * self.width * 4


def model_checks(name: str, revision: str | None) -> Iterator[DoctorCheck]:
    """Yield where a model fits, whole or by layers, and how long a comparison by default takes.

    Raises:
        UsageError: Nothing goes by that name.
    """
    source = resolve(name, revision)
    try:
        config = _config(source)
        outline = outline_of(config)
    except QevalError as error:
        yield _check("model", f"{name}: {error}", "wrong", "give another model, or do as it says")
        return
    size = outline.parameters * outline.stored.itemsize
    stored = dtype_name(outline.stored)
    count = f"{outline.parameters / 1e9:.1f} billion" if outline.parameters >= 1e9 else f"{outline.parameters:,}"
    yield _check("model", f"{name}: {count} weights in {stored}, {size / 1e9:.2f} GB")
    if source.kind == "hub":
        yield from _download(size)
    yield from _fits(name, outline)


def outline_of(config: Any) -> Outline:
    """Return the outline of a configuration's model, which is built without memory.

    Raises:
        UsageError: transformers can't build it.
    """
    try:
        with quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise UsageError(f"transformers can't build the model of this configuration: {error}.") from error

    # the longest list of modules is the decoder's
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=_parameters)

    text = language_config(config)
    return Outline(
        parameters=_parameters(model),
        layer_weights=sum(weight.numel() for weight in layers.parameters() if weight.dim() > 1),
        largest_layer=max(map(_parameters, layers)),
        layers=len(layers),
        head_weights=model.get_output_embeddings().weight.numel(),
        width=int(text.hidden_size),
        stored=getattr(text, "dtype", None) or getattr(config, "dtype", None) or torch.float32,
    )


def _config(source: ModelSource) -> Any:
    """Read the configuration of a model as the loader does.

    Raises:
        UsageError: It can't be had, or is none. QevalError: It can't be fetched.
    """
    if source.kind == "gguf" or source.inside is not None:
        raise UsageError("A GGUF file's size in memory is known when it was converted: compare it once with --limit 1.")
    if source.kind == "demo" and (folder := cached_demo_folder()) is None:
        raise UsageError("The demo model is not here yet: `qeval compare --model demo` fetches it (93 MB).")
    if source.kind == "hub":
        return read_config(fetch_config(str(source.hub_id), source.revision).parent)
    return read_config(folder if source.kind == "demo" else Path(str(source.path)))  # type: ignore[arg-type]


def _download(size: int) -> Iterator[DoctorCheck]:
    free = shutil.disk_usage(nearest_existing(hub_home())).free
    if free < size:
        value = f"{size / 1e9:.1f} GB to fetch, {free / 1e9:.1f} GB free"
        yield _check("disk", value, "wrong", "make room, or: export HF_HOME=/a/folder/on/a/larger/disk")


def _fits(name: str, outline: Outline) -> Iterator[DoctorCheck]:
    """Yield whether it fits whole, on several GPUs, by layers; then the command that suits, and its time."""
    roomy, together = [], 0
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free = free_bytes(torch.device("cuda", index))
        needed = cost(0.0, 1.0, outline.shape(outline.stored), on_gpu=True).gpu_bytes
        roomy += [index] if needed <= free else []
        together += max(0, free - WORKING_BYTES)
        yield _check(f"whole on cuda:{index}", _verdict(needed, free))

    needed, free = cost(0.0, 1.0, outline.shape(torch.float32)).peak_bytes, free_bytes(torch.device("cpu"))
    whole_on_cpu = needed <= free
    yield _check("whole on the CPU", f"{_verdict(needed, free)}, computed in float32")

    spreads = not roomy and outline.shape(outline.stored).model_bytes <= together
    if len(roomy) > 1:
        yield _check("on several GPUs", f"yes: --workers {len(roomy)}, a whole model on each")
    elif spreads:
        yield _check("on several GPUs", "yes: --device-map auto, one model on all of them")
    elif torch.cuda.is_available():
        yield _check("on several GPUs", "no: --workers puts a whole model on each GPU, and fewer than two hold it")

    # by layers, on the device that `compare` would choose
    device = resolve_device("auto").name
    compute = torch.float32 if device == "cpu" else outline.stored
    room = free_bytes(torch.device(device))
    streams = outline.streamed_bytes(compute) + PROGRAM_BYTES
    yield _check("by layers (--stream)", _verdict(streams, room))
    way: str | None = None
    if spreads:
        way = " --device-map auto"
    elif device == "cuda" and roomy:
        way = f" --device cuda:{roomy[0]}" if roomy[0] else ""
    elif device != "cuda" and whole_on_cpu:
        way = ""
    elif streams <= room:
        way = " --stream"
    yield from _command(name, outline, device, compute, way)


def _command(name: str, outline: Outline, device: str, compute: torch.dtype, way: str | None) -> Iterator[DoctorCheck]:
    """Yield the command with the flags of the `way` in which the model fits (None: in none), and its time."""
    if way is None:
        yield _check("what to run", "nothing fits", "wrong", "free memory, or take a machine with more of it")
        return
    texts = _SHIPPED if takes_shipped_texts(name, offline=False) else _PUBLISHED
    seconds = cost(_flops(outline, compute, texts), flops_per_second(device, compute), outline.shape(compute)).seconds
    yield _check("what to run", f"qeval compare --model {name}{way}")
    yield _check("time", f"about {_duration(seconds)} for the baseline and three variants on {texts.title}")


def _flops(outline: Outline, compute: torch.dtype, texts: _Texts) -> float:
    """Return the operations of `compare` by default.

    Texts and questions are run by each model, calibration text twice, and every group is tried alone.
    """
    shape = outline.shape(compute)
    flops = _MODELS * shape.forward_flops(texts.run + texts.question_tokens, 2 * texts.scored + texts.questions)
    flops += 2 * shape.forward_flops(texts.calibration, 0)
    tried = sensitivity.SENSITIVITY_SAMPLES * sensitivity.SENSITIVITY_LENGTH
    return flops + outline.layers * _UNITS_A_LAYER * shape.forward_flops(tried // 2, tried // sensitivity.EVERY)


def _verdict(needed: int, free: int) -> str:
    fits = "yes" if needed <= free else "no"
    return f"{fits}: about {needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB that are free"


def _check(name: str, value: str, status: CheckStatus = "ok", fix: str | None = None) -> DoctorCheck:
    return DoctorCheck(part="model", name=name, value=value, status=status, fix=fix)


def _parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _duration(seconds: float) -> str:
    hours, minutes = seconds / 3600, max(1, round(seconds / 60))
    return f"{hours:.0f} hours" if hours >= 10 else f"{hours:.1f} hours" if hours >= 1 else f"{minutes} min"

"""The uses of a model type besides scoring: methods, layers read one at a time, exports; tried on its tiny model.

A use works, or has a sentence that says why not. Whether an ONNX graph agrees with torch shows when one is exported,
which takes too long for every type: here it is only told what is refused before that.
"""

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qeval.backends.onnx.packages import require_builder
from qeval.backends.stream.backend import StreamBackend, inspect, streamed
from qeval.backends.torch import TorchSession
from qeval.errors import QevalError, first_line
from qeval.jobs.conformance import Bench, WrongError
from qeval.models.checkpoint.meta_model import build_meta_model
from qeval.models.checkpoint.weights import read_entries, weight_files
from qeval.models.families import byte_tokenizer
from qeval.models.info import LoadedModel
from qeval.models.load import model_info
from qeval.models.silence_transformers import quiet
from qeval.models.structure.forward import body_of
from qeval.models.structure.supported import support_notes
from qeval.quantize.build import quantizable
from qeval.types import Request

TRIED_METHODS: Mapping[str, str] = {
    "rtn": "rtn:int4-channel",
    "awq": "awq:int4-channel",
    "gptq": "gptq:int4-channel",
    "mixed": "mixed-rtn:int4-channel",
}
"""The recipe that each method is tried with: per channel, since the tiny models' rows are shorter than most blocks."""
WORKS, ON_EXPORT, FAULT = "yes", "on export", "fault: "
"""A use that was tried; one that only an export shows; the beginning of what should not have happened."""
USES = (*TRIED_METHODS, "stream", "onnx", "gguf")
_FOLDER = "qeval-type-"
_SAMPLES, _LENGTH = 4, 24
_STREAM_BYTES = 1 << 30
_APART = 1e-4
"""Of the largest state: what reading layers one at a time may change."""


def try_uses(model: Any) -> dict[str, str]:
    """Return for each of `USES` that it works, or why not, in sentences that don't name the model's class.

    Args:
        model: The tiny model, with weights in fp32.
    """
    return {use: _unnamed(line, model) for use, line in _tried(model).items()}


def _unnamed(line: str, model: Any) -> str:
    """Return a sentence for any model's class, so that types of one reason share it."""
    for part in (model, body_of(model)):
        line = re.sub(rf"\b{type(part).__name__}\b", "this model", line)
    line = re.sub(rf"'[^']*/{_FOLDER}[^/']*/", "'", line)
    return line[0].upper() + line[1:] if line.startswith("this ") else line


def _tried(model: Any) -> dict[str, str]:
    try:
        bench = _bench_of(model)
    except QevalError as error:
        uses = dict.fromkeys(TRIED_METHODS, str(error))
    else:
        uses = {name: _outcome(partial(_quantize, bench, recipe)) for name, recipe in TRIED_METHODS.items()}
    return {
        **uses,
        "stream": _outcome(partial(_stream, model)),
        "onnx": _outcome(partial(_check_onnx, model), works=ON_EXPORT),
        "gguf": _outcome(partial(_check_gguf, model)),
    }


def _outcome(use: Callable[[], object], works: str = WORKS) -> str:
    try:
        with quiet():
            use()
    except QevalError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - whatever a model's code raises is its row's
        return f"{FAULT}{type(error).__name__}: {first_line(error)}"
    return works


def _bench_of(model: Any) -> Bench:
    """Return a bench of a model, most of whose weights can be quantized.

    Raises:
        QevalError: They can't.
    """
    with quiet():
        bench = Bench(type(model).__name__, model)
    support_notes(model, bench.description)
    bench.samples = [sample[:_LENGTH] for sample in bench.samples[:_SAMPLES]]
    return bench


def _quantize(bench: Bench, recipe: str) -> None:
    """Quantize and score by a recipe: each linear comes out quantized, and the scores are numbers."""
    variant = bench.variant(recipe)
    if left := set(quantizable(bench.description)) - set(variant.weights):
        raise WrongError(f"{recipe} leaves out {sorted(left)[0]} (one of {len(left)}).")
    with bench.backend.open(variant) as session:
        if not bool(session.states([bench.request])[0].isfinite().all()):
            raise WrongError(f"{recipe} gives states that are not finite.")


@torch.inference_mode()
def _stream(model: Any) -> None:
    """Score with one layer in memory at a time, and compare with the whole model."""
    request = Request(tuple(range(3, 3 + _LENGTH)), tuple(range(_LENGTH)))
    whole = TorchSession(model).states([request])[0]
    with TemporaryDirectory(prefix=_FOLDER) as folder:
        model.save_pretrained(folder)
        entries = read_entries(weight_files(Path(folder)))
        empty, _ = build_meta_model(deepcopy(model.config), torch.float32, entries, model.config.model_type)
        stream = streamed(empty, entries, torch.device("cpu"), "float32")
        with StreamBackend(stream, *inspect(stream, "float32"), _STREAM_BYTES).open(None) as session:
            apart = float((session.states([request])[0] - whole).abs().max() / whole.abs().max())
    if not apart <= _APART:
        raise WrongError(f"Layers read one at a time give other states, by {apart:.1e} of the largest.")


def _check_onnx(model: Any) -> None:
    require_builder()
    from qeval.backends.onnx.export import OnnxExporter  # noqa: PLC0415 - an extra

    OnnxExporter(_loaded(model), (), "auto", torch.get_num_threads())


def _check_gguf(model: Any) -> None:
    from qeval.backends.llamacpp.gguf_writer import check_family  # noqa: PLC0415 - an extra

    check_family(_loaded(model))


def _loaded(model: Any) -> LoadedModel:
    """Return a model as if it were read; its weights have no identity."""
    kind, dtype = model.config.model_type, "float32"
    info = model_info(
        model, where=kind, name=kind, source="memory", weights_sha256="", weight_dtype=dtype, compute_dtype=dtype
    )
    return LoadedModel(model, byte_tokenizer(), info, None)

"""From a source to a model that runs, with everything about it checked before it is returned."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qeval.errors import UsageError, unknown
from qeval.models import cache, weights
from qeval.models.demo import demo_folder
from qeval.models.fetch import fetch
from qeval.models.gguf import converted
from qeval.models.info import LoadedModel, ModelInfo
from qeval.models.quiet import quiet
from qeval.models.skeleton import skeleton
from qeval.models.source import ModelSource
from qeval.models.supported import check_config

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_MISMATCH = "ignore_mismatched_sizes"
"""What transformers names in its advice where tensors have other shapes than the configuration asks for."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json, safetensors and a tokenizer; `revision` is the hub's commit.

    `notes` belong to the model, `warnings` to how it was had today.
    """

    folder: Path
    revision: str | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def load(
    source: ModelSource, *, device: str = "cpu", dtype: str | None = None, weightless: bool = False
) -> LoadedModel:
    """The model of `source` on `device`, in eval mode, without gradients.

    `dtype` is what it is computed in. None means the checkpoint's own, but float32 on the CPU, where products in half
    precision are hundreds of times slower: its fp16 or bf16 weights are then exactly what fp32 computes with.
    A `weightless` model has no weights in memory; whoever runs it reads them from the folder.

    Raises:
        UsageError: one sentence for whatever is wrong with the checkpoint, the device or the dtype.
        QevalError: a download failed or the cache can't be written.
    """
    where = check_device(device)
    checkpoint = checkpoint_of(source)
    config = _read_config(checkpoint.folder)
    entries = weights.read_entries(weights.weight_files(checkpoint.folder))
    own_dtype = weights.main_dtype(entries)
    compute = _compute_dtype(own_dtype, where, dtype)
    tokenizer = _read_tokenizer(checkpoint.folder)
    if weightless:
        model, unused = skeleton(config, DTYPES[compute], entries, str(checkpoint.folder))
    else:
        model, unused = _read_model(checkpoint.folder, where, DTYPES[compute])
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            check_finite(name, tensor, compute)
    _check_vocabulary(tokenizer, model, checkpoint.folder)
    text = config.get_text_config()
    info = ModelInfo(
        name=source.name,
        source=source.kind,
        hub_id=source.hub_id,
        revision=checkpoint.revision,
        architecture=type(model).__name__,
        weights_sha256=weights.weights_sha256(entries),
        weight_dtype=own_dtype,
        compute_dtype=compute,
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab_size=_embedding_rows(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tied_embeddings=_tied(model),
        context_length=_context_length(text, checkpoint.folder),
        notes=(*checkpoint.notes, *unused),
    )
    return LoadedModel(model, tokenizer, info, checkpoint.folder, checkpoint.warnings)


def check_device(name: str) -> torch.device:
    """The torch device of that name.

    Raises:
        UsageError: there is no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"Unknown device '{name}'; say cpu, cuda or cuda:0.") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"qeval does not run on '{name}'; say cpu, cuda or cuda:0.")
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        count = torch.cuda.device_count()
        raise UsageError(f"--device {name}: this machine has {count or 'no'} CUDA devices that torch can use; say cpu.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: torch can't use one here; say cpu.")
    return device


def checkpoint_of(source: ModelSource) -> Checkpoint:
    """The folder that `source` stands for, fetched or converted when need be.

    Raises:
        UsageError, QevalError: as the places it may come from.
    """
    match source.kind:
        case "hub":
            assert source.hub_id is not None
            found = fetch(source.hub_id, source.revision, source.inside)
            if found.part.form != "gguf":
                return Checkpoint(found.path, found.commit, (), found.warnings)
            folder = converted(found.path)
            return Checkpoint(folder, found.commit, cache.read_notes(folder), found.warnings)
        case "folder":
            assert source.path is not None
            return Checkpoint(source.path, None, ())
        case "gguf":
            assert source.path is not None
            folder = converted(source.path)
        case "demo":
            folder = demo_folder()
    return Checkpoint(folder, None, cache.read_notes(folder))


def _read_config(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"'{folder}' is no model folder: there is no config.json in it.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        with quiet():
            config = AutoConfig.from_pretrained(folder, **_LOCAL)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise UsageError(f"'{path}' can't be used: {_reason(error)}.") from error
    check_config(config, path)
    beside = (folder / "hf_quant_config.json").is_file()  # Model Optimizer's, of which config.json may say nothing
    if "quantization_config" in raw or beside:
        method = raw.get("quantization_config", {}).get("quant_method", "modelopt" if beside else "unknown")
        raise UsageError(f"'{folder}' is quantized already ({method}); the baseline must be the float model.")
    return config


def _compute_dtype(own: str, device: torch.device, asked: str | None) -> str:
    if asked is None:
        return "float32" if device.type == "cpu" or own not in DTYPES else own
    if asked not in DTYPES:
        raise unknown("dtype", asked, DTYPES)
    return asked


def _read_tokenizer(folder: Path) -> Any:
    if not any(folder.glob("tokenizer*")) and not (folder / "vocab.json").is_file():
        raise UsageError(f"'{folder}' has no tokenizer: neither tokenizer.json nor tokenizer.model is in it.")
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, **_LOCAL)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UsageError(f"The tokenizer in '{folder}' can't be read: {_reason(error)}.") from error


def _read_model(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """The model, and a note on tensors of the checkpoint that it does not use."""
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                device_map={"": device},
                use_safetensors=True,
                output_loading_info=True,
                **_LOCAL,
            )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, AttributeError) as error:
        why = _first_line(error)
        if _MISMATCH in why:
            why = "the shapes of its tensors are not those that its config.json asks for"
        raise UsageError(f"'{folder}' can't be loaded: {why}.") from error
    weights.check_complete(report["missing_keys"], str(folder))
    unused = sorted(report["unexpected_keys"])
    notes = [f"The model does not use some tensors of the checkpoint: {weights.listed(unused)}."] if unused else []
    return model.eval().requires_grad_(False), notes


def check_finite(name: str, tensor: torch.Tensor, compute: str) -> None:
    """Refuse a weight that holds values that are no numbers, in the type that it is computed in.

    Raises:
        UsageError: it names the weight.
    """
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise UsageError(
            f"The weight {name} holds {bad} values that are not finite (as {compute}); the checkpoint is broken, "
            "or its values do not fit that dtype."
        )


def _check_vocabulary(tokenizer: Any, model: Any, folder: Path) -> None:
    largest = max(tokenizer.get_vocab().values(), default=-1)
    rows = _embedding_rows(model)
    if largest < 0:
        raise UsageError(f"The tokenizer in '{folder}' has an empty vocabulary.")
    if largest >= rows:
        raise UsageError(
            f"The tokenizer in '{folder}' has ids up to {largest}, but the embedding has {rows} rows: "
            "it belongs to another model."
        )


def _embedding_rows(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _context_length(config: Any, folder: Path) -> int:
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int):
        raise UsageError(f"The config in '{folder}' names no context length (max_position_embeddings).")
    return length


def _reason(error: BaseException) -> str:
    """Why transformers refuses a file: its first line, save where it asks to run what was downloaded."""
    if "custom code" in str(error):
        return (
            "it needs Python code from its own repository, and qeval runs none; take a checkpoint whose architecture "
            "transformers has"
        )
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
    return next((line.rstrip(".") for line in lines if line), type(error).__name__)

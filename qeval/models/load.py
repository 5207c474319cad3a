"""From a source to a model that runs, with everything about it checked before it is returned."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qeval.errors import UsageError, unknown
from qeval.models.checkpoint import cache, weights
from qeval.models.checkpoint.fit import Fit, check_fit
from qeval.models.checkpoint.meta_model import build_meta_model
from qeval.models.demo import demo_folder
from qeval.models.device import check_device, require_room
from qeval.models.gguf.convert import convert_gguf
from qeval.models.hub.fetch import fetch
from qeval.models.info import LoadedModel, ModelInfo, SourceKind
from qeval.models.mxfp4 import convert_mxfp4, is_mxfp4
from qeval.models.silence_transformers import transformers_errors
from qeval.models.source import ModelSource
from qeval.models.structure.supported import check_model_type, check_supported, context_length
from qeval.models.structure.trace import text_config
from qeval.models.trust import name_implementations, read_settings
from qeval.models.vocabulary import check_vocabulary, read_tokenizer

COMPUTE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_QUANTIZATION = ("quantization_config", "compression_config")
_NOT_FOLLOWED = ("quantization_config", "transformers_weights")
"""What transformers would follow in a configuration: a `null` that it takes for a quantizer, other files of weights."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json, safetensors and a tokenizer; `revision` is the hub's commit.

    `notes` belong to the model, `warnings` to how it was had today.
    """

    folder: Path
    revision: str | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def load_model(
    source: ModelSource, *, device: str = "cpu", dtype: str | None = None, weightless: bool = False
) -> LoadedModel:
    """Load the model of `source` on `device`, in eval mode, without gradients.

    On the CPU products in half precision are hundreds of times slower than in float32, which computes with exactly the
    fp16 or bf16 weights of the checkpoint.

    Args:
        source: Where the model comes from.
        device: Where it is computed, by torch's name.
        dtype: What it is computed in; None: the checkpoint's own type, but float32 on the CPU.
        weightless: Whether no weights are read into memory: whoever runs the model reads them from the folder.

    Raises:
        UsageError: One sentence for whatever is wrong with the checkpoint, the device or the dtype.
        QevalError: A download failed or the cache can't be written.
    """
    where = check_device(device)
    checkpoint = checkpoint_of(source)
    config = read_config(checkpoint.folder)
    files = weights.weight_files(checkpoint.folder)
    entries = weights.read_entries(files)
    own_dtype = weights.main_dtype(entries)
    compute = compute_dtype_of(own_dtype, where, dtype)
    if not weightless:
        require_room(where, entries, COMPUTE_DTYPES[compute].itemsize)

    tokenizer = read_tokenizer(checkpoint.folder)
    if weightless:
        model, notes = build_meta_model(config, COMPUTE_DTYPES[compute], entries, str(checkpoint.folder))
    else:
        fit = check_fit(config, entries, str(checkpoint.folder))
        model, notes = _read_model(checkpoint.folder, files, config, where, COMPUTE_DTYPES[compute], fit), fit.notes
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            check_finite(name, tensor, compute)

    notes = (
        *notes,
        *check_vocabulary(tokenizer, embedding_rows(model), checkpoint.folder),
        *_adapter_notes(checkpoint.folder),
    )

    info = model_info(
        model,
        where=checkpoint.folder / "config.json",
        name=source.name,
        source=source.kind,
        hub_id=source.hub_id,
        revision=checkpoint.revision,
        weights_sha256=weights.weights_sha256(entries),
        weight_dtype=own_dtype,
        compute_dtype=compute,
        notes=(*checkpoint.notes, *notes),
    )
    return LoadedModel(model, tokenizer, info, checkpoint.folder, checkpoint.warnings)


def model_info(
    model: Any,
    *,
    where: Path | str,
    name: str,
    source: SourceKind,
    weights_sha256: str,
    weight_dtype: str,
    compute_dtype: str,
    hub_id: str | None = None,
    revision: str | None = None,
    notes: tuple[str, ...] = (),
) -> ModelInfo:
    """Return what is known of a loaded model: its shape from itself, the rest as the arguments say.

    Raises:
        UsageError: Its configuration, which messages call `where`, names no context length.
    """
    text = text_config(model)
    return ModelInfo(
        name=name,
        source=source,
        hub_id=hub_id,
        revision=revision,
        architecture=type(model).__name__,
        weights_sha256=weights_sha256,
        weight_dtype=weight_dtype,
        compute_dtype=compute_dtype,
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab_size=embedding_rows(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tied_embeddings=_is_tied(model),
        context_length=context_length(text, where),
        notes=notes,
    )


def checkpoint_of(source: ModelSource) -> Checkpoint:
    """Return the folder that `source` stands for, fetched or converted when need be.

    Raises:
        UsageError, QevalError: As the places it may come from.
    """
    match source.kind:
        case "hub":
            assert source.hub_id is not None
            fetched = fetch(source.hub_id, source.revision, source.inside)
            if fetched.part.form != "gguf":
                return _float_checkpoint(fetched.path, fetched.commit, fetched.warnings)
            folder = convert_gguf(fetched.path)
            return Checkpoint(folder, fetched.commit, cache.read_notes(folder), fetched.warnings)
        case "folder":
            assert source.path is not None
            return _float_checkpoint(source.path, None)
        case "gguf":
            assert source.path is not None
            folder = convert_gguf(source.path)
        case "demo":
            folder = demo_folder()
    return Checkpoint(folder, None, cache.read_notes(folder))


def _float_checkpoint(folder: Path, revision: str | None, warnings: tuple[str, ...] = ()) -> Checkpoint:
    """Return a folder of safetensors as a checkpoint; one of MXFP4, as gpt-oss is published, is dequantized."""
    if (folder / "config.json").is_file() and is_mxfp4(read_settings(folder)):
        folder = convert_mxfp4(folder)
        return Checkpoint(folder, revision, cache.read_notes(folder), warnings)
    return Checkpoint(folder, revision, (), warnings)


def read_config(folder: Path) -> Any:
    """Return a float model's configuration, without what it says of the code that runs.

    Raises:
        UsageError: There is none, it names code, has sizes that no model has, or is a quantized or unknown model's.
    """
    path = folder / "config.json"
    if not path.is_file() and (folder / weights.ADAPTER).is_file():
        raise UsageError(weights.adapter_refusal(folder))
    raw = read_settings(folder)
    check_model_type(raw, path)
    with transformers_errors(f"'{path}' can't be used"):
        config = name_implementations(AutoConfig.from_pretrained(folder, **_LOCAL))
    check_supported(config, path)
    if (method := _quantized_by(raw, folder)) is not None:
        raise UsageError(f"'{folder}' is quantized already ({method}); the baseline must be the float model.")
    for part in (config, config.get_text_config()):
        for name in _NOT_FOLLOWED:
            if hasattr(part, name):
                delattr(part, name)
    return config


def _quantized_by(raw: Mapping[str, Any], folder: Path) -> str | None:
    """Return what a folder says that its weights were quantized by; None for floats."""
    if (method := quantized_by(raw)) is not None:
        return method
    return "modelopt" if (folder / "hf_quant_config.json").is_file() else None  # config.json may say nothing of it


def quantized_by(raw: Mapping[str, Any]) -> str | None:
    """Return what a configuration says that its weights were quantized by; None for floats, which `null` says too."""
    parts = [raw, *(part for part in raw.values() if isinstance(part, dict))]  # a text_config may say it too
    sections = (part[name] for part in parts for name in _QUANTIZATION if part.get(name) is not None)
    if (first := next(sections, None)) is not None:
        return str(first.get("quant_method", "unknown")) if isinstance(first, dict) else "unknown"
    return None


def compute_dtype_of(weight_dtype: str, device: torch.device, wanted: str | None) -> str:
    """Return what a model is computed in: the type asked for, else its own, but float32 on the CPU.

    Args:
        weight_dtype: The checkpoint's own, by torch's name.
        device: Where the model is computed.
        wanted: What was asked for, or None.

    Raises:
        UsageError: There is no such type.
    """
    if wanted is None:
        return "float32" if device.type == "cpu" or weight_dtype not in COMPUTE_DTYPES else weight_dtype
    if wanted not in COMPUTE_DTYPES:
        raise unknown("dtype", wanted, COMPUTE_DTYPES)
    return wanted


def _read_model(
    folder: Path, files: Sequence[Path], config: Any, device: torch.device, dtype: torch.dtype, fit: Fit
) -> Any:
    """Return the model of a configuration with the weights of these files alone.

    transformers looks for weights, indexes and adapters by itself, and may find others than those that were checked
    and hashed: it is given a folder of links to these.
    """
    with TemporaryDirectory(prefix="qeval-weights-") as alone, transformers_errors(f"'{folder}' can't be loaded"):
        (Path(alone) / "config.json").symlink_to((folder / "config.json").resolve())
        _link(files, Path(alone))
        model, report = AutoModelForCausalLM.from_pretrained(
            alone,
            config=config,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
            **_LOCAL,
        )

    weights.check_complete(report["missing_keys"], str(folder))
    if fit.untied and _is_tied(model):
        raise UsageError(f"'{folder}' can't be loaded: transformers ties its head, which is stored with other values.")
    return model.eval().requires_grad_(False)


def _link(files: Sequence[Path], folder: Path) -> None:
    """Put links to weight files into a folder, by the names that transformers looks for."""
    if len(files) == 1:
        (folder / weights.SINGLE).symlink_to(files[0].resolve())
        return
    for file in files:
        (folder / file.name).symlink_to(file.resolve())
    placed = {entry.name: entry.path.name for entry in weights.read_entries(files)}
    (folder / weights.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}), encoding="utf-8")


def _adapter_notes(folder: Path) -> list[str]:
    """Return sentences on what lies beside the weights and is not applied."""
    if not (folder / weights.ADAPTER).is_file():
        return []
    return [
        f"An adapter lies beside the weights ({weights.ADAPTER}): it is not applied, the weights are taken as stored."
    ]


def check_finite(name: str, tensor: torch.Tensor, compute: str) -> None:
    """Refuse a weight that holds values that are no numbers, in the type that it is computed in.

    Raises:
        UsageError: It names the weight.
    """
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise UsageError(
            f"The weight {name} holds {bad} values that are not finite (as {compute}); the checkpoint is broken, "
            "or its values do not fit that dtype."
        )


def embedding_rows(model: Any) -> int:
    """Return how many ids a model has an embedding for."""
    return int(model.get_input_embeddings().weight.shape[0])


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight

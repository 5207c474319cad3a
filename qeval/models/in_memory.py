"""A model that the caller has loaded already: run as it lies in memory, and left as it was.

What qeval changes of a model, it changes of a copy of the modules: hooks, modes, types of norms. The copy's parameters
are the caller's own memory, so that no second set of weights is held; variants are written over them one at a time,
and `backends.torch` puts the originals back bit for bit. Where the caller's type is not what is computed in, the copy
has weights of its own.
"""

import copy
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qeval.arithmetic import dtype_name
from qeval.errors import UsageError
from qeval.models.checkpoint.weights import hash_header
from qeval.models.info import LoadedModel, needs_folder
from qeval.models.load import COMPUTE_DTYPES, check_finite, compute_dtype_of, embedding_rows, model_info, quantized_by
from qeval.models.structure.supported import check_supported
from qeval.models.vocabulary import check_vocabulary

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""How safetensors calls torch's types, so that a model and its saved folder have one hash."""


@dataclass(frozen=True, eq=False)
class MemoryModel:
    """A transformers causal language model and its tokenizer, as the caller loaded them; whole on one device."""

    model: Any
    tokenizer: Any

    @property
    def name(self) -> str:
        """The model's name: the last part of where it came from, else its class."""
        return Path(str(self.model.name_or_path or "")).name or type(self.model).__name__

    @property
    def device(self) -> torch.device:
        """The device that the model lies on."""
        device: torch.device = self.model.device
        return device

    def check_fits(self, backends: Sequence[str], *, stream: bool, processes: str | None) -> None:
        """Refuse what needs a folder, before any work.

        Args:
            backends: Names of the backends that score.
            stream: Whether the model is to be read by layers.
            processes: The flag by which other processes load the model, if there is one.

        Raises:
            UsageError: It names the flag, and says to save the model.
        """
        others = [name for name in backends if name != "torch"]
        flags = ["--stream"] if stream else []
        flags += [f"--backend {','.join(others)}"] if others else []
        flags += [processes] if processes else []
        if flags:
            raise UsageError(needs_folder(flags[0]))

    def load(self, compute: str | None) -> LoadedModel:
        """Return the model ready to be scored: a copy of its modules on the caller's weights.

        Args:
            compute: What it is computed in, by torch's name; None: float32 on the CPU, elsewhere its own type.

        Raises:
            UsageError: It can't be scored, or holds values that are not finite.
        """
        tensors = stored_tensors(self.model)
        weight_dtype = _main_dtype(tensors)
        dtype = compute_dtype_of(weight_dtype, self.device, compute)

        model = _shared_copy(self.model, COMPUTE_DTYPES[dtype]).eval()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            check_finite(name, tensor, dtype)

        notes = check_vocabulary(self.tokenizer, embedding_rows(model), self.name)
        info = model_info(
            model,
            where=self.name,
            name=self.name,
            source="memory",
            weights_sha256=tensors_sha256(tensors),
            weight_dtype=weight_dtype,
            compute_dtype=dtype,
            notes=tuple(notes),
        )
        return LoadedModel(model, self.tokenizer, info, None, config=self.config_text())

    def weights_sha256(self) -> str:
        """Return the hash of the weights as they are now, in hex."""
        return tensors_sha256(stored_tensors(self.model))

    def config_text(self) -> str:
        """Return the configuration as `save_pretrained` would write it."""
        config = copy.deepcopy(self.model.config)
        config.architectures = [type(self.model).__name__]
        config.dtype = self.model.dtype
        text: str = config.to_json_string()
        return text


def memory_model(model: Any, tokenizer: Any, *, revision: str | None = None, device: str = "auto") -> MemoryModel:
    """Return a model that the caller loaded, checked.

    Args:
        model: A transformers causal language model in float, whole on one device.
        tokenizer: Its tokenizer.
        revision: What the caller gave as a revision; a loaded model has none.
        device: Where the caller wants it: `auto`, or where it lies.

    Raises:
        UsageError: It is no such model, lacks its tokenizer, or is to be elsewhere.
    """
    if not isinstance(model, PreTrainedModel):
        hint = "; leave tokenizer out" if isinstance(model, str | Path) else ""
        raise UsageError(
            f"tokenizer goes with a transformers model that is loaded already, and model is a {type(model).__name__}"
            f"{hint}; a model is such a model, or a name, a hub id or a path."
        )
    if tokenizer is None:
        raise UsageError("A model that is loaded already needs its tokenizer: give tokenizer=.")
    if revision is not None:
        raise UsageError(f"--revision {revision} needs a model on the hub; this one is in memory. Leave it out.")

    memory = MemoryModel(model, tokenizer)
    check_supported(model.config, memory.name)
    if (method := quantized_by(model.config.to_dict())) is not None:
        raise UsageError(f"'{memory.name}' is quantized already ({method}); the baseline must be the float model.")
    _check_device(model, device)
    return memory


def stored_tensors(model: Any) -> dict[str, Tensor]:
    """Return the tensors that `save_pretrained` writes, by name: all of the state but what is tied to others."""
    state: dict[str, Tensor] = model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        name: tensor
        for name, tensor in state.items()
        if name not in tied or state[tied[name]].data_ptr() != tensor.data_ptr()
    }


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """Return the sha256 over (name, dtype, shape, bytes) in the order of the names, as `weights.weights_sha256`."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(hash_header(name, _NAMES[tensor.dtype], tensor.shape))
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        sha.update(flat.cpu().numpy().data)
    return sha.hexdigest()


def _main_dtype(tensors: dict[str, Tensor]) -> str:
    """Return the float type of most parameters, by torch's name."""
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            counts[dtype_name(tensor.dtype)] += tensor.numel()
    return counts.most_common(1)[0][0]


def _shared_copy(model: Any, dtype: torch.dtype) -> Any:
    """Return a copy of the modules on the model's own parameters, or on copies of those of another type."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        value = parameter.detach()
        memo[id(parameter)] = nn.Parameter(value.to(dtype) if value.is_floating_point() else value, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(model, memo)


def _check_device(model: Any, device: str) -> None:
    """Refuse a model that is spread over devices, or that is to be elsewhere than it is."""
    places = sorted({str(tensor.device) for tensor in (*model.parameters(), *model.buffers())})
    if len(places) > 1 or places == ["meta"]:
        raise UsageError(f"The model's weights lie on {', '.join(places)}; load it whole on one device.")
    if device not in ("auto", places[0], places[0].partition(":")[0]):
        raise UsageError(f"--device {device}: the loaded model lies on {places[0]}; move it first, or leave it out.")

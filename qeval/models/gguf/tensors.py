"""A GGUF file's tensors as a transformers model's: named, and turned back from the order that llama.cpp keeps them in.

Every tensor of the file goes into the model, is read elsewhere (rotary factors), or is refused by its name.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from torch import Tensor

from qeval.errors import UsageError
from qeval.models.checkpoint.weights import check_complete, shorten_list
from qeval.models.gguf.rope import TENSORS
from qeval.models.gguf.settings import Metadata

_EXPERTS = re.compile(r"(?P<layer>.*)\.experts\.gate_up_proj$")
_SKIPPED = ("attn_rot_embd", "rope_freqs")
"""Rotary frequencies that older converters wrote for each layer: what the base gives anyway."""
_PLUS_ONE = ("gemma", "gemma2", "gemma3", "nemotron")
"""Architectures whose norms are kept as 1 + weight."""
_CONV1D = ("attn_qkv.weight", "ffn_down.weight", "ffn_up.weight", "attn_output.weight")


class NameMap:
    """The names that a file of an architecture gives a model's parameters."""

    def __init__(self, architecture: str, layers: int, prefix: str = "") -> None:
        """`prefix`: what the base model's names begin with, which some architectures leave out.

        Raises:
            UsageError: The gguf package does not know the architecture.
        """
        known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        if architecture not in known:
            raise UsageError(f"The GGUF architecture '{architecture}' is not known to the gguf package.")
        self._map, self._prefix = gguf.get_tensor_name_map(known[architecture], layers), prefix

    def names(self, parameter: str) -> tuple[str, ...]:
        """Return the tensors that hold a parameter: one, a gate's and an up projection's, or none."""
        if match := _EXPERTS.match(parameter):
            down = self._map.get_name(f"{match['layer']}.experts.down_proj")
            base = down.removesuffix("ffn_down_exps") if down else None
            return (f"{base}ffn_gate_exps.weight", f"{base}ffn_up_exps.weight") if base else ()
        stem, dot, leaf = parameter.rpartition(".")
        if leaf not in ("weight", "bias"):
            stem, dot, leaf = parameter, ".", "weight"
        base = self._map.get_name(stem) or self._map.get_name(stem.removeprefix(self._prefix))
        return (f"{base}{dot}{leaf}",) if base else ()


def state_of(reader: GGUFReader, metadata: Metadata, model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return every parameter and buffer of a model, out of a file's tensors; vectors stay in fp32 until they are saved.

    Args:
        reader: The open file.
        metadata: What it says of itself.
        model: The transformers model of its configuration, on the meta device.
        dtype: What matrices are kept in.

    Raises:
        UsageError: A tensor of the file is of no use, of another shape or type, or one is missing.
    """
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = NameMap(metadata.architecture, model.config.num_hidden_layers, f"{model.base_model_prefix}.")
    places = {name: names.names(name) for name in _parameter_names(model)}
    _check_used(metadata, tensors, places)

    # all but biases must be there
    missing = [n for n, sources in places.items() if not sources or not all(each in tensors for each in sources)]
    check_complete([n for n in missing if not n.endswith(".bias")], str(metadata.path))

    empty = model.state_dict()
    state: dict[str, Tensor] = {}
    for name, sources in places.items():
        if name in missing:  # a bias that is not there is zero
            state[name] = torch.zeros(empty[name].shape, dtype=dtype)
            continue
        parts = [_model_values(tensors[each], metadata, model.config) for each in sources]
        whole = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        state[name] = _fit_shape(metadata, name, whole, empty[name]).to(dtype)
    return state


def _parameter_names(model: Any) -> Iterator[str]:
    """Yield the names of parameters and kept buffers; of tied ones the first."""
    yield from (name for name, _ in model.named_parameters())
    saved = model.state_dict().keys()
    yield from (name for name, _ in model.named_buffers() if name in saved)


def _check_used(metadata: Metadata, tensors: Mapping[str, ReaderTensor], places: Mapping[str, tuple[str, ...]]) -> None:
    used = {each for sources in places.values() for each in sources} | {*TENSORS}
    left = sorted(name for name in tensors if name not in used and name.split(".")[-2] not in _SKIPPED)
    if left:
        raise metadata.error(
            f"holds tensors that are not read for the architecture {metadata.architecture} of "
            f"{metadata.keys.get('block_count')} layers: {shorten_list(left)}"
        )


def _fit_shape(metadata: Metadata, name: str, values: np.ndarray, empty: Tensor) -> Tensor:
    if values.shape != tuple(empty.shape) and values.size == empty.numel() and 1 in empty.shape:
        values = values.reshape(tuple(empty.shape))  # a shared expert's gate is a vector in files
    if values.shape != tuple(empty.shape):
        raise metadata.error(f"holds {name} as {list(values.shape)}, its metadata asks for {list(empty.shape)}")
    return torch.from_numpy(np.array(values, order="C"))  # a copy: what the file maps can't be written


def _model_values(tensor: ReaderTensor, metadata: Metadata, config: Any) -> np.ndarray:
    """Return a tensor's values as the model's own code keeps them, fp32."""
    try:
        values: np.ndarray = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise metadata.error(f"holds {tensor.name} as {kind}, which the gguf package can't dequantize") from error
    for matches, change in _CHANGES.get(metadata.architecture, ()):
        if matches in tensor.name:
            values = change(values, config)
    if metadata.architecture in _PLUS_ONE and tensor.name.endswith("norm.weight"):
        values = values - 1
    if metadata.architecture == "gpt2" and tensor.name.endswith(_CONV1D) and tensor.name != "output.weight":
        values = values.T
    return values


def _pairs_to_halves(heads: str) -> Callable[[np.ndarray, Any], np.ndarray]:
    """Return what reorders rows of queries or keys.

    llama.cpp rotates pairs side by side, transformers a head's two halves.
    """

    def change(values: np.ndarray, config: Any) -> np.ndarray:
        count = int(getattr(config, heads))
        paired = values.reshape(count, len(values) // count // 2, 2, *values.shape[1:])
        return paired.swapaxes(1, 2).reshape(values.shape)

    return change


def _falcon_rows(values: np.ndarray, config: Any) -> np.ndarray:
    """Return fused queries, keys and values in the model's order.

    Files hold all of each; the model has them group by group where a group has keys of its own.
    """
    if not config.new_decoder_architecture:
        return values
    groups, heads = config.num_kv_heads, config.num_attention_heads
    size = len(values) // (heads + 2 * groups)
    query, key, value = np.split(values, [heads * size, (heads + groups) * size])
    rest = values.shape[1:]
    parts = [each.reshape(groups, -1, size, *rest) for each in (query, key, value)]
    return np.concatenate(parts, axis=1).reshape(values.shape)


_CHANGES: Mapping[str, tuple[tuple[str, Callable[[np.ndarray, Any], np.ndarray]], ...]] = {
    "llama": (
        (".attn_q.", _pairs_to_halves("num_attention_heads")),
        (".attn_k.", _pairs_to_halves("num_key_value_heads")),
    ),
    "falcon": ((".attn_qkv.", _falcon_rows),),
}
"""By architecture: what is done to the tensors whose names hold a part."""

"""A Llama-family model, or a variant of it, as a GGUF file that llama.cpp runs, written through the `gguf` package.

A quantized matrix keeps its codes wherever a GGUF type spells its grid: 4-bit symmetric ones as Q4_0, other grids of
up to 4 bits as Q4_1, 5-bit ones as Q5_0 and Q5_1, 8-bit symmetric ones as Q8_0, in blocks of 32 that share a coarser
block's scale by repetition. Those types hold scales (and the offsets of Q4_1 and Q5_1) in fp16, so they are rounded to
that: by 0.05 % at most, which moves no code; `check_exact` refuses a variant for which that changes a value. Every
other matrix is written dequantized. Token ids are all that an engine here feeds, so a tokenizer is written only where
it is asked for.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qeval import __version__
from qeval.backends.llamacpp.gguf_vocabulary import Vocabulary
from qeval.errors import QevalError, UsageError
from qeval.identity import digest
from qeval.models.checkpoint.cache import build_once
from qeval.models.gguf.rope import llama3_factors, wavelengths
from qeval.models.info import LoadedModel
from qeval.quant.grid import Grid, WeightGrid
from qeval.quant.qweight import QWeight
from qeval.quant.variant import Variant
from qeval.types import FloatType

GGUF_VERSION = 3
"""Raise it when the same variant is written otherwise."""

_FAMILY = ("LlamaForCausalLM", "MistralForCausalLM")
"""The architectures that llama.cpp knows as `llama`."""
_BLOCK = 32
_FITS = "take rtn:int4-g32, rtn:int8-g32-signed or gptq:int4-g32-noclip of a checkpoint in fp16 or bf16"
_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_Types = gguf.GGMLQuantizationType


def written(loaded: LoadedModel, variant: Variant | None, precision: FloatType) -> Path:
    """Return the GGUF file of a variant, or of the float model: written once and kept in the cache.

    Raises:
        UsageError: the model is of another family, or the variant is one that a GGUF can't hold.
        QevalError: the cache can't be written.
    """
    check_family(loaded)
    made_from = {
        "gguf": GGUF_VERSION, "weights": loaded.info.weights_sha256, "variant": variant.key if variant else None,
        "precision": precision,
    }  # fmt: skip
    name, file = f"gguf-variant-{digest(made_from)[:16]}", "model.gguf"
    return build_once(name, (), lambda folder: write_gguf(loaded, variant, precision, folder / file)) / file


def check_family(loaded: LoadedModel) -> None:
    """Refuse what llama.cpp's `llama` graph does not compute.

    Raises:
        UsageError: it names the architecture, or what is unusual about it.
    """
    config, name = loaded.model.config, loaded.info.architecture
    if name not in _FAMILY:
        raise UsageError(
            f"qeval writes GGUF files of the Llama family ({', '.join(_FAMILY)}), not of {name}; make one with "
            "llama.cpp's convert_hf_to_gguf.py and give it as the variant."
        )
    if getattr(config, "sliding_window", None):
        raise UsageError(f"llama.cpp's llama graph has no sliding window, and this {name} has; leave llama.cpp out.")
    kind = _rope(config)["rope_type"]
    if kind not in ("default", "linear", "llama3"):
        raise UsageError(f"qeval writes no GGUF file of a model with rotary positions of type '{kind}'.")


def write_gguf(
    loaded: LoadedModel,
    variant: Variant | None,
    precision: FloatType,
    out: Path,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Write the file `out`; what is left in float is of type `precision`, norms and what it would round in fp32.

    Raises:
        UsageError: the variant scales a matrix's input, which no GGUF holds.
        QevalError: a tensor has no name in GGUF.
    """
    if variant is not None and variant.input_scales:
        raise UsageError(
            f"This variant scales the input of {next(iter(variant.input_scales))}, which a GGUF file can't say; "
            "leave llama.cpp out."
        )
    writer = gguf.GGUFWriter(out, "llama")
    _add_settings(writer, loaded)
    if vocabulary is None:
        writer.add_tokenizer_model("none")
    else:
        vocabulary.add_to(writer)
    for name, data, kind in _tensors(loaded, variant, _FLOATS[precision]):
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def to_gguf(weight: QWeight) -> tuple[NDArray[np.uint8], Any] | None:
    """Return the bytes [rows, blocks * bytes of a block] of a quantized matrix and their type; None where no type fits.

    Layouts: ggml's `block_q4_0` (scale; weight i and i + 16 in a byte), `block_q4_1` (an offset after the scale),
    `block_q5_0` and `block_q5_1` (after these the fifth bits, weight i's in bit i) and `block_q8_0`.
    """
    rows, columns = weight.codes.shape
    size, grid = weight.grid.block_size(columns), weight.grid
    if gguf_type(grid, columns) is None or not isinstance(grid, Grid):
        return None
    repeat = columns // _BLOCK if size == columns else size // _BLOCK
    codes = weight.codes.numpy().reshape(rows, -1, _BLOCK)
    scales = _spread(weight.scales, rows, repeat, codes.shape[1])
    if grid.symmetric and grid.bits == 8:
        return _joined(scales, (codes.astype(np.int16) - grid.zero).astype(np.int8).view(np.uint8)), _Types.Q8_0
    low = codes & np.uint8(0xF)
    packed = low[..., : _BLOCK // 2] | low[..., _BLOCK // 2 :] << np.uint8(4)
    if grid.bits == 5:
        packed = np.concatenate([np.packbits(codes >> 4, axis=-1, bitorder="little"), packed], axis=-1)
    if grid.symmetric and grid.bits in (4, 5):
        return _joined(scales, packed), gguf_type(grid, columns)
    zeros = torch.full_like(weight.scales, grid.zero) if weight.zeros is None else weight.zeros
    offsets = -scales * _spread(zeros.float(), rows, repeat, codes.shape[1])
    return _joined(np.concatenate([scales, offsets], axis=-1), packed), gguf_type(grid, columns)


def gguf_type(grid: WeightGrid, columns: int) -> Any | None:
    """Return the GGUF type that spells the codes of a grid for rows of so many weights; None where none does."""
    size = grid.block_size(columns)
    if not isinstance(grid, Grid) or columns % _BLOCK or (size % _BLOCK and size != columns):
        return None
    if grid.bits == 8:
        return _Types.Q8_0 if grid.symmetric else None
    if grid.bits == 5:
        return _Types.Q5_0 if grid.symmetric else _Types.Q5_1
    if grid.bits > 5:
        return None
    return _Types.Q4_0 if grid.symmetric and grid.bits == 4 else _Types.Q4_1


def check_gguf_grid(name: str, grid: WeightGrid, columns: int) -> None:
    """Refuse a grid that no GGUF type holds exactly, whatever the weights.

    Raises:
        UsageError: It names one that is held.
    """
    if gguf_type(grid, columns) is None:
        raise UsageError(f"No GGUF type spells {grid} for the {columns} weights of a row of {name}; {_FITS}.")
    if isinstance(grid, Grid) and grid.symmetric and grid.span != "signed":
        raise UsageError(
            f"GGUF's blocks hold their scales in fp16, which those of {grid} are not: its largest magnitude goes to "
            f"another code than -{grid.zero}; {_FITS}."
        )


def check_exact(variant: Variant) -> None:
    """Refuse a variant with a matrix that its GGUF type would change, in a scale or an offset.

    Raises:
        UsageError: It names the first, and what is held exactly.
    """
    for name, weight in variant.weights.items():
        encoded = to_gguf(weight)
        if encoded is None or not np.array_equal(gguf.dequantize(*encoded), weight.dequantize().numpy()):
            raise UsageError(
                f"The scales of {name} ({weight.grid}) are no fp16 numbers, which GGUF's blocks hold them in; {_FITS}."
            )


def _spread(values: Tensor, rows: int, repeat: int, blocks: int) -> NDArray[np.float32]:
    """Return one value for each block of 32, [rows, blocks, 1]."""
    each = values.expand(rows, -1).repeat_interleave(repeat, dim=1)[:, :blocks]
    return np.ascontiguousarray(each.unsqueeze(-1).numpy(), np.float32)


def _joined(halves: NDArray[np.float32], codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    head = np.ascontiguousarray(halves.astype(np.float16)).view(np.uint8)
    return np.concatenate([head, codes], axis=-1).reshape(len(codes), -1)


def _tensors(
    loaded: LoadedModel, variant: Variant | None, dtype: torch.dtype
) -> Iterator[tuple[str, NDArray[Any], Any]]:
    """Yield every tensor by its name in GGUF, with its bytes' type; a tied head is left out, as llama.cpp expects."""
    config = loaded.model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    weights: Mapping[str, QWeight] = variant.weights if variant else {}
    changed: Mapping[str, Tensor] = variant.floats if variant else {}
    floats = {**dict(loaded.model.named_parameters()), **changed}
    for name in dict.fromkeys([*floats, *weights]):
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if called is None:
            raise QevalError(f"GGUF has no name for {name}, so this model can't be written.")
        order = _row_order(name, config)
        found = to_gguf(_reordered(weights[name], order)) if name in weights else None
        if found is not None:
            yield called, *found
        else:
            tensor = weights[name].dequantize() if name in weights else floats[name]
            kept = (
                torch.float32
                if name in changed and not torch.equal(tensor.to(dtype).float(), tensor.float())
                else dtype
            )
            yield called, *_float(tensor if order is None else tensor[order], kept)
    rope = _rope(config)
    if rope["rope_type"] == "llama3":
        factors = llama3_factors(rope, wavelengths(rope["rope_theta"], _head_size(config)))
        yield "rope_freqs.weight", factors.astype(np.float32), _Types.F32


def _float(tensor: Tensor, dtype: torch.dtype) -> tuple[NDArray[Any], Any]:
    """Return a matrix in `dtype`, a vector in fp32."""
    values = tensor.detach().cpu().contiguous()
    if values.dim() == 1 or dtype == torch.float32:
        return values.float().numpy(), _Types.F32
    if dtype == torch.float16:
        return values.half().numpy(), _Types.F16
    return values.bfloat16().view(torch.uint8).numpy(), _Types.BF16


def _row_order(name: str, config: Any) -> Tensor | None:
    """Return the rows of queries and keys as llama.cpp turns them: pairs side by side, not a head's two halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return None
    size = _head_size(config)
    return torch.arange(heads * size).reshape(heads, 2, size // 2).transpose(1, 2).reshape(-1)


def _reordered(weight: QWeight, order: Tensor | None) -> QWeight:
    if order is None:
        return weight
    rows = len(weight.codes)
    scales, zeros = (
        part if part is None or len(part) != rows else part[order] for part in (weight.scales, weight.zeros)
    )
    assert scales is not None
    return replace(weight, codes=weight.codes[order], scales=scales, zeros=zeros)


def _add_settings(writer: Any, loaded: LoadedModel) -> None:
    config, size = loaded.model.config, _head_size(loaded.model.config)
    writer.add_name(f"{loaded.info.name} (written by qeval {__version__})")
    writer.add_vocab_size(loaded.info.vocab_size)
    writer.add_context_length(loaded.info.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = _rope(config)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: Any) -> dict[str, Any]:
    return {"rope_type": "default", **config.rope_parameters}

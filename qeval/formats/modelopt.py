"""NVIDIA Model Optimizer's checkpoints for Hugging Face (`export_hf_checkpoint`).

    weight [rows, columns] float8, int8     weight_scale: one, [rows], tiles [r, 1, c, 1], or a byte 2^(e-127) per block
    weight [rows / 2, columns] uint8        INT4: two rows a byte, the even one low, signed; weight_scale [rows, groups]
    weight [rows, columns / 2] uint8        FP4, the even column low: NVFP4 with weight_scale [rows, groups] in float8
                                            and weight_scale_2 of the whole, MXFP4 with bytes 2^(e-127)
    pre_quant_scale [columns]               by which the input is multiplied while running; mostly it is folded into
                                            the norm or the linear before, and then the file has none
    input_scale                             of activations: the size of a step; of NVFP4's, their largest over 448 * 6
    k_proj.k_scale, v_proj.v_scale          of the cache, likewise

Source: `to_quantized_weight`, `pack_int4_in_uint8` of modelopt/torch/export/quant_utils.py, `NVFP4QTensor` (0.47).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qeval.arithmetic import dtype_name
from qeval.errors import UsageError
from qeval.formats.base import (
    CheckpointFormat,
    Config,
    DecodedMatrix,
    Module,
    Values,
    fp8_size_bits,
    group_size,
    on_grid,
    read_bits,
)
from qeval.formats.floats import FP8, decode_e8m0, expand_scales, fp4
from qeval.formats.rounding import TensorRounding, no_format, rounding_of, rounding_to
from qeval.quant.scheme import PartName

_WEIGHTS_ALONE = ("W4A16_AWQ", "W4A16_NVFP4", "W8A16", "FP8_PB_WO")
_READ = (
    *_WEIGHTS_ALONE, "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "NVFP4_AWQ", "MXFP4", "MXFP8", "W8A8_SQ_PER_CHANNEL",
    "W4A8_AWQ", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8",
)  # fmt: skip
_MIXED = "MIXED_PRECISION"
_STATIC_FP8 = rounding_to("fp8-tensor", "activations", scale="input_scale")
_NVFP4 = rounding_to("nvfp4", "activations", scale="input_scale")
_ACTIVATIONS: Mapping[str, TensorRounding] = {
    "FP8": _STATIC_FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": rounding_to("fp8-token", "activations"),
    "NVFP4": _NVFP4,
    "NVFP4_AWQ": _NVFP4,
    "MXFP4": rounding_to("mxfp4-rceil", "activations"),
    "MXFP8": rounding_to("mxfp8-rceil", "activations"),
    "W8A8_SQ_PER_CHANNEL": rounding_to("int8-tensor", "activations", scale="input_scale"),
    "W4A8_AWQ": _STATIC_FP8,
    "W4A8_NVFP4_FP8": _STATIC_FP8,
    "W4A8_MXFP4_FP8": _STATIC_FP8,
}
"""The formats of inputs by algorithm; those of `_WEIGHTS_ALONE` have none."""
_CACHES = {"FP8": "fp8-tensor", "INT8": "int8-tensor", "NVFP4": "nvfp4"}


def _decode(module: Module, config: Config) -> DecodedMatrix:
    """Decode the integers of a linear, or the values of its small floats."""
    weight = module.part("weight", shape=(None, None))
    if weight.dtype in FP8:
        return _fp8(module, module.part("weight", shape=(module.rows, module.columns)))
    if weight.dtype == torch.int8:
        codes = (module.part("weight", shape=(module.rows, module.columns)).to(torch.int16) + 128).to(torch.uint8)
        return on_grid(codes, module.part("weight_scale").reshape(module.rows, 1), None, 8, module.columns)
    if weight.dtype != torch.uint8:
        raise module.error(f"has scales beside a weight in {dtype_name(weight.dtype)}")
    return _int4(module, weight, config) if weight.shape[1] == module.columns else _fp4(module)


def _notes(config: Config) -> tuple[str, ...]:
    """Return the algorithms.

    Raises:
        UsageError: An algorithm that is not read.
    """
    named = _algorithms(config)
    if other := [name for name in named if name.upper() not in _READ]:
        raise UsageError(f"Model Optimizer's '{other[0]}' is not read; these are: {', '.join(_READ)}.")
    return (", ".join(named),)


def _inputs(name: str, config: Config) -> TensorRounding | None:
    """Return how the inputs of a linear are rounded: by its own algorithm where they are mixed."""
    whole = str(config.get("quant_algo"))
    layers: Mapping[str, Any] = config.get("quantized_layers") or {}
    algorithm = str(layers.get(name, {}).get("quant_algo")) if whole == _MIXED else whole
    if algorithm.upper() == "MXFP4" and _says_weights_alone(config):
        return None
    return _ACTIVATIONS.get(algorithm.upper())


def _says_weights_alone(config: Config) -> bool:
    """Return whether the configuration has groups, and none of them names activations: MXFP4 means either."""
    groups: Mapping[str, Any] = config.get("config_groups") or {}
    return bool(groups) and not any(group.get("input_activations") for group in groups.values())


def _caches(config: Config, part: PartName) -> TensorRounding | None:
    scale = f"{part[0]}_scale"
    algorithm = str(config.get("kv_cache_quant_algo") or "").upper()
    if algorithm in _CACHES:
        found = rounding_to(_CACHES[algorithm], part, scale=scale)
    elif algorithm:
        return no_format(algorithm)
    elif arguments := config.get("kv_cache_scheme"):
        is_nvfp4 = arguments.get("num_bits") == 4 and arguments.get("type") == "float"
        found = rounding_to("nvfp4", part, scale=scale) if is_nvfp4 else rounding_of(arguments, part, scale)
    else:
        return None
    return replace(found, default=1.0) if found.how and found.how.kind == "fp8" else found


def _algorithms(config: Config) -> list[str]:
    whole = str(config.get("quant_algo"))
    if whole != _MIXED:
        return [whole]
    layers: Mapping[str, Any] = config.get("quantized_layers") or {}
    return sorted({str(layer.get("quant_algo")) for layer in layers.values()})


def _fp8(module: Module, weight: Tensor) -> Values:
    scales = module.part("weight_scale")
    micro = scales.dtype == torch.uint8
    factors = expand_scales(decode_e8m0(scales) if micro else scales, module.rows, module.columns)
    return Values(weight.float() * factors, "mxfp8" if micro else "fp8 e4m3", fp8_size_bits(weight, scales))


def _int4(module: Module, packed: Tensor, config: Config) -> DecodedMatrix:
    """Decode signed codes; where there is a second scale (W4A8), values that were rounded to float8 once more."""
    columns_first = module.part("weight", shape=(module.rows // 2, module.columns)).t().contiguous()
    codes = read_bits(columns_first, 4, module.rows).t() ^ 8
    scales = module.part("weight_scale", shape=(module.rows, None))
    size = group_size(module, scales.shape[1], config.get("group_size"))
    read = on_grid(codes, scales, None, 4, size)
    second = module.parts.get("weight_scale_2")
    if second is None:
        return read
    values = (read.dequantize() / second.float()).to(torch.float8_e4m3fn).float() * second.float()
    return Values(values, f"int4 in blocks of {size}, then fp8 e4m3", 8 * packed.numel() + 32 * scales.numel())


def _fp4(module: Module) -> Values:
    packed = module.part("weight", shape=(module.rows, module.columns // 2))
    stored = module.part("weight_scale", shape=(module.rows, None))
    micro = stored.dtype == torch.uint8
    scales = decode_e8m0(stored) if micro else stored.float() * module.part("weight_scale_2").float().reshape(())
    values = fp4(packed) * expand_scales(scales, module.rows, module.columns)
    return Values(values, "mxfp4" if micro else "nvfp4", 8 * (packed.numel() + stored.numel()))


MODELOPT = CheckpointFormat(
    "Model Optimizer", ("weight_scale",), _decode, _notes, input_scale="pre_quant_scale", inputs=_inputs, caches=_caches
)

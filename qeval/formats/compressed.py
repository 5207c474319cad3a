"""compressed-tensors (llm-compressor, vLLM).

    weight_packed [rows, columns * bits / 32] int32   pack-quantized: codes less 2^(bits-1), the lowest bits first
    weight [rows, columns] int8 | float8              int-quantized, naive-quantized, float-quantized, mxfp8-quantized
    weight_packed [rows, columns / 2] uint8           nvfp4-, mxfp4-pack-quantized: FP4, two a byte
    weight_scale [rows, groups] | [rows, 1] | [1]     weight_zero_point of its shape, packed along the rows or int8;
                                                      in bytes (E8M0) of mxfp4 and mxfp8
    weight_g_idx [columns]                            with actorder: the group of each column
    input_scale [1]                                   of static activations: the size of a step
    input_global_scale [1]                            of NVFP4's: 448 * 6 over the largest magnitude
    self_attn.k_scale, self_attn.v_scale [1]          of the cache: the size of a step

Source: compressors/{pack_quantized,naive_quantized,nvfp4,mxfp4,mxfp8} of compressed_tensors 0.20.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from qeval.errors import UsageError
from qeval.formats.base import (
    CheckpointFormat,
    Config,
    DecodedMatrix,
    Module,
    Values,
    dequantize_groups,
    fp8_form,
    fp8_size_bits,
    group_size,
    is_in_order,
    on_grid,
    read_bits,
)
from qeval.formats.floats import decode_e8m0, expand_scales, fp4
from qeval.formats.rounding import TensorRounding, rounding_of
from qeval.quant.scheme import PartName

_READ = (
    "dense", "int-quantized", "naive-quantized", "float-quantized", "pack-quantized", "mixed-precision",
    "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized",
)  # fmt: skip
_ROUNDS_CACHE = "its kv_cache_scheme rounds keys and values too: only the loss of its weights is scored"


def _decode(module: Module, config: Config) -> DecodedMatrix:
    """Decode the integers of a linear, or the values of its small floats."""
    if "weight_packed" in module.parts and module.parts["weight_packed"].dtype == torch.uint8:
        return _fp4(module)
    if "weight_packed" in module.parts:
        return _packed(module, config)
    weight = module.part("weight", shape=(module.rows, module.columns))
    if weight.dtype != torch.int8:
        return _fp8(module, weight, config)
    bits = max((each for each in _widths(config)), default=8)
    return _integers(module, config, weight, bits)


def _notes(config: Config) -> tuple[str, ...]:
    """Return the formats of the weights.

    Raises:
        UsageError: A format that is not read, sparse weights, or rotations that are applied while running.
    """
    named = {str(config.get("format", "dense")), *(str(g["format"]) for g in _groups(config) if g.get("format"))}
    if other := sorted(named - set(_READ)):
        raise UsageError(f"The compressed-tensors format '{other[0]}' is not read; these are: {', '.join(_READ)}.")
    if config.get("transform_config"):
        raise UsageError("Its transform_config rotates activations while running, which qeval does not; not read.")
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise UsageError("Its weights are stored sparsely (sparsity_config), which is not read.")
    return (f"format {', '.join(sorted(named))}",)


def _inputs(name: str, config: Config) -> TensorRounding | None:
    """Return how the inputs of a linear are rounded: as the group says whose targets name it, or its class."""
    groups = [group for group in _groups(config) if group.get("weights")]
    named = [group for group in groups if any(_names(str(target), name) for target in group.get("targets") or ())]
    of_class = [group for group in groups if "Linear" in (group.get("targets") or ())]
    arguments = next(iter([*named, *of_class, *groups]), {}).get("input_activations")
    return rounding_of(arguments, "activations", "input_scale") if arguments else None


def _names(target: str, name: str) -> bool:
    """Return whether a target is a module's name, or a pattern that its beginning matches."""
    return bool(re.match(target[3:], name)) if target.startswith("re:") else target == name


def _caches(config: Config, part: PartName) -> TensorRounding | None:
    """Return how keys or values are rounded: by a scheme of their own, or as the inputs of attention are."""
    attention = [group.get("input_activations") for group in _groups(config) if not group.get("weights")]
    arguments = config.get("kv_cache_scheme") or next(filter(None, attention), None)
    if not arguments:
        return None
    found = rounding_of(arguments, part, f"{part[0]}_scale")
    limits = "" if config.get("kv_cache_scheme") else "queries are rounded too, and are left as they are"
    return replace(found, default=1.0 if found.how and found.how.kind == "fp8" else None, limits=limits)


def _packed(module: Module, config: Config) -> DecodedMatrix:
    packed = module.part("weight_packed", shape=(module.rows, None))
    bits = next((b for b in _widths(config) if -(-module.columns * b // 32) == packed.shape[1]), None)
    if bits is None:
        raise module.error(f"holds {packed.shape[1]} words a row, which no width of config.json gives")
    signed = read_bits(packed, bits, module.columns).to(torch.int16) - (1 << (bits - 1))
    return _integers(module, config, signed, bits)


def _integers(module: Module, config: Config, signed: Tensor, bits: int) -> DecodedMatrix:
    """Return signed codes [rows, columns], with their scales, on an unsigned grid."""
    middle = 1 << (bits - 1)
    codes = (signed.to(torch.int16) + middle).to(torch.uint8)
    scales = module.part("weight_scale")
    if scales.numel() > 1 and scales.shape[0] != module.rows:
        raise module.error(f"has scales of {list(scales.shape)}, which belong to tiles and not to rows")
    scales = scales.reshape(1, 1) if scales.numel() == 1 else scales.reshape(module.rows, -1)
    zeros = _zeros(module, bits, tuple(scales.shape))
    size = group_size(module, scales.shape[1], next(iter(_sizes(config, module, scales.shape[1])), None))
    order = module.parts.get("weight_g_idx")
    if order is None or int(order.min()) < 0 or is_in_order(order, size):
        return on_grid(codes, scales, zeros, bits, size)
    middles = torch.full(scales.shape, middle) if zeros is None else zeros
    return dequantize_groups(module, codes, scales, middles, bits, order)


def _zeros(module: Module, bits: int, shape: tuple[int, ...]) -> Tensor | None:
    zeros = module.parts.get("weight_zero_point")
    if zeros is None:
        return None
    if zeros.dtype == torch.int32:
        unpacked = read_bits(zeros.reshape(-1, shape[1]).t(), bits, shape[0]).t()
        return unpacked.to(torch.uint8)
    return (zeros.reshape(shape).to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)


def _fp8(module: Module, weight: Tensor, config: Config) -> Values:
    form, stored = fp8_form(module, weight), module.part("weight_scale")
    micro = stored.dtype == torch.uint8
    scales = decode_e8m0(stored) if micro else stored
    tile = next((each["block_structure"] for each in _weights(config) if each.get("block_structure")), None)
    micro = scales.dtype == torch.uint8
    factors = expand_scales(decode_e8m0(scales) if micro else scales, module.rows, module.columns, tile)
    return Values(weight.float() * factors, "mxfp8" if micro else form, fp8_size_bits(weight, scales))


def _fp4(module: Module) -> Values:
    packed = module.part("weight_packed", shape=(module.rows, module.columns // 2))
    stored = module.part("weight_scale", shape=(module.rows, None))
    micro = stored.dtype == torch.uint8
    scales = decode_e8m0(stored) if micro else stored.float() / module.part("weight_global_scale").float().reshape(())
    values = fp4(packed) * expand_scales(scales, module.rows, module.columns)
    return Values(values, "mxfp4" if micro else "nvfp4", 8 * (packed.numel() + stored.numel()))


def _groups(config: Config) -> list[Config]:
    groups = config.get("config_groups") or {}
    return [group for group in groups.values() if isinstance(group, dict)]


def _weights(config: Config) -> Iterable[Config]:
    return (group["weights"] for group in _groups(config) if group.get("weights"))


def _widths(config: Config) -> list[int]:
    return sorted({int(weights.get("num_bits", 8)) for weights in _weights(config)}, reverse=True)


def _sizes(config: Config, module: Module, groups: int) -> Iterable[int]:
    sizes = (weights.get("group_size") for weights in _weights(config))
    return (int(size) for size in sizes if size and -(-module.columns // int(size)) == groups)


COMPRESSED_TENSORS = CheckpointFormat(
    "compressed-tensors", ("weight_packed", "weight_scale"), _decode, _notes, inputs=_inputs, caches=_caches
)

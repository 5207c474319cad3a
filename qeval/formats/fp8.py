"""Checkpoints in FP8: a scale for each tile of a matrix, or for each row.

`quant_method: fp8` (DeepSeek-V3, Qwen3):

    weight [rows, columns] float8       weight_scale_inv: one, or [rows / 128, columns / 128], the last tiles short
    weight [rows, columns / 2] int8     FP4 (experts of DeepSeek-V4), the even column low, scales of a row's blocks
    activation_scale                    of activations that are static: the size of a step

A scale in bytes or `float8_e8m0fnu` is 2 to the power of the byte less 127. Despite its name the scale multiplies.
Source: `Fp8Dequantize` of transformers/integrations/finegrained_fp8.py (5.23).

`quant_method: fbgemm_fp8` (Llama 3.1 405B):
    weight [rows, columns] float8       weight_scale [rows, 1]
    input_scale_ub                      bounds the scales of activations, which is not applied

Source: `FbgemmFp8Linear` of transformers/integrations/fbgemm_fp8.py (5.23).
"""

import torch

from qeval.formats.base import (
    CheckpointFormat,
    Config,
    DecodedMatrix,
    Module,
    Values,
    fp8_form,
    fp8_size_bits,
)
from qeval.formats.floats import decode_e8m0, expand_scales, fp4
from qeval.formats.rounding import TensorRounding, no_format, rounding_to


def _decode_tiles(module: Module, config: Config) -> DecodedMatrix:
    """Decode the values of a linear."""
    weight, stored = module.part("weight", shape=(module.rows, None)), module.part("weight_scale_inv")
    packed = weight.dtype == torch.int8
    name = "fp4" if packed else fp8_form(module, weight)
    values = fp4(weight.view(torch.uint8)) if packed else weight.float()
    if values.shape[1] != module.columns:
        raise module.error(f"holds {values.shape[1]} columns where the baseline's matrix has {module.columns}")
    scales = decode_e8m0(stored) if stored.dtype == torch.uint8 else stored
    factors = expand_scales(scales, module.rows, module.columns, tile=config.get("weight_block_size"))
    return Values(values * factors, name, fp8_size_bits(weight, stored))


def _decode_rows(module: Module, config: Config) -> DecodedMatrix:
    """Decode the values of a linear that has a scale a row."""
    weight = module.part("weight", shape=(module.rows, module.columns))
    scales = module.part("weight_scale", shape=(module.rows, 1))
    return Values(weight.float() * scales.float(), fp8_form(module, weight), fp8_size_bits(weight, scales))


def _notes_on_tiles(config: Config) -> tuple[str, ...]:
    """Return the tiles."""
    blocks = config.get("weight_block_size")
    return (f"tiles of {blocks[0]} x {blocks[1]}" if blocks else "one scale a matrix",)


def _notes_on_rows(config: Config) -> tuple[str, ...]:
    """Return the same for a scale a row."""
    return ("one scale a row",)


def _inputs_of_tiles(name: str, config: Config) -> TensorRounding:
    """Return how inputs are rounded: in groups as wide as a tile, or by token where a matrix has one scale."""
    if str(config.get("activation_scheme", "dynamic")) == "static":
        return rounding_to("fp8-tensor", "activations", scale="activation_scale")
    if str(config.get("scale_fmt", "float")).lower() == "ue8m0":
        return no_format("FP8 with scales rounded up to powers of two (scale_fmt ue8m0)")
    blocks = config.get("weight_block_size")
    return rounding_to(f"fp8-g{int(blocks[1])}" if blocks else "fp8-token", "activations")


def _inputs_of_rows(name: str, config: Config) -> TensorRounding:
    """Return how inputs are rounded: by token, each scale at most a bound."""
    bound = config.get("activation_scale_ub")
    limits = f"the bound on its scales (activation_scale_ub {bound}) is left out" if bound is not None else ""
    return rounding_to("fp8-token", "activations", limits=limits)


FP8_TILES = CheckpointFormat(
    "FP8 in tiles", ("weight_scale_inv",), _decode_tiles, _notes_on_tiles, inputs=_inputs_of_tiles
)
FP8_ROWS = CheckpointFormat("FP8 by rows", ("weight_scale",), _decode_rows, _notes_on_rows, inputs=_inputs_of_rows)

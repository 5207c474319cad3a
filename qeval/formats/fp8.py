"""`quant_method: fp8`: DeepSeek-V3's and Qwen3's checkpoints in FP8, a scale for each tile of a matrix.

    weight [rows, columns] float8       weight_scale_inv: one, or [rows / 128, columns / 128], the last tiles short
    weight [rows, columns / 2] int8     FP4 (experts of DeepSeek-V4), the even column low, scales of a row's blocks
    activation_scale                    of activations, which is not read

A scale in bytes or `float8_e8m0fnu` is 2 to the power of the byte less 127. Despite its name the scale multiplies.
Source: `Fp8Dequantize` of transformers/integrations/finegrained_fp8.py (5.23).
"""

import torch

from qeval.formats.base import Config, Format, Matrix, Module, Values
from qeval.formats.floats import FP8, fp4, powers, spread


def decode(module: Module, config: Config) -> Matrix:
    """The values of a linear."""
    weight, stored = module.part("weight", shape=(module.rows, None)), module.part("weight_scale_inv")
    packed = weight.dtype == torch.int8
    if not (packed or weight.dtype in FP8):
        raise module.error(f"has scales beside a weight in {str(weight.dtype).removeprefix('torch.')}")
    values = fp4(weight.view(torch.uint8)) if packed else weight.float()
    if values.shape[1] != module.columns:
        raise module.error(f"holds {values.shape[1]} columns where the baseline's matrix has {module.columns}")
    name = "fp4" if packed else "fp8 e4m3" if weight.dtype == torch.float8_e4m3fn else "fp8 e5m2"
    scales = powers(stored) if stored.dtype == torch.uint8 else stored
    factors = spread(scales, module.rows, module.columns, tile=config.get("weight_block_size"))
    size_bits = 8 * weight.numel() + 8 * stored.numel() * stored.element_size()
    return Values(values * factors, name, size_bits)


def notes(config: Config) -> tuple[str, ...]:
    """The tiles, and that activations are rounded too, which is not scored here."""
    blocks = config.get("weight_block_size")
    tiles = f"tiles of {blocks[0]} x {blocks[1]}" if blocks else "one scale a matrix"
    return (tiles, "its own kernels round activations too: only the loss of its weights is scored")


FORMAT = Format("FP8 in tiles", ("weight_scale_inv",), decode, notes)

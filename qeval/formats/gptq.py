"""GPTQ's packing (AutoGPTQ, GPTQModel; AutoRound's of that name).

    qweight [columns * bits / 32, rows] int32   codes along the columns of the weight, the lowest bits first
    qzeros  [groups, rows * bits / 32] int32    zero points along the rows, likewise; v1 stores them less one
    scales  [groups, rows], g_idx [columns]     the group of each column; with desc_act not in consecutive blocks

Source: `pack` of auto_gptq/nn_modules/qlinear/qlinear_cuda.py, `convert_gptq_v1_to_v2_format` of
gptqmodel/utils/model.py.
"""

import torch
from torch import Tensor

from qeval.errors import UsageError
from qeval.formats.base import (
    CheckpointFormat,
    Config,
    DecodedMatrix,
    Module,
    dequantize_groups,
    group_size,
    is_in_order,
    on_grid,
    read_bits,
)

_BITS = (2, 3, 4, 8)
_V1, _V2 = "gptq", "gptq_v2"


def _decode(module: Module, config: Config) -> DecodedMatrix:
    """Decode the integers of a linear, or its values where g_idx scatters the groups."""
    return decode_gptq(module, config, offset=config.get("checkpoint_format", _V1) != _V2)


def decode_gptq(module: Module, config: Config, *, offset: bool) -> DecodedMatrix:
    """Decode a linear; `offset`: whether zero points are stored less one."""
    qweight = module.part("qweight", shape=(None, module.rows))
    bits = qweight.shape[0] * 32 // module.columns
    if bits not in _BITS or bits * module.columns != qweight.shape[0] * 32:
        raise module.error(f"holds qweight of {list(qweight.shape)}, which no width of {module.columns} columns gives")
    scales = module.part("scales", shape=(None, module.rows))
    groups = scales.shape[0]
    qzeros = module.part("qzeros", shape=(groups, -(-module.rows * bits // 32)))
    codes = read_bits(qweight.t(), bits, module.columns)
    zeros = _zeros(qzeros, bits, module.rows, offset).t()
    order = module.parts.get("g_idx")
    if order is not None and not is_in_order(order, _size_by(order, module, groups)):
        return dequantize_groups(module, codes, scales.t(), zeros, bits, order)
    size = group_size(module, groups, config.get("group_size"))
    return on_grid(codes, scales.t(), zeros, bits, size)


def _notes(config: Config) -> tuple[str, ...]:
    """Return which of the two conventions of zero points is read.

    Raises:
        UsageError: A checkpoint format that is neither.
    """
    version = config.get("checkpoint_format", _V1)
    if version not in (_V1, _V2):
        raise UsageError(f"The checkpoint format '{version}' is not read; save it as {_V1} or {_V2}.")
    return (f"checkpoint format {version}: zero points stored {'less one' if version == _V1 else 'as they are'}",)


def _zeros(qzeros: Tensor, bits: int, rows: int, offset: bool) -> Tensor:
    """Return zero points [groups, rows].

    GPTQModel subtracts one from all of a word at once, borrows included; so it is added back where codes fill words
    evenly.
    """
    if offset and 32 % bits == 0:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        words = (qzeros.long() + ones) & 0xFFFFFFFF
        return read_bits(torch.where(words >= 1 << 31, words - (1 << 32), words).int(), bits, rows)
    return (read_bits(qzeros, bits, rows) + int(offset)) & ((1 << bits) - 1)


def _size_by(order: Tensor, module: Module, groups: int) -> int:
    """Return how many columns the first group has, if its columns stand together."""
    return int((order == 0).sum()) or -(-module.columns // groups)


GPTQ = CheckpointFormat("GPTQ", ("qweight",), _decode, _notes)

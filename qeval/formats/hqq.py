"""HQQ as `HQQLinear.state_dict` writes it: codes, floating zero points and scales, and the settings as tensors.

    W_q                codes of [groups, group_size] (axis 1) or [group_size, groups] (axis 0), packed along
                       dimension 0: the first part of the rows in the highest bits; 3 bits ten a word of 32
    scale, zero        weight = (code - zero) * scale, zero points floating
    nbits, axis, shape, group_size, packing, view_as_float

Source: hqq/core/{bitpack,quantize}.py (0.2.8).
"""

import torch
from torch import Tensor

from qeval.formats.base import CheckpointFormat, Config, DecodedMatrix, Module, Values

_PER_WORD = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
"""How many codes of which width a packed word holds: bytes, and words of 32 bits for 3 bits."""


def _decode(module: Module, config: Config) -> DecodedMatrix:
    """Decode the values of a linear: its zero points are floating, so no grid says them."""
    if any(name in module.parts for name in ("scale_q", "zero_q", "zero_scale")):
        raise module.error("has quantized scales or zero points, which HQQ itself can't write either")

    bits = _number(module, "nbits")
    if bits not in _PER_WORD:
        raise module.error(f"has codes of {bits} bits")
    if _number(module, "view_as_float"):
        raise module.error("stores its codes as floats (view_as_float), which is not read")

    size, axis = _number(module, "group_size"), _number(module, "axis")
    groups = module.rows * module.columns // size
    codes = _unpack(module.part("W_q"), bits)[: groups if axis == 1 else size]
    scale, zero = module.part("scale").float(), module.part("zero").float()
    if codes.numel() != module.rows * module.columns:
        raise module.error(f"holds {codes.numel()} codes")

    values = ((codes.float() - zero) * scale).reshape(module.rows, module.columns)
    size_bits = bits * codes.numel() + 8 * scale.numel() * (module.parts["scale"].element_size() * 2)
    return Values(values, f"hqq int{bits}, groups of {size} along axis {axis}", size_bits)


def _number(module: Module, name: str) -> int:
    return int(module.part(name).reshape(-1)[0])


def _unpack(packed: Tensor, bits: int) -> Tensor:
    count = _PER_WORD[bits]
    words = packed.to(torch.int64)
    parts = [(words >> bits * (count - 1 - place)) & ((1 << bits) - 1) for place in range(count)]
    return torch.cat(parts)


HQQ = CheckpointFormat("HQQ", ("W_q",), _decode)

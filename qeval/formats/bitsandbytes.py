"""bitsandbytes as it is serialized: NF4 and FP4 codebooks, and LLM.int8().

    weight [n / 2, 1] uint8 (or another shape)   4 bits: codes into weight.quant_map, the high nibble first
    weight.absmax                                the largest magnitude of each block; itself 8-bit codes where nested
    weight.quant_state.bitsandbytes__nf4         JSON: blocksize, shape, nested_blocksize, nested_offset
    weight [rows, columns] int8, SCB [rows]      8 bits: weight = code * SCB / 127

Source: `QuantState.as_dict`, `dequantize_4bit`, `dequantize_blockwise` of bitsandbytes/functional.py (0.50).
"""

import json
from typing import Any

import torch
from torch import Tensor

from qeval.formats.base import CheckpointFormat, Config, DecodedMatrix, Module, Values, on_grid
from qeval.formats.rounding import TensorRounding, no_format

_STATE = "weight.quant_state.bitsandbytes__"


def _decode(module: Module, config: Config) -> DecodedMatrix:
    """Decode the integers of LLM.int8(), or the values of a codebook."""
    if "SCB" not in module.parts:
        return _codebook(module)
    weight = module.part("weight", shape=(module.rows, module.columns))
    if weight.dtype != torch.int8 or int(module.parts.get("weight_format", torch.tensor(0))) != 0:
        raise module.error("is laid out for one GPU's kernel (weight_format), not row by row")
    scales = module.part("SCB", shape=(module.rows,)).float() / 127
    codes = (weight.to(torch.int16) + 128).to(torch.uint8)
    return on_grid(codes, scales.reshape(-1, 1), None, 8, module.columns)


def _inputs(name: str, config: Config) -> TensorRounding | None:
    """Return that LLM.int8() rounds inputs but for outliers, which no format says."""
    if not config.get("load_in_8bit"):
        return None
    return no_format("INT8 by token but for outlier columns, which stay in fp16 (LLM.int8())")


def _codebook(module: Module) -> Values:
    kind, state = _state(module)
    count = module.rows * module.columns
    if tuple(state.get("shape") or ()) != (module.rows, module.columns):
        raise module.error(f"says that its shape is {state.get('shape')}")
    packed = module.part("weight").reshape(-1).view(torch.uint8)
    codes = torch.stack([packed >> 4, packed & 0xF], dim=-1).reshape(-1)[:count]
    if len(codes) < count:
        raise module.error("holds too few codes")
    values = module.part("weight.quant_map").float()[codes.long()]
    size, absmax = int(state["blocksize"]), _absmax(module, state)
    values = values * absmax.repeat_interleave(size)[:count]
    nested = "weight.nested_absmax" in module.parts
    bits = 4 * count + (8 if nested else 32) * len(absmax)
    form = f"{kind}, blocks of {size}{', nested' if nested else ''}"
    return Values(values.reshape(module.rows, module.columns), form, bits)


def _absmax(module: Module, state: dict[str, Any]) -> Tensor:
    absmax = module.part("weight.absmax")
    if "weight.nested_absmax" not in module.parts:
        return absmax.float()
    codes = module.part("weight.nested_quant_map").float()[absmax.long()]
    size = int(state["nested_blocksize"])
    scales = module.part("weight.nested_absmax").float().repeat_interleave(size)[: len(codes)]
    return codes * scales + float(state["nested_offset"])


def _state(module: Module) -> tuple[str, dict[str, Any]]:
    name = next((name for name in module.parts if name.startswith(_STATE)), None)
    if name is None:
        raise module.error("has no quant_state")
    try:
        return name.removeprefix(_STATE), dict(json.loads(bytes(module.parts[name].tolist())))
    except ValueError as error:
        raise module.error("has a quant_state that is no JSON") from error


BITSANDBYTES = CheckpointFormat("bitsandbytes", ("weight.absmax", "SCB"), _decode, inputs=_inputs)

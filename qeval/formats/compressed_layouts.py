"""compressed-tensors' layouts of quantized matrices, written: which one holds a grid exactly, its tensors, its words.

The other half of `formats/compressed.py`, which reads them. Nothing is rounded again but one number: NVFP4's second
scale is kept there as its reciprocal in fp32. What a layout can't say is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qeval.errors import UsageError
from qeval.quant.elements import E2M1, E4M3, POWER_RULES
from qeval.quant.grid import FloatGrid, Grid, PerBlock, PerChannel, PerTensor, PerTile, WeightGrid
from qeval.quant.pack import pack
from qeval.quant.qweight import QWeight
from qeval.quant.scheme import Scheme, TensorFormat
from qeval.quant.stored_scales import encode_scales

Args = dict[str, Any]
"""compressed-tensors' QuantizationArgs, as JSON has them."""

_INTEGERS = (4, 8)
"""The bits that vLLM's kernels for compressed-tensors take."""
_TAKEN = "int4 and int8 by group or channel, fp8, mxfp4, mxfp8 and nvfp4"
_MICRO: Args = {"type": "float", "strategy": "group", "group_size": 32, "dynamic": True, "scale_dtype": "torch.uint8"}
_INPUTS: Mapping[str, Args] = {
    "int8-token": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
    "int8-tensor": {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False},
    "fp8-token": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    "fp8-tensor": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    "fp8-g128": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True},
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
    "mxfp4-even": {"num_bits": 4, **_MICRO},
    "mxfp8-even": {"num_bits": 8, **_MICRO},
}
"""The activations that compressed-tensors' runtimes round as qeval does, by their format's name."""
_INPUTS_OF: Mapping[str, tuple[str, ...]] = {
    "int-quantized": ("int8-token", "int8-tensor"),
    "float-quantized": ("fp8-token", "fp8-tensor"),
    "nvfp4-pack-quantized": ("nvfp4",),
    "mxfp4-pack-quantized": ("mxfp4-even",),
    "mxfp8-quantized": ("mxfp8-even",),
}
"""The activations that go with weights of a layout; with tiles of weights go blocks of activations."""
_INPUTS_OF_TILES = ("fp8-g128",)
_CACHE = "fp8-tensor"
_CACHE_ARGS: Args = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
_LARGEST = {"int8-tensor": 127.0, "fp8-tensor": E4M3.largest}
"""The number that the largest magnitude of a static format becomes."""


@dataclass(frozen=True)
class Layout:
    """The layout of a matrix: compressed-tensors' format, and its words for the weights and for what enters them.

    `inputs` is None where activations stay as they are.
    """

    format: str
    weights: Args
    inputs: Args | None = None

    def config_group(self, targets: list[str]) -> dict[str, Any]:
        """Return the entry of `config_groups` for modules or classes of modules."""
        return {
            "targets": targets,
            "weights": {"dynamic": False, "symmetric": True, **self.weights},
            "input_activations": self.inputs,
            "output_activations": None,
            "format": self.format,
        }


def layout_of(name: str, grid: WeightGrid, columns: int, activations: TensorFormat | None) -> Layout:
    """Return the layout that holds a matrix's codes and scales exactly.

    Args:
        name: The matrix, for errors.
        grid: Its grid.
        columns: The width of its rows.
        activations: How what enters it is rounded; None leaves it as it is.

    Raises:
        UsageError: There is none; it says which grids have one.
    """
    layout = _float_layout(grid) if isinstance(grid, FloatGrid) else _integer_layout(grid, activations)
    if isinstance(grid.granularity, PerBlock) and columns % grid.granularity.size:
        raise UsageError(
            f"{grid} ends the rows of {name} ({columns} weights) in a short block, which compressed-tensors has not; "
            "take a group size that divides every row, or scales by channel, such as rtn:int4-channel."
        )
    if activations is None:
        return layout
    words = str(activations)
    known = _INPUTS_OF_TILES if "block_structure" in layout.weights else _INPUTS_OF.get(layout.format, ())
    if words not in known:
        fits = f"with {' or '.join(f'+a-{each}' for each in known)}"
        raise UsageError(
            f"compressed-tensors' runtimes have weights on {grid} {fits}, not with activations on {words}."
        )
    return replace(layout, inputs={"symmetric": True, **_INPUTS[words]})


def _integer_layout(grid: Grid, activations: TensorFormat | None) -> Layout:
    if grid.bits not in _INTEGERS:
        raise UsageError(
            f"{grid} is on {grid.bits} bits, which no compressed-tensors kernel takes; there are {_TAKEN}."
        )
    weights: Args = {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, **_strategy(grid)}
    if activations is None:
        if isinstance(grid.granularity, PerTensor):
            raise UsageError(f"{grid} has one scale a matrix, which pack-quantized has not; there are {_TAKEN}.")
        return Layout("pack-quantized", weights)
    if grid.bits != 8 or isinstance(grid.granularity, PerBlock) or not grid.symmetric:
        raise UsageError(
            f"Weights on {grid} with rounded activations are in no compressed-tensors layout that qeval writes; take "
            "rtn:int8-w8a8 or rtn:fp8-w8a8, or leave the +a part out."
        )
    return Layout("int-quantized", weights)


def _float_layout(grid: FloatGrid) -> Layout:
    weights: Args = {"num_bits": grid.bits, "type": "float", **_strategy(grid)}
    if grid.element == E2M1 and grid.has_global_scale:
        return Layout("nvfp4-pack-quantized", {**weights, "strategy": "tensor_group"})
    if grid.element == E2M1 and grid.scaling in POWER_RULES:
        return Layout("mxfp4-pack-quantized", {**weights, "scale_dtype": "torch.uint8"})
    if grid.element == E4M3 and grid.scaling in POWER_RULES:
        return Layout("mxfp8-quantized", {**weights, "scale_dtype": "torch.uint8"})
    if grid.element == E4M3:
        return Layout("float-quantized", weights)
    raise UsageError(f"{grid} has no layout in compressed-tensors; there are {_TAKEN}.")


def _strategy(grid: WeightGrid) -> Args:
    granularity = grid.granularity
    if isinstance(granularity, PerTile):
        return {"strategy": "block", "block_structure": [granularity.size, granularity.size]}
    if isinstance(granularity, PerBlock):
        return {"strategy": "group", "group_size": granularity.size}
    return {"strategy": "channel" if isinstance(granularity, PerChannel) else "tensor"}


def compress_weight(weight: QWeight, layout: Layout) -> dict[str, Tensor]:
    """Return the tensors of a matrix in its layout, by what follows the module's name.

    `weight_packed` int32 [rows, words], uint8 [rows, columns / 2]; or `weight` int8, float8 [rows, columns];
    `weight_scale` in fp32, uint8 (E8M0) or float8 (E4M3), [rows, groups], [rows, 1], tiles, or [1].
    """
    rows, columns = weight.codes.shape
    stored = encode_scales(weight)
    parts = {"weight_scale": stored.reshape(1) if isinstance(weight.grid.granularity, PerTensor) else stored}
    match layout.format:
        case "pack-quantized":
            parts |= {"weight_packed": _words(weight.codes, weight.grid.bits), "weight_shape": _shape(rows, columns)}
            if weight.zeros is not None:
                parts["weight_zero_point"] = _words(weight.zeros.T, weight.grid.bits).T
        case "int-quantized":
            parts["weight"] = (weight.codes.to(torch.int16) - 128).to(torch.int8)
        case "float-quantized" | "mxfp8-quantized":
            parts["weight"] = weight.codes.view(torch.float8_e4m3fn)
        case _:
            parts["weight_packed"] = torch.from_numpy(pack(np.ascontiguousarray(weight.codes.numpy()), 4))
    if weight.global_scale is not None:
        parts["weight_scale"] = stored.view(torch.float8_e4m3fn)
        parts["weight_global_scale"] = weight.global_scale.reshape(1).reciprocal()
    return {name: part.contiguous() for name, part in parts.items()}


def input_parts(activations: TensorFormat, amax: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a linear's static activations, by what follows the module's name.

    Args:
        activations: The format.
        amax: The largest magnitude on calibration text, one number.
    """
    if activations.element == E2M1:
        return {"input_global_scale": (E4M3.largest * E2M1.largest / amax.float()).reshape(1)}
    return {"input_scale": (amax.float() / _LARGEST[str(activations)]).reshape(1)}


def cache_args(scheme: Scheme) -> Args | None:
    """Return compressed-tensors' words for the keys and values of a scheme; None where both stay as they are.

    Raises:
        UsageError: They are rounded otherwise than runtimes of such checkpoints do.
    """
    if not scheme.caches:
        return None
    if {str(scheme.keys), str(scheme.values)} != {_CACHE}:
        named = ", ".join(f"{part} on {how}" for part, how in scheme.formats.items() if part != "activations")
        raise UsageError(
            f"compressed-tensors' kv_cache_scheme is FP8 with one static scale for keys and one for values, and this "
            f"has {named}; take +kv-{_CACHE}, or leave the +kv part out."
        )
    return dict(_CACHE_ARGS)


def cache_scale(amax: Tensor) -> Tensor:
    """Return the scale of a layer's keys or values, [1] fp32, of their largest magnitude."""
    return (amax.float() / E4M3.largest).reshape(1)


def _words(codes: Tensor, bits: int) -> Tensor:
    """Return codes [rows, columns] packed along the rows into int32, the lowest bits first."""
    packed = pack(np.ascontiguousarray(codes.numpy()), bits)
    filled = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return torch.from_numpy(np.ascontiguousarray(filled).view(np.int32))


def _shape(rows: int, columns: int) -> Tensor:
    return torch.tensor([rows, columns])

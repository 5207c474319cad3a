"""torchao's weight-only integers: `int4wo` in groups, `int8wo` per channel.

`Int4WeightOnlyConfig` packs for kernels of GPUs alone, so int4wo is `IntxWeightOnlyConfig` at 4 bits: scales from each
group's range too, with integer zero points where the grid has any.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qeval.errors import UsageError
from qeval.formats.base import DecodedMatrix, on_grid
from qeval.quant.grid import Grid, PerBlock
from qeval.quantize.tools.base import Tool, ToolJob


def quantize_by_torchao(job: ToolJob) -> Mapping[str, DecodedMatrix]:
    """Quantize every matrix by `quantize_`."""
    matrix = _int8 if job.algorithm == "int8wo" else _int4
    return {name: matrix(name, job.parameters[name], grid) for name, grid in job.grids.items()}


def _int4(name: str, weight: Tensor, grid: Grid) -> DecodedMatrix:
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup  # noqa: PLC0415 - an extra

    if grid.bits != 4 or not isinstance(grid.granularity, PerBlock) or weight.shape[1] % grid.granularity.size:
        raise UsageError(
            f"torchao:int4wo takes 4 bits in groups that divide a row, not {grid} of {name} ({weight.shape[1]} wide)."
        )
    mapping = MappingType.SYMMETRIC if grid.symmetric else MappingType.ASYMMETRIC
    size = grid.granularity.size
    four: torch.dtype = torch.int4  # type: ignore[attr-defined]  # torch's stubs leave it out
    quantized = _quantize(weight, IntxWeightOnlyConfig(four, PerGroup(size), mapping))
    codes, zeros = ((each.to(torch.int16) + 8).to(torch.uint8) for each in (quantized.qdata, quantized.zero_point))
    return on_grid(codes, quantized.scale, zeros, 4, size)


def _int8(name: str, weight: Tensor, grid: Grid) -> DecodedMatrix:
    from torchao.quantization import Int8WeightOnlyConfig  # noqa: PLC0415 - an extra

    quantized = _quantize(weight, Int8WeightOnlyConfig(version=2))
    codes = (quantized.qdata.to(torch.int16) + 128).to(torch.uint8)
    return on_grid(codes, quantized.scale.reshape(len(codes), 1), None, 8, weight.shape[1])


def _quantize(weight: Tensor, config: object) -> Any:
    from torchao.quantization import quantize_  # noqa: PLC0415 - an extra

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    linear.weight = torch.nn.Parameter(weight.detach().float().clone(), requires_grad=False)
    quantize_(linear, config)
    return linear.weight.detach()


TORCHAO_TOOL = Tool(quantize_by_torchao, "torchao", "torchao", "pip install 'qeval[torchao]'")

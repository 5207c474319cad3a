"""HQQ (Badri and Shaji 2023): half-quadratic search of zero points, without calibration."""

from collections.abc import Mapping

import torch
from torch import Tensor

from qeval.errors import UsageError
from qeval.formats.base import DecodedMatrix, Module
from qeval.formats.hqq import HQQ
from qeval.quant.grid import Grid, PerBlock, PerTensor
from qeval.quantize.tools.base import Tool, ToolJob

_BITS = (1, 2, 3, 4, 8)


def quantize_by_hqq(job: ToolJob) -> Mapping[str, DecodedMatrix]:
    """Quantize every matrix by `HQQLinear` with its defaults (axis 1, fp16 scales and floating zero points)."""
    return {name: _matrix(name, job.parameters[name], grid) for name, grid in job.grids.items()}


def _matrix(name: str, weight: Tensor, grid: Grid) -> DecodedMatrix:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear  # noqa: PLC0415 - an extra

    if grid.bits not in _BITS or isinstance(grid.granularity, PerTensor):
        raise UsageError(f"hqq takes {_BITS} bits in blocks or per channel, not {grid}.")
    rows, columns = weight.shape
    size = grid.granularity.size if isinstance(grid.granularity, PerBlock) else columns
    if rows * columns % size:
        raise UsageError(f"hqq needs blocks that divide {name} ({rows} x {columns}), which {size} does not.")

    linear = torch.nn.Linear(columns, rows, bias=False, device=weight.device)
    linear.weight = torch.nn.Parameter(weight.detach().float().clone(), requires_grad=False)
    config = BaseQuantizeConfig(nbits=grid.bits, group_size=size, axis=1)
    quantized = HQQLinear(linear, config, compute_dtype=torch.float16, device=str(weight.device))
    quantized.encoded_state_dict = True
    module = Module(name.removesuffix(".weight"), rows, columns, quantized.state_dict())
    return HQQ.decode(module, {})


HQQ_TOOL = Tool(quantize_by_hqq, "hqq", "hqq", "pip install 'qeval[hqq]'")

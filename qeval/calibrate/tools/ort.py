"""ONNX Runtime's own weight-only quantizers, as its model builder calls them: `rtn` and llama.cpp's `k_quant`.

Source: `rtn_quantize` of onnxruntime/quantization/neural_compressor/weight_only.py. `rtn` spreads the largest magnitude
over 15 steps of 16 (qeval's over 7 of 8 a side); `k_quant` always has zero points.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qeval.calibrate.tools.base import Job, Tool
from qeval.errors import UsageError
from qeval.formats.base import Matrix, on_grid
from qeval.quant.grid import Grid, PerBlock
from qeval.quant.qweight import from_blocks, to_blocks


def quantize(job: Job) -> Mapping[str, Matrix]:
    """Every matrix, block by block."""
    return {
        name: _one(name, job.parameters[name].detach().float().cpu(), grid, job.algorithm == "k_quant")
        for name, grid in job.grids.items()
    }


def _one(name: str, weight: Tensor, grid: Grid, k_quant: bool) -> Matrix:
    from onnxruntime.quantization.neural_compressor import weight_only  # noqa: PLC0415 - an extra

    if not isinstance(grid.granularity, PerBlock) or grid.bits not in (4, 8):
        raise UsageError(f"ort takes 4 or 8 bits in blocks, not {grid} for {name}.")
    size, blocks = grid.granularity.size, to_blocks(weight, grid)
    data = blocks.reshape(-1, blocks.shape[-1]).numpy()
    if k_quant:
        made = weight_only.quant_tensor_k_quant_cpu(data, grid.bits, size)
    else:
        made = weight_only.quant_tensor(data, grid.bits, size, "sym" if grid.symmetric else "asym", "uint")
    codes, scales, zeros = (torch.from_numpy(each.copy()) for each in made)
    shape = blocks.shape[:2]
    rows, columns = weight.shape
    kept = from_blocks(codes.to(torch.uint8).reshape(blocks.shape), rows, columns)
    return on_grid(kept, scales.reshape(shape), zeros.reshape(shape), grid.bits, size)


TOOL = Tool(quantize, "onnxruntime", "onnxruntime", "pip install 'qeval[cpu]'")

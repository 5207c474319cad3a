"""ONNX Runtime's own weight-only quantizers: `rtn`, llama.cpp's `k_quant`, and `default`, its C++ one.

Sources: `rtn_quantize` of onnxruntime/quantization/neural_compressor/weight_only.py, as the model builder calls it;
`DefaultWeightOnlyQuantizer` of matmul_nbits_quantizer.py. Without zero points `rtn` spans its range as qeval's
`half`, and `default` as `signed`; `k_quant` always has zero points.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qeval.errors import UsageError
from qeval.formats.base import DecodedMatrix, on_grid
from qeval.quant.grid import Grid, PerBlock
from qeval.quant.pack import unpack
from qeval.quant.qweight import from_blocks, to_blocks
from qeval.quantize.tools.base import Tool, ToolJob


def quantize_by_ort(job: ToolJob) -> Mapping[str, DecodedMatrix]:
    """Quantize every matrix, block by block."""
    return {
        name: _matrix(name, job.parameters[name].detach().float().cpu(), grid, job.algorithm or "rtn")
        for name, grid in job.grids.items()
    }


def _matrix(name: str, weight: Tensor, grid: Grid, algorithm: str) -> DecodedMatrix:
    from onnxruntime.quantization.neural_compressor import weight_only  # noqa: PLC0415 - an extra

    if not isinstance(grid.granularity, PerBlock) or grid.bits not in (4, 8):
        raise UsageError(f"ort takes 4 or 8 bits in blocks, not {grid} for {name}.")

    size, blocks = grid.granularity.size, to_blocks(weight, grid)
    data = blocks.reshape(-1, blocks.shape[-1]).numpy()
    if algorithm == "default":
        result = _default(data, grid)
    elif algorithm == "k_quant":
        result = weight_only.quant_tensor_k_quant_cpu(data, grid.bits, size)
    else:
        result = weight_only.quant_tensor(data, grid.bits, size, "sym" if grid.symmetric else "asym", "uint")
    codes, scales, zeros = (torch.from_numpy(array.copy()) for array in result)

    # a short last block was padded
    shape = blocks.shape[:2]
    codes = from_blocks(codes.to(torch.uint8).reshape(blocks.shape), *weight.shape)
    return on_grid(codes, scales.reshape(shape), zeros.reshape(shape), grid.bits, size)


def _default(blocks: NDArray[np.float32], grid: Grid) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return codes, scales and zero points of blocks [n, size], each quantized as a matrix's only row."""
    from onnxruntime.capi import _pybind_state as library  # noqa: PLC0415 - an extra

    quantize_blocks = library.quantize_matmul_4bits if grid.bits == 4 else library.quantize_matmul_8bits
    count, size = blocks.shape
    packed = np.zeros((count, 1, size * grid.bits // 8), np.uint8)
    scales, zeros = np.zeros((count, 1), np.float32), np.zeros((count, 1), np.uint8)
    columns = np.ascontiguousarray(blocks.T)  # its matrices have a row for each input
    quantize_blocks(packed, columns, scales, zeros, size, count, size, grid.symmetric)
    codes = unpack(packed.reshape(count, -1), grid.bits, size)
    return codes, scales, np.full_like(zeros, grid.zero) if grid.symmetric else unpack(zeros, grid.bits, 1)


ORT_TOOL = Tool(quantize_by_ort, "onnxruntime", "onnxruntime", "pip install 'qeval[cpu]'")

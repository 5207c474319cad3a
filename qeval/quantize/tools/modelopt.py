"""NVIDIA Model Optimizer: `awq_lite`, its AWQ without the clip search, calibrated on the run's own text.

Its scales are multiplied into each linear's input while running; the variant has the matrix that this amounts to, the
rounded weights with the columns divided again.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch

from qeval.errors import UsageError
from qeval.formats.base import DecodedMatrix, Values
from qeval.quant.grid import Grid, PerBlock
from qeval.quantize.tools.base import Tool, ToolJob

_SCALE_BITS = 16


def quantize_by_modelopt(job: ToolJob) -> Mapping[str, DecodedMatrix]:
    """Quantize a copy of the model by `mtq.quantize`, and read it linear by linear."""
    import modelopt.torch.quantization as mtq  # noqa: PLC0415 - an extra

    grid = job.one_grid("modelopt")
    if grid != Grid(4, PerBlock(128)):
        raise UsageError(f"modelopt:awq_lite is its INT4_AWQ_CFG, which is int4-g128; leave {grid} out.")
    model = copy.deepcopy(job.model)

    def forward(quantized: Any) -> None:
        for sample in job.samples:
            quantized.base_model(input_ids=torch.tensor([list(sample)], device=model.device), use_cache=False)

    with torch.inference_mode():
        mtq.quantize(model, mtq.INT4_AWQ_CFG, forward)
        return {name: _read(model, name) for name in job.grids}


def _read(model: Any, name: str) -> DecodedMatrix:
    module = model.get_submodule(name.removesuffix(".weight"))
    values = module.weight_quantizer(module.weight).float()
    scale = module.input_quantizer.pre_quant_scale
    values = values if scale is None else values * scale.float()
    rows, columns = values.shape
    bits = values.numel() * 4 + rows * -(-columns // 128) * _SCALE_BITS + columns * _SCALE_BITS
    return Values(values.cpu().clone(), "modelopt awq_lite int4, blocks of 128", bits)


MODELOPT_TOOL = Tool(
    quantize_by_modelopt, "modelopt", "nvidia-modelopt",
    "pip install --no-deps nvidia-modelopt omegaconf antlr4-python3-runtime==4.9.3 pulp",
)  # fmt: skip

"""The methods that a recipe may name, one row each: what a method does, and so what it needs.

The rows are data, so that names are read without torch; `quantize/quantizers.py` does what they say.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Rounding = Literal["nearest", "sequential", "smoothed", "external", "none"]
"""The ways in which weights become integers: each to the nearest value; column after column, layer after layer;
to the nearest once activations' outliers were moved into them; by another tool; not at all."""

FloatKind = Literal["router", "gate", "indexer", "convolution", "decay", "small"]

FLOAT_REASONS: Mapping[FloatKind, str] = {
    "router": "a router: it decides which experts run",
    "gate": "a gate: it scales whole heads or a running state",
    "indexer": "an indexer: it picks the tokens that attention sees",
    "convolution": "a convolution: it mixes neighbouring tokens, a few weights a channel",
    "decay": "a decay: it sets how fast a running state fades",
    "small": "a small matrix: its row is shorter than a block",
}
"""Matrices of decoder layers that stay in float by any recipe, by kind, with the reason that manifests give."""


@dataclass(frozen=True)
class QuantMethod:
    """A method: its effect on a model, and so its needs.

    Attributes:
        description: Its line in `qeval methods`.
        rounding: How weights become integers.
        calibrated: Whether it reads calibration text.
        scales_inputs: Whether input scales are searched, from statistics of all layer inputs.
        clips: Whether the range of each block is searched, unless a recipe says otherwise.
        mixes: Whether groups of linears get one of two widths, or of several formats, under a size budget.
        words: What its name alone stands for, where that is not INT4 in blocks of 128.
        mixed: The method that does the same at two widths, by name; empty where none does.
        algorithms: What the name of another tool's method may say, with the grid that each word means. The first is
            the default; a tool with a single algorithm has the empty word.
    """

    description: str
    rounding: Rounding = "nearest"
    calibrated: bool = False
    scales_inputs: bool = False
    clips: bool = False
    mixes: bool = False
    words: str = ""
    mixed: str = ""
    algorithms: Mapping[str, str] = field(default_factory=dict)


METHODS: Mapping[str, QuantMethod] = {
    "rtn": QuantMethod("round to nearest", mixed="mixed-rtn"),
    "awq": QuantMethod(
        "activation-aware scales, then a clip search for every block (calibrated)",
        calibrated=True,
        scales_inputs=True,
        clips=True,
        mixed="mixed",
    ),
    "gptq": QuantMethod(
        "a clip search, then column after column, each one's error made good by the next (calibrated)",
        rounding="sequential",
        calibrated=True,
        clips=True,
    ),
    "mixed": QuantMethod(
        "INT8 for the groups that matter most, INT4 for the rest, or any formats named, on awq, under a size budget",
        calibrated=True,
        scales_inputs=True,
        clips=True,
        mixes=True,
    ),
    "mixed-rtn": QuantMethod("the same on rtn", mixes=True),
    "smoothquant": QuantMethod(
        "activations' outliers moved into the weights, which are rounded by row: INT8 W8A8 (calibrated)",
        rounding="smoothed",
        calibrated=True,
        words="int8-w8a8",
    ),
    "none": QuantMethod(
        "the weights as they are, for activations, keys and values alone; fp16 and bf16 mean the same", "none"
    ),
    "modelopt": QuantMethod(
        "NVIDIA Model Optimizer's awq_lite (calibrated; needs nvidia-modelopt)",
        rounding="external",
        calibrated=True,
        algorithms={"awq_lite": "int4-g128"},
    ),
    "torchao": QuantMethod(
        "torchao's int4wo or int8wo (needs torchao)",
        rounding="external",
        algorithms={"int4wo": "int4-g64", "int8wo": "int8-channel"},
    ),
    "hqq": QuantMethod(
        "HQQ, half-quadratic search of zero points (needs hqq)",
        rounding="external",
        algorithms={"": "int4-g64"},
    ),
    "gptqmodel": QuantMethod(
        "GPTQ by GPTQModel (calibrated; needs gptqmodel)",
        rounding="external",
        calibrated=True,
        algorithms={"": "int4-g128"},
    ),
    "autoround": QuantMethod(
        "AutoRound, rounding learned by signed gradients (calibrated; needs auto-round)",
        rounding="external",
        calibrated=True,
        algorithms={"": "int4-g128"},
    ),
    "ort": QuantMethod(
        "ONNX Runtime's rtn, k_quant or default (needs onnxruntime)",
        rounding="external",
        algorithms={"rtn": "int4-g32", "k_quant": "int4-g32-asym", "default": "int4-g32"},
    ),
}
"""All methods by name; the adapters of other tools are in `quantize/tools`."""

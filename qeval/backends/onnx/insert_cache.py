"""A variant's static scales put into the attention of an exported graph, which then keeps keys and values as integers.

GroupQueryAttention computes with the integers that it keeps, those of the current positions included.
"""

import json
import re
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from qeval.backends.onnx.cache_format import cache_format
from qeval.backends.onnx.files import GENAI_CONFIG
from qeval.errors import QevalError
from qeval.quant.floats import TINY
from qeval.quant.variant import Variant

_ATTENTION = "GroupQueryAttention"
_PASTS, _PRESENTS, _SCALES = (3, 4), (1, 2), (12, 13)
"""The operator's inputs of past keys and values, its outputs of present ones, and its inputs of their scales."""
_ALL_ZERO = 1e30
"""The scale of what was zero on all of the calibration text: every number rounds to zero, as in torch."""


def quantize_caches(graph: ir.Graph, variant: Variant, folder: Path) -> None:
    """Have every attention keep keys and values as the variant's scheme says; change nothing where that is in float.

    Args:
        graph: The float graph.
        variant: Its scheme and the ranges of its layers.
        folder: The folder of the graph, whose genai_config.json is brought into line.

    Raises:
        UsageError: The operator has no such keys and values.
        QevalError: The graph's layers attend otherwise, or are others than the variant's.
    """
    how = cache_format(variant.scheme)
    if how is None:
        return
    layers = {name.partition(".")[0] for name in variant.ranges if name.endswith(".keys")}
    nodes = {_layer_of(node): node for node in graph if node.op_type == _ATTENTION}
    if set(nodes) != layers or not (folder / GENAI_CONFIG).is_file():
        raise QevalError(
            f"The exported graph has {_ATTENTION} in {len(nodes)} layers of {len(layers)}, and no other operator keeps "
            "keys and values as integers; the model builder of onnxruntime-genai writes it for the families that it "
            "takes (--exporter genai)."
        )
    head_size = _let_runtime_grow_caches(folder)
    for layer, node in nodes.items():
        node.resize_inputs(max(len(node.inputs), _SCALES[1] + 1))
        for place, part in zip(_SCALES, ("keys", "values"), strict=True):
            scales = _scales(f"{node.name}.{part}_scale", variant.ranges[f"{layer}.{part}"], 1 << (how.bits - 1))
            graph.register_initializer(scales)
            node.replace_input_with(place, scales)
        node.attributes.update({
            "k_quant_type": ir.AttrString("k_quant_type", how.quant_type),
            "v_quant_type": ir.AttrString("v_quant_type", how.quant_type),
            "kv_cache_bit_width": ir.AttrInt64("kv_cache_bit_width", how.bits),
        })  # fmt: skip
        for value in (*(node.inputs[place] for place in _PASTS), *(node.outputs[place] for place in _PRESENTS)):
            assert value is not None and value.shape is not None
            value.type = ir.TensorType(ir.DataType.INT8 if how.bits == 8 else ir.DataType.UINT8)
            # two numbers of 4 bits lie in a byte
            value.shape = ir.Shape([*value.shape[:3], head_size if how.bits == 8 else (head_size + 1) // 2])


def _let_runtime_grow_caches(folder: Path) -> int:
    """Have onnxruntime-genai make new buffers in each step, as its builder has it; return the size of a head."""
    file = folder / GENAI_CONFIG
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    content["search"]["past_present_share_buffer"] = False
    file.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    return int(content["model"]["decoder"]["head_size"])


def _layer_of(node: ir.Node) -> str:
    """Return the number of an attention's layer, which the name of its past keys has."""
    past = node.inputs[_PASTS[0]]
    found = re.search(r"\d+", "" if past is None else past.name or "")
    return found[0] if found else ""


def _scales(name: str, amax: Tensor, steps: int) -> ir.Value:
    """Return the scales of largest magnitudes, [1] or [heads * size], as the operator takes them."""
    scales = torch.where(amax < TINY, _ALL_ZERO, amax / steps).float().flatten()
    return ir.Value(name=name, const_value=ir.tensor(scales.numpy(), name=name))

"""A variant's experts put into an exported float graph: each MoE node becomes a QMoE that reads their codes.

The node has one width and one block for all matrices of its experts (onnxruntime 1.32.0, CPU: two widths are not
implemented); which grids it takes is said in `nbits`.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from qeval.backends.onnx.expert_nodes import DOMAIN, FLOAT_EXPERTS, INTERLEAVED, QUANTIZED_EXPERTS, STACKS, interleave
from qeval.backends.onnx.insert_nodes import NodeMaker, take_over
from qeval.backends.onnx.match_parameters import as_floats
from qeval.backends.onnx.matrices import integer
from qeval.backends.onnx.nbits import NBits, container_bits, expert_block, integers_of, to_nbits
from qeval.errors import QevalError, UsageError
from qeval.models.structure.weight_views import expert_of, is_expert, stack_of
from qeval.quant.pack import Bytes, pack
from qeval.quant.qweight import QWeight
from qeval.quant.variant import Variant

_INPUTS = {STACKS[0]: 2, STACKS[1]: 4}
"""The places of an MoE node's stacks among its inputs; the bias of each follows it."""

MatrixCounts = Counter[tuple[int, int, int, int]]
"""The number of quantized matrices by rows, columns, bits and block; a block of 0 is a scale a row."""


def insert_experts(graph: ir.Graph, variant: Variant, accuracy_level: int) -> MatrixCounts:
    """Swap a variant's experts in, and count the matrices written.

    Args:
        graph: The float graph, which changes.
        variant: The variant.
        accuracy_level: MatMulNBits' and QMoE's.

    Raises:
        QevalError: an expert of the variant has no place in the graph; it is named.
        UsageError: the node can't compute what the variant does.
    """
    changed = {name for name in (*variant.weights, *variant.floats) if is_expert(name)}
    written: MatrixCounts = Counter()
    for node in [node for node in graph if node.op_type == FLOAT_EXPERTS]:
        stacks = [_stack(node, key) for key in STACKS]
        names = {name for name in changed if stack_of(name) in {stack.name for stack in stacks}}
        changed -= names
        quantized = names & variant.weights.keys()
        if not quantized:
            _set_floats(node, {name: variant.floats[name] for name in names})
        elif len(quantized) == sum(_experts(stack) for stack in stacks):
            written += _quantize(graph, node, variant, accuracy_level)
        else:
            raise UsageError(_cannot(node, "some of them are quantized and others stay in float"))
    if changed:
        raise QevalError(f"The exported graph has no experts {min(changed)}; it can't take this variant.")
    return written


def quantized_experts(node: ir.Node) -> MatrixCounts:
    """Count the matrices that a QMoE node holds, read from its tensors."""
    bits, block = integer(node, "expert_weight_bits", 4), integer(node, "block_size", 0)
    found: MatrixCounts = Counter()
    for place in (2, 5):
        codes = node.inputs[place]
        assert codes is not None and codes.const_value is not None
        experts, rows, size = codes.const_value.shape.numpy()
        found[rows, size * 8 // bits, bits, block] += experts
    return found


def _quantize(graph: ir.Graph, node: ir.Node, variant: Variant, accuracy_level: int) -> MatrixCounts:
    """Put a QMoE in the place of an MoE."""
    stacks = {key: _weights(node, key, variant) for key in STACKS}
    bits, block = _width(node, [weight for stack in stacks.values() for weight in stack.items()])
    maker = NodeMaker(graph, node, node.name or FLOAT_EXPERTS)
    inputs, zeros = list(node.inputs[:2]), list[ir.Value | None]()
    for key, weights in stacks.items():
        parts = _stacked(weights, block, is_interleaved=key == STACKS[0] and INTERLEAVED in node.metadata_props)
        inputs += [
            maker.constant(f"{key}.Q{bits}", parts.codes),
            maker.constant(f"{key}.scales", parts.scales),
            _bias(node, key),
        ]
        zeros.append(None if parts.zeros is None else maker.constant(f"{key}.zero_points", parts.zeros))
    quantized = maker.node(
        QUANTIZED_EXPERTS,
        [*inputs, None, None, None, *zeros],
        QUANTIZED_EXPERTS,
        domain=DOMAIN,
        expert_weight_bits=bits,
        accuracy_level=accuracy_level,
        weights_prepacked=0,
        **({"block_size": block} if block else {}),
    )
    node_of = quantized.producer()
    assert node_of is not None
    node_of.attributes.update(node.attributes)
    take_over(graph, node, quantized)
    shapes = [weight.codes.shape for weights in stacks.values() for weight in weights.values()]
    return Counter((rows, columns, bits, block) for rows, columns in shapes)


def _weights(node: ir.Node, key: str, variant: Variant) -> dict[str, QWeight]:
    """Return the weights of a node's stack by name, in the order of the experts.

    Raises:
        UsageError: the variant does something to their inputs.
    """
    stack = _stack(node, key)
    names = sorted((name for name in variant.weights if stack_of(name) == stack.name), key=expert_of)
    for name in names:
        if name in variant.input_scales or name in variant.input_rotations or name in variant.rounded_inputs:
            raise UsageError(_cannot(node, "the inputs of their products are changed or rounded"))
    return {name: variant.weights[name] for name in names}


def _width(node: ir.Node, weights: list[tuple[str, QWeight]]) -> tuple[int, int]:
    """Return the bits and the block that a node stores its weights with; a block of 0 is a scale a row.

    Raises:
        UsageError: they have no such in common.
    """
    widths = {container_bits(integers_of(name, weight.grid)) for name, weight in weights}
    blocks = {expert_block(name, weight.grid, weight.codes.shape[1]) for name, weight in weights}
    if len(widths) > 1:
        raise UsageError(_cannot(node, "some have 4 bits and others 8"))
    return widths.pop(), min(blocks)  # of powers of two the least divides the others


class _Parts(NamedTuple):
    """A stack as a QMoE reads it: codes [experts, rows, bytes], scales and zero points [experts, rows(, blocks)]."""

    codes: Bytes
    scales: NDArray[np.float32]
    zeros: Bytes | None


def _stacked(weights: Mapping[str, QWeight], block: int, *, is_interleaved: bool) -> _Parts:
    """Return weights as one stack; `is_interleaved`: the two halves of their rows take turns."""
    packed = [to_nbits(name, weight, block=block or weight.codes.shape[1]) for name, weight in weights.items()]
    codes = np.stack([each.packed_codes().reshape(each.rows, -1) for each in packed])
    scales = np.stack([each.scales for each in packed])
    has_zeros = any(each.zeros is not None for each in packed)
    zeros = np.stack([_packed_zeros(each) for each in packed]) if has_zeros else None
    if is_interleaved:
        codes, scales = _interleaved(codes), _interleaved(scales)
        zeros = None if zeros is None else _interleaved(zeros)
    if not block:
        scales, zeros = scales[..., 0], None if zeros is None else zeros[..., 0]
    return _Parts(codes, scales, zeros)


def _interleaved(stack: NDArray[Any]) -> NDArray[Any]:
    return interleave(torch.from_numpy(stack)).numpy()


def _packed_zeros(packed: NBits) -> Bytes:
    """Return packed zero points, those in the middle of the range spelled out."""
    zeros = packed.packed_zeros()
    return pack(np.full(packed.scales.shape, 1 << (packed.bits - 1), np.uint8), packed.bits) if zeros is None else zeros


def _set_floats(node: ir.Node, floats: Mapping[str, Tensor]) -> None:
    """Give experts that stay in float other values."""
    for key in STACKS:
        stack = _stack(node, key)
        changed = {expert_of(name): tensor for name, tensor in floats.items() if stack_of(name) == stack.name}
        if not changed:
            continue
        assert stack.const_value is not None
        is_interleaved = key == STACKS[0] and INTERLEAVED in node.metadata_props
        whole = stack.const_value.numpy().copy()
        for expert, tensor in changed.items():
            whole[expert] = as_floats(interleave(tensor[None])[0] if is_interleaved else tensor)
        stack.const_value = ir.tensor(whole, name=stack.name)


def _experts(stack: ir.Value) -> int:
    assert stack.const_value is not None
    return int(stack.const_value.shape.numpy()[0])


def _stack(node: ir.Node, key: str) -> ir.Value:
    value = node.inputs[_INPUTS[key]]
    assert value is not None
    return value


def _bias(node: ir.Node, key: str) -> ir.Value | None:
    place = _INPUTS[key] + 1
    return node.inputs[place] if place < len(node.inputs) else None


def _cannot(node: ir.Node, why: str) -> str:
    return (
        f"ONNX Runtime's QMoE, one node for all experts of {node.name}, can't compute these: {why}. Give them one grid "
        "of integers, or leave ONNX out (--backend torch)."
    )

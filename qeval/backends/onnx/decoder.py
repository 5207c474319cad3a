"""A decoder's graph, cut at its head: a body from token ids to final states, and a head from states to logits.

The body gathers the wanted positions inside the graph, so that only they reach the head; and the head runs on as many
states at a time as its caller likes. Both are cut from the same file, so the kernels and their numbers are the file's.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from qeval.backends.onnx.files import load_graph
from qeval.backends.onnx.inspection import OnnxFacts, Port
from qeval.errors import UsageError
from qeval.parsing import one_sentence

HIDDEN, SCORED, STATES, COUNT, LOGITS = ("qeval.hidden", "qeval.scored", "qeval.states", "qeval.count", "qeval.logits")
"""Names that the cut adds: the head's input, the wanted rows of [batch * sequence], their states, the number of all
rows, and the head's output in fp32."""

_PRODUCTS = ("MatMul", "MatMulNBits", "Gemm", "FusedMatMul")
_AFTER_HEAD = ("Add", "Cast", "Div", "Identity", "Mul", "Reshape", "Tanh")
_DTYPES: dict[str, type[np.generic]] = {
    "FLOAT": np.float32, "FLOAT16": np.float16, "INT8": np.int8, "UINT8": np.uint8,
}  # fmt: skip
"""Keys and values; two of 4 bits lie in a byte."""
_INTEGERS: dict[str, type[np.integer]] = {"INT64": np.int64, "INT32": np.int32}


@dataclass(frozen=True)
class PastInput:
    """One layer's keys or values: fed as `name` [batch, heads, past, head_size], returned as `present`.

    Where two numbers lie in a byte, `head_size` is half of a head's.
    """

    name: str
    present: str
    heads: int
    head_size: int
    dtype: type[np.generic]


@dataclass(frozen=True)
class Decoder:
    """The facts of a graph that a session needs."""

    ids: str
    mask: str | None
    positions: str | None
    pasts: tuple[PastInput, ...]
    vocab_size: int
    hidden_size: int
    body: bytes
    head: bytes
    integers: Mapping[str, type[np.integer]] = field(default_factory=dict)
    """The types of ids, mask and positions by their names; int64 where none is told."""


class Widths(NamedTuple):
    """The vocabulary's rows, and the numbers of a state."""

    vocab: int
    hidden: int


def read_decoder(facts: OnnxFacts) -> Decoder:
    """Return the decoder of an ONNX folder whose logits cover every position.

    Raises:
        UsageError: the graph isn't one that qeval can feed or cut; the sentence says why.
    """
    path, ports = facts.files.model, facts.ports
    vocab, hidden = scorable(facts, load_graph(path).graph)
    logits = ports.logits.name
    with broken_rules(path):
        return Decoder(
            ids=ports.ids.name,
            mask=ports.mask.name if ports.mask else None,
            positions=ports.positions.name if ports.positions else None,
            pasts=past_inputs(facts),
            vocab_size=vocab,
            hidden_size=hidden,
            body=_body(path, logits, hidden, unwindow=bool(facts.windowed_caches)),
            head=_head(path, logits, hidden),
            integers=integer_inputs(facts),
        )


def broken_rules(path: Path) -> AbstractContextManager[None]:
    """Return what makes one sentence of whatever goes wrong with a graph in its block."""
    return one_sentence(f"{path} breaks the rules of its operators", after="Export it again.")


def scorable(facts: OnnxFacts, graph: ir.Graph) -> Widths:
    """Return the widths of a graph that can be fed and cut, and whose logits cover every position.

    Raises:
        UsageError: it isn't one; the sentence says why.
    """
    path, logits = facts.files.model, facts.ports.logits.name
    refuse_other_inputs(facts)
    past_inputs(facts)
    integer_inputs(facts)
    with broken_rules(path):
        product = None if facts.gives_last_position_only else head_product(graph, logits, path)
        if product is None or takes_last_position(product):
            raise UsageError(_last_only(path))
        return widths(graph, product, logits, path)


def refuse_other_inputs(facts: OnnxFacts) -> None:
    """Only what token ids determine can be fed.

    Raises:
        UsageError: the graph takes something else, which is named.
    """
    for other in facts.ports.other_inputs:
        raise UsageError(
            f"{facts.files.model} takes an input '{other.name}' {list(other.shape)} that qeval doesn't know how to "
            "fill."
        )


def integer_inputs(facts: OnnxFacts) -> dict[str, type[np.integer]]:
    """Return the types of the inputs that are ids, mask and positions, by name: int64, or int32 as NPUs take them.

    Raises:
        UsageError: one is of another type.
    """
    ports = (facts.ports.ids, facts.ports.mask, facts.ports.positions)
    types: dict[str, type[np.integer]] = {}
    for port in ports:
        if port is not None and port.dtype not in _INTEGERS:
            raise UsageError(
                f"{facts.files.model} takes '{port.name}' as {port.dtype or 'values of no type'}; qeval feeds int64 "
                "and int32."
            )
        if port is not None:
            types[port.name] = _INTEGERS[port.dtype]
    return types


def past_inputs(facts: OnnxFacts) -> tuple[PastInput, ...]:
    """Return every layer's keys and values.

    Raises:
        UsageError: their number, type or shape is none that qeval knows.
    """
    past, present = facts.ports.past, facts.ports.present
    if len(past) != len(present):
        raise UsageError(
            f"{facts.files.model} takes the keys and values of {len(past)} layers and returns those of {len(present)}."
        )
    pairs = zip((port for pair in past for port in pair), (port for pair in present for port in pair), strict=True)
    return tuple(_past(one, other.name, facts) for one, other in pairs)


def _past(port: Port, present: str, facts: OnnxFacts) -> PastInput:
    heads = port.shape[1] if len(port.shape) == 4 else None
    size = port.shape[3] if len(port.shape) == 4 and isinstance(port.shape[3], int) else None
    if size is None and port.dtype != "UINT8":  # bytes of an open size may hold a number or two
        size = facts.head_size
    if not isinstance(heads, int) or size is None or port.dtype not in _DTYPES:
        raise UsageError(
            f"{facts.files.model}: the shape or type of '{port.name}' ({port.dtype}, {list(port.shape)}) is none that "
            "qeval knows; it takes keys and values [batch, heads, past, head size] in floats or integers."
        )
    return PastInput(port.name, present, heads, size, _DTYPES[port.dtype])


def _last_only(path: Path) -> str:
    return (
        f"{path} computes logits of the last position only; scoring needs all of them "
        "(the model builder's prune_lm_head=true does that: build it without)."
    )


def head_product(graph: ir.Graph, logits: str, path: Path) -> ir.Node:
    """Return the matrix product that makes logits of states, behind soft caps, scales and casts.

    Raises:
        UsageError: none is found.
    """
    node = _output(graph, logits).producer()
    while node is not None and node.op_type in _AFTER_HEAD:
        computed = [value for value in node.inputs if value is not None and not _is_constant(value)]
        node = computed[0].producer() if computed else None
    if node is None or node.op_type not in _PRODUCTS:
        raise UsageError(f"{path}: no matrix product was found before its logits; qeval can't find the head.")
    return node


def _output(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.outputs if value.name == name)


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return value.const_value is not None or (producer is not None and producer.op_type == "Constant")


def takes_last_position(product: ir.Node) -> bool:
    """Return whether the head of a graph is given some of the positions only."""
    source = product.inputs[0]
    while source is not None and (producer := source.producer()) is not None:
        if producer.op_type in ("Gather", "GatherND", "Slice", "GatherElements"):
            return True
        if producer.op_type not in ("Cast", "Reshape", "Unsqueeze", "Squeeze"):
            return False
        source = producer.inputs[0]
    return False


def widths(graph: ir.Graph, product: ir.Node, name: str, path: Path) -> Widths:
    """Return the widths on both sides of the head's product.

    Raises:
        UsageError: the head's weight doesn't tell.
    """
    if product.op_type == "MatMulNBits":
        return Widths(product.attributes["N"].as_int(), product.attributes["K"].as_int())
    shape = _output(graph, name).shape
    sides = _matrix_shape(product.inputs[1])
    vocab = shape[-1] if shape is not None else None
    if not isinstance(vocab, int):
        vocab = max(sides, default=0)
    if len(sides) != 2 or vocab not in sides:
        raise UsageError(f"{path}: the head's shape can't be read off its weight; qeval can't cut the graph there.")
    return Widths(vocab, sides[0] if sides[1] == vocab else sides[1])


def _matrix_shape(value: ir.Value | None) -> list[int]:
    """Return the shape of a matrix behind transposes, casts and dequantization."""
    while value is not None:
        if value.const_value is not None:
            return [int(dim) for dim in value.const_value.shape.numpy()]
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and producer.inputs else None
    return []


def _body(path: Path, logits: str, hidden: int, *, unwindow: bool) -> bytes:
    """Return the graph up to the head: states of the wanted rows, and how many rows there were."""
    model = load_graph(path)
    graph = model.graph
    if unwindow:
        take_plain_caches(graph)
    states = head_product(graph, logits, path).inputs[0]
    assert states is not None
    scored = ir.Value(name=SCORED, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["scored"]))
    graph.inputs.append(scored)
    width = ir.Value(name="qeval.width", const_value=ir.tensor(np.array([-1, hidden]), name="qeval.width"))
    graph.register_initializer(width)
    kind = states.dtype or ir.DataType.FLOAT
    flat = _append(graph, "Reshape", [states, width], "qeval.flat", kind)
    count = _append(graph, "Shape", [flat], COUNT, ir.DataType.INT64, end=1)
    gathered = _append(graph, "Gather", [flat, scored], "qeval.gathered", kind, axis=0)
    chosen = _append(graph, "Cast", [gathered], STATES, ir.DataType.FLOAT, to=ir.DataType.FLOAT.value)
    count.shape, chosen.shape = ir.Shape([1]), ir.Shape(["scored", hidden])
    graph.outputs[:] = [chosen, count, *(value for value in graph.outputs if value.name != logits)]
    return serialized(model)


def take_plain_caches(graph: ir.Graph) -> None:
    """Let sliding layers take keys and values of any length; their window stays what it is."""
    for node in graph.all_nodes():
        node.attributes.pop("sliding_window_cache", None)


def _head(path: Path, logits: str, hidden: int) -> bytes:
    """Return the head alone: `HIDDEN` [1, n, hidden] fp32 to `LOGITS`."""
    model = load_graph(path)
    graph = model.graph
    product = head_product(graph, logits, path)
    source = product.inputs[0]
    assert source is not None
    given = ir.Value(name=HIDDEN, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "n", hidden]))
    cast = ir.node("Cast", [given], {"to": (source.dtype or ir.DataType.FLOAT).value}, name="qeval.cast")
    cast.outputs[0].name = "qeval.cast"
    graph.insert_before(product, cast)
    product.replace_input_with(0, cast.outputs[0])
    wide = _append(graph, "Cast", [_output(graph, logits)], LOGITS, ir.DataType.FLOAT, to=ir.DataType.FLOAT.value)
    graph.inputs[:] = [given]
    graph.outputs[:] = [wide]
    return serialized(model)


def _append(
    graph: ir.Graph, op: str, inputs: list[ir.Value], name: str, kind: ir.DataType, **attributes: int
) -> ir.Value:
    node = ir.node(op, inputs, attributes, name=name)
    node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(kind)
    graph.append(node)
    return node.outputs[0]


def serialized(model: ir.Model) -> bytes:
    """Return the model without what its outputs don't need, as bytes; weights stay in the file that they are in."""
    graph = model.graph
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(value.uses() or value in outputs for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in outputs:
            del graph.initializers[name]
    written: bytes = ir.serde.serialize_model(model).SerializeToString()
    return written

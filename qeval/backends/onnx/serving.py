"""A decoder's graph as one serves it: logits of the last position alone, which is all that the next token needs.

The file's own graph multiplies every position of a prompt by the head. Here the head is given the last one, as the
model builder does with `prune_lm_head=true` and as transformers' `generate` does; everything else, weights included,
is the file's. A graph that gives the last position already stays as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qeval.backends.onnx.decoder import (
    PastInput,
    broken_rules,
    head_product,
    integer_inputs,
    past_inputs,
    refuse_other_inputs,
    serialized,
    take_plain_caches,
    takes_last_position,
    widths,
)  # fmt: skip
from qeval.backends.onnx.files import load_graph
from qeval.backends.onnx.inspection import OnnxFacts
from qeval.errors import UsageError

_LAST, _WIDTH = "qeval.last", "qeval.last_state"


@dataclass(frozen=True)
class Served:
    """The facts of a graph that a generating session needs; `graph` is its serialized form."""

    ids: str
    mask: str | None
    positions: str | None
    pasts: tuple[PastInput, ...]
    logits: str
    vocab_size: int
    graph: bytes
    integers: Mapping[str, type[np.integer]]
    """The types of ids, mask and positions by their names."""
    in_place: bool
    """Whether keys and values are appended to the buffer that they lie in: GroupQueryAttention does, if it is given
    the same buffer as past and as present."""


def read_served(facts: OnnxFacts) -> Served:
    """Return the decoder of an ONNX folder, to generate with.

    Raises:
        UsageError: the graph isn't one that qeval can feed, or holds no keys and values; the sentence says why.
    """
    path, ports = facts.files.model, facts.ports
    refuse_other_inputs(facts)
    pasts = past_inputs(facts)
    if not pasts:
        raise UsageError(f"{path} takes no keys and values of earlier tokens: export it with a cache to generate.")
    if any(np.issubdtype(past.dtype, np.integer) for past in pasts):
        raise UsageError(
            f"{path} keeps keys and values as integers, and this engine feeds floats alone; give a folder whose keys "
            "and values are floats."
        )
    model = load_graph(path)
    with broken_rules(path):
        product = head_product(model.graph, ports.logits.name, path)
        vocab_size, _ = widths(model.graph, product, ports.logits.name, path)
        graph = _of_last_position(model, product)
    return Served(
        ids=ports.ids.name,
        mask=ports.mask.name if ports.mask else None,
        positions=ports.positions.name if ports.positions else None,
        pasts=pasts,
        logits=ports.logits.name,
        vocab_size=vocab_size,
        graph=graph,
        integers=integer_inputs(facts),
        in_place=set(facts.attention) == {"GroupQueryAttention"},
    )


def _of_last_position(model: ir.Model, product: ir.Node) -> bytes:
    take_plain_caches(model.graph)
    if not takes_last_position(product):
        _gather_last(model.graph, product)
    return serialized(model)


def _gather_last(graph: ir.Graph, product: ir.Node) -> None:
    """Gather [batch, 1, width] before the head."""
    states = product.inputs[0]
    last = ir.Value(name=_LAST, const_value=ir.tensor(np.array([-1]), name=_LAST))
    graph.register_initializer(last)
    gathered = ir.node("Gather", [states, last], {"axis": 1}, name=_WIDTH)
    gathered.outputs[0].name = _WIDTH
    graph.insert_before(product, gathered)
    product.replace_input_with(0, gathered.outputs[0])

"""New nodes and constants in a graph, behind the node that gives what they read."""

from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray


class NodeMaker:
    """Makes nodes one behind the other, and constants, all named after one base."""

    def __init__(self, graph: ir.Graph, after: ir.Node | None, base: str) -> None:
        """Begin behind a node.

        Args:
            graph: The graph, which changes.
            after: The node; None is the graph's beginning.
            base: The first part of all names.
        """
        self._graph, self._last, self._base = graph, after, base

    def constant(self, what: str, array: NDArray[Any], dtype: ir.DataType | None = None) -> ir.Value:
        """Return a new initializer; `what` is the last part of its name."""
        name = f"{self._base}.{what}"
        value = ir.Value(name=name, const_value=ir.tensor(array, dtype=dtype, name=name))
        self._graph.register_initializer(value)
        return value

    def node(
        self, op: str, inputs: list[ir.Value | None], what: str, *, domain: str = "", **attributes: int
    ) -> ir.Value:
        """Return the output of a new node; `what` is the last part of its name."""
        name = f"{self._base}_{what}"
        made = ir.node(op, inputs, attributes, domain=domain, name=name)
        made.outputs[0].name = f"{name}/output_0"
        if self._last is None:
            self._graph.insert_before(self._graph[0], made)
        else:
            self._graph.insert_after(self._last, made)
        self._last = made
        return made.outputs[0]


def take_over(graph: ir.Graph, old: ir.Node, new: ir.Value) -> None:
    """Put `new` in the place of `old`'s output, its name, type and shape included."""
    output = old.outputs[0]
    name, new.type, new.shape = output.name, output.type, output.shape
    output.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    output.name = f"{name}.replaced"
    new.name = name

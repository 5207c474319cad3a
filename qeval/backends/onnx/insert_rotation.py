"""An input that is turned while running (R4), in an exported graph."""

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qeval.backends.onnx.insert_nodes import NodeMaker
from qeval.backends.onnx.match_parameters import as_floats
from qeval.quant.rotation import hadamard_factors


def turned_input(graph: ir.Graph, source: ir.Value, core: Tensor, columns: int, base: str) -> ir.Value:
    """Return an input turned by H x `core`, in fp32 and back, by the products that `rotation.turn_runs` takes.

    Args:
        graph: The graph, which changes.
        source: The input, [..., columns].
        core: [m, m] fp32.
        columns: Its channels.
        base: The first part of all names.
    """
    maker = NodeMaker(graph, source.producer(), f"{base}.turned")
    run = len(core)
    turned = maker.node("Cast", [source], "wide", to=ir.DataType.FLOAT)
    shape = maker.node("Shape", [source], "shape")
    if run > 1:
        rows = maker.node("Reshape", [turned, maker.constant("runs", np.array([-1, run], np.int64))], "runs")
        turned = maker.node("MatMul", [rows, maker.constant("core", as_floats(core))], "core")
    for factor in hadamard_factors(columns // run, torch.float32, torch.device("cpu")):
        size = len(factor)
        parts = maker.constant(f"parts{run}", np.array([-1, size, run], np.int64))
        rows = maker.node("Reshape", [turned, parts], f"parts{run}")
        turned = maker.node("MatMul", [maker.constant(f"hadamard{run}", as_floats(factor)), rows], f"hadamard{run}")
        run *= size
    return maker.node("CastLike", [maker.node("Reshape", [turned, shape], "whole"), source], "narrow")

"""Statistics of the input of each group of linears, from one pass of the calibration text."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from qeval.models.structure.forward import run_samples
from qeval.models.structure.graph import Description, Group
from qeval.models.structure.weight_views import Before, watch_products, weights_of
from qeval.progress import Advance
from qeval.quant.statistics import Accumulator, InputStatistics

Statistics = dict[str, InputStatistics]
"""By the name of the first linear of a group; an expert that no token reached has none."""


@torch.inference_mode()
def collect(
    model: Any,
    description: Description,
    samples: Sequence[Sequence[int]],
    seed: int,
    advance: Advance,
    *,
    all_experts: bool = False,
) -> Statistics:
    """Collect the statistics of every group's input, one sample a forward pass.

    Args:
        model: The float model.
        description: Its structure.
        samples: Token ids of the calibration text.
        seed: Of the sketches; the result depends on it and on the samples alone.
        advance: Called with the tokens of each pass.
        all_experts: Whether each expert sees every token, not those routed to it alone.
    """
    weights = weights_of(model)
    accumulators = {
        group.names[0]: Accumulator(group.columns, seed + index, weights[group.names[0]].device)
        for index, group in enumerate(description.groups)
    }
    with listening(model, description.groups, accumulators, all_experts=all_experts):
        run_samples(model, samples, advance)
    return {name: accumulator.statistics() for name, accumulator in accumulators.items() if accumulator.tokens}


def listening(
    model: Any, groups: Sequence[Group], accumulators: Mapping[str, Accumulator], *, all_experts: bool = False
) -> AbstractContextManager[None]:
    """Add the inputs of groups to their accumulators (by the name of the first linear) inside a `with` block."""
    listeners = {group.seen_at: _listener(accumulators[group.names[0]]) for group in groups}
    return watch_products(model, before=listeners, all_experts=all_experts)


def _listener(accumulator: Accumulator) -> Before:
    def listen(inputs: Tensor) -> None:
        accumulator.add(inputs.reshape(-1, inputs.shape[-1]))

    return listen

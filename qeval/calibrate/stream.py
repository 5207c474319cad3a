"""Calibration text streams through the model once; each group of linears keeps statistics of its input."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from qeval.models.graph import Description, Group
from qeval.models.matrices import Before, watching
from qeval.progress import Advance
from qeval.quant.statistics import Accumulator, InputStatistics

Statistics = dict[str, InputStatistics]
"""By the name of the first linear of a group; an expert that no token reached has none."""


@torch.inference_mode()
def collect(
    model: Any, description: Description, samples: Sequence[Sequence[int]], seed: int, advance: Advance
) -> Statistics:
    """Statistics of every group's input over `samples` (token ids), one sample a forward pass.

    `advance` is told the tokens of each pass. The result depends on the samples and the seed alone.
    """
    accumulators = {
        group.names[0]: Accumulator(group.columns, seed + index, model.device)
        for index, group in enumerate(description.groups)
    }
    with listening(model, description.groups, accumulators):
        for sample in samples:
            ids = torch.tensor([sample], dtype=torch.long, device=model.device)
            model.base_model(input_ids=ids, use_cache=False)
            advance(len(sample))
    return {name: accumulator.statistics() for name, accumulator in accumulators.items() if accumulator.tokens}


def listening(
    model: Any, groups: Sequence[Group], accumulators: Mapping[str, Accumulator]
) -> AbstractContextManager[None]:
    """The inputs of the groups go into their accumulators (by the name of their first linear) for a while."""
    return watching(model, before={group.seen_at: _listener(accumulators[group.names[0]]) for group in groups})


def _listener(accumulator: Accumulator) -> Before:
    def listen(given: Tensor) -> None:
        accumulator.add(given.reshape(-1, given.shape[-1]))

    return listen

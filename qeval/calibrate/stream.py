"""Calibration text streams through the model once; each group of linears keeps statistics of its input."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qeval.models.graph import Description, Group
from qeval.progress import Advance
from qeval.quant.statistics import Accumulator, InputStatistics

Statistics = dict[str, InputStatistics]
"""By the name of the first linear of a group."""


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
    return {name: accumulator.statistics() for name, accumulator in accumulators.items()}


@contextmanager
def listening(model: Any, groups: Sequence[Group], accumulators: dict[str, Accumulator]) -> Iterator[None]:
    """The inputs of the groups' first linears go into their accumulators (by the linear's name) for a while."""

    def listener(accumulator: Accumulator) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: accumulator.add(args[0].reshape(-1, args[0].shape[-1]))

    handles = [
        model.get_submodule(group.names[0].removesuffix(".weight")).register_forward_pre_hook(
            listener(accumulators[group.names[0]])
        )
        for group in groups
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""SmoothQuant's scales of a model's groups, from the largest magnitude of each input channel on calibration text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qeval.models.structure.forward import run_samples
from qeval.models.structure.graph import Group
from qeval.models.structure.weight_views import Before, watch_products
from qeval.quant.awq import ScaleChoice
from qeval.quant.smooth import smooth_scales
from qeval.quantize.scaling import Grids, Parameters, Scaled


@torch.inference_mode()
def largest_inputs(
    model: Any, groups: Sequence[Group], samples: Sequence[Sequence[int]], *, all_experts: bool = False
) -> dict[str, Tensor]:
    """Return the largest magnitude of each channel of every group's input, [columns] by the group's first name.

    Args:
        model: The float model.
        groups: Its groups; one whose input no token reaches is missing.
        samples: Token ids of the calibration text, one sequence a forward pass.
        all_experts: Whether each expert sees every token, not those routed to it alone.
    """
    largest: dict[str, Tensor] = {}

    def listener(name: str) -> Before:
        def look(inputs: Tensor) -> None:
            if inputs.numel():
                amax = inputs.float().abs().flatten(0, -2).amax(0)
                largest[name] = torch.maximum(largest[name], amax) if name in largest else amax

        return look

    listeners = {group.seen_at: listener(group.names[0]) for group in groups}
    with watch_products(model, before=listeners, all_experts=all_experts):
        run_samples(model, samples, lambda _: None)
    return largest


def smoothed_groups(
    groups: Sequence[Group], parameters: Parameters, grids: Grids, largest: Mapping[str, Tensor], alpha: float
) -> dict[str, Scaled]:
    """Return the scales of the groups whose input a preceding tensor can divide, by the group's first name.

    Args:
        groups: The model's.
        parameters: Its weights.
        grids: The grid of every weight that is quantized; a group with a linear in float is left alone.
        largest: As `largest_inputs` gives it.
        alpha: The share of the outliers that the weights take.
    """
    scales: dict[str, Scaled] = {}
    for group in groups:
        first, fold = group.names[0], group.fold
        if fold is None or first not in largest or not all(name in grids for name in group.names):
            continue
        weights = [parameters[name] for name in group.names]
        factors = smooth_scales(weights, largest[first], alpha, fold.repeat, fold.head)
        scales[first] = Scaled(group.names, ScaleChoice(factors, alpha, 0.0, 0.0), fold, group.followers)
    return scales

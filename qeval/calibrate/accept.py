"""Which of several ways to give out the bits is taken: the one with the least KL on text that none was chosen on.

Each way is measured whole, all its groups quantized together. A layer's quantized weights are in the model only while
the text passes that layer, so that no second copy of the model is held.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from qeval.calibrate.in_order import Stream
from qeval.calibrate.recall import layers_of, replaced_by
from qeval.calibrate.sensitivity import Effective
from qeval.metrics.tokens import mean_kl
from qeval.models.graph import Description
from qeval.models.head import Head

SAMPLES, LENGTH = 2, 256
"""Calibration tokens that the ways are measured on; KL at every position."""


@torch.inference_mode()
def measure_ways(
    model: Any,
    description: Description,
    head: Head,
    samples: Sequence[Sequence[int]],
    ways: Mapping[str, Effective],
) -> dict[str, float]:
    """Mean KL(baseline || all groups quantized) in nats of each way, over the last of `samples`; by the way's name.

    A way gives each group's quantized matrices as they act in the unfolded model.
    """
    held_out = [sample[:LENGTH] for sample in samples[-SAMPLES:]]
    base = _final_states(model, description, held_out, lambda group: {})
    return {
        name: mean_kl(head.logits, base, head.logits, _final_states(model, description, held_out, way))
        for name, way in ways.items()
    }


def _final_states(model: Any, description: Description, samples: Sequence[Sequence[int]], way: Effective) -> Tensor:
    stream = Stream(model, layers_of(model, description), samples)
    for layer in range(len(description.layers)):
        with ExitStack() as quantized:
            for group in (group for group in description.groups if group.layer == layer):
                quantized.enter_context(replaced_by(stream.parameters, way(group)))
            stream.pass_layer()
    return stream.final_states()

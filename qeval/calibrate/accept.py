"""Which of several ways to give out the bits is taken: the one with the least KL on text that none was chosen on.

Each way is measured whole, all its groups quantized together. A layer's quantized weights are in the model only while
the text passes that layer, so that no second copy of the model is held.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from qeval.calibrate.in_order import Stream
from qeval.calibrate.recall import layers_of, replaced_by
from qeval.calibrate.sensitivity import Effective, trial_passes
from qeval.metrics.tokens import mean_kl
from qeval.models.graph import Description
from qeval.models.head import Head
from qeval.progress import Advance, in_parts

SAMPLES, LENGTH = 2, 256
"""Calibration tokens that the ways are measured on; KL at every position."""


@torch.inference_mode()
def measure_ways(
    model: Any,
    description: Description,
    head: Head,
    samples: Sequence[Sequence[int]],
    ways: Mapping[str, Effective],
    advance: Advance,
) -> dict[str, float]:
    """Mean KL(baseline || all groups quantized) in nats of each way, over the last of `samples`; by the way's name.

    A way gives each group's quantized matrices as they act in the unfolded model. `advance` is told `trial_passes` in
    all, a share after each layer of each pass.
    """
    held_out = [sample[:LENGTH] for sample in samples[-SAMPLES:]]
    done = in_parts(advance, trial_passes(description), (1 + len(ways)) * len(description.layers))
    base = _final_states(model, description, held_out, lambda group: {}, done)
    return {
        name: mean_kl(head.logits, base, head.logits, _final_states(model, description, held_out, way, done))
        for name, way in ways.items()
    }


def _final_states(
    model: Any, description: Description, samples: Sequence[Sequence[int]], way: Effective, done: Callable[[], None]
) -> Tensor:
    stream = Stream(model, layers_of(model, description), samples)
    for layer in range(len(description.layers)):
        with ExitStack() as quantized:
            for group in (group for group in description.groups if group.layer == layer):
                quantized.enter_context(replaced_by(stream.parameters, way(group)))
            stream.pass_layer()
        done()
    return stream.final_states()

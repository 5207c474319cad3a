"""Measure several mixes, to take the one with the least KL on text that none was chosen on.

Each mix is measured whole, all its groups quantized together. A layer's quantized weights are in the model only while
the text passes that layer, so that no second copy of the model is held; where layers don't run in turn, until the end.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from qeval.metrics.tokens import mean_kl
from qeval.models.structure.graph import Description
from qeval.models.structure.head import Head
from qeval.progress import Advance, in_parts
from qeval.quantize.patching import replace_values
from qeval.quantize.sensitivity import Effective, trial_passes
from qeval.quantize.sequential import Stream

MIX_SAMPLES, MIX_LENGTH = 2, 256
"""Calibration tokens that the mixes are measured on; KL at every position."""


@torch.inference_mode()
def measure_mixes(
    model: Any,
    description: Description,
    head: Head,
    samples: Sequence[Sequence[int]],
    mixes: Mapping[str, Effective],
    advance: Advance,
) -> dict[str, float]:
    """Measure the mean KL(baseline || all groups quantized) in nats of each mix, by the mix's name.

    Args:
        model: The float model; it is left as it was.
        description: Its structure.
        head: Its output projection.
        samples: Token ids of the calibration text, of which the last `MIX_SAMPLES` are used.
        mixes: By name, a function that returns a group's quantized matrices as they act in the unfolded model.
        advance: Called with `trial_passes` in all, a share after each layer of each pass.
    """
    held_out = [sample[:MIX_LENGTH] for sample in samples[-MIX_SAMPLES:]]
    done = in_parts(advance, trial_passes(description), (1 + len(mixes)) * len(description.layers))
    base = _final_states(model, description, held_out, lambda group: {}, done)
    return {
        name: mean_kl(head.logits, base, head.logits, _final_states(model, description, held_out, effective, done))
        for name, effective in mixes.items()
    }


def _final_states(
    model: Any,
    description: Description,
    samples: Sequence[Sequence[int]],
    effective: Effective,
    done: Callable[[], None],
) -> Tensor:
    stream = Stream(model, description, samples)
    with ExitStack() as quantized:
        for layer in range(len(description.layers)):
            for group in (group for group in description.groups if group.layer == layer):
                quantized.enter_context(replace_values(stream.parameters, effective(group)))
            stream.pass_layer()
            if description.in_turn:
                quantized.close()
            done()
        return stream.final_states()

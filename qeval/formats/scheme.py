"""The scheme of a checkpoint that someone else quantized: its activations, keys and values, as its configuration says.

What its configuration rounds and qeval has no format for, or its file no scale, is named in a sentence and left as it
is.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qeval.errors import UsageError
from qeval.formats.assemble import Reading, is_packed
from qeval.formats.checkpoint import CheckpointTensors
from qeval.formats.match_baseline import BaselineWeights
from qeval.formats.names import TensorNames
from qeval.formats.rounding import TensorRounding
from qeval.models.structure.weight_views import is_expert
from qeval.quant.scheme import PartName, Scheme, TensorFormat


class ExternalScheme(NamedTuple):
    """The scheme of a checkpoint: the way in which it rounds what is not weights.

    `scheme`, `ranges` and `input_formats` are those of a `Variant`. `limits`: what it rounds and qeval does not, in
    words. `notes`: which scales its file lacks, and what stands for them.
    """

    scheme: Scheme
    ranges: Mapping[str, Tensor]
    input_formats: Mapping[str, TensorFormat | None]
    limits: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def without_caches(self, reason: str) -> "ExternalScheme":
        """Return the scheme with keys and values as they are, and the reason among its limits."""
        inputs = {name: amax for name, amax in self.ranges.items() if not name.endswith((".keys", ".values"))}
        scheme = replace(self.scheme, keys=None, values=None)
        return ExternalScheme(scheme, inputs, self.input_formats, (*self.limits, reason))


def read_scheme(tensors: CheckpointTensors, reading: Reading, baseline: BaselineWeights) -> ExternalScheme:
    """Return the scheme that a checkpoint's configuration and its static scales say.

    Args:
        tensors: The checkpoint's.
        reading: How they are to be read.
        baseline: The weights that they are compared with.

    Raises:
        UsageError: A static scale is no positive number.
    """
    if reading.format is None:
        return ExternalScheme(Scheme(), {}, {})
    inputs = _read_inputs(TensorNames(tensors, baseline.prefix), reading, baseline)
    keys = _read_cache(tensors, reading, baseline, "keys")
    values = _read_cache(tensors, reading, baseline, "values")
    return ExternalScheme(
        Scheme(inputs.scheme.activations, keys.scheme.keys, values.scheme.values),
        {**inputs.ranges, **keys.ranges, **values.ranges},
        inputs.input_formats,
        (*inputs.limits, *keys.limits, *values.limits),
        (*keys.notes, *values.notes),
    )


def _read_inputs(names: TensorNames, reading: Reading, baseline: BaselineWeights) -> ExternalScheme:
    """Return the formats of the inputs of linears: the commonest as the scheme's, the others by name."""
    assert reading.format is not None
    formats: dict[str, TensorFormat | None] = {}
    ranges: dict[str, Tensor] = {}
    limits = Counter[str]()
    head = baseline.description.head
    matrices = [*baseline.needed, *([head] if baseline.description.tied else [])]
    for name in matrices:
        if baseline.parameters[name].dim() != 2 or not is_packed(names, reading.format, name):
            continue
        formats[name] = None
        module = names.modules(name)[0]
        rounding = reading.format.inputs(module, reading.config)
        if rounding is None:
            continue
        if rounding.limits:
            limits[rounding.limits] += 1
        if reason := _reason_to_leave(rounding, name, head, names.tensors, module):
            limits[reason] += 1
            continue
        formats[name] = rounding.how
        if rounding.scale:
            ranges[name] = _largest_magnitude(names.tensors, f"{module}.{rounding.scale}", rounding)

    rounded = Counter(how for how in formats.values() if how is not None)
    commonest = rounded.most_common(1)[0][0] if rounded else None
    others = {name: how for name, how in formats.items() if how != commonest}
    sentences = tuple(f"inputs of {count} of {len(formats)} linears: {reason}" for reason, count in limits.items())
    return ExternalScheme(Scheme(activations=commonest), ranges, others, sentences)


def _reason_to_leave(
    rounding: TensorRounding, name: str, head: str, tensors: CheckpointTensors, module: str
) -> str | None:
    """Return why a linear's input is left as it is although it is to be rounded; None where it can be."""
    if rounding.how is None:
        return rounding.reason
    if name == head:
        return "the head's input stays in float"
    if is_expert(name) and rounding.scale:
        return "experts are kept in stacks, where gate and up share an input and static scales may differ"
    if rounding.scale and f"{module}.{rounding.scale}" not in tensors:
        return f"{rounding.how}, whose {rounding.scale} the file has not"
    return None


def _read_cache(
    tensors: CheckpointTensors, reading: Reading, baseline: BaselineWeights, part: PartName
) -> ExternalScheme:
    """Return the format of keys or values, and its scales by layer."""
    assert reading.format is not None
    rounding = reading.format.caches(reading.config, part)
    if rounding is None:
        return ExternalScheme(Scheme(), {}, {})
    if rounding.how is None:
        return ExternalScheme(Scheme(), {}, {}, (f"{part}: {rounding.reason}",))
    stored = _scales_by_layer(tensors, rounding.scale)
    layers = range(len(baseline.description.layers))
    missing = [layer for layer in layers if layer not in stored]
    if missing and rounding.default is None:
        reason = (
            f"{part}: {rounding.how}, whose {rounding.scale} the file lacks in {len(missing)} of {len(layers)} layers"
        )
        return ExternalScheme(Scheme(), {}, {}, (reason,))
    ranges = {f"{layer}.{part}": torch.tensor(rounding.largest * (rounding.default or 1.0)) for layer in missing}
    ranges |= {
        f"{layer}.{part}": _largest_magnitude(tensors, stored[layer], rounding)
        for layer in layers
        if layer not in missing
    }
    note = f"the file has no {rounding.scale} in {len(missing)} of {len(layers)} layers: {rounding.default} there"
    formats: dict[str, Any] = {part: rounding.how}
    scheme = replace(Scheme(), **formats)
    limits = (f"{part}: {rounding.limits}",) if rounding.limits else ()
    return ExternalScheme(scheme, ranges, {}, limits, (note,) if missing else ())


def _scales_by_layer(tensors: CheckpointTensors, suffix: str) -> dict[int, str]:
    """Return the tensors of a name by the first number in it, which is the layer's."""
    found = {}
    for name in tensors.named():
        layer = re.search(r"\.(\d+)\.", name)
        if layer and name.endswith(f".{suffix}"):
            found[int(layer[1])] = name
    return found


def _largest_magnitude(tensors: CheckpointTensors, name: str, rounding: TensorRounding) -> Tensor:
    """Return what a static scale of the file stands for, one number in fp32."""
    scale = tensors.load(name).float()
    if scale.numel() != 1 or not bool((scale > 0) & scale.isfinite()):
        raise UsageError(
            f"its {name} is to be one positive number, and has {scale.numel()}: {scale.flatten()[:3].tolist()}."
        )
    one = scale.reshape(()).double()
    return (rounding.largest / one if rounding.divides else rounding.largest * one).float()

"""A checkpoint that someone else quantized, laid beside the baseline and made into a `Variant`, or refused.

Every weight of the baseline is found in it or named as missing. Before anything is scored: the tensors that no
quantizer changes (embedding, last norm) must be the baseline's, and every matrix must resemble it as its bits allow
(`formats/misreadings.py`), AWQ's folded scales taken back through the groups that `models/structure/graph.py` found.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qeval.arithmetic import dtype_name
from qeval.errors import UsageError
from qeval.formats.base import CheckpointFormat, Config, DecodedMatrix, Module, Values
from qeval.formats.checkpoint import CheckpointTensors
from qeval.formats.match_baseline import (
    BaselineWeights,
    as_matrix,
    check_resemblance,
    check_same,
    check_tie,
    fit_shape,
)
from qeval.formats.misreadings import values_of
from qeval.formats.names import TensorNames
from qeval.formats.stack import stack_rows
from qeval.models.checkpoint.weights import shorten_list
from qeval.models.structure.weight_views import is_expert
from qeval.progress import Advance
from qeval.quant.qweight import QWeight
from qeval.quant.variant import FloatWeight, StoredMatrix, Variant

_HARMLESS = (
    "rotary_emb.inv_freq", "masked_bias", "input_scale", "input_scale_ub", "input_global_scale", "k_scale", "v_scale",
    "activation_scale",
)  # fmt: skip


class Reading(NamedTuple):
    """A way to read a checkpoint's tensors: by a format, or as floats; the forms that floats come from, if any."""

    format: CheckpointFormat | None
    config: Config
    forms: Mapping[str, tuple[str, int]]
    """For a checkpoint converted from another file: what a matrix was there, and its bits."""


def assemble(
    tensors: CheckpointTensors, reading: Reading, baseline: BaselineWeights, key: str, advance: Advance
) -> Variant:
    """Return the variant that lies in `tensors`.

    Args:
        tensors: The checkpoint's.
        reading: How they are to be read.
        baseline: The weights that they are compared with.
        key: The variant's.
        advance: Hears the parameters that were read.

    Raises:
        UsageError: Tensors are missing or of another shape, it is another model's, or its matrices are misread.
    """
    names = TensorNames(tensors, baseline.prefix)
    check_same_base(names, reading, baseline)
    matrices: dict[str, DecodedMatrix | Tensor] = {}
    for name in _parameters_to_read(names, baseline):
        matrices[name] = _read_weight(names, reading, baseline, name)
        check_finite_matrix(name, matrices[name])
        advance(baseline.parameters[name].numel())
    check_tie(names, matrices, baseline)
    inputs = _input_factors(names, reading, baseline)
    exact = reading.format is not None or bool(reading.forms)
    check_resemblance(matrices, inputs, baseline, loose=() if exact else matrices)
    for name in filter(is_expert, [*inputs]):
        matrices[name] = _fold_input_scales(as_matrix(matrices[name]), inputs.pop(name))
    return _variant(matrices, inputs, reading, baseline, key)


def check_same_base(names: TensorNames, reading: Reading, baseline: BaselineWeights) -> None:
    """Refuse another model's checkpoint by tensors that no quantizer changes, where they are floats in it.

    Raises:
        UsageError: Tensors are missing, or the embedding, the head or the last norm differ.
    """
    missing = [name for name in baseline.needed if name not in names]
    if missing:
        raise UsageError(f"it lacks {shorten_list(sorted(missing))}, which the baseline has: it is another model's.")
    for name in _unchanged_names(baseline):
        if _is_packed(names, reading, baseline, name) or name in reading.forms:
            continue
        base = baseline.parameters[name]
        check_same(name, fit_shape(name, names.load(name), base), base)


def _variant(
    matrices: Mapping[str, DecodedMatrix | Tensor],
    inputs: Mapping[str, Tensor],
    reading: Reading,
    baseline: BaselineWeights,
    key: str,
) -> Variant:
    weights = {name: read for name, read in matrices.items() if isinstance(read, QWeight)}
    floats: dict[str, Tensor] = {}
    kept_weights, stored_weights = [], []

    linears = {name for group in baseline.description.groups for name in group.names}
    simulated = reading.format is None and not reading.forms

    # integers stay as they are; floats that differ from the baseline's are written over it
    for name, read in matrices.items():
        if isinstance(read, QWeight):
            continue
        if isinstance(read, Values):
            floats[name] = read.values
            stored_weights.append(StoredMatrix(name, read.values.numel(), read.form, read.size_bits))
            continue
        base = baseline.parameters[name]
        same = torch.equal(read.to(base.dtype), base.cpu())
        if not same:
            floats[name] = read
        if simulated and name in linears:
            stored_weights.append(
                StoredMatrix(name, read.numel(), dtype_name(read.dtype), read.numel() * read.element_size() * 8)
            )
        else:
            kept_weights.append(
                FloatWeight(name, read.numel(), f"in float{'' if same else ', other than the baseline has it'}")
            )

    caches = reading.format is not None and reading.format.caches(reading.config, "keys") is not None
    if not (weights or stored_weights or caches):
        raise UsageError("it holds no quantized weight.")
    return Variant(
        key,
        weights,
        floats,
        inputs,
        tuple(kept_weights),
        details=_details(weights, stored_weights),
        stored=tuple(stored_weights),
    )


def _details(weights: Mapping[str, QWeight], stored: Iterable[StoredMatrix]) -> dict[str, str]:
    forms = Counter(each.form for each in stored)
    parts = [f"{len(weights)} matrices as integers, scales and zero points"] if weights else []
    parts += [f"{count} as dequantized values ({form})" for form, count in forms.most_common()]
    return {
        "read as": ", ".join(parts) or "floats",
        "computed": "by qeval's own path, not by the kernels that it was made for",
    }


def _parameters_to_read(names: TensorNames, baseline: BaselineWeights) -> list[str]:
    """Return the parameters to read: a tied head too where the file quantizes one of its own."""
    head = baseline.description.head
    has_head = any(tensor != head for tensor in names.tensors.below(head.removesuffix(".weight")))
    return [*baseline.needed, *([head] if baseline.description.tied and has_head else [])]


def _read_weight(names: TensorNames, reading: Reading, baseline: BaselineWeights, name: str) -> DecodedMatrix | Tensor:
    base = baseline.parameters[name]
    if reading.format is not None and _is_packed(names, reading, baseline, name):
        return decode_weight(names, reading.format, reading.config, name, base)
    values = fit_shape(name, baseline.as_matrix(name, names.load(name), names.stored(name)), base)
    if name in reading.forms:
        form, bits = reading.forms[name]
        return Values(values, form, bits)
    if not values.is_floating_point():
        raise UsageError(f"it holds {name} as {dtype_name(values.dtype)} without what would say how to read that.")
    return values


def decode_weight(
    names: TensorNames, reads: CheckpointFormat, config: Config, name: str, base: Tensor
) -> DecodedMatrix:
    """Decode the modules that are a weight in the file.

    Args:
        names: The file's tensors by the baseline's names.
        reads: The format.
        config: The checkpoint's `quantization_config`.
        name: The weight.
        base: The baseline's matrix, [rows, columns].

    Raises:
        UsageError: A module's tensors are missing or do not fit each other.
    """
    modules = names.modules(name)
    rows = len(base) // len(modules)
    parts = [Module(each, rows, base.shape[1], names.tensors.parts_of(each)) for each in modules]
    return stack_rows([_decode_module(part, reads, config) for part in parts])


def is_packed(names: TensorNames, reads: CheckpointFormat, name: str) -> bool:
    """Return whether a file's tensors of a weight are a format's."""
    return any(f"{module}.{each}" in names.tensors for module in names.modules(name) for each in reads.markers)


def _decode_module(module: Module, reads: CheckpointFormat, config: Config) -> DecodedMatrix:
    try:
        return reads.decode(module, config)
    except (ValueError, RuntimeError, IndexError, KeyError) as error:  # parts that do not fit each other
        raise module.error(f"can't be read as {reads.title} ({' '.join(str(error).split())})") from error


def _input_factors(names: TensorNames, reading: Reading, baseline: BaselineWeights) -> dict[str, Tensor]:
    """Return what the inputs of linears are multiplied by while running, fp32, where the file says so.

    [columns]; [rows, columns] where an expert's gate and up say other things.
    """
    part = reading.format.input_scale if reading.format else None
    factors: dict[str, Tensor] = {}
    for name in _parameters_to_read(names, baseline) if part else ():
        if not _is_packed(names, reading, baseline, name):
            continue
        tensors = [f"{module}.{part}" for module in names.modules(name)]
        if all(each in names.tensors for each in tensors):
            rows, columns = baseline.parameters[name].shape
            scales = [_input_scale(names.tensors, each, columns) for each in tensors]
            alike = all(torch.equal(each, scales[0]) for each in scales)
            factors[name] = (
                scales[0] if alike else torch.cat([each.expand(rows // len(tensors), -1) for each in scales])
            )
    return factors


def _input_scale(tensors: CheckpointTensors, name: str, columns: int) -> Tensor:
    scales = tensors.load(name).float()
    if scales.shape != (columns,) or not bool(((scales > 0) & scales.isfinite()).all()):
        raise UsageError(f"its {name} is no positive number for each of the linear's {columns} inputs.")
    return scales


def _fold_input_scales(read: DecodedMatrix, scales: Tensor) -> Values:
    """Return an expert's matrix with the scales of its inputs in it: nothing else could apply them."""
    form = read.form if isinstance(read, Values) else str(read.grid)
    return Values(values_of(read) * scales, f"{form} with input scales", read.size_bits + 16 * scales.numel())


def _is_packed(names: TensorNames, reading: Reading, baseline: BaselineWeights, name: str) -> bool:
    if reading.format is None or baseline.parameters[name].dim() != 2:
        return False
    return is_packed(names, reading.format, name)


def padding_ids(tensors: CheckpointTensors, baseline: BaselineWeights) -> range:
    """Return the ids that the checkpoint's embedding has beyond the baseline's."""
    name = baseline.description.embedding
    rows = baseline.parameters[name].shape[0]
    stored = TensorNames(tensors, baseline.prefix).stored(name)
    entry = next((entry for entry in tensors.entries if entry.name == stored), None)
    return range(rows, max(rows, entry.shape[0] if entry and len(entry.shape) == 2 else rows))


def unused_tensors(tensors: CheckpointTensors, baseline: BaselineWeights) -> list[str]:
    """Return tensors that belong to none of the baseline's parameters, and are not known to be harmless."""
    names = TensorNames(tensors, baseline.prefix)
    used = {each for name in baseline.parameters for each in names.belonging(name)}
    return sorted(name for name in tensors.named() if name not in used and not name.endswith(_HARMLESS))


def _unchanged_names(baseline: BaselineWeights) -> list[str]:
    """Return the embedding, a head of its own, and the norms that no group's scales can be folded into."""
    folded = {name for group in baseline.description.groups if group.fold for name in group.fold.parameters}
    norms = [n for n, p in baseline.parameters.items() if p.dim() == 1 and n.endswith("weight") and n not in folded]
    about = baseline.description
    return [about.embedding, *([] if about.tied else [about.head]), *norms]


def check_finite_matrix(name: str, read: DecodedMatrix | Tensor) -> None:
    """Refuse what is no number.

    Raises:
        UsageError: It names the matrix and how many such scales or values it has.
    """
    part = read.scales if isinstance(read, QWeight) else read.values if isinstance(read, Values) else read
    if math.isfinite(float(part.float().sum())):  # a tenth of the time of looking at each
        return
    if bad := int((~torch.isfinite(part.float())).sum()):
        what = "scales" if isinstance(read, QWeight) else "values"
        raise UsageError(f"its {name} has {bad} {what} that are not finite.")

"""A checkpoint that someone else quantized, laid beside the baseline and made into a `Variant`, or refused.

Every weight of the baseline is found in it or named as missing. Before anything is scored: the tensors that no
quantizer changes (embedding, last norm) must be the baseline's, and every matrix must resemble it as its bits allow
(`formats/resemble.py`), AWQ's folded scales taken back through the groups that `models/graph.py` found.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qeval.errors import UsageError
from qeval.formats.base import Config, Format, Matrix, Module, Values
from qeval.formats.beside import Baseline, as_matrix, check_resemblance, check_same, check_tie, dtype_name, fitting
from qeval.formats.checkpoint import Tensors
from qeval.formats.join import joined
from qeval.formats.names import Names
from qeval.formats.resemble import values_of
from qeval.models.matrices import is_expert
from qeval.models.weights import listed
from qeval.progress import Advance
from qeval.quant.qweight import QWeight
from qeval.quant.variant import Kept, Stored, Variant

_HARMLESS = (
    "rotary_emb.inv_freq", "masked_bias", "input_scale", "input_scale_ub", "input_global_scale", "k_scale", "v_scale",
)  # fmt: skip


class Reading(NamedTuple):
    """How a checkpoint's tensors are to be read: by a format, or as floats; the forms that floats come from, if any."""

    format: Format | None
    config: Config
    forms: Mapping[str, tuple[str, int]]
    """For a checkpoint converted from another file: what a matrix was there, and its bits."""


def assemble(tensors: Tensors, reading: Reading, baseline: Baseline, key: str, advance: Advance) -> Variant:
    """The variant that lies in `tensors`. `advance` is told the parameters that were read.

    Raises:
        UsageError: tensors are missing or of another shape, it is another model's, or its matrices are misread.
    """
    names = Names(tensors, baseline.prefix)
    check_same_base(names, reading, baseline)
    found: dict[str, Matrix | Tensor] = {}
    for name in _wanted(names, baseline):
        found[name] = _read(names, reading, baseline, name)
        check_finite(name, found[name])
        advance(baseline.parameters[name].numel())
    check_tie(names, found, baseline)
    inputs = _inputs(names, reading, baseline)
    exact = reading.format is not None or bool(reading.forms)
    check_resemblance(found, inputs, baseline, loose=() if exact else found)
    for name in filter(is_expert, [*inputs]):
        found[name] = _multiplied(as_matrix(found[name]), inputs.pop(name))
    return _variant(found, inputs, reading, baseline, key)


def check_same_base(names: Names, reading: Reading, baseline: Baseline) -> None:
    """Refuse another model's checkpoint by tensors that no quantizer changes, where they are floats in it.

    Raises:
        UsageError: tensors are missing, or the embedding, the head or the last norm differ.
    """
    missing = [name for name in baseline.needed if name not in names]
    if missing:
        raise UsageError(f"it lacks {listed(sorted(missing))}, which the baseline has: it is another model's.")
    for name in _untouched(baseline):
        if _is_packed(names, reading, baseline, name) or name in reading.forms:
            continue
        ours = baseline.parameters[name]
        check_same(name, fitting(name, names.load(name), ours), ours)


def _variant(
    found: Mapping[str, Matrix | Tensor], inputs: Mapping[str, Tensor], reading: Reading, baseline: Baseline, key: str
) -> Variant:
    weights = {name: read for name, read in found.items() if isinstance(read, QWeight)}
    floats: dict[str, Tensor] = {}
    kept, stored = [], []
    linears = {name for group in baseline.description.groups for name in group.names}
    simulated = reading.format is None and not reading.forms
    for name, read in found.items():
        if isinstance(read, QWeight):
            continue
        if isinstance(read, Values):
            floats[name] = read.values
            stored.append(Stored(name, read.values.numel(), read.form, read.size_bits))
            continue
        ours = baseline.parameters[name]
        same = torch.equal(read.to(ours.dtype), ours.cpu())
        if not same:
            floats[name] = read
        if simulated and name in linears:
            stored.append(Stored(name, read.numel(), dtype_name(read), read.numel() * read.element_size() * 8))
        else:
            kept.append(Kept(name, read.numel(), f"in float{'' if same else ', other than the baseline has it'}"))
    if not (weights or stored):
        raise UsageError("it holds no quantized weight.")
    return Variant(key, weights, floats, inputs, tuple(kept), details=_details(weights, stored), stored=tuple(stored))


def _details(weights: Mapping[str, QWeight], stored: Iterable[Stored]) -> dict[str, str]:
    forms = Counter(each.form for each in stored)
    told = [f"{len(weights)} matrices as integers, scales and zero points"] if weights else []
    told += [f"{count} as dequantized values ({form})" for form, count in forms.most_common()]
    return {"read as": ", ".join(told), "computed": "by qeval's own path, not by the kernels that it was made for"}


def _wanted(names: Names, baseline: Baseline) -> list[str]:
    """The parameters to read: a tied head too where the file quantizes one of its own."""
    head = baseline.description.head
    own = any(tensor != head for tensor in names.tensors.below(head.removesuffix(".weight")))
    return [*baseline.needed, *([head] if baseline.description.tied and own else [])]


def _read(names: Names, reading: Reading, baseline: Baseline, name: str) -> Matrix | Tensor:
    ours = baseline.parameters[name]
    if reading.format is not None and _is_packed(names, reading, baseline, name):
        return unpacked(names, reading.format, reading.config, name, ours)
    stored = names.load(name)
    theirs = fitting(name, stored.T if name in baseline.turned else stored, ours)
    if name in reading.forms:
        form, bits = reading.forms[name]
        return Values(theirs, form, bits)
    if not theirs.is_floating_point():
        raise UsageError(f"it holds {name} as {dtype_name(theirs)} without what would say how to read that.")
    return theirs


def unpacked(names: Names, reads: Format, config: Config, name: str, ours: Tensor) -> Matrix:
    """What a format makes of the modules that are a weight in the file; `ours` is the baseline's [rows, columns].

    Raises:
        UsageError: a module's tensors are missing or do not fit each other.
    """
    modules = names.modules(name)
    rows = len(ours) // len(modules)
    parts = [Module(each, rows, ours.shape[1], names.tensors.parts_of(each)) for each in modules]
    return joined([_decoded(part, reads, config) for part in parts])


def is_packed(names: Names, reads: Format, name: str) -> bool:
    """Whether a file's tensors of a weight are a format's."""
    return any(f"{module}.{each}" in names.tensors for module in names.modules(name) for each in reads.markers)


def _decoded(module: Module, reads: Format, config: Config) -> Matrix:
    try:
        return reads.decode(module, config)
    except (ValueError, RuntimeError, IndexError, KeyError) as error:  # parts that do not fit each other
        raise module.error(f"can't be read as {reads.title} ({' '.join(str(error).split())})") from error


def _inputs(names: Names, reading: Reading, baseline: Baseline) -> dict[str, Tensor]:
    """By what the inputs of linears are multiplied while running, fp32, where the file says so.

    [columns]; [rows, columns] where an expert's gate and up say other things.
    """
    part = reading.format.input_scale if reading.format else None
    found: dict[str, Tensor] = {}
    for name in _wanted(names, baseline) if part else ():
        if not _is_packed(names, reading, baseline, name):
            continue
        held = [f"{module}.{part}" for module in names.modules(name)]
        if all(each in names.tensors for each in held):
            rows, columns = baseline.parameters[name].shape
            scales = [_input_scale(names.tensors, each, columns) for each in held]
            alike = all(torch.equal(each, scales[0]) for each in scales)
            found[name] = scales[0] if alike else torch.cat([each.expand(rows // len(held), -1) for each in scales])
    return found


def _input_scale(tensors: Tensors, name: str, columns: int) -> Tensor:
    scales = tensors.load(name).float()
    if scales.shape != (columns,) or not bool(((scales > 0) & scales.isfinite()).all()):
        raise UsageError(f"its {name} is no positive number for each of the linear's {columns} inputs.")
    return scales


def _multiplied(read: Matrix, scales: Tensor) -> Values:
    """An expert's matrix with the scales of its inputs in it: nothing else could apply them."""
    form = read.form if isinstance(read, Values) else str(read.grid)
    return Values(values_of(read) * scales, f"{form} with input scales", read.size_bits + 16 * scales.numel())


def _is_packed(names: Names, reading: Reading, baseline: Baseline, name: str) -> bool:
    if reading.format is None or baseline.parameters[name].dim() != 2:
        return False
    return is_packed(names, reading.format, name)


def padding(tensors: Tensors, baseline: Baseline) -> range:
    """The ids that the checkpoint's embedding has beyond the baseline's."""
    name = baseline.description.embedding
    ours = baseline.parameters[name].shape[0]
    stored = Names(tensors, baseline.prefix).stored(name)
    entry = next((entry for entry in tensors.entries if entry.name == stored), None)
    return range(ours, max(ours, entry.shape[0] if entry and len(entry.shape) == 2 else ours))


def unused(tensors: Tensors, baseline: Baseline) -> list[str]:
    """Tensors that belong to none of the baseline's parameters, and are not known to be harmless."""
    names = Names(tensors, baseline.prefix)
    used = {each for name in baseline.parameters for each in names.belonging(name)}
    return sorted(name for name in tensors.named() if name not in used and not name.endswith(_HARMLESS))


def _untouched(baseline: Baseline) -> list[str]:
    """The embedding, a head of its own, and the norms that no group's scales can be folded into."""
    folded = {name for group in baseline.description.groups if group.fold for name in group.fold.parameters}
    norms = [n for n, p in baseline.parameters.items() if p.dim() == 1 and n.endswith("weight") and n not in folded]
    about = baseline.description
    return [about.embedding, *([] if about.tied else [about.head]), *norms]


def check_finite(name: str, read: Matrix | Tensor) -> None:
    """Refuse what is no number.

    Raises:
        UsageError: it names the matrix and how many such scales or values it has.
    """
    part = read.scales if isinstance(read, QWeight) else read.values if isinstance(read, Values) else read
    if math.isfinite(float(part.float().sum())):  # a tenth of the time of looking at each
        return
    if bad := int((~torch.isfinite(part.float())).sum()):
        what = "scales" if isinstance(read, QWeight) else "values"
        raise UsageError(f"its {name} has {bad} {what} that are not finite.")

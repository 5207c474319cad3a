"""Variants written to their folders a block at a time, where memory does not hold all of their matrices."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from qeval.files.atomic import atomic_folder
from qeval.files.tensors import Spec, tensor_file
from qeval.identity import digest_file
from qeval.quant.grid import PerTensor
from qeval.quant.qweight import QWeight
from qeval.quant.variant import Variant
from qeval.store.spill import Spill, open_spill
from qeval.store.variants import (
    WEIGHTS,
    Origin,
    check_free,
    manifest_of,
    packed_tensors,
    read_manifest,
    variant_tensors,
    write_manifest,
)

_BLOCK_BYTES = 16 << 20
"""Of a tensor that is copied from file to file."""


def save_variant_by_parts(
    parts: Iterable[tuple[str, QWeight]], rest: Callable[[], tuple[Variant, Origin]], folder: Path
) -> None:
    """Write a variant whose matrices come one by one, never all at once; the files are those of `save_variant`.

    Which floats a method changes may be known only when all matrices are there, and their sizes decide where in the
    file the matrices lie. So the matrices wait in a temporary file, as large as they are.

    Args:
        parts: The matrices, in any order; one may come in several, rows after rows.
        rest: Called once all are there for the variant with its matrices on the meta device, and its origin.
        folder: Where it goes.

    Raises:
        UsageError: The folder exists and holds something else.
        QevalError: It cannot be written.
    """
    check_free(folder)
    with atomic_folder(folder) as part, open_spill(folder.parent) as spill:
        waiting = _PackedParts(spill)
        for name, weight in parts:
            waiting.add(name, weight)
        variant, origin = rest()
        floats = variant_tensors(replace(variant, weights={}))
        specs = waiting.specs | {name: Spec(value.dtype, tuple(value.shape)) for name, value in floats.items()}
        with tensor_file(part / WEIGHTS, specs) as file:
            for key in specs:
                file.write(key, [floats[key]] if key in floats else waiting.parts(key))
        write_manifest(manifest_of(variant, origin, digest_file(part / WEIGHTS)), part)


def save_with_scheme(source: Path, variant: Variant, origin: Origin, folder: Path) -> None:
    """Write the variant of a folder once more with a scheme; the files are those of `save_variant`.

    Its matrices are copied a block of rows at a time and never all in memory.

    Args:
        source: The folder of a variant of weights alone.
        variant: The new key, scheme, ranges and details; what it says of weights is not looked at.
        origin: Where it came from.
        folder: Where it goes.

    Raises:
        UsageError: The folder exists and holds something else.
        QevalError: It cannot be written.
    """
    check_free(folder)
    ranges = variant_tensors(replace(variant, weights={}, floats={}, input_scales={}, input_rotations={}))
    with atomic_folder(folder) as part:
        with safe_open(source / WEIGHTS, "pt") as weights:
            empty = {name: weights.get_slice(name)[:0] for name in weights.keys()}  # noqa: SIM118 - no mapping
            specs = {
                name: Spec(each.dtype, tuple(weights.get_slice(name).get_shape())) for name, each in empty.items()
            } | {name: Spec(amax.dtype, tuple(amax.shape)) for name, amax in ranges.items()}
            with tensor_file(part / WEIGHTS, specs) as file:
                for name, spec in specs.items():
                    file.write(name, [ranges[name]] if name in ranges else _blocks(weights, name, spec))
        kept = {
            "key": variant.key, "recipe": origin.recipe, "calibration": origin.calibration, "seconds": origin.seconds,
            "details": dict(variant.details), "scheme": variant.scheme.names(), "ranges": list(variant.ranges),
            "weights_sha256": digest_file(part / WEIGHTS), "sha256": None,
        }  # fmt: skip
        write_manifest(read_manifest(source).model_copy(update=kept), part)


def _blocks(weights: Any, name: str, spec: Spec) -> Iterator[Tensor]:
    """Yield a tensor of an open file in blocks of rows."""
    rows = max(1, _BLOCK_BYTES * spec.shape[0] // max(1, spec.size_bytes))
    for start in range(0, spec.shape[0], rows):
        yield weights.get_slice(name)[start : start + rows]


class _PackedParts:
    """Packed matrices, or rows of them one after the other, in a spill."""

    def __init__(self, spill: Spill) -> None:
        self._spill, self._counts = spill, Counter[str]()

    def add(self, name: str, weight: QWeight) -> None:
        """Add all of a matrix, or its next rows; a scale that spans all of it is kept once."""
        one = isinstance(weight.grid.granularity, PerTensor)
        for key, tensor in packed_tensors(name, weight).items():
            grows = key == f"{name}.codes" or (not one and key != f"{name}.global_scale")
            if grows or not self._counts[key]:
                self._spill.put((key, self._counts[key]), tensor)
                self._counts[key] += 1

    @property
    def specs(self) -> dict[str, Spec]:
        """The tensors of whole matrices."""
        specs = self._spill.specs
        return {
            key: _stacked_spec([specs[key, place] for place in range(count)]) for key, count in self._counts.items()
        }

    def parts(self, key: str) -> Iterator[Tensor]:
        """Return what a tensor came in."""
        return (self._spill.get((key, place)) for place in range(self._counts[key]))


def _stacked_spec(specs: Sequence[Spec]) -> Spec:
    """Return the tensor of rows that are one below the other."""
    return Spec(specs[0].dtype, (sum(spec.shape[0] for spec in specs), *specs[0].shape[1:]))

"""A variant on disk: a folder of packed integers, scales, zero points and changed floats, and a manifest.

    manifest.json         every weight of the model with its grid or its reason for staying in float
    weights.safetensors   NAME.codes (packed, lowest bits first), NAME.scales, NAME.zeros, NAME.input_scale, floats

The folder appears whole or not at all, and reads back to the same variant.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from qeval.errors import BrokenRecordError, QevalError, UsageError
from qeval.identity import digest_file
from qeval.owners import temporary_prefix
from qeval.quant.grid import PerTensor, parse
from qeval.quant.pack import pack, unpack
from qeval.quant.qweight import QWeight
from qeval.quant.variant import Choice, Kept, Stored, Variant
from qeval.store.atomic import sync
from qeval.store.spill import Spill, spilled
from qeval.store.tensors import Spec, save_tensors, tensor_file

MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightEntry(_Part):
    """A quantized matrix."""

    name: str
    rows: int
    columns: int
    grid: str
    size_bits: int


class KeptEntry(_Part):
    """A weight in float, with its reason."""

    name: str
    parameters: int
    reason: str


class StoredEntry(_Part):
    """A matrix among the floats that lies quantized where it came from, in a form that no grid says."""

    name: str
    parameters: int
    form: str
    size_bits: int


class ChoiceEntry(_Part):
    """A group as the mixed-precision choice saw it."""

    layer: int
    kind: str
    names: tuple[str, ...]
    parameters: int
    kl_low: float | None
    kl_high: float | None
    bits: int


class Manifest(_Part):
    """All of manifest.json."""

    format_version: Literal[1]
    key: str
    recipe: dict[str, Any]
    model: dict[str, str]
    calibration: dict[str, Any] | None
    bits_per_weight: float
    bits_per_weight_model: float
    size_bytes: int
    weights: list[WeightEntry]
    floats: list[str]
    input_scales: list[str]
    kept: list[KeptEntry]
    choices: list[ChoiceEntry]
    details: dict[str, str]
    seconds: float
    weights_sha256: str
    stored: list[StoredEntry] = []


class Origin(_Part):
    """Where a variant came from: what its manifest says beside its weights."""

    recipe: dict[str, Any]
    model: dict[str, str]
    calibration: dict[str, Any] | None
    float_bits: int
    seconds: float


def save_variant(variant: Variant, folder: Path, origin: Origin) -> None:
    """Write `variant` to `folder`, which must not exist yet or hold an earlier variant.

    Raises:
        UsageError: the folder exists and holds something else.
        QevalError: it cannot be written.
    """
    with _placed(folder) as part:
        save_tensors(_tensors(variant), part / WEIGHTS)
        _write_manifest(variant, origin, part)


def save_variant_by_parts(
    parts: Iterable[tuple[str, QWeight]], rest: Callable[[], tuple[Variant, Origin]], folder: Path
) -> None:
    """Write a variant whose matrices come one by one, never all at once; the files are those of `save_variant`.

    `parts` are the matrices, in any order; one may come in several, rows after rows. `rest` is asked when all are there
    for the variant with its matrices on the meta device: which floats a method changes may be known only then, and
    their sizes decide where in the file the matrices lie. So these wait in a temporary file beside, as large as they
    are.

    Raises:
        UsageError: the folder exists and holds something else.
        QevalError: it cannot be written.
    """
    with _placed(folder) as part, spilled(folder.parent) as spill:
        waiting = _Waiting(spill)
        for name, weight in parts:
            waiting.add(name, weight)
        variant, origin = rest()
        floats = _tensors(replace(variant, weights={}))
        specs = waiting.specs | {name: Spec(value.dtype, tuple(value.shape)) for name, value in floats.items()}
        with tensor_file(part / WEIGHTS, specs) as file:
            for key in specs:
                file.write(key, [floats[key]] if key in floats else waiting.parts(key))
        _write_manifest(variant, origin, part)


class _Waiting:
    """Packed matrices, or rows of them one after the other, in a spill."""

    def __init__(self, spill: Spill) -> None:
        self._spill, self._counts = spill, Counter[str]()

    def add(self, name: str, weight: QWeight) -> None:
        """All of a matrix, or its next rows; a scale that spans all of it is kept once."""
        one = isinstance(weight.grid.granularity, PerTensor)
        for key, tensor in _packed(name, weight).items():
            if not self._counts[key] or not one or key == f"{name}.codes":
                self._spill.put((key, self._counts[key]), tensor)
                self._counts[key] += 1

    @property
    def specs(self) -> dict[str, Spec]:
        """The tensors of whole matrices."""
        specs = self._spill.specs
        return {key: _below([specs[key, place] for place in range(count)]) for key, count in self._counts.items()}

    def parts(self, key: str) -> Iterator[Tensor]:
        """What a tensor came in."""
        return (self._spill.get((key, place)) for place in range(self._counts[key]))


def _below(specs: Sequence[Spec]) -> Spec:
    """The tensor of rows that are one below the other."""
    return Spec(specs[0].dtype, (sum(spec.shape[0] for spec in specs), *specs[0].shape[1:]))


@contextmanager
def _placed(folder: Path) -> Iterator[Path]:
    """A folder to write to that takes its place when the block ends well."""
    check_free(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(mkdtemp(prefix=temporary_prefix(folder.name), dir=folder.parent))
    except OSError as error:
        raise QevalError(f"Cannot write {folder}: {error.strerror or error}.") from error
    try:
        yield part
        for written in part.iterdir():
            sync(written)
        part.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except OSError as error:
        raise QevalError(f"Cannot write {folder}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_manifest(variant: Variant, origin: Origin, part: Path) -> None:
    manifest = _manifest(variant, origin, digest_file(part / WEIGHTS))
    (part / MANIFEST).write_text(json.dumps(manifest.model_dump(), indent=1) + "\n", encoding="utf-8")


def check_free(folder: Path) -> None:
    """Refuse a place where something else than a variant lies.

    Raises:
        UsageError: it is a file, or a folder that holds something else.
    """
    if folder.is_dir() and ((folder / MANIFEST).exists() or not any(folder.iterdir())):
        return
    if folder.exists():
        raise UsageError(f"'{folder}' exists and is no variant; name another folder.")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a variant's folder.

    Raises:
        UsageError: `folder` holds no variant.
        BrokenRecordError: the manifest is torn or of another version.
    """
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"'{folder}' holds no variant: there is no {MANIFEST} in it.") from error
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "the whole file"
        raise BrokenRecordError(f"{path} is torn or of another version ({where}).") from error


def verify_variant(folder: Path) -> Manifest:
    """The manifest of a variant whose weights are those that were written.

    Raises:
        BrokenRecordError: they are not.
    """
    manifest = read_manifest(folder)
    path = folder / WEIGHTS
    if not path.exists() or digest_file(path) != manifest.weights_sha256:
        raise BrokenRecordError(f"{path} is missing, torn or was changed: its checksum is not the manifest's.")
    return manifest


def load_variant(folder: Path) -> Variant:
    """The variant that was saved to `folder`, verified."""
    manifest = verify_variant(folder)
    tensors = load_file(folder / WEIGHTS)
    return Variant(
        key=manifest.key,
        weights={entry.name: _weight(entry, tensors) for entry in manifest.weights},
        floats={name: tensors[name] for name in manifest.floats},
        input_scales={name: tensors[f"{name}.input_scale"] for name in manifest.input_scales},
        kept=tuple(Kept(**entry.model_dump()) for entry in manifest.kept),
        choices=tuple(Choice(**entry.model_dump()) for entry in manifest.choices),
        details=manifest.details,
        stored=tuple(Stored(**entry.model_dump()) for entry in manifest.stored),
    )


def _tensors(variant: Variant) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, weight in variant.weights.items():
        tensors |= _packed(name, weight)
    tensors |= variant.floats
    tensors |= {f"{name}.input_scale": scales for name, scales in variant.input_scales.items()}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _packed(name: str, weight: QWeight) -> dict[str, Tensor]:
    tensors = {f"{name}.codes": torch.from_numpy(pack(weight.codes.cpu().numpy(), weight.grid.bits))}
    tensors[f"{name}.scales"] = weight.scales
    if weight.zeros is not None:
        tensors[f"{name}.zeros"] = torch.from_numpy(pack(weight.zeros.cpu().numpy(), weight.grid.bits))
    return tensors


def _weight(entry: WeightEntry, tensors: Mapping[str, Tensor]) -> QWeight:
    grid = parse(entry.grid)
    scales = tensors[f"{entry.name}.scales"]
    codes = unpack(tensors[f"{entry.name}.codes"].numpy(), grid.bits, entry.columns)
    zeros = None
    if not grid.symmetric:
        packed = tensors[f"{entry.name}.zeros"].numpy()
        zeros = torch.from_numpy(unpack(packed, grid.bits, scales.shape[1]).copy())
    return QWeight(grid, torch.from_numpy(codes.copy()), scales, zeros)


def _manifest(variant: Variant, origin: Origin, weights_sha256: str) -> Manifest:
    return Manifest(
        format_version=1,
        key=variant.key,
        recipe=origin.recipe,
        model=origin.model,
        calibration=origin.calibration,
        bits_per_weight=variant.bits_per_weight,
        bits_per_weight_model=variant.bits_per_weight_model(origin.float_bits),
        size_bytes=variant.size_bytes(origin.float_bits),
        weights=[
            WeightEntry(
                name=name,
                rows=weight.codes.shape[0],
                columns=weight.codes.shape[1],
                grid=str(weight.grid),
                size_bits=weight.size_bits,
            )
            for name, weight in variant.weights.items()
        ],
        floats=list(variant.floats),
        input_scales=list(variant.input_scales),
        kept=[KeptEntry(name=k.name, parameters=k.parameters, reason=k.reason) for k in variant.kept],
        choices=[ChoiceEntry(**vars(choice)) for choice in variant.choices],
        details=dict(variant.details),
        seconds=origin.seconds,
        weights_sha256=weights_sha256,
        stored=[StoredEntry(**vars(each)) for each in variant.stored],
    )

"""A variant on disk: a folder of packed integers, scales, zero points and changed floats, and a manifest.

    manifest.json         every weight of the model with its grid or its reason for staying in float
    weights.safetensors   NAME.codes (packed, lowest bits first), NAME.scales, NAME.zeros, NAME.input_scale, floats;
                          NAME.scales in bytes where the grid has such (E8M0, E4M3), NAME.global_scale,
                          NAME.range, where activations, keys or values have static scales
                          NAME.input_rotation, where an input is turned while running

The folder appears whole or not at all, and reads back to the same variant.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qeval.errors import BrokenRecordError, UsageError
from qeval.files.atomic import atomic_folder, is_temporary
from qeval.files.hashes import process_hash
from qeval.files.tensors import save_tensors
from qeval.identity import digest_file
from qeval.parsing import error_reason, first_fault, load_json
from qeval.paths import home
from qeval.quant.grid import FloatGrid, parse
from qeval.quant.pack import pack_tensor, unpack_tensor
from qeval.quant.qweight import QWeight
from qeval.quant.scheme import TensorFormat, parse_format, scheme_of
from qeval.quant.stored_scales import decode_scales, encode_scales, repeat_scales
from qeval.quant.variant import Choice, FloatWeight, StoredMatrix, Variant, left_in_float
from qeval.store.seal import has_valid_seal, parse_object, seal

MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
FORMAT_VERSION: Literal[2] = 2
_FLOAT_BITS = (8, 16, 32, 64)


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
    format: str | None = None
    """Of a mix of formats: like `kls`, written only there."""
    kls: dict[str, float] = {}


class Manifest(_Part):
    """All of manifest.json."""

    format_version: Literal[1, 2]
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
    scheme: dict[str, str] = {}
    """The formats of activations, keys and values by these words; like what follows, written only where it is used."""
    ranges: list[str] = []
    input_formats: dict[str, str | None] = {}
    """The formats of the inputs of linears for which `scheme` does not hold; written only where there are any."""
    input_rotations: list[str] = []
    expert_tokens: dict[str, tuple[int, ...]] = {}
    """The calibration tokens that reached each expert, by the stack of their inner matrices."""
    sha256: str | None = None
    """Of all the rest of the manifest, from version 2 on."""

    @property
    def parameters(self) -> int:
        """The number of weights of the model."""
        on_grids = sum(entry.rows * entry.columns for entry in self.weights)
        stored = sum(entry.parameters for entry in self.stored)
        return on_grids + stored + sum(entry.parameters for entry in self.kept)

    @property
    def activation_inputs(self) -> tuple[str, ...]:
        """The names of the linears whose inputs the scheme's activations are, as `Variant` has them."""
        matrices = (*(entry.name for entry in self.weights), *(entry.name for entry in self.stored))
        return (*matrices, *left_in_float(self.floats_kept))

    @property
    def floats_kept(self) -> tuple[FloatWeight, ...]:
        """The weights in float, with their reasons."""
        return tuple(FloatWeight(**entry.model_dump()) for entry in self.kept)

    @property
    def parsed_input_formats(self) -> dict[str, TensorFormat | None]:
        """The formats of `input_formats`."""
        named = self.input_formats.items()
        return {name: None if how is None else parse_format(how, "activations") for name, how in named}

    @property
    def adds_up(self) -> bool:
        """Return whether the size is that of the weights listed, those in float at some width of floats."""
        listed = sum(entry.size_bits for entry in self.weights) + sum(entry.size_bits for entry in self.stored)
        in_float = sum(entry.parameters for entry in self.kept)
        return any(self._is_size(listed, in_float, float_bits) for float_bits in _FLOAT_BITS)

    def _is_size(self, listed: int, in_float: int, float_bits: int) -> bool:
        rest = self.size_bytes * 8 - listed - in_float * float_bits
        # input scales are listed by name alone, in fp32; the size is cut to whole bytes
        most = 32 * self.parameters if self.input_scales else 0
        return -8 < rest <= most


class Origin(_Part):
    """The origin of a variant, which its manifest states beside its weights."""

    recipe: dict[str, Any]
    model: dict[str, str]
    calibration: dict[str, Any] | None
    float_bits: int
    seconds: float


def save_variant(variant: Variant, folder: Path, origin: Origin) -> None:
    """Write a variant to a folder.

    Args:
        variant: The variant.
        folder: Where it goes; it must not exist yet, or hold an earlier variant.
        origin: Where it came from.

    Raises:
        UsageError: The folder exists and holds something else.
        QevalError: It cannot be written.
    """
    check_free(folder)
    with atomic_folder(folder) as part:
        save_tensors(variant_tensors(variant), part / WEIGHTS)
        write_manifest(manifest_of(variant, origin, digest_file(part / WEIGHTS)), part)


def write_manifest(manifest: Manifest, part: Path) -> None:
    """Write a manifest, sealed, beside the weights that it tells of; what is not used is not named."""
    optional = ("scheme", "ranges", "input_formats", "input_rotations", "expert_tokens")
    unused = {name for name in optional if not getattr(manifest, name)}
    content = json.loads(manifest.model_dump_json(exclude=unused))
    for choice in content["choices"]:
        if choice["format"] is None:
            del choice["format"], choice["kls"]
    content = seal(content)
    (part / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check_free(folder: Path) -> None:
    """Refuse a place where something else than a variant lies.

    Raises:
        UsageError: It is a file, or a folder that holds something else.
    """
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir() if not is_temporary(path)} if folder.is_dir() else {""}
    if names and not _is_own(folder):
        raise UsageError(f"'{folder}' exists and is no variant; name another folder.")
    if others := sorted(names - {MANIFEST, WEIGHTS}):
        raise UsageError(f"'{folder}' holds {others[0]} beside a variant, which would be lost; name another folder.")


def is_variant(folder: Path) -> bool:
    """Return whether a folder holds a variant of qeval's, and not some other model."""
    return (folder / MANIFEST).exists()


def _is_own(folder: Path) -> bool:
    """Return whether a folder's manifest is one of qeval's; in the cache, where all is qeval's, a torn one is too."""
    path = folder / MANIFEST
    if not path.is_file():
        return False
    if folder.resolve().is_relative_to(home().resolve()):
        return True
    try:
        content = load_json(path)
    except UsageError:
        return False
    return isinstance(content, dict) and {"format_version", "bits_per_weight"} <= content.keys()


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a variant's folder.

    Raises:
        UsageError: `folder` holds no variant.
        BrokenRecordError: The manifest is torn, was changed, or is of another version.
    """
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"'{folder}' holds no variant: there is no {MANIFEST} in it.") from error

    try:
        manifest, content = Manifest.model_validate_json(data), parse_object(data)
    except ValidationError as error:
        where, _ = first_fault(error.errors())
        raise BrokenRecordError(f"{path} is torn or of another version ({where}).") from error
    except ValueError as error:
        raise BrokenRecordError(f"{path} is torn ({error}).") from error

    needs_seal = manifest.format_version > 1
    if (needs_seal and not has_valid_seal(content)) or not manifest.adds_up:
        raise BrokenRecordError(f"{path} was changed: its checksum or its sizes do not fit it.")
    return manifest


def verify_variant(folder: Path) -> Manifest:
    """Return the manifest of a variant whose weights are those that were written.

    Raises:
        BrokenRecordError: They are not.
    """
    manifest = read_manifest(folder)
    path = folder / WEIGHTS
    if not path.exists() or process_hash(path) != manifest.weights_sha256:
        raise BrokenRecordError(f"{path} is missing, torn or was changed: its checksum is not the manifest's.")
    return manifest


def load_variant(folder: Path, place: Callable[[str], torch.device] | None = None) -> Variant:
    """Return the variant that was saved to `folder`, verified.

    Args:
        folder: Where it lies.
        place: Returns the device that the codes of a weight are unpacked on, by its name; ranges stay in host memory.
    """
    manifest = verify_variant(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
        if place is not None:
            floats = set(manifest.floats)
            for name in tensors:
                if not name.endswith(".range"):
                    tensors[name] = tensors[name].to(place(name if name in floats else name.rpartition(".")[0]))
        return _variant(manifest, tensors)
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise BrokenRecordError(
            f"'{folder}' holds weights that its manifest does not fit ({error_reason(error)})."
        ) from error


def _variant(manifest: Manifest, tensors: Mapping[str, Tensor]) -> Variant:
    """Return the variant of a manifest's entries and the tensors of its file."""
    return Variant(
        key=manifest.key,
        weights={entry.name: _weight(entry, tensors) for entry in manifest.weights},
        floats={name: tensors[name] for name in manifest.floats},
        input_scales={name: tensors[f"{name}.input_scale"] for name in manifest.input_scales},
        kept=manifest.floats_kept,
        choices=tuple(Choice(**entry.model_dump()) for entry in manifest.choices),
        details=manifest.details,
        stored=tuple(StoredMatrix(**entry.model_dump()) for entry in manifest.stored),
        scheme=scheme_of(manifest.scheme),
        ranges={name: tensors[f"{name}.range"] for name in manifest.ranges},
        input_formats=manifest.parsed_input_formats,
        input_rotations={name: tensors[f"{name}.input_rotation"] for name in manifest.input_rotations},
        expert_tokens=manifest.expert_tokens,
    )


def variant_tensors(variant: Variant) -> dict[str, Tensor]:
    """Return what the weights' file holds, by name."""
    tensors: dict[str, Tensor] = {}
    for name, weight in variant.weights.items():
        tensors |= packed_tensors(name, weight)
    tensors |= variant.floats
    tensors |= {f"{name}.input_scale": scales for name, scales in variant.input_scales.items()}
    tensors |= {f"{name}.range": amax for name, amax in variant.ranges.items()}
    tensors |= {f"{name}.input_rotation": core for name, core in variant.input_rotations.items()}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def packed_tensors(name: str, weight: QWeight) -> dict[str, Tensor]:
    """Return what the file holds of one matrix, by name: packed codes, scales, zero points, the scale of all of it."""
    tensors = {f"{name}.codes": pack_tensor(weight.codes, weight.grid.bits)}
    tensors[f"{name}.scales"] = encode_scales(weight)
    if weight.zeros is not None:
        tensors[f"{name}.zeros"] = pack_tensor(weight.zeros, weight.grid.bits)
    if weight.global_scale is not None:
        tensors[f"{name}.global_scale"] = weight.global_scale
    return tensors


def _weight(entry: WeightEntry, tensors: Mapping[str, Tensor]) -> QWeight:
    grid = parse(entry.grid)
    global_scale = None
    if isinstance(grid, FloatGrid) and grid.has_global_scale:
        global_scale = tensors[f"{entry.name}.global_scale"]
    scales = decode_scales(tensors[f"{entry.name}.scales"], grid, global_scale)
    scales = repeat_scales(scales, grid, 0, entry.rows)
    codes = unpack_tensor(tensors[f"{entry.name}.codes"], grid.bits, entry.columns)
    zeros = None
    if not grid.symmetric:
        zeros = unpack_tensor(tensors[f"{entry.name}.zeros"], grid.bits, scales.shape[1])
    return QWeight(grid, codes, scales, zeros, global_scale)


def manifest_of(variant: Variant, origin: Origin, weights_sha256: str) -> Manifest:
    """Return what a folder says of a variant, its origin and the sha256 of its weights' file."""
    return Manifest(
        format_version=FORMAT_VERSION,
        key=variant.key,
        recipe=origin.recipe,
        model=origin.model,
        calibration=origin.calibration,
        bits_per_weight=variant.bits_per_weight if variant.quantized_parameters else float(origin.float_bits),
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
        scheme=variant.scheme.names(),
        ranges=list(variant.ranges),
        input_formats={name: None if how is None else str(how) for name, how in variant.input_formats.items()},
        input_rotations=list(variant.input_rotations),
        expert_tokens=dict(variant.expert_tokens),
    )

"""Open what `--variant` names, once it lies on this machine: qeval's variants, checkpoints, ONNX folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qeval.backends.base import Backend
from qeval.backends.onnx.packages import require_onnx
from qeval.backends.onnx.providers import choose_provider, require_provider
from qeval.compare.external_checkpoints import (
    TokenCheck,
    baseline_of,
    import_checkpoints,
    is_external_checkpoint,
)
from qeval.compare.external_parts import PartsChoice
from qeval.compare.external_paths import VariantPath
from qeval.compare.variants import BaselineModel, FitsKernel, VariantEntry, any_grid
from qeval.errors import UsageError
from qeval.models.checkpoint.weights import ADAPTER, adapter_refusal
from qeval.models.info import LoadedModel
from qeval.models.onnx_layout import is_onnx
from qeval.quant.grid import parse
from qeval.store.variants import is_variant, verify_variant

if TYPE_CHECKING:
    from qeval.compare.onnx import OnnxVariant


def read_variants(
    places: Sequence[VariantPath],
    loaded: LoadedModel,
    source: BaselineModel,
    backend: Backend[Any],
    token_check: TokenCheck,
    fits: Sequence[FitsKernel],
    choice: PartsChoice,
) -> tuple[VariantEntry, ...]:
    """Return the variants of --variant that are no ONNX folders: qeval's own, and other tools' checkpoints."""
    variants = [place for place in places if is_variant(place.path) or not is_onnx(place.path)]
    checkpoints = [place for place in variants if not is_variant(place.path) and is_external_checkpoint(place.path)]
    imported = import_checkpoints(checkpoints, loaded, source, backend, token_check, fits, choice)
    weights = loaded.info.weights_sha256
    entries: list[VariantEntry] = []
    for place in variants:
        entries += imported.get(place.name) or [given_entry(place.name, place.path, weights, *fits)]
    names = [entry.name for entry in entries]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"Two variants are named '{twice}': the weights of a --variant, and another; rename that one.")
    return tuple(entries)


def read_onnx_folders(
    places: Sequence[VariantPath], ep: str, loaded: LoadedModel, source: BaselineModel, token_check: TokenCheck
) -> "tuple[OnnxVariant, ...]":
    """Return the ONNX folders among --variant, each checked to read this run's texts as the baseline's tokens."""
    folders = [place for place in places if not is_variant(place.path) and is_onnx(place.path)]
    if not folders:
        return ()
    require_onnx()
    from qeval.backends.onnx.backend import FolderBackend  # noqa: PLC0415 - an extra
    from qeval.compare.onnx import read_onnx_folder  # noqa: PLC0415

    provider = choose_provider(ep)
    require_provider(provider)
    baseline = baseline_of(loaded, source)
    backend = FolderBackend(provider, torch.get_num_threads(), ids=int(source.head.weight.shape[0]))
    return tuple(read_onnx_folder(place, loaded, baseline, token_check, backend) for place in folders)


def given_entry(name: str, folder: Path, weights_sha256: str, fits: FitsKernel = any_grid) -> VariantEntry:
    """Return a variant that `--variant NAME=FOLDER` names.

    Raises:
        UsageError: the folder holds no variant, one of another model, or one whose grids no kernel takes.
    """
    if not folder.exists():
        raise UsageError(f"--variant {name}={folder}: there is nothing there; on the hub it would be ORG/REPO.")
    if not is_variant(folder) and (folder / ADAPTER).is_file():
        raise UsageError(f"--variant {name}={folder}: {adapter_refusal(folder)}")
    manifest = verify_variant(folder)
    if manifest.model.get("weights_sha256") != weights_sha256:
        raise UsageError(
            f"--variant {name}={folder} was made from other weights ({manifest.model.get('name')}) than the "
            "baseline's, so it cannot be compared with it."
        )
    for entry in manifest.weights:
        fits(entry.name, parse(entry.grid), entry.columns)
    return VariantEntry(name, str(manifest.recipe.get("method", "given")), folder, content=manifest.weights_sha256)

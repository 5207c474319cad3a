"""What `--variant` names, once it lies on this machine: variants of qeval's own, checkpoints, ONNX folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qeval.backends.onnx.packages import require_onnx
from qeval.backends.onnx.providers import choose, require_provider
from qeval.backends.stream.backend import StreamBackend
from qeval.backends.torch import TorchBackend
from qeval.compare.elsewhere import Asked, baseline_of, imported, is_made_elsewhere
from qeval.compare.local import Place
from qeval.compare.variants import Entry, FitsKernel, Loaded, given_entry, is_variant
from qeval.models.info import LoadedModel

if TYPE_CHECKING:
    from qeval.compare.onnx import Foreign


def given_variants(
    places: Sequence[Place],
    loaded: LoadedModel,
    source: Loaded,
    backend: TorchBackend | StreamBackend,
    asked: Asked,
    fits: Sequence[FitsKernel],
) -> tuple[Entry, ...]:
    """The variants of --variant that are no ONNX folders: qeval's own, and checkpoints that were made elsewhere."""
    given = [each for each in places if is_variant(each.path) or not _is_onnx(each.path)]
    elsewhere = [each for each in given if not is_variant(each.path) and is_made_elsewhere(each.path)]
    found = {entry.name: entry for entry in imported(elsewhere, loaded, source, backend, asked, fits)}
    own = loaded.info.weights_sha256
    return tuple(found.get(each.name) or given_entry(each.name, each.path, own, *fits) for each in given)


def given_folders(
    places: Sequence[Place], ep: str, loaded: LoadedModel, source: Loaded, asked: Asked
) -> "tuple[Foreign, ...]":
    """The ONNX folders among --variant, each found to speak of the baseline's tokens in the texts of this run."""
    found = [each for each in places if not is_variant(each.path) and _is_onnx(each.path)]
    if not found:
        return ()
    require_onnx()
    from qeval.compare.onnx import foreign  # noqa: PLC0415 - an extra

    require_provider(choose(ep))
    baseline = baseline_of(loaded, source)
    return tuple(foreign(each, loaded, baseline, asked) for each in found)


def _is_onnx(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "genai_config.json").exists() or any(folder.glob("*.onnx")))

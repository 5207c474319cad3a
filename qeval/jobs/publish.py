"""`export --to hf`, `--to gguf`: one variant in the files that other runtimes load, read back before they appear."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from qeval import __version__
from qeval.compare.external_checkpoints import baseline_of
from qeval.compare.loading import source_of_model, tell_warnings
from qeval.compare.plan import calibration_of
from qeval.compare.settings import CalibrationChoice, ExportForm, ModelChoice
from qeval.compare.variants import BaselineModel, FitsKernel, Workshop, check_recipes
from qeval.config import Recipe
from qeval.errors import QevalError, UsageError
from qeval.files.atomic import atomic_folder
from qeval.formats.checkpoint import open_checkpoint
from qeval.formats.compressed_files import ModelShape, checkpoint_tensors, quantization_config, write_shards
from qeval.formats.compressed_layouts import cache_args
from qeval.formats.read_back import read_back
from qeval.models.info import LoadedModel
from qeval.models.trust import clean_settings, known_files
from qeval.progress import Progress
from qeval.quant.grid import WeightGrid
from qeval.quant.variant import Variant
from qeval.store.seal import seal
from qeval.store.variants import MANIFEST, Manifest, load_variant, read_manifest

EXPORT_MANIFEST = "qeval.json"
"""The file beside exported weights that says what they are, whatever their form."""
VARIANT_MANIFEST = "qeval-variant.json"
"""The manifest of the variant beside its files; by its own name `--variant` would take the folder for qeval's form."""


class PublishedManifest(BaseModel):
    """All of `qeval.json` beside exported weights: what they are, and how they were compared once they were written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    export_version: Literal[2]
    form: ExportForm
    model: dict[str, str]
    recipe: dict[str, object]
    variant_key: str  # the identity of the integers
    bits_per_weight: float  # scales as the variant counts them
    layouts: list[str]  # "pack-quantized", "Q4_0"
    matrices: int  # read back and compared, bit for bit
    floats: int  # the same of the other tensors
    largest_difference: float  # of a dequantized value, relative: 0 but where a layout keeps a reciprocal
    contents: list[str]  # in sentences

    def describe(self) -> list[str]:
        """Return what the folder holds, in sentences."""
        return self.contents


class Outcome(NamedTuple):
    """The files of a writer, in numbers and in sentences; the numbers are those of `ReadBack`."""

    layouts: list[str]
    matrices: int
    floats: int
    largest_difference: float
    contents: list[str]


class VariantWriter(Protocol):
    """Writes variants of one model in one form."""

    def check(self, recipe: Recipe) -> FitsKernel:
        """Refuse a recipe that the form can't say, before work; return what refuses a matrix's grid.

        Raises:
            UsageError: It says what the form can.
        """

    def write(self, variant: Variant, part: Path) -> Outcome:
        """Write the files into a folder, read them back, and say what was written.

        Raises:
            UsageError: The form can't hold the variant exactly.
            QevalError: What was read back is something else.
        """


def publish_variant(
    form: ExportForm,
    model: ModelChoice,
    recipe: Recipe | None,
    calibration: CalibrationChoice,
    out: Path,
    *,
    threads: int | None,
    seed: int,
    progress: Progress,
) -> PublishedManifest:
    """Write the variant of `recipe` to the folder `out`, which must not exist; it appears once it was read back.

    Raises:
        UsageError: bad input, or a recipe that the form can't hold; QevalError: the files are not what was meant.
    """
    if out.exists():
        raise UsageError(f"'{out}' exists; name another folder.")
    if recipe is None:
        raise UsageError(f"--method float leaves nothing to write: --to {form} writes quantized weights.")
    if threads:
        torch.set_num_threads(threads)
    loaded, source = source_of_model(model)
    tell_warnings(loaded, progress)
    writer = WRITERS[form](loaded, source)
    check_recipes([recipe], source, calibration.samples, writer.check(recipe))
    folder = Workshop(source, lambda: calibration_of(calibration, loaded), seed, progress).folder(recipe)
    variant, manifest = load_variant(folder), read_manifest(folder)

    with progress.phase("write and read back", 1) as advance, atomic_folder(out) as part:
        published = _manifest(form, writer.write(variant, part), manifest)
        _write_json(part / EXPORT_MANIFEST, published.model_dump())
        _write_json(part / VARIANT_MANIFEST, _without_paths(json.loads((folder / MANIFEST).read_bytes())))
        advance(1)
        if out.exists():  # its content is someone's, and would be replaced
            raise QevalError(f"Cannot write {out}: it exists.")
    return published


class CheckpointWriter:
    """Writes folders in compressed-tensors' layouts."""

    def __init__(self, loaded: LoadedModel, source: BaselineModel) -> None:
        """Look at the model's modules."""
        self._loaded, self._baseline = loaded, baseline_of(loaded, source)
        linears = tuple(name for name, module in loaded.model.named_modules() if isinstance(module, nn.Linear))
        self._shape = ModelShape(source.description, linears, self._baseline.turned, self._baseline.prefix)

    def check(self, recipe: Recipe) -> FitsKernel:
        """Refuse keys and values that kv_cache_scheme can't say; return what refuses a grid without a layout."""
        if cache_args(recipe.scheme):
            self._shape.attention_modules()
        if recipe.quant_method.rounding == "none":
            raise UsageError(f"'{recipe.name}' leaves the weights in float, and the model has that checkpoint already.")

        def fits(name: str, grid: WeightGrid, columns: int) -> None:
            self._shape.layout(name, grid, columns, recipe.scheme)

        return fits

    def write(self, variant: Variant, part: Path) -> Outcome:
        """Write configuration, tokenizer and tensors, and compare all tensors with the variant's."""
        config = quantization_config(variant, self._shape)
        folder = self._loaded.folder
        for path in known_files(folder):
            shutil.copyfile(path, part / path.name)
        _write_json(part / "config.json", {**clean_settings(folder), "quantization_config": config})
        with open_checkpoint(folder) as tensors:
            write_shards(checkpoint_tensors(variant, tensors, self._shape), part)
        same = read_back(part, variant, self._baseline)
        layouts = sorted({group["format"] for group in config["config_groups"].values()})
        return Outcome(layouts, *same, _sentences(layouts, same.matrices, variant, same.largest_difference))


def _sentences(layouts: list[str], matrices: int, variant: Variant, difference: float) -> list[str]:
    count = "1 matrix" if matrices == 1 else f"{matrices} matrices"
    same = "bit for bit what the variant has"
    if difference:
        same = f"code for code what the variant has; values differ by {difference:.1e} at most, relative"
    sentences = [f"{count} in compressed-tensors' {', '.join(layouts)}; read back, they are {same}."]
    if variant.floats:
        sentences.append(f"{len(variant.floats)} other tensors hold what the method folded into them.")
    if how := variant.scheme.activations:
        sentences.append(f"Activations: {how.describe('token')}, rounded by the runtime.")
    if variant.scheme.caches:
        sentences.append("Keys and values: FP8 with a static scale each a layer, rounded by the runtime.")
    return sentences


WRITERS: Mapping[ExportForm, Callable[[LoadedModel, BaselineModel], VariantWriter]] = {"hf": CheckpointWriter}
"""What writes variants, by the form."""


def _manifest(form: ExportForm, outcome: Outcome, manifest: Manifest) -> PublishedManifest:
    return PublishedManifest(
        export_version=2,
        form=form,
        model={**manifest.model, "name": _shown(manifest.model["name"]), "written_by": f"qeval {__version__}"},
        recipe=manifest.recipe,
        variant_key=manifest.key,
        bits_per_weight=manifest.bits_per_weight,
        **outcome._asdict(),
    )


def _without_paths(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a variant's manifest with the last parts of this machine's paths, sealed again."""
    manifest["model"]["name"] = _shown(manifest["model"]["name"])
    if calibration := manifest["calibration"]:
        manifest["calibration"] = {
            key: _shown(value) if isinstance(value, str) else value for key, value in calibration.items()
        }
    return seal({key: value for key, value in manifest.items() if key != "sha256"})


def _shown(name: str) -> str:
    """Return a name, of a path its last part."""
    return Path(name).name if Path(name).exists() else name


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

"""`export --to hf`, `--to gguf`: one variant in the files that other runtimes load, read back before they appear."""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from qeval import __version__
from qeval.backends.llamacpp.gguf_vocabulary import Vocabulary
from qeval.backends.llamacpp.gguf_writer import check_exact, check_family, check_gguf_grid, write_gguf
from qeval.compare.external_checkpoints import baseline_of
from qeval.compare.loading import source_of_model, tell_warnings
from qeval.compare.plan import calibration_of
from qeval.compare.schemes import refuse_schemes
from qeval.compare.settings import CalibrationChoice, ExportForm, ModelChoice
from qeval.compare.variants import BaselineModel, FitsKernel, Workshop, check_recipes
from qeval.config import Recipe
from qeval.errors import QevalError, UsageError
from qeval.files.atomic import atomic_folder
from qeval.formats.checkpoint import open_checkpoint
from qeval.formats.compressed_files import ModelShape, checkpoint_tensors, quantization_config
from qeval.formats.compressed_layouts import cache_args
from qeval.formats.read_back import has_own_head, read_back, read_gguf_back
from qeval.models.checkpoint.shards import write_shards
from qeval.models.gguf.convert import read_contents
from qeval.models.info import LoadedModel
from qeval.models.trust import clean_settings, known_files
from qeval.progress import Progress
from qeval.quant.grid import WeightGrid
from qeval.quant.variant import Variant
from qeval.score.token_hash import PROBES, why_other
from qeval.store.run import read_run
from qeval.store.seal import seal
from qeval.store.variants import MANIFEST, Manifest, load_variant, read_manifest
from qeval.types import FloatType

EXPORT_MANIFEST = "qeval.json"
"""The file beside exported weights that says what they are, whatever their form."""
GGUF_FILE = "model.gguf"
_GGUF_FLOATS: Mapping[str, FloatType] = {"float32": "fp32", "float64": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_NEGATIVE_SCALES = (
    "Some scales are negative, as in ONNX Runtime's and llama.cpp's own INT4. Kernels that multiply by a scale take "
    "them; where one needs positive scales, as vLLM's Marlin does with VLLM_MARLIN_INPUT_DTYPE=int8, take a -full "
    "grid, such as int4-g128-full."
)
VARIANT_MANIFEST = "qeval-variant.json"
"""The manifest of the variant beside its files; by its own name `--variant` would take the folder for qeval's form."""


class PublishedManifest(BaseModel):
    """All of `qeval.json` beside exported weights: what they are, and how they were compared once they were written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    export_version: Literal[2]
    form: ExportForm
    model: dict[str, str]
    written_by: str
    recipe: dict[str, object] | None  # None for the float model
    variant_key: str | None  # the identity of the integers
    bits_per_weight: float | None  # scales as the variant counts them
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

    def check(self, recipe: Recipe | None) -> FitsKernel:
        """Refuse a recipe (the float model with None) that the form can't say; return what refuses a matrix's grid.

        Raises:
            UsageError: It says what the form can.
        """

    def write(self, variant: Variant | None, part: Path) -> Outcome:
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
    run: Path | None = None,
    threads: int | None,
    seed: int,
    progress: Progress,
) -> PublishedManifest:
    """Write the variant of `recipe` (the float model with None) to the folder `out`, once it was read back.

    The folder must not exist. The card of `run`, which must have scored this very variant, goes beside the files.

    Raises:
        UsageError: bad input, or a recipe that the form can't hold; QevalError: the files are not what was meant.
    """
    if out.exists():
        raise UsageError(f"'{out}' exists; name another folder.")
    if recipe is not None and recipe.scheme.rotates_inputs:
        raise UsageError(f"'{recipe.name}' turns inputs while running, which no checkpoint says; leave r4 out.")
    if threads:
        torch.set_num_threads(threads)
    loaded, source = source_of_model(model)
    tell_warnings(loaded, progress)
    writer = WRITERS[form](loaded, source)
    fits = writer.check(recipe)
    if run is not None and recipe is None:
        raise UsageError("--run is for variants, and the float model is a run's baseline; leave it out.")

    # the variant, which the cache holds where a run has scored it
    folder, name = None, ""
    if recipe is not None:
        check_recipes([recipe], source, calibration.samples, fits)
        workshop = Workshop(source, cache(lambda: calibration_of(calibration, loaded)), seed, progress)
        if run is not None:
            name = _scored_name(run, recipe, workshop.key(recipe))
        folder = workshop.folder(recipe)

    with progress.phase("write and read back", 1) as advance, atomic_folder(out) as part:
        outcome = writer.write(None if folder is None else load_variant(folder), part)
        published = _manifest(form, source, outcome, None if folder is None else read_manifest(folder))
        _write_json(part / EXPORT_MANIFEST, published.model_dump())
        if folder is not None:
            _write_json(part / VARIANT_MANIFEST, _without_paths(json.loads((folder / MANIFEST).read_bytes())))
        if run is not None:
            _write_card(run, name, part)
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

    def check(self, recipe: Recipe | None) -> FitsKernel:
        """Refuse keys and values that kv_cache_scheme can't say; return what refuses a grid without a layout."""
        if recipe is None:
            raise UsageError("--method float leaves nothing to write: the float model has a checkpoint already.")
        if cache_args(recipe.scheme):
            self._shape.attention_modules()
        if recipe.quant_method.rounding == "none":
            raise UsageError(f"'{recipe.name}' leaves the weights in float, and the model has that checkpoint already.")

        def fits(name: str, grid: WeightGrid, columns: int) -> None:
            self._shape.layout(name, grid, columns, recipe.scheme)

        return fits

    def write(self, variant: Variant | None, part: Path) -> Outcome:
        """Write configuration, tokenizer and tensors, and compare all tensors with the variant's."""
        assert variant is not None
        config = quantization_config(variant, self._shape)
        folder = self._loaded.folder
        for path in known_files(folder):
            shutil.copyfile(path, part / path.name)
        settings = clean_settings(folder)
        if has_own_head(variant, self._baseline):
            settings["tie_word_embeddings"] = False
        _write_json(part / "config.json", {**settings, "quantization_config": config})
        with open_checkpoint(folder) as tensors:
            write_shards(checkpoint_tensors(variant, tensors, self._shape), part)
        same = read_back(part, variant, self._baseline)
        layouts = sorted({group["format"] for group in config["config_groups"].values()})
        return Outcome(layouts, *same, _sentences(layouts, same.matrices, variant, same.largest_difference))


class GgufFileWriter:
    """Writes GGUF files of the Llama family, in types that hold a variant exactly."""

    def __init__(self, loaded: LoadedModel, source: BaselineModel) -> None:
        """Refuse a model of another family.

        Raises:
            UsageError: It is one.
        """
        check_family(loaded)
        kept = (loaded.info.weight_dtype, "float32")
        if loaded.info.compute_dtype not in kept:
            raise UsageError(
                f"--compute {loaded.info.compute_dtype} rounds the checkpoint's {loaded.info.weight_dtype}, and a GGUF "
                "file is written of the loaded weights; leave --compute out."
            )
        self._loaded, self._baseline = loaded, baseline_of(loaded, source)

    def check(self, recipe: Recipe | None) -> FitsKernel:
        """Refuse what is rounded beside the weights; return what refuses a grid without an exact type."""
        if recipe is not None:
            refuse_schemes({recipe.name: recipe.scheme}, "--to gguf writes")
        turns_stream = recipe is not None and recipe.rotations is not None and recipe.rotations.residual
        if recipe is not None and recipe.quantize_head and self._baseline.description.tied and not turns_stream:
            raise UsageError("The head is the embedding too, which a GGUF file holds once; leave --quantize-head out.")
        return check_gguf_grid

    def write(self, variant: Variant | None, part: Path) -> Outcome:
        """Write the file, and compare all tensors with the variant's as qeval reads them."""
        if variant is not None:
            check_exact(variant)
        path = part / GGUF_FILE
        vocabulary, tokens = self._vocabulary()
        write_gguf(self._loaded, variant, _GGUF_FLOATS[self._loaded.info.weight_dtype], path, vocabulary)
        same = read_gguf_back(path, self._loaded, variant, self._baseline)
        kinds = [name for name, _ in read_contents(path).types]
        sentence = f"{GGUF_FILE}: {same.matrices + same.floats} tensors ({', '.join(kinds)}; vectors F32)"
        return Outcome(kinds, *same, [f"{sentence}; read back, they are bit for bit what the model has.", tokens])

    def _vocabulary(self) -> tuple[Vocabulary | None, str]:
        """Return the vocabulary where it is read back as the model's own, and a sentence on it."""
        ours = self._loaded.tokenizer
        try:
            vocabulary = Vocabulary(ours, self._loaded.info.vocab_size)
            theirs = vocabulary.read_back()
            reason = why_other(ours, theirs, PROBES, "auto")
        except UsageError as error:
            reason = str(error)
        if reason is not None:
            return None, f"Without a tokenizer, an engine is to be fed token ids: {reason.removesuffix('.')}."
        return vocabulary, "With the tokenizer, which read back gives the model's token ids, and the chat template."


def _sentences(layouts: list[str], matrices: int, variant: Variant, difference: float) -> list[str]:
    count = "1 matrix" if matrices == 1 else f"{matrices} matrices"
    same = "bit for bit what the variant has"
    if difference:
        same = f"code for code what the variant has; values differ by {difference:.1e} at most, relative"
    sentences = [f"{count} in compressed-tensors' {', '.join(layouts)}; read back, they are {same}."]
    if any(bool((weight.scales < 0).any()) for weight in variant.weights.values()):
        sentences.append(_NEGATIVE_SCALES)
    if variant.floats:
        sentences.append(f"{len(variant.floats)} other tensors hold what the method folded into them.")
        wide = sum(tensor.dim() > 1 for tensor in variant.floats.values())
        if wide:
            sentences.append(f"{wide} of them are matrices, in fp32 where the model's type would round them.")
    if how := variant.scheme.activations:
        sentences.append(f"Activations: {how.describe('token')}, rounded by the runtime.")
    if variant.scheme.caches:
        sentences.append("Keys and values: FP8 with a static scale each a layer, rounded by the runtime.")
    return sentences


WRITERS: Mapping[ExportForm, Callable[[LoadedModel, BaselineModel], VariantWriter]] = {
    "hf": CheckpointWriter,
    "gguf": GgufFileWriter,
}
"""The writers of variants, by the form."""


def _scored_name(run: Path, recipe: Recipe, key: str) -> str:
    """Return what a run calls the variant with a key; scored on several backends, the first.

    Raises:
        UsageError: There is no run, or it did not score that variant.
    """
    done = [each for each in read_run(run).variants if each.role == "variant" and each.status == "done"]
    if (name := next((each.name for each in done if each.key == key), None)) is None:
        raise UsageError(
            f"The run {run} scored no variant that is this {recipe.name}: other weights, calibration, seed or "
            f"--compute; it has {', '.join(each.name for each in done) or 'none'}. Give its flags, or leave --run out."
        )
    return name


def _write_card(run: Path, name: str, part: Path) -> None:
    from qeval.report.card import write_card  # noqa: PLC0415 - plots take a second to import

    write_card(run, name, part)


def _manifest(
    form: ExportForm, source: BaselineModel, outcome: Outcome, manifest: Manifest | None
) -> PublishedManifest:
    return PublishedManifest(
        export_version=2,
        form=form,
        model={"name": _shown(source.name), "weights_sha256": source.weights_sha256},
        written_by=f"qeval {__version__}",
        recipe=manifest.recipe if manifest else None,
        variant_key=manifest.key if manifest else None,
        bits_per_weight=manifest.bits_per_weight if manifest else None,
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

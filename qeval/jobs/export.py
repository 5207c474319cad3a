"""`export`: one variant as an ONNX folder that onnxruntime-genai loads, checked against its fake-quantized twin."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from qeval.backends.onnx.export import ExportTarget, OnnxExporter, Parity
from qeval.backends.onnx.insert_weights import Style
from qeval.backends.onnx.inspection import inspect_folder
from qeval.backends.onnx.nbits import check_kernel
from qeval.backends.onnx.packages import require_runtime
from qeval.backends.onnx.providers import choose_provider
from qeval.backends.torch import TorchBackend
from qeval.compare.loading import source_of_model, tell_warnings
from qeval.compare.onnx import target_of
from qeval.compare.plan import calibration_of
from qeval.compare.schemes import refuse_schemes_off_ort
from qeval.compare.settings import BackendChoice, CalibrationChoice, ModelChoice
from qeval.compare.variants import Workshop, check_recipes
from qeval.config import Recipe
from qeval.errors import QevalError, UsageError
from qeval.jobs.publish import EXPORT_MANIFEST
from qeval.progress import Progress
from qeval.quant.variant import Variant
from qeval.store.variants import Manifest, load_variant, read_manifest


class ExportManifest(BaseModel):
    """All of `qeval.json` in an exported folder: what is in it and how near it is to what was meant."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    export_version: Literal[1]
    model: dict[str, str]
    recipe: dict[str, object] | None  # None for the float model
    variant_key: str | None  # the identity of the integers
    bits_per_weight: float | None  # scales in fp32, as the variant counts them
    exporter: str  # "genai", "dynamo"
    runtime: str  # what it was checked with
    provider: str  # what it was made for
    precision: str  # "fp32", "fp16": of activations and floats
    format: str  # "nbits", "qdq"
    accuracy_level: int
    loads_in_genai: bool  # whether onnxruntime-genai can load the folder and generate
    parity: dict[str, float] | None  # against the fake-quantized twin, on the CPU; None where it doesn't run there
    parity_missing: str | None  # why there is none
    contents: list[str]  # in sentences

    def describe(self) -> list[str]:
        """Return what the folder holds and how near it is to torch, in sentences."""
        if self.parity is None:
            return [*self.contents, f"Not compared with torch: {self.parity_missing}"]
        return [
            *self.contents,
            f"Against the same weights in torch: mean KL {self.parity['kl_nats']:.1e} nats, largest logit difference "
            f"{self.parity['max_logit_difference']:.1e} over {self.parity['tokens']:.0f} tokens.",
        ]


def export_variant(
    model: ModelChoice,
    recipe: Recipe | None,
    calibration: CalibrationChoice,
    choice: BackendChoice,
    out: Path,
    *,
    threads: int | None,
    seed: int,
    progress: Progress,
) -> ExportManifest:
    """Write the variant of `recipe` (the float model with None) to the folder `out`, which must not exist.

    Raises:
        UsageError: bad input; QevalError: no exporter takes the model, or the folder can't be written.
    """
    if out.exists():
        raise UsageError(f"'{out}' exists; name another folder.")
    if recipe is not None:
        refuse_schemes_off_ort({recipe.name: recipe.scheme}, choice.ep, "qeval export can't write")
    choose_provider(choice.ep)
    if threads:
        torch.set_num_threads(threads)
    loaded, source = source_of_model(model)
    tell_warnings(loaded, progress)
    if recipe is not None:
        check_recipes([recipe], source, calibration.samples, check_kernel)
    names = [name for group in source.description.groups for name in group.names] + [source.description.head]
    target = target_of(choice)
    exporter = OnnxExporter(loaded, names, choice.exporter, torch.get_num_threads(), target)
    variant, source_manifest = None, None
    if recipe is not None:
        workshop = Workshop(source, lambda: calibration_of(calibration, loaded), seed, progress)
        folder = workshop.folder(recipe)
        variant, source_manifest = load_variant(folder), read_manifest(folder)
    with progress.phase("export the float graph", 1) as advance:
        exporter.float_folder()
        advance(1)
    if exporter.refused:
        progress.warn(f"{exporter.refused} torch's own exporter made the graph instead.")
    style = Style(choice.format, choice.accuracy_levels[0])
    backend = TorchBackend(loaded.model, source.description, source.head, source.weight_dtype)
    written: list[ExportManifest] = []

    def finish(part: Path) -> None:
        parity, missing = _parity(exporter, backend, variant, part)
        manifest = _manifest(exporter, choice, target, model, source_manifest, part, parity, missing)
        (part / EXPORT_MANIFEST).write_text(json.dumps(manifest.model_dump(), indent=1) + "\n", encoding="utf-8")
        written.append(manifest)

    with progress.phase("write and check", 1) as advance:
        exporter.write(variant, style, out, finish)
        advance(1)
    return written[0]


def _parity(
    exporter: OnnxExporter, backend: TorchBackend, variant: Variant | None, part: Path
) -> tuple[Parity | None, str | None]:
    """Compare the written folder with its fake-quantized twin on the CPU, or return why it can't be."""
    try:
        with backend.open(variant) as session:
            return exporter.parity(part, session), None
    except (QevalError, UsageError) as error:
        return None, str(error)


def _manifest(
    exporter: OnnxExporter,
    choice: BackendChoice,
    target: ExportTarget,
    model: ModelChoice,
    source_manifest: Manifest | None,
    part: Path,
    parity: Parity | None,
    missing: str | None,
) -> ExportManifest:
    versions = require_runtime()
    return ExportManifest(
        export_version=1,
        model={"name": model.name, "weights_sha256": exporter.weights_sha256},
        recipe=source_manifest.recipe if source_manifest else None,
        variant_key=source_manifest.key if source_manifest else None,
        bits_per_weight=source_manifest.bits_per_weight if source_manifest else None,
        exporter=str(exporter.route),
        runtime=f"{versions.distribution} {versions.version}",
        provider=choose_provider(target.ep).onnx_name,
        precision=target.precision,
        format=choice.format,
        accuracy_level=choice.accuracy_levels[0],
        loads_in_genai=exporter.route == "genai",
        parity=asdict(parity) if parity else None,
        parity_missing=missing,
        contents=inspect_folder(part, needs_tokenizer=False).describe(),
    )

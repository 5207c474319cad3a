"""ONNX Runtime for `compare` and `export`; imported only when it is asked for."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from qeval.backends.base import Saved
from qeval.backends.onnx.backend import FolderBackend, OrtBackend
from qeval.backends.onnx.decoder import scorable
from qeval.backends.onnx.export import ExportTarget, OnnxExporter
from qeval.backends.onnx.insert_weights import Style
from qeval.backends.onnx.inspection import OnnxFacts, parse_folder
from qeval.backends.onnx.matrices import GraphMatrix
from qeval.backends.onnx.providers import choose_provider
from qeval.compare.external_checkpoints import TokenCheck, check_same_tokens, padding_note
from qeval.compare.external_graphs import check_same_model, check_weights
from qeval.compare.external_paths import VariantPath
from qeval.compare.settings import BackendChoice
from qeval.errors import UsageError
from qeval.files.hashes import cached_hash
from qeval.formats.match_baseline import BaselineWeights
from qeval.identity import digest_file
from qeval.models.info import LoadedModel
from qeval.models.structure.graph import Description
from qeval.quant.grid import Grid, PerBlock, PerChannel, PerTensor, describe
from qeval.store.run import KeptRecord, VariantRecord

_ROUNDING_LEVEL = 4
_NEVER_ROUNDING = ("cuda", "tensorrt")
"""Providers whose MatMulNBits never rounds activations."""


def ort_backends(choice: BackendChoice, loaded: LoadedModel, description: Description) -> dict[int, OrtBackend]:
    """Make a backend of each accuracy level that a run asks for, and of level 1; one exporter serves them all.

    Raises:
        UsageError: The provider is unknown, packages are missing, or its kernels know no such level.
    """
    check_accuracy_levels(choice)
    provider, threads = choose_provider(choice.ep), torch.get_num_threads()
    names = [name for group in description.groups for name in group.names] + [description.head]
    exporter = OnnxExporter(loaded, names, choice.exporter, threads, target_of(choice))
    levels = {*choice.accuracy_levels, 1}
    return {level: OrtBackend(exporter, Style(choice.format, level), provider, threads) for level in levels}


def check_accuracy_levels(choice: BackendChoice) -> None:
    """Refuse level 4 where the kernels don't round activations.

    CUDA's MatMulNBits multiplies dequantized weights by the activations as they are, whatever the attribute says
    (onnxruntime, docs/contrib_ops/cuda/matmul_nbits.md), so both levels would have the same rows under two names.

    Raises:
        UsageError: It says where level 4 means something.
    """
    if _ROUNDING_LEVEL in choice.accuracy_levels and choice.ep in _NEVER_ROUNDING:
        raise UsageError(
            f"--accuracy-level {_ROUNDING_LEVEL} rounds activations to int8 in ONNX Runtime's CPU kernels; those of "
            f"{choice.ep} compute with them as they are. Leave it out, or say --ep cpu."
        )


def target_of(choice: BackendChoice) -> ExportTarget:
    """Return what graphs are made for: fp32 on the CPU, elsewhere fp16, which the attention kernels take."""
    return ExportTarget(choice.ep, choice.precision or ("fp32" if choice.ep == "cpu" else "fp16"))


@dataclass(frozen=True, eq=False)
class OnnxVariant:
    """An ONNX folder that someone else made, found to answer the baseline's token ids."""

    name: str
    folder: Path
    facts: OnnxFacts
    sha256: str
    backend: FolderBackend
    notes: Mapping[str, str]
    """Where it is from, and what a reader must know of its tokenizer and vocabulary."""
    method = "onnx"

    @property
    def target(self) -> Saved:
        """The target that its backend opens."""
        return Saved(self.folder)

    def record(self, name: str, backend: str, seconds: float) -> VariantRecord:
        """Return what a run says of it, scored on a backend in so many seconds."""
        facts = self.facts
        grids = [grid for grid, _ in Counter(_grid(matrix) for matrix in facts.quantized).most_common()]
        kept = [KeptRecord(name=m.weight, parameters=m.parameters, reason=reason) for m, reason in facts.kept]
        quantized = sum(matrix.parameters for matrix in facts.quantized)
        total = quantized + sum(each.parameters for each in kept)
        return VariantRecord(
            name=name,
            method=self.method,
            backend=backend,
            status="done",
            error=None,
            key=self.sha256,
            grid=" + ".join(str(grid) for grid in grids) or "float",
            granularity=" + ".join(dict.fromkeys(describe(grid) for grid in grids)) or "none",
            symmetric=all(grid.symmetric for grid in grids),
            bits_per_weight=facts.bits_per_weight or facts.size_bytes * 8 / total,
            bits_per_weight_model=facts.size_bytes * 8 / total,
            size_bytes=facts.size_bytes,
            quantized_weights=len(facts.quantized),
            quantized_parameters=quantized,
            kept=kept,
            input_scales=[],
            details={"made by": facts.producer, **self.notes},
            importance=None,
            budget_bits_per_weight=None,
            groups=[],
            quantize_seconds=0.0,
            score_seconds=seconds,
        )


def read_onnx_folder(
    place: VariantPath, loaded: LoadedModel, baseline: BaselineWeights, token_check: TokenCheck, backend: FolderBackend
) -> OnnxVariant:
    """Check the ONNX folder of `--variant` before anything is scored.

    Args:
        place: Where it lies, and the flag that named it.
        loaded: The baseline's model.
        baseline: The weights that its matrices are laid beside.
        token_check: What both sides are asked; the folder's tokens must be the baseline's.
        backend: What will run it.

    Raises:
        UsageError: files are missing or cut short, the graph can't be scored, it is another model's or has matrices
            that are not the baseline's, or it speaks of other tokens.
    """
    parsed = parse_folder(place.path)
    facts, theirs = parsed.facts, scorable(parsed.facts, parsed.graph).vocab
    ours = len(baseline.parameters[baseline.description.head])
    if theirs < ours:
        raise UsageError(
            f"{place.flag} gives logits of {theirs} ids, the baseline of {ours}: it has no probability for ids "
            f"{theirs} to {ours - 1}, so the two cannot be compared."
        )
    try:
        check_same_model(parsed.graph, loaded.model, baseline.description)
        compared = check_weights(parsed, baseline)
    except UsageError as error:
        raise UsageError(f"{place.flag}: {error}") from error
    notes = {
        "from": place.origin,
        "compared": compared,
        **check_same_tokens(place.flag, place.path, loaded.tokenizer, token_check),
    }
    if theirs > ours:
        notes["padding"] = padding_note("head", range(ours, theirs))
    files = list(facts.contents)
    sha256 = cached_hash("onnx", files, lambda: "".join(digest_file(file) for file in files))
    return OnnxVariant(place.name, place.path, facts, sha256, backend, notes)


def _grid(matrix: GraphMatrix) -> Grid:
    how = matrix.quantization
    assert how is not None
    if how.block:
        return Grid(how.bits, PerBlock(how.block), how.symmetric)
    return Grid(how.bits, PerTensor() if how.granularity == "tensor" else PerChannel(), how.symmetric)

"""What `compare` and `export` need of ONNX Runtime; imported only when it is asked for."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qeval.backends.onnx.backend import FolderBackend, OrtBackend, Ran
from qeval.backends.onnx.decoder import read_decoder
from qeval.backends.onnx.export import Exporter, Target
from qeval.backends.onnx.files import content_files
from qeval.backends.onnx.inspection import OnnxFacts, inspect_folder
from qeval.backends.onnx.matrices import Matrix
from qeval.backends.onnx.packages import require_runtime
from qeval.backends.onnx.providers import choose
from qeval.backends.onnx.swap import Style
from qeval.backends.onnx.vectors import vectors_of
from qeval.compare.elsewhere import Asked, check_tokens, padding_told
from qeval.compare.local import Place
from qeval.compare.settings import BackendChoice
from qeval.errors import UsageError
from qeval.formats.beside import SAME, apart
from qeval.identity import digest_file
from qeval.models.graph import Description
from qeval.models.hashes import remembered
from qeval.models.info import LoadedModel
from qeval.quant.grid import Grid, PerBlock, PerChannel, PerTensor, describe
from qeval.store.run import KeptRecord, RuntimeRecord, VariantRecord


@dataclass(frozen=True, eq=False)
class Runtime:
    """ONNX Runtime for one model: who exports it, and a backend an accuracy level."""

    exporter: Exporter
    backends: tuple[OrtBackend, ...]


def runtime_of(choice: BackendChoice, loaded: LoadedModel, description: Description) -> Runtime:
    """The exporter and the backends that a run asks for.

    Raises:
        UsageError: the provider is unknown, or packages are missing.
    """
    provider, threads = choose(choice.ep), torch.get_num_threads()
    names = [name for group in description.groups for name in group.names] + [description.head]
    exporter = Exporter(loaded, names, choice.exporter, threads, target_of(choice))
    styles = [Style(choice.format, level) for level in choice.accuracy_levels]
    return Runtime(exporter, tuple(OrtBackend(exporter, style, provider, threads) for style in styles))


def target_of(choice: BackendChoice) -> Target:
    """What graphs are made for: fp32 on the CPU, and on other providers fp16, which their attention kernels take."""
    return Target(choice.ep, choice.precision or ("fp32" if choice.ep == "cpu" else "fp16"))


@dataclass(frozen=True, eq=False)
class Foreign:
    """An ONNX folder that someone else made, found to answer the baseline's token ids."""

    name: str
    folder: Path
    facts: OnnxFacts
    sha256: str
    ids: int
    """The baseline's vocabulary; what the folder has beyond it is left out."""
    told: Mapping[str, str]
    """Where it is from, and what a reader must know of its tokenizer and vocabulary."""

    def backend(self, choice: BackendChoice) -> FolderBackend:
        """What runs it."""
        return FolderBackend(self.folder, choose(choice.ep), torch.get_num_threads(), ids=self.ids)

    def record(self, backend: str, runtime: RuntimeRecord | None, seconds: float) -> VariantRecord:
        """What a run says of it."""
        facts = self.facts
        grids = [grid for grid, _ in Counter(_grid(matrix) for matrix in facts.quantized).most_common()]
        kept = [KeptRecord(name=m.weight, parameters=m.parameters, reason=reason) for m, reason in facts.kept]
        quantized = sum(matrix.parameters for matrix in facts.quantized)
        total = quantized + sum(each.parameters for each in kept)
        return VariantRecord(
            name=self.name,
            method="onnx",
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
            details={"made by": facts.producer, **self.told},
            importance=None,
            budget_bits_per_weight=None,
            groups=[],
            quantize_seconds=0.0,
            score_seconds=seconds,
            runtime=runtime,
        )


def foreign(place: Place, loaded: LoadedModel, description: Description, vocabulary: int, asked: Asked) -> Foreign:
    """The ONNX folder of `--variant`, checked before anything is scored.

    `vocabulary` is the width of the baseline's logits; the tokens of what is `asked` must be the baseline's.

    Raises:
        UsageError: files are missing or cut short, the graph can't be scored, it is another model's, or it speaks of
            other tokens.
    """
    facts = inspect_folder(place.path)
    decoder = read_decoder(facts)
    if decoder.vocab_size < vocabulary:
        raise UsageError(
            f"{place.flag} gives logits of {decoder.vocab_size} ids, the baseline of {vocabulary}: "
            f"it has no probability for ids {decoder.vocab_size} to {vocabulary - 1}, so the two cannot be compared."
        )
    check_same_model(place.flag, facts, loaded.model, description)
    told = {"from": place.origin, **check_tokens(place.flag, place.path, loaded.tokenizer, asked)}
    if decoder.vocab_size > vocabulary:
        told = {**told, "padding": padding_told("head", range(vocabulary, decoder.vocab_size))}
    files = content_files(facts.files)
    sha256 = remembered("onnx", files, lambda: "".join(digest_file(file) for file in files))
    return Foreign(place.name, place.path, facts, sha256, vocabulary, told)


def check_same_model(what: str, facts: OnnxFacts, model: Any, description: Description) -> None:
    """Refuse the graph of another model: none of its vectors is the gain of the baseline's last norm.

    Quantizers leave that gain alone, but a graph may hold it with the 1 that Gemma adds. A model without one, and a
    graph without a vector of its length, tell nothing.

    Raises:
        UsageError: the graph has vectors of that length, and none is the gain.
    """
    if (last := last_norm(model, description)) is None:
        return
    name, gain = last
    vectors = [torch.from_numpy(vector) for vector in vectors_of(facts.files, len(gain))]
    nearest = min((apart(vector, own) for vector in vectors for own in (gain, gain + 1)), default=0.0)
    if nearest > SAME:
        raise UsageError(
            f"{what}: the nearest of its {len(vectors)} vectors of {len(gain)} numbers differs from the baseline's "
            f"{name} by {100 * nearest:.2g} %, which no quantizer changes: it was made from another model (a "
            "fine-tuned one, or one whose weights were rotated)."
        )


def last_norm(model: Any, description: Description) -> tuple[str, torch.Tensor] | None:
    """The name and the gain [d_model], fp32, of the norm before the head; None where it has none."""
    inside = tuple(f"{layer}." for layer in description.layers)
    outside = [
        (name, parameter.detach().float().cpu())
        for name, parameter in model.named_parameters()
        if parameter.dim() == 1 and name.endswith("weight") and not name.startswith(inside)
    ]
    return outside[-1] if outside else None


def runtime_record(ran: Ran, choice: BackendChoice, *, route: str | None, level: int | None) -> RuntimeRecord:
    """How a model ran, in the words of a run's record; no route and level for a folder made elsewhere."""
    versions = require_runtime()
    return RuntimeRecord(
        runtime=f"{versions.distribution} {versions.version}",
        provider=ran.provider,
        nodes=ran.nodes,
        exporter=route,
        format=choice.format if route else None,
        accuracy_level=level,
        shares_prefixes=ran.sharing,
        facts=ran.facts,
    )


def _grid(matrix: Matrix) -> Grid:
    how = matrix.quantization
    assert how is not None
    if how.block:
        return Grid(how.bits, PerBlock(how.block), how.symmetric)
    return Grid(how.bits, PerTensor() if how.granularity == "tensor" else PerChannel(), how.symmetric)

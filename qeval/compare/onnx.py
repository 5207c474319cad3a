"""What `compare` and `export` need of ONNX Runtime; imported only when it is asked for."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from qeval.backends.onnx.backend import FolderBackend, OrtBackend, Ran
from qeval.backends.onnx.decoder import scorable
from qeval.backends.onnx.export import Exporter, Target
from qeval.backends.onnx.inspection import OnnxFacts, parse_folder
from qeval.backends.onnx.matrices import Matrix
from qeval.backends.onnx.packages import require_runtime
from qeval.backends.onnx.providers import choose
from qeval.backends.onnx.swap import Style
from qeval.compare.elsewhere import Asked, check_tokens, padding_told
from qeval.compare.graph_weights import check_same_model, check_weights
from qeval.compare.local import Place
from qeval.compare.settings import BackendChoice
from qeval.errors import UsageError
from qeval.formats.beside import Baseline
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


def foreign(place: Place, loaded: LoadedModel, baseline: Baseline, asked: Asked) -> Foreign:
    """The ONNX folder of `--variant NAME=FOLDER`, checked before anything is scored.

    The tokens of what is `asked` must be the baseline's.

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
    told = {"from": place.origin, "compared": compared, **check_tokens(place.flag, place.path, loaded.tokenizer, asked)}
    if theirs > ours:
        told["padding"] = padding_told("head", range(ours, theirs))
    files = list(facts.contents)
    sha256 = remembered("onnx", files, lambda: "".join(digest_file(file) for file in files))
    return Foreign(place.name, place.path, facts, sha256, ours, told)


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

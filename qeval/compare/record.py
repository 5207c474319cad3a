"""The run's record: what each variant is and what it was measured on, in the words that reports use."""

from collections.abc import Mapping
from dataclasses import dataclass

from qeval.models.structure.weight_views import expert_name
from qeval.quant.grid import FLOAT, describe, parse
from qeval.store.run import GroupRecord, KeptRecord, OverlapRecord, VariantRecord
from qeval.store.variants import Manifest

FEW_TOKENS = 128
"""An expert that calibration showed fewer tokens is warned of: as many as a block has weights."""


@dataclass(frozen=True)
class FloatModel:
    """The baseline itself as a model of a run: scored in other arithmetic it is a noise floor."""

    key: str
    bits: float
    """Of a weight in the checkpoint."""
    size_bytes: int
    method = "float"
    target = None

    def record(self, name: str, backend: str, seconds: float) -> VariantRecord:
        """Return what the run says of a noise floor."""
        return failed_record(name, self.method, backend, "").model_copy(
            update={
                "status": "done", "error": None, "role": "floor", "grid": "float", "granularity": "none",
                "key": self.key, "bits_per_weight": self.bits, "bits_per_weight_model": self.bits,
                "size_bytes": self.size_bytes, "score_seconds": seconds,
            }
        )  # fmt: skip


def variant_record(
    name: str, backend: str, manifest: Manifest, seconds: float, notes: Mapping[str, str], overlap: OverlapRecord | None
) -> VariantRecord:
    """Return the record of a finished variant.

    Args:
        name: As rows have it.
        backend: What it was scored on.
        manifest: The variant's.
        seconds: How long scoring took.
        notes: What a reader must know of it in this run, beside what its manifest says.
        overlap: What its calibration text shares with what is scored.
    """
    grids = _grids(manifest)
    in_float = [FLOAT] if any(choice.format == FLOAT for choice in manifest.choices) else []
    forms = list(dict.fromkeys(entry.form for entry in manifest.stored))
    recipe = manifest.recipe
    return VariantRecord(
        name=name,
        method=str(recipe["method"]),
        backend=backend,
        status="done",
        error=None,
        key=manifest.key,
        grid=" + ".join([*grids, *forms, *in_float]) or FLOAT,
        granularity=" + ".join(
            [*dict.fromkeys(describe(parse(grid)) for grid in grids), *(["its own"] if forms else [])]
        )
        or "none",
        symmetric=all(parse(grid).symmetric for grid in grids),
        bits_per_weight=manifest.bits_per_weight,
        bits_per_weight_model=manifest.bits_per_weight_model,
        size_bytes=manifest.size_bytes,
        quantized_weights=len(manifest.weights) + len(manifest.stored),
        quantized_parameters=_on_grids(manifest) + sum(entry.parameters for entry in manifest.stored),
        kept=[KeptRecord(**entry.model_dump()) for entry in manifest.kept],
        input_scales=manifest.input_scales,
        details={**manifest.details, **notes},
        importance=str(recipe["importance"]) if str(recipe["method"]).startswith("mixed") else None,
        budget_bits_per_weight=recipe.get("budget"),
        groups=[GroupRecord(**entry.model_dump()) for entry in manifest.choices],
        quantize_seconds=manifest.seconds,
        score_seconds=seconds,
        calibration_sha256=(manifest.calibration or {}).get("tokens_sha256"),
        overlap=overlap,
        expert_tokens={stack: list(tokens) for stack, tokens in manifest.expert_tokens.items()},
    )


def coverage_warning(name: str, manifest: Manifest) -> str | None:
    """Return a sentence where calibration showed experts of a variant few tokens; None where all saw enough."""
    counts = {expert_name(stack, i): n for stack, seen in manifest.expert_tokens.items() for i, n in enumerate(seen)}
    few = {expert: tokens for expert, tokens in counts.items() if tokens < FEW_TOKENS}
    if not few:
        return None
    least = min(few, key=few.__getitem__)
    return (
        f"{name}: {len(few)} of {len(counts)} experts saw fewer than {FEW_TOKENS} calibration tokens ({least}: "
        f"{few[least]}); give more --calibration-samples, or --calibrate-all-experts."
    )


def failed_record(name: str, method: str, backend: str, error: str) -> VariantRecord:
    """Return the record of a variant that could not be made or scored."""
    return VariantRecord(
        name=name,
        method=method,
        backend=backend,
        status="failed",
        error=error,
        key="",
        grid="",
        granularity="",
        symmetric=True,
        bits_per_weight=0.0,
        bits_per_weight_model=0.0,
        size_bytes=0,
        quantized_weights=0,
        quantized_parameters=0,
        kept=[],
        input_scales=[],
        details={},
        importance=None,
        budget_bits_per_weight=None,
        groups=[],
        quantize_seconds=0.0,
        score_seconds=0.0,
    )


def _grids(manifest: Manifest) -> list[str]:
    """Return the distinct grids, the one with the most weights first."""
    weights: dict[str, int] = {}
    for entry in manifest.weights:
        weights[entry.grid] = weights.get(entry.grid, 0) + entry.rows * entry.columns
    return sorted(weights, key=lambda grid: -weights[grid])


def _on_grids(manifest: Manifest) -> int:
    return sum(entry.rows * entry.columns for entry in manifest.weights)

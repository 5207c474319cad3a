"""The models that a run scores: the baseline, its noise floors, and every variant on every backend."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qeval.backends.base import Backend
from qeval.compare.exact import ExactBackend
from qeval.compare.plan import Plan
from qeval.compare.record import FloatModel
from qeval.compare.scored_models import ReferenceModel, ScoredModel
from qeval.compare.variants import VariantEntry
from qeval.config import BASELINE
from qeval.executors.local import Share
from qeval.identity import digest
from qeval.models.device import free_bytes
from qeval.models.vocabulary import end_tokens
from qeval.paths import home
from qeval.progress import Progress
from qeval.score.jobs import Work
from qeval.store.ledger import Ledger
from qeval.store.rows import RowStore
from qeval.store.states import StateStore

_STATES_SHARE = 8
"""The part of a GPU's free memory that the baseline's states may take: an eighth."""


def baseline_model(plan: Plan, progress: Progress, states: Path | None = None) -> ReferenceModel:
    """Return the baseline, which all others are compared with; its states are in the cache, or in a folder `states`."""
    return ReferenceModel(
        name=BASELINE,
        variant=FloatModel(plan.baseline_key, float(plan.source.float_bits), plan.baseline_size_bytes),
        backend=plan.backend,
        key={"weights": plan.baseline_key},
        out=plan.settings.out,
        store=_baseline_states(plan, states or home() / "states" / plan.baseline_key, progress),
        is_baseline=True,
    )


def _baseline_states(plan: Plan, folder: Path, progress: Progress) -> StateStore:
    """Return the store of the baseline's states, which may take a share of a GPU's free memory."""
    device = plan.source.head.weight.device if plan.settings.model.device_map else plan.source.device
    room = free_bytes(device) // _STATES_SHARE if device.type == "cuda" else 0
    return StateStore(folder, progress.warn, device, room)


def work_of(
    plan: Plan, baseline: ReferenceModel, ledger: Ledger, progress: Progress, share: Share | None = None
) -> Work:
    """Return what every model of the plan is scored on, and this worker's share where jobs are run together."""
    return Work(
        shards=plan.shards,
        corpus=plan.protocol.corpus if plan.protocol else "",
        suites=plan.suites,
        responses=plan.responses,
        parts=plan.parts,
        continued=plan.drift.corpus if plan.drift else "",
        traces=plan.traces.parts,
        haystacks=plan.haystacks,
        rows=RowStore(plan.settings.out),
        ledger=ledger,
        baseline=baseline,
        sampling=plan.settings.sampling,
        batch_tokens=plan.batch_tokens,
        device=plan.source.device,
        progress=progress,
        tokenizer=plan.loaded.tokenizer,
        stops=end_tokens(plan.loaded.model, plan.loaded.tokenizer),
        share=share,
    )


def scored_models(
    plan: Plan, entries: Sequence[VariantEntry], baseline: ReferenceModel, progress: Progress
) -> Iterator[ScoredModel]:
    """Yield the models to score, in the order of the report: noise floors, variants, folders that other tools made."""
    for backend in plan.floors:
        yield _floor(plan, backend, f"{BASELINE}@{backend.name}", baseline, backend.prepare(progress))
    if plan.rounds:
        yield _floor(plan, ExactBackend(plan), f"{BASELINE}@fp32", None, None)
    for entry in entries:
        yield from _on_every_backend(plan, entry, progress)
    for each in plan.onnx_variants:
        weights = {"weights": each.sha256, "baseline": plan.baseline_key}
        key = {**weights, **each.backend.identity(each.target)}
        yield ScoredModel(name=each.name, variant=each, backend=each.backend, key=key, out=plan.settings.out)


def states_folder(out: Path) -> Path:
    """Return where a run keeps the variants' final states until every backend has been compared with them."""
    return out / "states"


def score_all(baseline: ScoredModel, models: Sequence[ScoredModel], work: Work) -> None:
    """Score the models that come after the baseline, then wait for what others are at, the baseline's part first."""
    for model in models:
        model.score(work, wait=False)
    if any(each.is_open for each in (baseline, *models)) and (others := work.ledger.at_work()):
        work.progress.tell(f"Waiting for {' and '.join(others)}: at work on what is left of this run.")
    for model in (baseline, *models):
        model.score(work, wait=True)


def _on_every_backend(plan: Plan, entry: VariantEntry, progress: Progress) -> Iterator[ScoredModel]:
    """Yield a variant on every backend: on the first by the name that was typed, then by that with `@backend`.

    A part that --split added is scored on the first alone.
    """
    twin: ReferenceModel | None = None
    is_part = any(entry.name == recipe.name for recipe in plan.settings.parts)
    for place, backend in enumerate(plan.backends[:1] if is_part else plan.backends):
        name = f"{entry.name}@{backend.name}" if place else entry.name
        error = entry.error or backend.prepare(progress)
        key = {} if error else {"weights": plan.baseline_key, **entry.identity, **backend.identity(entry.target)}
        if backend is plan.backend and len(plan.backends) > 1:
            store = StateStore(states_folder(plan.settings.out), progress.warn)
            twin = ReferenceModel(
                name=name, variant=entry, backend=plan.backend, key=key, out=plan.settings.out, error=error, store=store
            )
            yield twin
        else:
            yield ScoredModel(
                name=name, variant=entry, backend=backend, key=key, out=plan.settings.out, twin=twin, error=error
            )


def _floor(plan: Plan, backend: Backend[Any], name: str, twin: ReferenceModel | None, error: str | None) -> ScoredModel:
    """Return the baseline itself in other arithmetic: the least that a run can see."""
    key = {"weights": plan.baseline_key, **backend.identity(None)}
    variant = FloatModel(digest(key), float(plan.source.float_bits), plan.baseline_size_bytes)
    return ScoredModel(
        name=name, variant=variant, backend=backend, key=key, out=plan.settings.out, twin=twin, error=error
    )

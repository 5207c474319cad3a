"""`bench`: the speed and the memory of each variant in each engine, and whether its tokens are the variant's.

    plan -> variants made -> engines prepared -> each opened and its tokens checked -> rounds by the clock

What can't be had on the way (an engine, a variant, a provider) is a row with its reason, and the rest goes on.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial

from qeval.backends.base import Saved, Session
from qeval.bench.engine_pool import EnginePool, PooledEngine, PrepareProcess, engine_pool, prepare_process
from qeval.bench.engines.base import FreeRun
from qeval.bench.engines.drift import broken, drift
from qeval.bench.engines.engine_spec import EngineSpec
from qeval.bench.engines.registry import maker, prepare_engine
from qeval.bench.messages import Choose, Ready
from qeval.bench.plan import BenchPlan, Checks, make_variants
from qeval.bench.results import Results
from qeval.bench.rounds import CellGrid, Clock, run_rounds
from qeval.bench.settings import PRECISIONS
from qeval.bench.worker_handle import EngineError
from qeval.compare.variants import VariantEntry
from qeval.errors import QevalError, UsageError
from qeval.files.hashes import cached_hash
from qeval.identity import digest_file
from qeval.progress import Progress
from qeval.store.timings import BenchRecord, CellOutcome, Drift, EngineRecord
from qeval.store.variants import is_variant, read_manifest


def run_bench(plan: BenchPlan, progress: Progress, started: float) -> BenchRecord:
    """Measure what was planned, and return the record, which is in the run's folder too.

    Args:
        plan: What is measured.
        progress: Hears of phases and warnings.
        started: When the command began, on the monotonic clock: the budget counts from there.
    """
    choice, logs = plan.choice, plan.choice.out / "logs"
    results = Results(choice.out, plan.record, plan.places, progress)
    clock = Clock(started + choice.budget_seconds)
    _refuse_too_long(plan, results)
    variants = make_variants(plan, progress)
    with prepare_process(logs) as preparer:
        systems = _prepare_engines(plan, variants, results, preparer, clock, progress)
    with engine_pool(logs) as pool:
        systems = _check_engines(plan, systems, results, pool, clock, progress)
        _free_model(plan)
        grid = CellGrid(systems, plan.prompts, choice.generate, choice.repeats)
        with progress.phase("time", len(systems) * len(plan.prompts)) as advance:
            run_rounds(grid, results, pool, clock, choice.seed, advance)
    results.mark_unspent()
    return results.write(finished=True)


def bench_exit_code(record: BenchRecord) -> int:
    """Return 3 where an engine or a cell failed or nothing was measured; lack of memory or budget is a result."""
    failed = any(each.reason for each in record.opened) or any(cell.outcome == "failed" for cell in record.cells)
    return QevalError.exit_code if failed or not record.timings else 0


def _refuse_too_long(plan: BenchPlan, results: Results) -> None:
    for place in plan.places:
        if (place.batch, place.prompt) in plan.too_long:
            results.refuse_cell(place, "refused", plan.too_long[place.batch, place.prompt])


def _prepare_engines(
    plan: BenchPlan,
    variants: Sequence[VariantEntry],
    results: Results,
    preparer: PrepareProcess,
    clock: Clock,
    progress: Progress,
) -> list[PooledEngine]:
    """Return the systems whose engine is installed and could prepare its files, as far as the budget goes."""
    systems: list[PooledEngine] = []
    pairs = [(engine, entry) for engine in plan.choice.engines for entry in variants]
    with progress.phase("prepare engines", len(pairs)) as advance:
        for engine, entry in pairs:
            if clock.left <= 0:
                break
            with _failures_recorded(results, engine, entry.name, progress):
                prepare_files = prepare_engine if maker(engine).is_light else preparer.prepare
                spec = _spec_of(plan.spec, entry)
                systems.append(PooledEngine(engine, entry.name, spec, prepare_files(engine, spec)))
            advance(1)
    return systems


def _check_engines(
    plan: BenchPlan,
    systems: Sequence[PooledEngine],
    results: Results,
    pool: EnginePool,
    clock: Clock,
    progress: Progress,
) -> list[PooledEngine]:
    """Return the systems that open and whose tokens are their variant's, as far as the budget goes."""
    sound: list[PooledEngine] = []
    with progress.phase("open and check engines", len(systems)) as advance:
        for system in systems:
            if clock.left <= 0:
                break
            with _failures_recorded(results, *system.name, progress):
                ready = pool.ready(system)
                identity = asdict(ready.identity) | {"variant": _content(system)}
                results.open(_opened(system, ready), identity)
                _check_tokens(plan, system, results, pool, progress)
                sound.append(system)
            if system not in sound:
                pool.end(system)
            advance(1)
    return sound


def _check_tokens(
    plan: BenchPlan, system: PooledEngine, results: Results, pool: EnginePool, progress: Progress
) -> None:
    """Compare a system's tokens with those of its variant in torch.

    Raises:
        EngineError: It could not run, or its tokens are none of the variant's.
    """
    with _reference(plan, system) as session:
        if session is None:
            progress.warn(f"{system.variant} is no variant of qeval's: the tokens of {system.engine} were not checked.")
            return
        drifts = _drifts(plan.checks, system, session, pool)
    results.add_drifts(drifts)
    if reason := broken(drifts):
        raise EngineError("failed", f"No speed is told of a broken model. {reason}")


def _drifts(checks: Checks, system: PooledEngine, session: Session, pool: EnginePool) -> list[Drift]:
    """Return what each prompt of the check shows."""

    def run(text: Sequence[int], count: int) -> FreeRun:
        return pool.ask(system, Choose(tuple(text), count), FreeRun)

    drift_of = partial(drift, run, session, rejoin=checks.rejoin, engine=system.engine, variant=system.variant)
    return [drift_of(prompt, checks.tokens, index=index) for index, prompt in enumerate(checks.prompts.tolist())]


@contextmanager
def _reference(plan: BenchPlan, system: PooledEngine) -> Iterator[Session | None]:
    """Yield the variant in torch, fake-quantized; None for one that only its engine can read."""
    folder = system.spec.variant
    if folder is None:
        with plan.backend.open(None) as session:
            yield session
    elif is_variant(folder):
        with plan.backend.open(Saved(folder)) as session:
            yield session
    else:
        yield None


@contextmanager
def _failures_recorded(results: Results, engine: str, variant: str, progress: Progress) -> Iterator[None]:
    """Record and warn of what fails for a system in the block, so that the next one goes on."""
    outcome: CellOutcome
    try:
        yield
    except EngineError as trouble:
        outcome, reason = trouble.trouble, trouble.reason
    except UsageError as error:
        outcome, reason = "refused", str(error)
    except QevalError as error:
        outcome, reason = "failed", str(error)
    else:
        return
    results.refuse(engine, variant, outcome, reason)
    progress.warn(f"{engine} with {variant}: {reason}")


def _spec_of(base: EngineSpec, entry: VariantEntry) -> EngineSpec:
    """Return what a variant's engines are opened for.

    Raises:
        QevalError: The variant could not be quantized.
    """
    if entry.error is not None:
        raise QevalError(f"The variant could not be made: {entry.error}")
    named = [kind for kind in PRECISIONS if entry.folder is None and kind == entry.name]
    return replace(base, variant=entry.folder, precision=named[0] if named else base.precision)


def _content(system: PooledEngine) -> str:
    """Return the identity of a variant's numbers; for the model itself its type, as its weights are hashed apart."""
    folder = system.spec.variant
    if folder is None:
        return system.spec.precision
    if is_variant(folder):
        return read_manifest(folder).key
    files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    return cached_hash("bench", files, lambda: "".join(digest_file(file) for file in files))


def _opened(system: PooledEngine, ready: Ready) -> EngineRecord:
    identity, memory = ready.identity, ready.memory
    return EngineRecord(
        *system.name,
        reason=None,
        provider=identity.provider,
        dtype=identity.dtype,
        weights=identity.weights,
        threads=identity.threads,
        version=identity.version,
        load_seconds=ready.load_seconds,
        compile_seconds=0.0,
        disk_bytes=memory.disk_bytes,
        weights_bytes=memory.weights_bytes,
    )


def _free_model(plan: BenchPlan) -> None:
    """Free the parent's copy of the model, which is needed no more."""
    plan.loaded.model.to("meta")
    gc.collect()

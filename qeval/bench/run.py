"""`bench`: the speed and the memory of each variant in each engine, and whether its tokens are the variant's.

    plan -> variants made -> engines prepared -> each opened and its tokens checked -> rounds by the clock

What can't be had on the way (an engine, a variant, a provider) is a row with its reason, and the rest goes on.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial

from qeval.backends.base import Session
from qeval.bench.book import Book
from qeval.bench.fleet import Fleet, System, Yard, fleet, yard
from qeval.bench.plan import Checks, Plan, make_variants
from qeval.bench.process import TroubleError
from qeval.bench.rounds import Clock, Grid, run_rounds
from qeval.bench.settings import PRECISIONS
from qeval.bench.words import Choose, Ready
from qeval.compare.variants import Entry, is_variant
from qeval.engines.base import FreeRun
from qeval.engines.drift import broken, drift
from qeval.engines.opening import Opening
from qeval.engines.registry import maker, prepare
from qeval.errors import QevalError, UsageError
from qeval.identity import digest_file
from qeval.models.hashes import remembered
from qeval.progress import Progress
from qeval.store.timings import BenchRecord, Drift, Opened, Outcome
from qeval.store.variants import read_manifest


def bench(plan: Plan, progress: Progress, started: float) -> BenchRecord:
    """Measure what was planned; the record, which is in the run's folder too.

    `started` is when the command began, on the monotonic clock: the budget counts from there.
    """
    asked, logs = plan.choice, plan.choice.out / "logs"
    book = Book(asked.out, plan.record, plan.places, progress)
    clock = Clock(started + asked.budget_seconds)
    _refuse_too_long(plan, book)
    variants = make_variants(plan, progress)
    with yard(logs) as workplace:
        systems = _prepared(plan, variants, book, workplace, clock, progress)
    with fleet(logs) as running:
        systems = _checked(plan, systems, book, running, clock, progress)
        _let_go(plan)
        grid = Grid(systems, plan.prompts, asked.generate, asked.repeats)
        with progress.phase("time", len(systems) * len(plan.prompts)) as advance:
            run_rounds(grid, book, running, clock, asked.seed, advance)
    book.say_unspent()
    return book.write(finished=True)


def exit_code(record: BenchRecord) -> int:
    """3 where an engine or a cell failed, or nothing was measured; a lack of memory or of budget is a result."""
    failed = any(each.reason for each in record.opened) or any(cell.outcome == "failed" for cell in record.cells)
    return QevalError.exit_code if failed or not record.timings else 0


def _refuse_too_long(plan: Plan, book: Book) -> None:
    for place in plan.places:
        if (place.batch, place.prompt) in plan.too_long:
            book.refuse_cell(place, "refused", plan.too_long[place.batch, place.prompt])


def _prepared(
    plan: Plan, variants: Sequence[Entry], book: Book, workplace: Yard, clock: Clock, progress: Progress
) -> list[System]:
    """The systems whose engine is there and could make what it runs, as far as the budget goes."""
    found: list[System] = []
    pairs = [(engine, entry) for engine in plan.choice.engines for entry in variants]
    with progress.phase("prepare engines", len(pairs)) as advance:
        for engine, entry in pairs:
            if clock.left <= 0:
                break
            with _told(book, engine, entry.name, progress):
                making = prepare if maker(engine).is_light else workplace.prepare
                opening = _opening(plan.opening, entry)
                found.append(System(engine, entry.name, opening, making(engine, opening)))
            advance(1)
    return found


def _checked(
    plan: Plan, systems: Sequence[System], book: Book, running: Fleet, clock: Clock, progress: Progress
) -> list[System]:
    """The systems that open and whose tokens are their variant's, as far as the budget goes."""
    found: list[System] = []
    with progress.phase("open and check engines", len(systems)) as advance:
        for system in systems:
            if clock.left <= 0:
                break
            with _told(book, *system.name, progress):
                ready = running.ready(system)
                identity = asdict(ready.identity) | {"variant": _content(system)}
                book.open(_opened(system, ready), identity)
                _check_tokens(plan, system, book, running, progress)
                found.append(system)
            if system not in found:
                running.end(system)
            advance(1)
    return found


def _check_tokens(plan: Plan, system: System, book: Book, running: Fleet, progress: Progress) -> None:
    """Hold a system's tokens to its variant's reference.

    Raises:
        TroubleError: it could not run, or its tokens are none of the variant's.
    """
    with _reference(plan, system) as session:
        if session is None:
            progress.warn(f"{system.variant} is no variant of qeval's: the tokens of {system.engine} were not checked.")
            return
        drifts = _drifts(plan.checks, system, session, running)
    book.drifted(drifts)
    if reason := broken(drifts):
        raise TroubleError("failed", f"No speed is told of a broken model. {reason}")


def _drifts(checks: Checks, system: System, session: Session, running: Fleet) -> list[Drift]:
    """What each prompt of the check shows."""

    def run(text: Sequence[int], count: int) -> FreeRun:
        return running.ask(system, Choose(tuple(text), count), FreeRun)

    own = partial(drift, run, session, rejoin=checks.rejoin, engine=system.engine, variant=system.variant)
    return [own(prompt, checks.tokens, index=index) for index, prompt in enumerate(checks.prompts.tolist())]


@contextmanager
def _reference(plan: Plan, system: System) -> Iterator[Session | None]:
    """The variant in torch, fake-quantized; None for one that only its engine can read."""
    folder = system.opening.variant
    if folder is None:
        with plan.backend.open(None) as session:
            yield session
    elif is_variant(folder):
        with plan.backend.open_saved(folder) as session:
            yield session
    else:
        yield None


@contextmanager
def _told(book: Book, engine: str, variant: str, progress: Progress) -> Iterator[None]:
    """What goes wrong with a system is written down and told, and the next one goes on."""
    outcome: Outcome
    try:
        yield
    except TroubleError as trouble:
        outcome, reason = trouble.trouble, trouble.reason
    except UsageError as error:
        outcome, reason = "refused", str(error)
    except QevalError as error:
        outcome, reason = "failed", str(error)
    else:
        return
    book.refuse(engine, variant, outcome, reason)
    progress.warn(f"{engine} with {variant}: {reason}")


def _opening(base: Opening, entry: Entry) -> Opening:
    """What a variant's engines are opened for.

    Raises:
        QevalError: the variant could not be made.
    """
    if entry.error is not None:
        raise QevalError(f"The variant could not be made: {entry.error}")
    own = [kind for kind in PRECISIONS if entry.folder is None and kind == entry.name]
    return replace(base, variant=entry.folder, precision=own[0] if own else base.precision)


def _content(system: System) -> str:
    """The identity of a variant's numbers; the model itself has that of its weights, which is told beside it."""
    folder = system.opening.variant
    if folder is None:
        return system.opening.precision
    if is_variant(folder):
        return read_manifest(folder).key
    files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    return remembered("bench", files, lambda: "".join(digest_file(file) for file in files))


def _opened(system: System, ready: Ready) -> Opened:
    told, memory = ready.identity, ready.memory
    return Opened(
        *system.name,
        reason=None,
        provider=told.provider,
        dtype=told.dtype,
        weights=told.weights,
        threads=told.threads,
        version=told.version,
        load_seconds=ready.load_seconds,
        compile_seconds=0.0,
        disk_bytes=memory.disk_bytes,
        weights_bytes=memory.weights_bytes,
    )


def _let_go(plan: Plan) -> None:
    """The parent's own copy of the model is needed no more."""
    plan.loaded.model.to("meta")
    gc.collect()

"""The models of a run: every variant on every backend that was asked for, and what each is compared with."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from pydantic import ValidationError

from qeval.backends.base import Session
from qeval.compare.llamacpp import Llama
from qeval.compare.prepare import Plan, open_exact
from qeval.compare.record import failed_record, variant_record
from qeval.compare.scoring import Candidate, Kept, Scorer
from qeval.compare.variants import Entry
from qeval.config import BASELINE
from qeval.errors import BrokenRecordError, QevalError
from qeval.identity import digest
from qeval.paths import home
from qeval.progress import Progress
from qeval.store.atomic import write_text
from qeval.store.run import RuntimeRecord, VariantRecord
from qeval.store.states import StateStore
from qeval.store.variants import load_variant, read_manifest

if TYPE_CHECKING:
    from qeval.backends.onnx.backend import OrtBackend, Ran
    from qeval.compare.onnx import Foreign, Runtime


_EXACT = "float32"


@dataclass(frozen=True, eq=False)
class Contender:
    """One model of a run. `record` is given the seconds that scoring took."""

    name: str
    backend: str
    method: str
    scorer: Callable[[], Scorer]
    record: Callable[[float], VariantRecord]
    error: str | None = None
    """Why it can't be scored at all."""

    def failed(self, error: str) -> VariantRecord:
        """Its record where it could not be made or scored."""
        return failed_record(self.name, self.method, self.backend, error)


def baseline_of(plan: Plan, progress: Progress) -> Kept:
    """The baseline, with its final states in the cache."""
    candidate = Candidate(
        BASELINE, plan.backend.name, {"weights": plan.baseline_key}, lambda: plan.backend.open(None), is_baseline=True
    )
    store = StateStore(home() / "states" / plan.baseline_key, progress.warn)
    return Kept(candidate, store, lambda: plan.backend.head.logits)


def contenders(plan: Plan, entries: list[Entry], baseline: Kept, progress: Progress) -> Iterator[Contender]:
    """The models to score, in the order of the report: the noise floor, the variants, folders made elsewhere."""
    broken = _export(plan, progress)
    yield from _floors(plan, baseline, broken)
    backends = _backends(plan, progress, broken)
    for entry in entries:
        yield from _entry(entry, backends)
    for each in plan.foreign:
        yield _foreign(plan, each)


def _floors(plan: Plan, baseline: Kept, broken: str | None) -> Iterator[Contender]:
    """The baseline itself, in other arithmetic: the least that a run can see."""
    if plan.runtime is not None:
        yield _floor(plan, plan.runtime, baseline, broken)
    if plan.llama is not None and plan.llama.unwritten is None:
        yield _llama_floor(plan, plan.llama, baseline)
    if plan.rounds_on_cpu:
        yield _compute_floor(plan)


def _entry(entry: Entry, backends: list[tuple[str, "_Makes"]]) -> Iterator[Contender]:
    """A variant on every backend: on the first by the name that was typed, then by that with `@backend`."""
    twin: _Torch | None = None
    for place, (backend, contender) in enumerate(backends):
        name = f"{entry.name}@{backend}" if place else entry.name
        if entry.folder is None:
            yield _unmade(entry, name, backend)
            continue
        found = contender(entry, name, twin)
        twin = found if isinstance(found, _Torch) else twin
        yield found.contender if isinstance(found, _Torch) else found


def _backends(plan: Plan, progress: Progress, broken: str | None) -> list[tuple[str, "_Makes"]]:
    """The backends by name, torch first, and what makes a contender of an entry on each."""
    found: list[tuple[str, _Makes]] = []
    if plan.settings.backends.uses_torch:
        found.append(("torch", lambda entry, name, twin: _torch(plan, entry, name, progress)))
    if plan.runtime is not None:
        found += [(each.name, partial(_ort, plan, each, broken)) for each in plan.runtime.backends]
    if plan.llama is not None:
        found.append((plan.llama.backend.name, partial(_llama, plan, plan.llama)))
    return found


def _export(plan: Plan, progress: Progress) -> str | None:
    """Make the float graph that all variants are put into; why it can't be made, or None."""
    if plan.runtime is None:
        return None
    exporter = plan.runtime.exporter
    with progress.phase("export the float graph", 1) as advance:
        try:
            exporter.float_folder()
        except QevalError as error:
            progress.warn(f"ONNX export failed: {error}")
            return str(error)
        advance(1)
    if exporter.refused:
        progress.warn(f"{exporter.refused} torch's own exporter made the graph instead.")
    return None


def _unmade(entry: Entry, name: str, backend: str) -> Contender:
    def impossible(*_: Any) -> Any:
        raise QevalError(entry.error or "it could not be made")

    return Contender(name, backend, entry.method, impossible, impossible, entry.error or "it could not be made")


class _Torch(NamedTuple):
    """A variant in torch; `states` are kept where another backend is compared with it."""

    contender: Contender
    states: Kept | None


_Makes = Callable[[Entry, str, "_Torch | None"], Contender | _Torch]
"""Of an entry, the name that it has there, and its twin in torch."""


def _torch(plan: Plan, entry: Entry, name: str, progress: Progress) -> _Torch:
    folder = _folder(entry)
    manifest = read_manifest(folder)
    key = {"weights": plan.baseline_key, "variant": manifest.key}
    candidate = Candidate(name, "torch", key, lambda: plan.backend.open_saved(folder))
    states = None
    if plan.runtime is not None or plan.llama is not None:
        store = StateStore(states_folder(plan.settings.out), progress.warn)
        states = Kept(candidate, store, lambda: plan.backend.head_for(load_variant(folder)).logits)

    def record(seconds: float) -> VariantRecord:
        return variant_record(name, "torch", manifest, seconds, entry)

    contender = Contender(name, "torch", entry.method, lambda: Scorer(candidate, kept=states), record)
    return _Torch(contender, states)


def states_folder(out: Path) -> Path:
    """Where a run keeps the variants' final states until every backend has been compared with them."""
    return out / "states"


def _ort(
    plan: Plan, backend: "OrtBackend", broken: str | None, entry: Entry, name: str, twin: _Torch | None
) -> Contender:
    folder = _folder(entry)
    key = {"weights": plan.baseline_key, "variant": read_manifest(folder).key, "backend": backend.identity}
    remembered = _Remembered(
        plan, key, lambda: backend.open(load_variant(folder)), lambda _: _ort_record(plan, backend, plan.runtime)
    )
    return _beside_torch(entry, Candidate(name, backend.name, key, remembered.open), remembered, twin, broken)


def _llama(plan: Plan, llama: Llama, entry: Entry, name: str, twin: _Torch | None) -> Contender:
    folder, own = _folder(entry), entry.name
    key = {
        "weights": plan.baseline_key, "variant": read_manifest(folder).key, "backend": llama.backend.identity,
        "file": llama.made(own),
    }  # fmt: skip
    remembered = _Remembered(
        plan, key, lambda: llama.open(own, lambda: load_variant(folder)), partial(llama.record, own)
    )
    return _beside_torch(entry, Candidate(name, llama.backend.name, key, remembered.open), remembered, twin)


def _beside_torch(
    entry: Entry, candidate: Candidate, remembered: "_Remembered", twin: _Torch | None, broken: str | None = None
) -> Contender:
    """A variant on another backend, compared with itself in torch too where that is scored."""
    manifest, states = read_manifest(_folder(entry)), twin.states if twin else None

    def record(seconds: float) -> VariantRecord:
        made = variant_record(candidate.name, candidate.backend, manifest, seconds, entry)
        details = {key: told for key, told in made.details.items() if key != "computed"}  # that is said of torch
        name = twin.contender.name if twin else None
        return made.model_copy(update={"runtime": remembered.record(), "twin": name, "details": details})

    scorer = partial(Scorer, candidate, twin=states)
    return Contender(candidate.name, candidate.backend, entry.method, scorer, record, broken)


def _floor(plan: Plan, runtime: "Runtime", baseline: Kept, broken: str | None) -> Contender:
    """The float model on ONNX Runtime: what the export alone costs, and the least that this run can see."""
    backend = runtime.backends[0]
    identity = {name: value for name, value in backend.identity.items() if name not in ("format", "accuracy_level")}
    key = {"weights": plan.baseline_key, "backend": identity}
    remembered = _Remembered(
        plan, key, lambda: backend.open(None), lambda _: _plain(_ort_record(plan, backend, runtime))
    )
    return _other_floor(plan, Candidate(f"{BASELINE}@ort", "ort", key, remembered.open), remembered, baseline, broken)


def _llama_floor(plan: Plan, llama: Llama, baseline: Kept) -> Contender:
    """The float model in llama.cpp, in fp32."""
    key = {"weights": plan.baseline_key, "backend": llama.backend.identity, "file": llama.made(BASELINE)}
    remembered = _Remembered(plan, key, lambda: llama.open(BASELINE, lambda: None), partial(llama.record, BASELINE))
    backend = llama.backend.name
    return _other_floor(plan, Candidate(f"{BASELINE}@{backend}", backend, key, remembered.open), remembered, baseline)


def _other_floor(
    plan: Plan, candidate: Candidate, remembered: "_Remembered", baseline: Kept, broken: str | None = None
) -> Contender:
    """The baseline on another backend, compared with itself in torch."""

    def record(seconds: float) -> VariantRecord:
        made = _floor_record(plan, candidate, seconds)
        return made.model_copy(update={"runtime": remembered.record(), "twin": BASELINE})

    scorer = partial(Scorer, candidate, twin=baseline)
    return Contender(candidate.name, candidate.backend, "float", scorer, record, broken)


def _compute_floor(plan: Plan) -> Contender:
    """The baseline computed in fp32, where a processor that rounds to bf16 computes the rest."""
    key = {"weights": plan.key_in(_EXACT), "against": plan.baseline_key}
    candidate = Candidate(f"{BASELINE}@fp32", "torch", key, lambda: open_exact(plan.settings.model, _EXACT))

    def record(seconds: float) -> VariantRecord:
        return _floor_record(plan, candidate, seconds)

    return Contender(candidate.name, "torch", "float", lambda: Scorer(candidate), record)


def _floor_record(plan: Plan, candidate: Candidate, seconds: float) -> VariantRecord:
    bits = float(plan.source.float_bits)
    return failed_record(candidate.name, "float", candidate.backend, "").model_copy(
        update={
            "status": "done", "error": None, "role": "floor", "grid": "float", "granularity": "none",
            "key": digest(candidate.key), "bits_per_weight": bits, "bits_per_weight_model": bits,
            "size_bytes": plan.shape.parameters * plan.source.float_bits // 8, "score_seconds": seconds,
        }
    )  # fmt: skip


def _plain(runtime: RuntimeRecord) -> RuntimeRecord:
    """How the float graph ran: nothing in it has a format or an accuracy level."""
    return runtime.model_copy(update={"format": None, "accuracy_level": None})


def _foreign(plan: Plan, foreign: "Foreign") -> Contender:
    backend = foreign.backend(plan.settings.backends)
    key = {"weights": foreign.sha256, "backend": backend.identity, "baseline": plan.baseline_key}
    remembered = _Remembered(plan, key, lambda: backend.open(None), lambda _: _ort_record(plan, backend, None))
    candidate = Candidate(foreign.name, "ort", key, remembered.open)

    def record(seconds: float) -> VariantRecord:
        return foreign.record("ort", remembered.record(), seconds)

    return Contender(foreign.name, "ort", "onnx", lambda: Scorer(candidate), record)


def _folder(entry: Entry) -> Path:
    assert entry.folder is not None
    return entry.folder


class _Tells(Protocol):
    @property
    def ran(self) -> "Ran | None": ...


def _ort_record(plan: Plan, backend: _Tells, runtime: "Runtime | None") -> RuntimeRecord:
    """How a model ran on ONNX Runtime, once it was opened; no `runtime` for a folder made elsewhere."""
    from qeval.compare.onnx import runtime_record  # noqa: PLC0415 - an extra

    assert backend.ran is not None
    style = getattr(backend, "style", None)
    return runtime_record(
        backend.ran,
        plan.settings.backends,
        route=runtime.exporter.route if runtime else None,
        level=style.accuracy_level if style else None,
    )


_Opened = TypeVar("_Opened", bound=Session)


class _Remembered:
    """How a model ran, told when it is opened and kept beside the rows for runs that find them finished."""

    def __init__(
        self,
        plan: Plan,
        key: dict[str, Any],
        opened: Callable[[], AbstractContextManager[_Opened]],
        told: Callable[[_Opened], RuntimeRecord],
    ) -> None:
        """`told` is handed the open session."""
        self._opened: Callable[[], AbstractContextManager[Any]] = opened
        self._told: Callable[[Any], RuntimeRecord] = told
        self._path = plan.settings.out / "runtimes" / f"{digest(key)}.json"

    @contextmanager
    def open(self) -> Iterator[Session]:
        """Open the model and write down how it runs."""
        with self._opened() as session:
            write_text(self._path, self._told(session).model_dump_json(indent=1) + "\n")
            yield session

    def record(self) -> RuntimeRecord | None:
        """How the model ran; None where it never did, since there was nothing to score."""
        try:
            return RuntimeRecord.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise BrokenRecordError(f"{self._path} is torn; delete it and the rows beside it.") from error

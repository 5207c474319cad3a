"""The models of a run: every variant on every backend that was asked for, and what each is compared with."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pydantic import ValidationError

from qeval.backends.base import Session
from qeval.compare.prepare import Plan, open_exact
from qeval.compare.record import failed_record, variant_record
from qeval.compare.scoring import Candidate, Kept, Scorer
from qeval.compare.settings import BACKENDS
from qeval.compare.variants import Entry
from qeval.config import BASELINE
from qeval.errors import BrokenRecordError, QevalError
from qeval.identity import digest
from qeval.paths import home
from qeval.progress import Progress
from qeval.quant.variant import Variant
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
    labels = _labels(plan)
    broken = _export(plan, progress)
    if plan.runtime is not None:
        yield _floor(plan, plan.runtime, baseline, broken)
    if plan.rounds_on_cpu:
        yield _compute_floor(plan)
    for entry in entries:
        torch_model: _Torch | None = None
        for backend, name in ((backend, label(entry.name)) for backend, label in labels):
            if entry.folder is None:
                yield _unmade(entry, name, _name(backend))
            elif backend is None:
                torch_model = _torch(plan, entry, name, progress, kept=plan.runtime is not None)
                yield torch_model.contender
            else:
                yield _ort(plan, entry, name, backend, torch_model, broken)
    for each in plan.foreign:
        yield _foreign(plan, each)


Label = Callable[[str], str]


def _labels(plan: Plan) -> list[tuple["OrtBackend | None", Label]]:
    """The backends (None: torch, which comes first), and how each names a variant: as typed, then with `@backend`."""
    ort = plan.runtime.backends if plan.runtime else ()
    found: list[OrtBackend | None] = []
    for name in BACKENDS:
        if name in plan.settings.backends.names:
            found += [None] if name == "torch" else ort

    def label(place: int, backend: "OrtBackend | None") -> Label:
        return (lambda name: name) if not place else (lambda name: f"{name}@{_name(backend)}")

    return [(backend, label(place, backend)) for place, backend in enumerate(found)]


def _name(backend: "OrtBackend | None") -> str:
    return "torch" if backend is None else backend.name


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
    contender: Contender
    states: Kept | None


def _torch(plan: Plan, entry: Entry, name: str, progress: Progress, *, kept: bool) -> _Torch:
    folder = _folder(entry)
    manifest = read_manifest(folder)
    key = {"weights": plan.baseline_key, "variant": manifest.key}
    candidate = Candidate(name, "torch", key, lambda: plan.backend.open_saved(folder))
    states = None
    if kept:
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
    plan: Plan, entry: Entry, name: str, backend: "OrtBackend", twin: _Torch | None, broken: str | None
) -> Contender:
    folder = _folder(entry)
    manifest = read_manifest(folder)
    key = {"weights": plan.baseline_key, "variant": manifest.key, "backend": backend.identity}
    runtime = _Remembered(plan, backend, key, plan.runtime)
    candidate = Candidate(name, backend.name, key, runtime.opener(lambda: load_variant(folder)))
    states = twin.states if twin else None

    def record(seconds: float) -> VariantRecord:
        made = variant_record(name, backend.name, manifest, seconds, entry)
        return made.model_copy(update={"runtime": runtime.record(), "twin": twin.contender.name if twin else None})

    return Contender(name, backend.name, entry.method, lambda: Scorer(candidate, twin=states), record, broken)


def _floor(plan: Plan, runtime: "Runtime", baseline: Kept, broken: str | None) -> Contender:
    """The float model on ONNX Runtime: what the export alone costs, and the least that this run can see."""
    backend = runtime.backends[0]
    identity = {name: value for name, value in backend.identity.items() if name not in ("format", "accuracy_level")}
    key = {"weights": plan.baseline_key, "backend": identity}
    remembered = _Remembered(plan, backend, key, runtime)
    name = f"{BASELINE}@ort"
    candidate = Candidate(name, "ort", key, remembered.opener(lambda: None))

    def record(seconds: float) -> VariantRecord:
        made = _floor_record(plan, candidate, seconds)
        return made.model_copy(update={"runtime": _plain(remembered.record()), "twin": BASELINE})

    return Contender(name, "ort", "float", lambda: Scorer(candidate, twin=baseline), record, broken)


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


def _plain(runtime: RuntimeRecord | None) -> RuntimeRecord | None:
    """How the float graph ran: nothing in it has a format or an accuracy level."""
    return runtime and runtime.model_copy(update={"format": None, "accuracy_level": None})


def _foreign(plan: Plan, foreign: "Foreign") -> Contender:
    backend = foreign.backend(plan.settings.backends)
    key = {"weights": foreign.sha256, "backend": backend.identity, "baseline": plan.baseline_key}
    remembered = _Remembered(plan, backend, key, None)
    candidate = Candidate(foreign.name, "ort", key, remembered.opener(lambda: None))

    def record(seconds: float) -> VariantRecord:
        return foreign.record("ort", remembered.record(), seconds)

    return Contender(foreign.name, "ort", "onnx", lambda: Scorer(candidate), record)


def _folder(entry: Entry) -> Path:
    assert entry.folder is not None
    return entry.folder


class _OpensAndTells(Protocol):
    @property
    def ran(self) -> "Ran | None": ...

    def open(self, variant: Variant | None) -> AbstractContextManager[Session]: ...


class _Remembered:
    """How a model ran, told when it is opened and kept beside the rows for runs that find them finished."""

    def __init__(self, plan: Plan, backend: _OpensAndTells, key: dict[str, Any], runtime: "Runtime | None") -> None:
        self._plan, self._backend, self._runtime = plan, backend, runtime
        self._path = plan.settings.out / "runtimes" / f"{digest(key)}.json"

    def opener(self, variant: Callable[[], Variant | None]) -> Callable[[], AbstractContextManager[Session]]:
        """What opens the model and writes down how it runs."""

        @contextmanager
        def opened() -> Iterator[Session]:
            with self._backend.open(variant()) as session:
                self._write()
                yield session

        return opened

    def _write(self) -> None:
        from qeval.compare.onnx import runtime_record  # noqa: PLC0415 - an extra

        assert self._backend.ran is not None
        route = self._runtime.exporter.route if self._runtime else None
        style = getattr(self._backend, "style", None)
        level = None if style is None else style.accuracy_level
        record = runtime_record(self._backend.ran, self._plan.settings.backends, route=route, level=level)
        write_text(self._path, record.model_dump_json(indent=1) + "\n")

    def record(self) -> RuntimeRecord | None:
        """How the model ran; None where it never did, since there was nothing to score."""
        try:
            return RuntimeRecord.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise BrokenRecordError(f"{self._path} is torn; delete it and the rows beside it.") from error

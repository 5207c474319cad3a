"""The processes of the engines: opened when needed, open as long as memory allows, replaced when they die."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil

from qeval.bench.engines.engine_spec import EngineSpec
from qeval.bench.messages import OpenRequest, Prepared, PrepareRequest, Ready, WorkerRequest
from qeval.bench.worker_handle import EngineError, WorkerHandle

_SPARE_SHARE = 0.15
"""Of all memory: what stays free for the system and its file cache when one more engine is opened."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class PooledEngine:
    """An engine with a variant, and what it is opened for; `place` is what was prepared."""

    engine: str
    variant: str
    spec: EngineSpec
    place: Path

    @property
    def name(self) -> tuple[str, str]:
        """Return engine and variant, as records name them."""
        return self.engine, self.variant


@dataclass
class _OpenEngine:
    worker: WorkerHandle
    ready: Ready
    warm: set[tuple[int, int]] = field(default_factory=set)


class EnginePool:
    """A process for each system that is open, all ended with the block."""

    def __init__(self, logs: Path) -> None:
        """Let what the processes print go into the folder `logs`."""
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        self.is_crowded = False
        """Whether an engine was closed to make room for another: then callers should use one engine after the other."""
        self._engines: dict[tuple[str, str], _OpenEngine] = {}

    def end(self, system: PooledEngine) -> None:
        """End a system's process, if it has one."""
        if engine := self._engines.pop(system.name, None):
            engine.worker.end()

    def close(self) -> None:
        """End every process."""
        for engine in self._engines.values():
            engine.worker.end()
        self._engines.clear()

    def ready(self, system: PooledEngine) -> Ready:
        """Return what a system's engine says of itself, and open it if need be.

        Raises:
            EngineError: It can't be opened.
        """
        return self._of(system).ready

    def ask(self, system: PooledEngine, what: WorkerRequest, kind: type[_T], seconds: float | None = None) -> _T:
        """Return a system's answer; a process that died is dropped, and the next request opens another.

        Args:
            system: Who answers.
            what: The request.
            kind: The type of the answer.
            seconds: The longest wait.

        Raises:
            EngineError: As `WorkerHandle.ask`.
        """
        engine = self._of(system)
        try:
            return engine.worker.ask(what, kind, seconds)
        except EngineError:
            if not engine.worker.is_alive:
                self._engines.pop(system.name, None)
            raise

    def is_warm(self, system: PooledEngine, batch: int, prompt: int) -> bool:
        """Return whether the process that is open has run this shape."""
        engine = self._engines.get(system.name)
        return engine is not None and (batch, prompt) in engine.warm

    def mark_warm(self, system: PooledEngine, batch: int, prompt: int) -> None:
        """Note that the process that is open has run this shape."""
        if engine := self._engines.get(system.name):
            engine.warm.add((batch, prompt))

    def _of(self, system: PooledEngine) -> _OpenEngine:
        engine = self._engines.pop(system.name, None)
        if engine is None or not engine.worker.is_alive:
            self._make_room()
            engine = self._start(system)
        self._engines[system.name] = engine  # the last one used is the last one to be closed
        return engine

    def _start(self, system: PooledEngine) -> _OpenEngine:
        worker = WorkerHandle(self._log(*system.name))
        try:
            return _OpenEngine(worker, worker.ask(OpenRequest(system.engine, system.spec, system.place), Ready))
        except BaseException:
            worker.end()
            raise

    def _make_room(self) -> None:
        """Close engines, those longest unused first, until another as large as the largest fits."""
        needed = max((engine.ready.rss_bytes for engine in self._engines.values()), default=0)
        memory = psutil.virtual_memory()
        while self._engines and psutil.virtual_memory().available - needed < _SPARE_SHARE * memory.total:
            oldest = next(iter(self._engines))
            self._engines.pop(oldest).worker.end()
            self.is_crowded = True

    def _log(self, engine: str, variant: str) -> Path:
        return self._logs / (re.sub(r"[^\w.-]+", "-", f"{engine}-{variant}") + ".log")


class PrepareProcess:
    """A process in which engines are prepared; it ends, and its memory is free, before any is opened."""

    def __init__(self, log: Path) -> None:
        """Let what it prints go to `log`."""
        self._log = log
        self._worker: WorkerHandle | None = None

    def prepare(self, engine: str, spec: EngineSpec) -> Path:
        """Return where the files lie that the engine runs, and write them if need be.

        Raises:
            EngineError: They can't be written.
        """
        if self._worker is None or not self._worker.is_alive:
            self._worker = WorkerHandle(self._log)
        return self._worker.ask(PrepareRequest(engine, spec), Prepared).place

    def close(self) -> None:
        """End it."""
        if self._worker is not None:
            self._worker.end()


@contextmanager
def engine_pool(logs: Path) -> Iterator[EnginePool]:
    """Yield a pool that is closed when the block ends."""
    pool = EnginePool(logs)
    try:
        yield pool
    finally:
        pool.close()


@contextmanager
def prepare_process(logs: Path) -> Iterator[PrepareProcess]:
    """Yield a process that is ended when the block ends."""
    logs.mkdir(parents=True, exist_ok=True)
    process = PrepareProcess(logs / "prepare.log")
    try:
        yield process
    finally:
        process.close()

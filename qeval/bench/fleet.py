"""The processes of the engines: opened when asked for, kept while memory allows, replaced when they die."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil

from qeval.bench.process import Child, TroubleError
from qeval.bench.words import Ask, Open, Prepare, Prepared, Ready
from qeval.engines.opening import Opening

_SPARE_SHARE = 0.15
"""Of all memory: what stays free for the system and its file cache when one more engine is opened."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class System:
    """An engine with a variant, and what it is opened for; `place` is what was prepared."""

    engine: str
    variant: str
    opening: Opening
    place: Path

    @property
    def name(self) -> tuple[str, str]:
        """Engine and variant, as records have them."""
        return self.engine, self.variant


@dataclass
class _Berth:
    child: Child
    ready: Ready
    warm: set[tuple[int, int]] = field(default_factory=set)


class Fleet:
    """A process for each system that is open, all ended with the block."""

    def __init__(self, logs: Path) -> None:
        """What the processes print goes into the folder `logs`."""
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        self.is_crowded = False
        """Whether an engine had to go for another one's sake: then whoever asks should ask one after the other."""
        self._berths: dict[tuple[str, str], _Berth] = {}

    def end(self, system: System) -> None:
        """Let a system's process go, if it has one."""
        if berth := self._berths.pop(system.name, None):
            berth.child.end()

    def close(self) -> None:
        """End every process."""
        for berth in self._berths.values():
            berth.child.end()
        self._berths.clear()

    def ready(self, system: System) -> Ready:
        """The system, opened if need be.

        Raises:
            TroubleError: it can't be opened.
        """
        return self._berth(system).ready

    def ask(self, system: System, what: Ask, kind: type[_T], seconds: float | None = None) -> _T:
        """Its answer; a process that died is forgotten, and the next question opens another.

        Raises:
            TroubleError: as `Child.ask`.
        """
        berth = self._berth(system)
        try:
            return berth.child.ask(what, kind, seconds)
        except TroubleError:
            if not berth.child.is_alive:
                self._berths.pop(system.name, None)
            raise

    def is_warm(self, system: System, batch: int, prompt: int) -> bool:
        """Whether the process that is open has run this shape."""
        berth = self._berths.get(system.name)
        return berth is not None and (batch, prompt) in berth.warm

    def warmed(self, system: System, batch: int, prompt: int) -> None:
        """It has now."""
        if berth := self._berths.get(system.name):
            berth.warm.add((batch, prompt))

    def _berth(self, system: System) -> _Berth:
        berth = self._berths.pop(system.name, None)
        if berth is None or not berth.child.is_alive:
            self._make_room()
            berth = self._opened(system)
        self._berths[system.name] = berth  # the last one asked is the last one to go
        return berth

    def _opened(self, system: System) -> _Berth:
        child = Child(self._log(*system.name))
        try:
            return _Berth(child, child.ask(Open(system.engine, system.opening, system.place), Ready))
        except BaseException:
            child.end()
            raise

    def _make_room(self) -> None:
        """Close engines, those longest unused first, until another as large as the largest fits."""
        needed = max((berth.ready.rss_bytes for berth in self._berths.values()), default=0)
        memory = psutil.virtual_memory()
        while self._berths and psutil.virtual_memory().available - needed < _SPARE_SHARE * memory.total:
            oldest = next(iter(self._berths))
            self._berths.pop(oldest).child.end()
            self.is_crowded = True

    def _log(self, engine: str, variant: str) -> Path:
        return self._logs / (re.sub(r"[^\w.-]+", "-", f"{engine}-{variant}") + ".log")


class Yard:
    """A process in which engines are prepared: its memory is let go before any is opened."""

    def __init__(self, log: Path) -> None:
        """What it prints goes to `log`."""
        self._log = log
        self._child: Child | None = None

    def prepare(self, engine: str, opening: Opening) -> Path:
        """Where what the engine runs lies, made if need be.

        Raises:
            TroubleError: it can't be made.
        """
        if self._child is None or not self._child.is_alive:
            self._child = Child(self._log)
        return self._child.ask(Prepare(engine, opening), Prepared).place

    def close(self) -> None:
        """End it."""
        if self._child is not None:
            self._child.end()


@contextmanager
def fleet(logs: Path) -> Iterator[Fleet]:
    """A fleet that is gone when the block ends."""
    made = Fleet(logs)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def yard(logs: Path) -> Iterator[Yard]:
    """A yard that is gone when the block ends."""
    logs.mkdir(parents=True, exist_ok=True)
    made = Yard(logs / "prepare.log")
    try:
        yield made
    finally:
        made.close()

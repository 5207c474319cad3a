"""The process of one engine: it is asked, works, and answers, until its parent lets it go or is gone."""

import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.util import _exit_function  # type: ignore[attr-defined]
from pathlib import Path

from qeval.bench.energy import Joules, energy_meter
from qeval.bench.peaks import peak_rss, rss_bytes
from qeval.bench.words import Ask, Choose, Failed, Open, Prepare, Prepared, Ready, Time, Timed
from qeval.engines import registry
from qeval.engines.base import Engine, FreeRun, free_run
from qeval.errors import QevalError, UsageError

_Answer = Prepared | Ready | Timed | FreeRun | Failed


def serve(connection: Connection, log: Path) -> None:
    """Answer what comes until nobody asks any more; what runtimes print goes to the file `log`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides
    _print_to(log)
    worker = _Worker()
    while True:
        try:
            ask: Ask = connection.recv()
        except EOFError:
            _exit_function()  # takes back what multiprocessing lent: a compiler's locks outlive the process else
            os._exit(0)  # without the interpreter's farewell, in which some runtimes crash
        connection.send(_answered(worker, ask))


def _answered(worker: "_Worker", ask: Ask) -> _Answer:
    try:
        return worker.answer(ask)
    except MemoryError as error:
        return Failed("oom", f"Out of memory: {error}." if str(error) else "Out of memory.", fatal=True)
    except UsageError as error:
        return Failed("refused", str(error))
    except QevalError as error:
        return Failed("failed", str(error))
    except Exception as error:  # noqa: BLE001 - whatever a runtime raises is a row with its reason, not the end
        first = (str(error).strip().splitlines() or [""])[0]
        return Failed("failed", f"{type(error).__name__}: {first}", fatal=True)


class _Worker:
    """At most one open engine."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._joules: Joules | None = None
        self._on_gpu = False

    def answer(self, ask: Ask) -> _Answer:
        """Do what is asked."""
        match ask:
            case Prepare(engine, opening):
                return Prepared(registry.prepare(engine, opening))
            case Open():
                return self._open(ask)
            case Time():
                return self._time(ask)
            case Choose(prompt, count):
                return free_run(self._opened, prompt, count)

    @property
    def _opened(self) -> Engine:
        assert self._engine is not None, "an engine is opened first"
        return self._engine

    def _open(self, ask: Open) -> Ready:
        start = time.perf_counter()
        self._engine = registry.open_engine(ask.engine, ask.opening, ask.place)
        seconds = time.perf_counter() - start
        self._joules = energy_meter(ask.opening.device)
        memory = self._engine.memory()
        self._on_gpu = memory.device_bytes is not None
        return Ready(self._engine.identity, memory, self._engine.max_length, seconds, rss_bytes())

    def _time(self, ask: Time) -> Timed:
        """One run by the clock; of a GPU's memory what is in use at the end of each phase, which its pools don't give
        back before."""
        engine, (batch, prompt) = self._opened, ask.prompts.shape
        engine.reset(batch, prompt + ask.generate)
        compiled, joules = engine.compile_seconds, self._joules() if self._joules else None
        with peak_rss() as peak:
            start = time.perf_counter()
            tokens = engine.prefill(ask.prompts)
            prompt_seconds = time.perf_counter() - start
            prompt_peak = self._device_or(peak())
        steps = []
        with peak_rss() as peak:
            for _ in range(ask.generate - 1):
                start = time.perf_counter()
                tokens = engine.step(tokens)
                steps.append(time.perf_counter() - start)
            generate_peak = self._device_or(peak())
        used = None if joules is None or self._joules is None else self._joules() - joules
        return Timed(
            prompt_seconds=prompt_seconds,
            step_seconds=tuple(steps),
            peak_prompt_bytes=prompt_peak,
            peak_generate_bytes=generate_peak,
            cache_bytes=engine.memory().cache_bytes,
            energy_joules=used,
            compiled_seconds=engine.compile_seconds - compiled,
            all_compiled_seconds=engine.compile_seconds,
        )

    def _device_or(self, own: int) -> int:
        """A GPU's memory in use, else this process's own peak."""
        held = self._opened.memory().device_bytes if self._on_gpu else None
        return own if held is None else held


def _print_to(log: Path) -> None:
    """Let everything that this process prints go to a file, warnings of native code included."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)

"""The process of one engine: it answers requests until its parent closes the connection or is gone."""

import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.util import _exit_function  # type: ignore[attr-defined]
from pathlib import Path

from qeval.bench.energy import Joules, energy_meter
from qeval.bench.engines import registry
from qeval.bench.engines.base import Engine, FreeRun, free_run
from qeval.bench.messages import (
    Choose,
    Failed,
    OpenRequest,
    Prepared,
    PrepareRequest,
    Ready,
    Time,
    Timed,
    WorkerRequest,
)
from qeval.bench.peak_memory import peak_rss, rss_bytes
from qeval.errors import QevalError, UsageError

_Answer = Prepared | Ready | Timed | FreeRun | Failed


def serve(connection: Connection, log: Path) -> None:
    """Answer requests until the connection is closed; what runtimes print goes to the file `log`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides
    _print_to(log)
    worker = _Worker()
    while True:
        try:
            request: WorkerRequest = connection.recv()
        except EOFError:
            _exit_function()  # releases what multiprocessing holds: a compiler's locks would outlive the process
            os._exit(0)  # without the interpreter's own exit, in which some runtimes crash
        connection.send(_answer(worker, request))


def _answer(worker: "_Worker", request: WorkerRequest) -> _Answer:
    try:
        return worker.answer(request)
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

    def answer(self, request: WorkerRequest) -> _Answer:
        """Do what is requested."""
        match request:
            case PrepareRequest(engine, spec):
                return Prepared(registry.prepare_engine(engine, spec))
            case OpenRequest():
                return self._open(request)
            case Time():
                return self._time(request)
            case Choose(prompt, count):
                return free_run(self._opened, prompt, count)

    @property
    def _opened(self) -> Engine:
        assert self._engine is not None, "an engine is opened first"
        return self._engine

    def _open(self, request: OpenRequest) -> Ready:
        start = time.perf_counter()
        self._engine = registry.open_engine(request.engine, request.spec, request.place)
        seconds = time.perf_counter() - start
        self._joules = energy_meter(request.spec.device)
        memory = self._engine.memory()
        self._on_gpu = memory.device_bytes is not None
        return Ready(self._engine.identity, memory, self._engine.max_length, seconds, rss_bytes())

    def _time(self, request: Time) -> Timed:
        """Run once by the clock.

        Of a GPU's memory the peak is what is in use at the end of each phase: its pools give nothing back before.
        """
        engine, (batch, prompt) = self._opened, request.prompts.shape
        engine.reset(batch, prompt + request.generate)
        compiled, joules = engine.compile_seconds, self._joules() if self._joules else None
        with peak_rss() as peak:
            start = time.perf_counter()
            tokens = engine.prefill(request.prompts)
            prompt_seconds = time.perf_counter() - start
            prompt_peak = self._device_or(peak())
        steps = []
        with peak_rss() as peak:
            for _ in range(request.generate - 1):
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

    def _device_or(self, process_bytes: int) -> int:
        """Return a GPU's memory in use, else the peak of this process."""
        device_bytes = self._opened.memory().device_bytes if self._on_gpu else None
        return process_bytes if device_bytes is None else device_bytes


def _print_to(log: Path) -> None:
    """Let everything that this process prints go to a file, warnings of native code included."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)

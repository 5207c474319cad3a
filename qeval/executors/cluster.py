"""Actors of a Ray cluster that do a run's work: each keeps its model and takes jobs from the run's ledger.

A worker that dies is started again by Ray, on another node if need be, and what it was at is claimed by whoever is
left. Which jobs are done stands in the ledger alone, so Ray needs to keep nothing: an actor's one call is the whole of
its work. The run's folder and qeval's cache must be the same on every node.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qeval.errors import QevalError, UsageError
from qeval.executors.processes import WorkerFunction
from qeval.progress import Advance

_RESTARTS = 3
_ROOM_SECONDS = 180.0
"""How long a cluster may take to start the first worker."""
_LOST_SECONDS = 120.0
"""How long no worker may be seen in the ledger before the run goes on without them."""
_POLL_SECONDS = 0.5
_END_SECONDS = 10.0


@dataclass(frozen=True)
class Needs:
    """The resources of the cluster that one worker takes."""

    cpus: int
    gpus: float

    def __str__(self) -> str:
        """Return the resources in words."""
        gpus = f" and {self.gpus:g} GPUs" if self.gpus else ""
        return f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}{gpus}"


def require_ray() -> Any:
    """Return Ray's module.

    Raises:
        UsageError: it isn't installed.
    """
    try:
        import ray  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UsageError("--executor ray needs Ray, which is not installed: pip install 'qeval[ray]'.") from error
    return ray


class RayWorkers:
    """The actors of one run."""

    def __init__(
        self, ray: Any, mail: Any, actors: Sequence[Any], work: WorkerFunction, each: Sequence[Any], needs: Needs
    ) -> None:
        """Put every actor to `work` on its part of `each`; `mail` holds the message that they wait for."""
        self._ray, self._mail, self._actors, self._needs = ray, mail, actors, needs
        folder = str(Path.cwd())
        self._ready = [actor.ready.remote() for actor in actors]
        self._calls = [actor.run.remote(work, part, folder, mail) for actor, part in zip(actors, each, strict=True)]

    def tell(self, message: Any) -> None:
        """Send every worker, also one that starts again later, what it waits for."""
        self._ray.get(self._mail.put.remote(message))

    def wait(self, done: Callable[[], int], seen: Callable[[], bool], advance: Advance) -> str | None:
        """Wait until a worker has found the run complete, or all have ended; why they ended early, or None.

        `done` counts the finished jobs and `seen` says whether live workers are in the ledger.

        Raises:
            QevalError: the cluster has no room for a single worker.
        """
        told, alive = 0, time.monotonic()
        self._require_room()
        while True:
            ended, running = self._ray.wait(list(self._calls), num_returns=len(self._calls), timeout=_POLL_SECONDS)
            now = done()
            advance(now - told)
            told, alive = now, time.monotonic() if seen() else alive
            reasons = [self._reason(call) for call in ended]
            if None in reasons:  # a worker ends when every job of the run is done, so the others are about to
                self._ray.wait(list(self._calls), num_returns=len(self._calls), timeout=_END_SECONDS)
                return None
            if not running:
                return str(reasons[0])
            if time.monotonic() - alive > _LOST_SECONDS:
                return f"no worker was seen for {_LOST_SECONDS:.0f} s."

    def stop(self) -> None:
        """End every actor."""
        for actor in (*self._actors, self._mail):
            self._ray.kill(actor, no_restart=True)

    def _require_room(self) -> None:
        ready, _ = self._ray.wait(self._ready, timeout=_ROOM_SECONDS)
        if not ready:
            free = {name: count for name, count in self._ray.cluster_resources().items() if name in ("CPU", "GPU")}
            raise QevalError(
                f"The Ray cluster started no worker within {_ROOM_SECONDS:.0f} s: a worker needs {self._needs}, and "
                f"the cluster has {free}. Give fewer --threads or --workers."
            )

    def _reason(self, call: Any) -> str | None:
        """Say why a call failed, or return None where it did its work."""
        try:
            self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            return str(error.cause) or type(error.cause).__name__
        except self._ray.exceptions.RayError as error:
            return f"it was lost ({type(error).__name__})."
        return None


@contextmanager
def helping_on_ray(work: WorkerFunction, arguments: Sequence[tuple[Any, ...]], needs: Needs) -> Iterator[RayWorkers]:
    """Start an actor for each of `arguments` that runs `work(*arguments, receive)` until the block ends.

    The cluster is that of `RAY_ADDRESS`, else the one that runs on this machine, else one that is started for the run.

    Raises:
        UsageError: Ray isn't installed.
        QevalError: the cluster can't be reached.
    """
    with _joined() as ray:
        workers = _started(ray, work, arguments, needs)
        try:
            yield workers
        finally:
            workers.stop()


@contextmanager
def shared_cluster() -> Iterator[tuple[str, int]]:
    """Keep the cluster that `helping_on_ray` would take for several runs; its address, and how many CPUs it has.

    Raises:
        UsageError: Ray isn't installed.
        QevalError: the cluster can't be reached.
    """
    with _joined() as ray:
        yield str(ray.get_runtime_context().gcs_address), int(ray.cluster_resources().get("CPU", 0))


@contextmanager
def _joined() -> Iterator[Any]:
    """Make this process a part of the cluster; Ray's module."""
    ray = require_ray()
    ours = not ray.is_initialized()
    try:
        if ours:
            ray.init(log_to_driver=False, logging_level="error", configure_logging=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise QevalError(f"The Ray cluster can't be reached: {error}") from error
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _started(ray: Any, work: WorkerFunction, arguments: Sequence[tuple[Any, ...]], needs: Needs) -> RayWorkers:
    mail = ray.remote(num_cpus=0)(_Mail).remote()
    options = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "max_restarts": _RESTARTS, "max_task_retries": _RESTARTS}
    kind = ray.remote(**options)(_Worker)
    return RayWorkers(ray, mail, [kind.remote() for _ in arguments], work, arguments, needs)


class _Mail:
    """The message for all workers: one that starts again finds it here."""

    def __init__(self) -> None:
        import asyncio  # noqa: PLC0415 - made in the actor, whose loop it belongs to

        self._there = asyncio.Event()
        self._message: Any = None

    async def put(self, message: Any) -> None:
        self._message = message
        self._there.set()

    async def take(self) -> Any:
        await self._there.wait()
        return self._message


class _Worker:
    """One worker: it does all its work in one call, and keeps nothing for another."""

    def ready(self) -> bool:
        """Answer once there is room for it."""
        return True

    def run(self, work: WorkerFunction, arguments: tuple[Any, ...], folder: str, mail: Any) -> None:
        """Work from `folder`, as the command does."""
        ray = require_ray()
        if not Path(folder).is_dir():
            raise QevalError(f"{folder} is not on the node {os.uname().nodename}; every node needs the run's folders.")
        os.chdir(folder)
        work(*arguments, lambda: ray.get(mail.take.remote()))

"""The backend `ort`: each variant exported with its own integers, and answered by ONNX Runtime's kernels."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qeval.backends.base import Saved, Target
from qeval.backends.onnx.export import EXPORT_VERSION, OnnxExporter
from qeval.backends.onnx.folder import opened
from qeval.backends.onnx.insert_weights import Style
from qeval.backends.onnx.packages import require_runtime
from qeval.backends.onnx.providers import Provider, require_provider
from qeval.backends.onnx.session import OrtSession
from qeval.errors import QevalError
from qeval.files.atomic import remove_abandoned
from qeval.files.process_id import temporary_prefix
from qeval.paths import home
from qeval.progress import Progress
from qeval.store.run import RuntimeRecord


class _OnProvider:
    """Opens folders on one execution provider."""

    fake_quantizes = False
    warnings: Sequence[str] = ()

    def __init__(self, provider: Provider, threads: int, device_id: int) -> None:
        """`threads` are the CPU's."""
        self._provider, self._threads, self._device_id = provider, threads, device_id
        versions = require_runtime()
        self._runtime = f"{versions.distribution} {versions.version}"

    def identity(self, target: Target) -> dict[str, Any]:
        """Return everything about the provider and the runtime that changes a number."""
        return {
            "backend": {
                "provider": self._provider.onnx_name,
                "options": dict(self._provider.options),
                "runtime": self._runtime,
            }
        }

    def describe(self, session: OrtSession, target: Target) -> RuntimeRecord:
        """Return how an open folder is run."""
        return RuntimeRecord(
            runtime=self._runtime,
            provider=self._provider.onnx_name,
            nodes=dict(session.nodes),
            exporter=None,
            format=None,
            accuracy_level=None,
            shares_prefixes=session.sharing,
            facts=list(session.facts),
        )

    @contextmanager
    def _opened(self, folder: Path) -> Iterator[OrtSession]:
        with opened(folder, self._provider, threads=self._threads, device_id=self._device_id) as found:
            yield found.session


class OrtBackend(_OnProvider):
    """Exports variants, or the float model, and opens them on one execution provider."""

    def __init__(
        self, exporter: OnnxExporter, style: Style, provider: Provider, threads: int, device_id: int = 0
    ) -> None:
        """`threads` are the CPU's.

        Raises:
            UsageError, QevalError: the provider can't be had here.
        """
        require_provider(provider, device_id)
        super().__init__(provider, threads, device_id)
        self.exporter, self.style = exporter, style

    @property
    def name(self) -> str:
        """`ort`, or `ort-acc4` where activations are rounded to int8."""
        return "ort" if self.style.accuracy_level == 1 else f"ort-acc{self.style.accuracy_level}"

    def identity(self, target: Target) -> dict[str, Any]:
        """Return everything about the backend that changes a number; the baseline's floats have no style."""
        exported: dict[str, Any] = {
            "export": EXPORT_VERSION,
            "exporter": self.exporter.route or self.exporter.asked,
            "precision": self.exporter.target.precision,
        }
        if target is not None:
            exported |= vars(self.style)
        return {"backend": exported | super().identity(target)["backend"]}

    def prepare(self, progress: Progress) -> str | None:
        """Export the float graph that all variants are put into, once for all backends of an exporter."""
        return self.exporter.prepare(progress)

    @contextmanager
    def open(self, target: Target) -> Iterator[OrtSession]:
        """Open a variant, or the float model with None; a variant's folder is gone when the block ends.

        Raises:
            QevalError, UsageError: It can't be exported or opened, or nodes fell back to another provider.
        """
        if target is None:
            with self._opened(self.exporter.float_folder()) as session:
                yield session
            return
        variant = target.variant() if isinstance(target, Saved) else target
        with _workplace() as folder:
            self.exporter.write(variant, self.style, folder / "model")
            with self._opened(folder / "model") as session:
                yield session

    def describe(self, session: OrtSession, target: Target) -> RuntimeRecord:
        """Return how an open folder is run, and how it was exported."""
        style = {} if target is None else vars(self.style)
        return super().describe(session, target).model_copy(update={"exporter": self.exporter.route, **style})


class FolderBackend(_OnProvider):
    """Opens ONNX folders that another tool made; no variant can be put into them."""

    name = "ort"

    def __init__(self, provider: Provider, threads: int, device_id: int = 0, *, ids: int) -> None:
        """`ids` is the size of the baseline's vocabulary: what a folder has beyond it is left out."""
        super().__init__(provider, threads, device_id)
        self._ids = ids

    def prepare(self, progress: Progress) -> None:
        """Do nothing: the folders are finished."""

    @contextmanager
    def open(self, target: Target) -> Iterator[OrtSession]:
        """Open a folder, which holds the model, its configuration and its tokenizer.

        Raises:
            QevalError: The target is no folder, or it can't be opened.
        """
        if not isinstance(target, Saved):
            raise QevalError("A folder that another tool made is a finished model; no variant can be put into it.")
        with self._opened(target.folder) as session:
            session.leave_out_padding(self._ids)
            yield session


@contextmanager
def _workplace() -> Iterator[Path]:
    """Make a folder in the cache for as long as a session lives; what killed processes left is removed first."""
    root = home() / "onnx"
    root.mkdir(parents=True, exist_ok=True)
    remove_abandoned(root)
    with TemporaryDirectory(prefix=temporary_prefix("session"), dir=root) as folder:
        yield Path(folder)

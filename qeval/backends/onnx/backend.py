"""The backend `ort`: each variant exported with its own integers, and answered by ONNX Runtime's kernels."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qeval.backends.onnx.export import EXPORT_VERSION, Exporter
from qeval.backends.onnx.folder import Opened, opened
from qeval.backends.onnx.inspection import inspect_folder
from qeval.backends.onnx.packages import require_runtime
from qeval.backends.onnx.providers import Provider, require_provider
from qeval.backends.onnx.session import OrtSession, Sharing
from qeval.backends.onnx.swap import Style
from qeval.errors import QevalError
from qeval.owners import temporary_prefix
from qeval.paths import home
from qeval.quant.variant import Variant
from qeval.store.atomic import sweep


@dataclass(frozen=True)
class Ran:
    """What a session turned out to be: what a report says of it."""

    provider: str
    nodes: dict[str, int]
    """Nodes by execution provider."""
    sharing: Sharing
    folder_bytes: int
    facts: list[str]


class _OnProvider:
    """Opens folders on one execution provider."""

    def __init__(self, provider: Provider, threads: int, device_id: int) -> None:
        """`threads` are the CPU's."""
        self._provider, self._threads, self._device_id = provider, threads, device_id
        self._runtime = require_runtime()
        self.ran: Ran | None = None
        """What the last session was; None before the first."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything about the provider and the runtime that changes a number."""
        return {
            "provider": self._provider.onnx_name,
            "options": dict(self._provider.options),
            "runtime": f"{self._runtime.distribution} {self._runtime.version}",
        }

    @contextmanager
    def _opened(self, folder: Path) -> Iterator[OrtSession]:
        with opened(folder, self._provider, threads=self._threads, device_id=self._device_id) as found:
            self.ran = ran(folder, found, self._provider)
            yield found.session


class OrtBackend(_OnProvider):
    """Opens variants, or the float model, on one execution provider."""

    def __init__(self, exporter: Exporter, style: Style, provider: Provider, threads: int, device_id: int = 0) -> None:
        """`threads` are the CPU's.

        Raises:
            UsageError, QevalError: the provider can't be had here.
        """
        require_provider(provider, device_id)
        super().__init__(provider, threads, device_id)
        self._exporter, self.style = exporter, style

    @property
    def name(self) -> str:
        """`ort`, or `ort-acc4` where activations are rounded to int8."""
        return "ort" if self.style.accuracy_level == 1 else f"ort-acc{self.style.accuracy_level}"

    @property
    def identity(self) -> dict[str, Any]:
        """Everything about the backend that changes a number."""
        return {
            "export": EXPORT_VERSION,
            "exporter": self._exporter.route or self._exporter.asked,
            "precision": self._exporter.target.precision,
            "format": self.style.format,
            "accuracy_level": self.style.accuracy_level,
        } | super().identity

    @contextmanager
    def open(self, variant: Variant | None) -> Iterator[OrtSession]:
        """A session of `variant`, or of the float model with None; its folder is gone when the block ends.

        Raises:
            QevalError, UsageError: it can't be exported or opened, or nodes fell back to another provider.
        """
        if variant is None:
            with self._opened(self._exporter.float_folder()) as session:
                yield session
            return
        with _workplace() as folder:
            self._exporter.write(variant, self.style, folder / "model")
            with self._opened(folder / "model") as session:
                yield session


class FolderBackend(_OnProvider):
    """Opens one folder that someone else made; variants are not its business."""

    name = "ort"

    def __init__(self, folder: Path, provider: Provider, threads: int, device_id: int = 0, *, ids: int) -> None:
        """`folder` holds the model, its configuration and its tokenizer; `ids` beyond these are left out."""
        super().__init__(provider, threads, device_id)
        self._folder, self._ids = folder, ids

    @contextmanager
    def open(self, variant: Variant | None) -> Iterator[OrtSession]:
        """A session of the folder.

        Raises:
            QevalError: a variant is given; or the folder can't be opened.
        """
        if variant is not None:
            raise QevalError(f"'{self._folder}' is a finished model; no variant can be put into it.")
        with self._opened(self._folder) as session:
            session.leave_out_padding(self._ids)
            yield session


def ran(folder: Path, found: Opened, provider: Provider) -> Ran:
    """What a session turned out to be."""
    facts = inspect_folder(folder, needs_tokenizer=False)
    return Ran(
        provider=provider.onnx_name,
        nodes=found.assignment.providers,
        sharing=found.session.sharing,
        folder_bytes=facts.size_bytes,
        facts=[*facts.describe(), *([provider.note] if provider.note else [])],
    )


@contextmanager
def _workplace() -> Iterator[Path]:
    """A folder in the cache for as long as a session lives; what killed processes left is removed first."""
    root = home() / "onnx"
    root.mkdir(parents=True, exist_ok=True)
    sweep(root)
    with TemporaryDirectory(prefix=temporary_prefix("session"), dir=root) as folder:
        yield Path(folder)

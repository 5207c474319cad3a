"""Find what `--variant` names on this machine: as it was typed, or fetched from the hub first."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qeval.errors import QevalError
from qeval.models.hub.fetch import Fetched, fetch
from qeval.models.onnx_layout import is_onnx, onnx_folder
from qeval.models.source import parse_hub_name


@dataclass(frozen=True)
class VariantPath:
    """A variant by name. `spelled` as the user typed it, `path` where it lies; `hub` says what was fetched.

    `warnings` belong to how it was had today; `shown` is what a local path is called in a report.
    """

    name: str
    spelled: str
    path: Path
    hub: str | None = None
    warnings: tuple[str, ...] = ()
    shown: str = ""

    @property
    def flag(self) -> str:
        """The opening of its errors: `--variant a=b`."""
        return f"--variant {self.name}={self.spelled}"

    @property
    def origin(self) -> str:
        """The origin that a report names: the id and commit of the hub's, a path's last part."""
        return self.hub or self.shown or self.path.name


def is_gguf(path: Path) -> bool:
    """Return whether a path names a GGUF file."""
    return path.suffix.lower() == ".gguf"


def local_places(variants: Iterable[tuple[str, Path]]) -> tuple[VariantPath, ...]:
    """Return the places of all of --variant, in their order.

    Raises:
        UsageError, QevalError: the hub has it not, or does not give it; it says which.
    """
    return tuple(_place(name, path) for name, path in variants)


def _place(name: str, path: Path) -> VariantPath:
    spelled = str(path)
    source = parse_hub_name(spelled)
    if source is None:
        return VariantPath(name, spelled, onnx_folder(path) if is_onnx(path) else path, shown=path.name)
    assert source.hub_id is not None
    try:
        fetched = fetch(source.hub_id, source.revision, source.inside, onnx=True)
    except QevalError as error:
        raise type(error)(f"--variant {name}={spelled} is no path here, and on the hub: {error}") from error
    return VariantPath(name, spelled, fetched.path, _fetched_text(source.hub_id, fetched), fetched.warnings)


def _fetched_text(hub_id: str, fetched: Fetched) -> str:
    """Return what was fetched, in words: `q/m-Q4_0.gguf of org/repo at commit 0123…`."""
    part = f"{fetched.part.path} of " if fetched.part.path else ""
    return f"{part}{hub_id} at commit {fetched.commit}"

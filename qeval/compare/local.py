"""Where what `--variant` names lies on this machine: as it was typed, or fetched from the hub first."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qeval.errors import QevalError
from qeval.models.fetch import Fetched, fetch
from qeval.models.source import on_the_hub


@dataclass(frozen=True)
class Place:
    """A variant by name. `spelled` as the user typed it, `path` where it lies; `hub` says what was fetched.

    `warnings` belong to how it was had today.
    """

    name: str
    spelled: str
    path: Path
    hub: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        """What errors begin with: `--variant a=b`."""
        return f"--variant {self.name}={self.spelled}"

    @property
    def origin(self) -> str:
        """What a report says that it was read from: the id and commit of the hub's, a path's last part."""
        return self.hub or self.path.name


def local_places(variants: Iterable[tuple[str, Path]]) -> tuple[Place, ...]:
    """The places of all of --variant, in their order.

    Raises:
        UsageError, QevalError: the hub has it not, or does not give it; it says which.
    """
    return tuple(_place(name, path) for name, path in variants)


def _place(name: str, path: Path) -> Place:
    spelled = str(path)
    source = on_the_hub(spelled)
    if source is None:
        return Place(name, spelled, path)
    assert source.hub_id is not None
    try:
        found = fetch(source.hub_id, source.revision, source.inside, onnx=True)
    except QevalError as error:
        raise type(error)(f"--variant {name}={spelled} is no path here, and on the hub: {error}") from error
    return Place(name, spelled, found.path, _had(source.hub_id, found), found.warnings)


def _had(hub_id: str, found: Fetched) -> str:
    """What was fetched, in words: `q/m-Q4_0.gguf of org/repo at commit 0123…`."""
    part = f"{found.part.path} of " if found.part.path else ""
    return f"{part}{hub_id} at commit {found.commit}"

"""The short names of `configs/models.yaml`."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from qeval import paths
from qeval.errors import UsageError, unknown
from qeval.parsing import load_yaml


class Alias(BaseModel):
    """An entry of a short name: a hub id with an optional revision, or the demo model."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    line: str
    hub_id: str | None = None
    revision: str | None = None
    demo: bool = False

    @model_validator(mode="after")
    def _names_one_place(self) -> "Alias":
        if self.demo == (self.hub_id is not None):
            raise ValueError("give either hub_id or demo: true")
        if self.demo and self.revision is not None:
            raise ValueError("a revision belongs to a hub_id")
        return self


def aliases() -> Mapping[str, Alias]:
    """Return the shipped table, in its order."""
    return read_aliases(paths.shipped("configs/models.yaml"))


def list_models() -> list[tuple[str, str, str]]:
    """Return (name, hub id or `PyPI wheel`, one line) of every alias, for `qeval models`."""
    return [(name, alias.hub_id or "PyPI wheel", alias.line) for name, alias in aliases().items()]


def read_aliases(path: Path) -> Mapping[str, Alias]:
    """Read a table of aliases from YAML.

    Raises:
        UsageError: No mapping; an entry has an unknown key (the nearest is named) or a wrong value.
    """
    raw = load_yaml(path)
    if not isinstance(raw, dict):
        raise UsageError(f"{path} must map names of models to entries.")
    return MappingProxyType({str(name): _alias(path, str(name), entry) for name, entry in raw.items()})


def _alias(path: Path, name: str, entry: Any) -> Alias:
    if not isinstance(entry, dict):
        raise UsageError(f"{path}: '{name}' must map hub_id and line to their values.")
    for key in entry:
        if key not in Alias.model_fields:
            raise UsageError(f"{path}: in '{name}': {unknown('key', str(key), Alias.model_fields)}")
    try:
        return Alias(**entry)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([name, *map(str, first["loc"])])
        raise UsageError(f"{path}: {where}: {first['msg']}.") from error

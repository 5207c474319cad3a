"""What `--model` may say, and what it means: an alias, a hub id, a folder, or a GGUF file."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from qeval.errors import UsageError
from qeval.models.aliases import Alias, aliases

Kind = Literal["hub", "folder", "gguf", "demo"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NEAREST = 3
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from. `name` is as the user typed it, or the alias that it spells.

    Of `hub_id` and `path` the kind has one or neither.
    """

    name: str
    kind: Kind
    hub_id: str | None = None
    revision: str | None = None
    path: Path | None = None


def resolve(name: str, revision: str | None = None) -> ModelSource:
    """What `name` means. A path that exists comes before a hub id, an alias before both (say `./demo` for a folder).

    An alias may be spelled as its model is called on the hub, in any case: `Llama-3.2-3B-Instruct` is `llama-3.2-3b`.

    Raises:
        UsageError: nothing goes by that name (the nearest aliases are listed), or a revision is given off the hub.
    """
    table = aliases()
    if name in table:
        return _aliased(name, table[name], revision)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _local(ModelSource(name, "folder", path=path), revision)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UsageError(f"The GGUF file '{name}' does not exist.")
        return _local(ModelSource(name, "gguf", path=path), revision)
    if path.is_file():
        raise UsageError(_not_a_model_file(name, path))
    if name.startswith((".", "~")) or path.is_absolute():
        raise UsageError(f"The model folder '{name}' does not exist.")
    if _HUB_ID.fullmatch(name):
        return ModelSource(name, "hub", hub_id=name, revision=revision)
    spelled = {spelling: alias for alias, entry in table.items() for spelling in spellings(alias, entry)}
    if name.casefold() in spelled:
        alias = spelled[name.casefold()]
        return _aliased(alias, table[alias], revision)
    near = [spelled[spelling] for spelling in get_close_matches(name.casefold(), spelled, n=6, cutoff=0.6)]
    hint = f"; nearest: {', '.join(list(dict.fromkeys(near))[:_NEAREST])}" if near else ""
    raise UsageError(
        f"Unknown model '{name}'{hint}. `qeval models` lists the {len(table)} that have short names; or give a hub id "
        "'org/name', a folder, or a .gguf file."
    )


def on_the_hub(spelled: str) -> ModelSource | None:
    """What `ORG/REPO` or `ORG/REPO@REVISION` names on the hub; None for a path: one that exists, or is spelled as none.

    >>> on_the_hub("org/theirs@v1").revision
    'v1'
    """
    hub_id, marked, revision = spelled.partition("@")
    if Path(spelled).exists() or spelled.lower().endswith(".gguf") or not _HUB_ID.fullmatch(hub_id):
        return None
    if marked and not revision:
        raise UsageError(f"'{spelled}' names no revision after its @; give a branch, a tag or a full commit.")
    return ModelSource(spelled, "hub", hub_id=hub_id, revision=revision or None)


def spellings(alias: str, entry: Alias) -> tuple[str, str]:
    """An alias, and what its model is called on the hub."""
    return alias, (entry.hub_id or alias).rpartition("/")[2].casefold()


def _aliased(name: str, alias: Alias, revision: str | None) -> ModelSource:
    if alias.hub_id is None:
        return _local(ModelSource(name, "demo"), revision)
    return ModelSource(name, "hub", hub_id=alias.hub_id, revision=revision or alias.revision)


def _local(source: ModelSource, revision: str | None) -> ModelSource:
    if revision is not None:
        raise UsageError(f"--revision {revision} needs a model on the hub; '{source.name}' is not one. Leave it out.")
    return source


def _not_a_model_file(name: str, path: Path) -> str:
    if path.suffix.lower() in _PICKLES:
        return (
            f"'{name}' is a pickle, which can run any code when it is read; "
            "convert the weights to safetensors and give their folder."
        )
    return f"'{name}' is a file; give the folder that holds config.json and the weights, or a .gguf file."

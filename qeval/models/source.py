"""The source of a model, as `--model` names it: an alias, a hub id, a folder, or a GGUF file, on the hub too."""

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from qeval.errors import UsageError
from qeval.models.checkpoint.weights import PICKLE_SUFFIXES
from qeval.models.hub.aliases import Alias, aliases

_Kind = Literal["hub", "folder", "gguf", "demo"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NEAREST = 3


@dataclass(frozen=True)
class ModelSource:
    """A model's source. `name` is as the user typed it, or the alias that it spells.

    Of `hub_id` and `path` the kind has one or neither. `inside` names a part of the repository, as
    `find_part` takes it; None is what its name alone means.
    """

    name: str
    kind: _Kind
    hub_id: str | None = None
    revision: str | None = None
    inside: str | None = None
    path: Path | None = None


def resolve(name: str, revision: str | None = None) -> ModelSource:
    """Return the source that `name` means.

    A path that exists comes before a hub id, an alias before both (say `./demo` for a folder).

    An alias may be spelled as its model is called on the hub, in any case: `Llama-3.2-3B-Instruct` is `llama-3.2-3b`.

    Raises:
        UsageError: Nothing goes by that name (the nearest aliases are listed), or a revision is given off the hub.
    """
    # names that mean one thing exactly
    table = aliases()
    if name in table:
        return _source_of_alias(name, table[name], revision)
    if (local := _local_source(name)) is not None:
        return _without_revision(local, revision)
    if (named := parse_hub_name(name)) is not None:
        return _with_revision(named, revision)

    # names that look like a path, or nearly like an alias
    if name.lower().endswith(".gguf"):
        raise UsageError(f"The GGUF file '{name}' does not exist.")
    if name.startswith((".", "~")) or Path(name).is_absolute():
        raise UsageError(f"The model folder '{name}' does not exist.")
    spelled = {spelling: alias for alias, entry in table.items() for spelling in spellings(alias, entry)}
    if name.casefold() in spelled:
        alias = spelled[name.casefold()]
        return _source_of_alias(alias, table[alias], revision)

    near = [spelled[spelling] for spelling in get_close_matches(name.casefold(), spelled, n=6, cutoff=0.6)]
    hint = f"; nearest: {', '.join(list(dict.fromkeys(near))[:_NEAREST])}" if near else ""
    raise UsageError(
        f"Unknown model '{name}'{hint}. `qeval models` lists the {len(table)} that have short names; or give a hub id "
        "'org/name' (of GGUF files 'org/name:Q8_0'), a folder, or a .gguf file."
    )


def _local_source(name: str) -> ModelSource | None:
    """Return the folder or GGUF file of that path, if there is one."""
    path = Path(name).expanduser()
    if name and path.is_dir():
        return ModelSource(name, "folder", path=path)
    if not path.is_file():
        return None
    if path.suffix.lower() != ".gguf":
        raise UsageError(_not_a_model_file(name, path))
    return ModelSource(name, "gguf", path=path)


def parse_hub_name(spelled: str) -> ModelSource | None:
    """Return what `ORG/REPO[@REVISION][:INSIDE]` names on the hub; None for a path.

    A path is one that exists, or is spelled as no hub id is.

    >>> parse_hub_name("org/theirs@v1:Q4_K_M")
    ModelSource(name='org/theirs@v1:Q4_K_M', kind='hub', hub_id='org/theirs', revision='v1', inside='Q4_K_M', path=None)
    """
    where, colon, inside = spelled.partition(":")
    hub_id, marked, revision = where.partition("@")
    if Path(spelled).exists() or where.lower().endswith(".gguf") or not _HUB_ID.fullmatch(hub_id):
        return None
    if marked and not revision:
        raise UsageError(f"'{spelled}' names no revision after its @; give a branch, a tag or a full commit.")
    inside = inside.strip("/")
    if colon and not inside:
        raise UsageError(f"'{spelled}' names nothing after its colon; give a GGUF file or type (Q4_K_M), or a folder.")
    return ModelSource(spelled, "hub", hub_id=hub_id, revision=revision or None, inside=inside or None)


def spellings(alias: str, entry: Alias) -> tuple[str, str]:
    """Return an alias, and what its model is called on the hub."""
    return alias, (entry.hub_id or alias).rpartition("/")[2].casefold()


def _source_of_alias(name: str, alias: Alias, revision: str | None) -> ModelSource:
    if alias.hub_id is None:
        return _without_revision(ModelSource(name, "demo"), revision)
    return ModelSource(name, "hub", hub_id=alias.hub_id, revision=revision or alias.revision)


def _with_revision(source: ModelSource, revision: str | None) -> ModelSource:
    if revision is not None and source.revision is not None:
        raise UsageError(f"'{source.name}' and --revision {revision} both name a revision; leave one of them out.")
    return replace(source, revision=revision or source.revision)


def _without_revision(source: ModelSource, revision: str | None) -> ModelSource:
    if revision is not None:
        raise UsageError(f"--revision {revision} needs a model on the hub; '{source.name}' is not one. Leave it out.")
    return source


def _not_a_model_file(name: str, path: Path) -> str:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return (
            f"'{name}' is a pickle, which can run any code when it is read; "
            "convert the weights to safetensors and give their folder."
        )
    return f"'{name}' is a file; give the folder that holds config.json and the weights, or a .gguf file."

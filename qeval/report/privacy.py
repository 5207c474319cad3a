"""Remove from what is published every place of the machine: absolute paths, the user's and the host's name.

A local model, text or variant goes by the last part of its path; its sha256 says which it is.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, TypeVar

from pydantic import BaseModel

from qeval.store.run import ModelRecord, RunRecord

_PART = r"[^\s/\\'\"`,;:|<>(){}\[\]=]+"
_FREE = r"(?<![\w.:/\\<~%-])"
_POSIX = re.compile(rf"{_FREE}(?:file://)?(?:~[\w.-]*|\.\.?)?(?:/+{_PART})+/?|{_FREE}\.\.(?![\w.])/?")
_QUOTED = re.compile(r"(?<=(['\"]))(?:~|[A-Za-z]:|\.\.?)?[/\\][^'\"\n]*(?=\1)")
_URL_FILE = re.compile(rf"file:/+(?:{_PART}/+)*({_PART})")
_WINDOWS = re.compile(rf"(?<!\w)(?:[A-Za-z]:[\\/]|\\\\)(?:{_PART}[\\/]+)*{_PART}")
_PROCESS = re.compile(r"(process \d+) on [^\s,;:]+")

_Content = TypeVar("_Content", bound=BaseModel)


def local_name(name: str, source: str) -> str:
    """Return what a page calls a model of a `source`: a local one by the last part of its path."""
    return Path(name).name or name if source in ("folder", "gguf") else name


def strip_model(model: ModelRecord) -> ModelRecord:
    """Return the record of a model without the place where it lies."""
    return model.model_copy(update={"name": local_name(model.name, model.source)})


def strip_record(content: _Content, names: Mapping[str, str]) -> _Content:
    """Return a record or a report without the places in any of its texts.

    Args:
        content: What is to be published.
        names: What is called otherwise: a path as it was typed, and its name.
    """
    return type(content).model_validate(_strip(content.model_dump(), names))


def short_names(
    model: ModelRecord, settings: Mapping[str, Any] | None = None, more: Iterable[str] = ()
) -> dict[str, str]:
    """Return the last parts of what a run was given, by the paths as they were typed.

    Args:
        model: The baseline.
        settings: A run's record of what it was asked for.
        more: Other paths.
    """
    paths = list(more)
    if model.source in ("folder", "gguf"):
        paths.append(model.name)
    paths += _local_paths(settings or {})
    names = {path: _last(path) for path in paths if "/" in path or "\\" in path}
    return {path: name for path, name in names.items() if name}


def run_short_names(record: RunRecord) -> dict[str, str]:
    """Return `short_names` a finished run."""
    return short_names(record.model, record.settings)


def strip_paths(text: str, names: Mapping[str, str] | None = None) -> str:
    """Return a text in which paths are their last parts, and no host is named.

    >>> strip_paths("qeval compare --model /home/me/model --corpus=../texts/a.txt --out ~/run org/name")
    'qeval compare --model model --corpus=a.txt --out run org/name'
    >>> strip_paths("see https://example.org/a/b, wikitext2-1024/512 and process 7 on far.example: and/or")
    'see https://example.org/a/b, wikitext2-1024/512 and process 7: and/or'
    """
    for path, name in sorted((names or {}).items(), key=lambda pair: -len(pair[0])):
        text = name.join(re.split(rf"(?<![\w/.-]){re.escape(path)}(?![\w-])", text))
    text = _QUOTED.sub(lambda match: PureWindowsPath(match[0]).name or match[0], text)
    text = _URL_FILE.sub(lambda match: match[1], text)
    text = _WINDOWS.sub(lambda match: PureWindowsPath(match[0]).name, text)
    text = _POSIX.sub(lambda match: _last(match[0]), text)
    return _PROCESS.sub(r"\1", text)


def _local_paths(settings: Mapping[str, Any]) -> Iterable[str]:
    """Yield the local paths among a run's settings, and the folder that it was started in."""
    choices = settings.get("settings") or {}
    yield str(settings.get("folder") or "")
    yield str(choices.get("out") or "")
    yield str((choices.get("questions") or {}).get("mmlu_dir") or "")
    yield str((choices.get("calibration") or {}).get("source") or "")
    corpus = str((choices.get("corpus") or {}).get("corpus") or "")
    yield from (part.strip() for part in (corpus, *corpus.split(",")))
    for _, path in choices.get("variants") or []:
        if not _is_on_the_hub(str(path)):
            yield str(path)


def _is_on_the_hub(spelled: str) -> bool:
    """Return whether a variant's path may be ORG/REPO of the hub, whose name is no secret."""
    return not spelled.startswith((".", "~", "/")) and spelled.count("/") == 1


def _last(path: str) -> str:
    name = Path(path).name
    return "" if name == ".." else name


def _strip(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return strip_paths(value, names)
    if isinstance(value, Mapping):
        return {_strip(key, names): _strip(item, names) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strip(item, names) for item in value]
    return value

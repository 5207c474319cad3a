"""A model's files from the hub: safetensors, GGUF or ONNX, configuration and tokenizer, never a pickle.

The hub, its token and its cache are huggingface_hub's own: `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`.
"""

import errno
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, get_cached_repo_tree, get_token, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but exported lazily
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from qeval.errors import QevalError, UsageError, first_line
from qeval.hub import REFUSED_TOKEN, offline_reason
from qeval.models.checkpoint.weights import PICKLE_SUFFIXES
from qeval.models.hub.aliases import aliases
from qeval.models.hub.files import RepositoryPart, find_part
from qeval.models.hub.links import link_files

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TransportError: type[Exception] = HfHubHTTPError.__mro__[1]
"""The HTTP client's own base error (huggingface_hub changed its client twice), which need not be an OSError."""
_UNREACHED: tuple[type[Exception], ...] = (_TransportError, OfflineModeIsEnabled)
_USER_CAN_ACT: tuple[tuple[type[Exception], str], ...] = (  # subclasses first
    (
        GatedRepoError,
        "Access to {model} is restricted: accept its licence at {page}, then log in with that account "
        "(`hf auth login`) or set HF_TOKEN.",
    ),
    (RevisionNotFoundError, "'{hub_id}' has no revision '{revision}'; give a branch, a tag or a full commit."),
    (RepositoryNotFoundError, "The hub has no model '{hub_id}', or it is private: check the name{near}, or {log_in}."),
    (HFValidationError, "'{hub_id}' is no hub id; it should look like 'org/name'."),
    (
        LocalEntryNotFoundError,
        "The hub can't be reached, and {model} is not whole in its cache: connect, or give a folder, a .gguf file, "
        "or 'demo'.",
    ),
)
_CODE = ("*.py", "*.so", "*.so.*", "*.dll", "*.dylib", "*.pyd", "*.exe", "*.sh")
_REFUSED = [*(f"*{suffix}" for suffix in PICKLE_SUFFIXES), *_CODE]


class Fetched(NamedTuple):
    """A part of a repository: where it lies now, its commit, and what must be told of how it was had."""

    path: Path
    """A folder or a GGUF file in the cache's copy of the commit; a graph's is a folder of links to what it needs."""
    commit: str
    part: RepositoryPart
    warnings: tuple[str, ...]


def fetch(hub_id: str, revision: str | None = None, inside: str | None = None, *, onnx: bool = False) -> Fetched:
    """Fetch a hub model's files where they aren't cached; take the cached ones where the hub does not answer.

    Args:
        hub_id: The repository, `org/name`.
        revision: A branch, a tag or a commit; default: the main branch.
        inside: A GGUF file or type, or a folder, as `find_part` takes it.
        onnx: Whether an ONNX model will do.

    Raises:
        UsageError: No such model, revision or part of it, no access to it, nothing that qeval takes, or the hub can't
            be reached and it isn't cached.
        QevalError: The download failed.
    """
    silence: Exception | None = None
    try:
        names, silence = _repository_files(hub_id, revision)
        part = _find_part(hub_id, names, inside, silence, onnx=onnx)
        with _bars_on_terminals_only():
            snapshot = snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=list(part.files),
                ignore_patterns=_REFUSED,
                local_files_only=silence is not None,
            )
    except (OSError, ValueError, RuntimeError, _TransportError) as error:  # RuntimeError: big files' transfer library
        answered = isinstance(error, LocalEntryNotFoundError) and isinstance(silence, HfHubHTTPError)
        raise _error_for(silence if silence and answered else error, hub_id, revision, inside) from error

    folder = Path(snapshot)
    warnings = (_from_cache(hub_id, folder.name, silence),) if silence and not _is_commit(revision) else ()
    return Fetched(_local_path(folder, part), folder.name, part, warnings)


def fetch_config(hub_id: str, revision: str | None = None) -> Path:
    """Fetch a hub model's config.json and nothing else; return where it lies.

    Raises:
        UsageError: As `fetch`.
        QevalError: The download failed.
    """
    try:
        with _bars_on_terminals_only():
            return Path(hf_hub_download(hub_id, "config.json", revision=revision))
    except (OSError, ValueError, RuntimeError, _TransportError) as error:
        raise _error_for(error, hub_id, revision, None) from error


def _local_path(copy: Path, part: RepositoryPart) -> Path:
    path = copy / part.path
    return link_files(copy, part.among(_files_in(copy))) if path.suffix == ".onnx" else path


def _repository_files(hub_id: str, revision: str | None) -> tuple[Sequence[str], Exception | None]:
    """Return a repository's files at a revision; those that the cache knows where the hub is silent, and why.

    A commit that the cache knows needs no asking.
    """
    listed = _listed_files(hub_id, revision)
    if listed and _is_commit(revision):
        return listed, None
    try:
        info = HfApi().model_info(hub_id, revision=revision, timeout=constants.DEFAULT_ETAG_TIMEOUT)
    except RevisionNotFoundError:
        raise
    except _UNREACHED as error:
        if known := listed or _cached_files(hub_id, revision):
            return known, error
        raise error if isinstance(error, HfHubHTTPError) else LocalEntryNotFoundError(str(error)) from error
    return [sibling.rfilename for sibling in info.siblings or ()], None


def _listed_files(hub_id: str, revision: str | None) -> list[str]:
    """Return the files of a whole repository, as the cache listed them when something of it was fetched."""
    try:
        return [file.path for file in get_cached_repo_tree(hub_id, revision=revision)]
    except CachedRepoTreeNotFoundError:
        return []


def _cached_files(hub_id: str, revision: str | None) -> list[str]:
    """Return the files of a repository's copy that was cached without such a list, by other programs."""
    try:
        folder = snapshot_download(hub_id, revision=revision, allow_patterns=[], local_files_only=True)
    except LocalEntryNotFoundError:
        return []
    return _files_in(Path(folder))


def _files_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _is_commit(revision: str | None) -> bool:
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def _find_part(
    hub_id: str, names: Sequence[str], inside: str | None, silence: Exception | None, *, onnx: bool
) -> RepositoryPart:
    try:
        return find_part(hub_id, names, inside, onnx=onnx)
    except UsageError as error:
        if silence is None:
            raise
        raise UsageError(f"The hub does not answer ({_why(silence)}), and of its copy in the cache: {error}") from error


def _from_cache(hub_id: str, commit: str, why: Exception) -> str:
    return (
        f"The hub does not answer for '{hub_id}' ({_why(why)}); the cached copy of commit {commit} is used, "
        "which need not be the newest."
    )


def _why(silence: Exception) -> str:
    return offline_reason() or first_line(silence)


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    hidden = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hidden:
        disable_progress_bars()
    try:
        yield
    finally:
        if hidden:
            enable_progress_bars()


def _error_for(error: Exception, hub_id: str, revision: str | None, inside: str | None) -> QevalError:
    """Return what went wrong between us and the hub, as a sentence."""
    model = f"'{hub_id}{f':{inside}' if inside else ''}'" + (f" at revision '{revision}'" if revision else "")
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        if error.response.status_code == 401 and get_token() and not isinstance(error, GatedRepoError):
            return UsageError(REFUSED_TOKEN.format(what=model))
        if not isinstance(error, RepositoryNotFoundError):  # what the hub's own site says where mirrors say 401 alone
            error = RepositoryNotFoundError(str(error), response=error.response)
    for kind, sentence in _USER_CAN_ACT:
        if isinstance(error, kind):
            return UsageError(sentence.format(model=model, hub_id=hub_id, revision=revision, **_advice(hub_id)))
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return QevalError(
            f"The disk is full: {model} could not be downloaded to {constants.HF_HUB_CACHE}; make room, or move "
            "HF_HOME, and run again to go on."
        )
    return QevalError(f"The download of {model} failed ({first_line(error)}); run again to go on.")


def _advice(hub_id: str) -> dict[str, str]:
    """Return what the sentences on a model that can't be had advise."""
    known = {alias.hub_id: name for name, alias in aliases().items() if alias.hub_id}
    near = [f"{match} ({known[match]})" for match in get_close_matches(hub_id, known, n=3, cutoff=0.8)]
    return {
        "near": f" (nearest: {', '.join(near)})" if near else "",
        "page": f"{constants.ENDPOINT}/{hub_id}",
        "log_in": "ask its owner for access" if get_token() else "log in (`hf auth login`)",
    }

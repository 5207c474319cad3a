"""A model's files from the hub: safetensors, configuration and tokenizer, never a pickle.

The hub, its token and its cache are huggingface_hub's own: `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`.
"""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but exported lazily
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from qeval.errors import QevalError, UsageError
from qeval.models.weights import INDEX, PICKLE_SUFFIXES, SINGLE, pickle_refused

_FILES = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",  # not consolidated.safetensors or original/, which hold the same weights again
    INDEX,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
]
_TransportError: type[Exception] = HfHubHTTPError.__mro__[1]
"""The HTTP client's own base error (huggingface_hub changed its client twice), which need not be an OSError."""
_USER_CAN_ACT: tuple[tuple[type[Exception], str], ...] = (  # subclasses first
    (
        GatedRepoError,
        "Access to {model} is restricted: accept its terms on its page on the hub, then log in (`hf auth login`) "
        "or set HF_TOKEN.",
    ),
    (RevisionNotFoundError, "'{hub_id}' has no revision '{revision}'; give a branch, a tag or a full commit."),
    (
        RepositoryNotFoundError,
        "The hub has no model '{hub_id}', or it is private: check the name, or log in (`hf auth login`).",
    ),
    (HFValidationError, "'{hub_id}' is no hub id; it should look like 'org/name'."),
    (
        LocalEntryNotFoundError,
        "The hub can't be reached, and {model} is not whole in its cache: connect, or give a folder, a .gguf file, "
        "or 'demo'.",
    ),
)
_REFUSED = [f"*{suffix}" for suffix in PICKLE_SUFFIXES] + ["*.py"]


def fetch(hub_id: str, revision: str | None = None) -> Path:
    """The folder of a hub model's files, downloaded where they aren't cached; its name is the commit.

    Raises:
        UsageError: no such model or revision, no access to it, no safetensors, or the hub can't be reached and the
            model isn't cached.
        QevalError: the download failed.
    """
    try:
        with _bars_on_terminals_only():
            folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=_FILES, ignore_patterns=_REFUSED))
        if not (folder / SINGLE).exists() and not (folder / INDEX).exists():
            raise UsageError(_no_weights(hub_id, folder.name))
    except (OSError, ValueError, _TransportError) as error:
        raise _told(error, hub_id, revision) from error
    return folder


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


def _no_weights(hub_id: str, commit: str) -> str:
    names = HfApi().list_repo_files(hub_id, revision=commit)
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    if pickles:
        return pickle_refused(hub_id, pickles)
    if any(name.endswith(".gguf") for name in names):
        return f"'{hub_id}' holds GGUF files only; download one and give its path."
    return f"'{hub_id}' has no weights: neither {SINGLE} nor {INDEX} is in it."


def _told(error: Exception, hub_id: str, revision: str | None) -> QevalError:
    """What went wrong between us and the hub, as a sentence."""
    model = f"'{hub_id}'" + (f" at revision '{revision}'" if revision else "")
    for kind, sentence in _USER_CAN_ACT:
        if isinstance(error, kind):
            return UsageError(sentence.format(model=model, hub_id=hub_id, revision=revision))
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return UsageError(f"The hub refused access to {model}: log in (`hf auth login`) or set HF_TOKEN.")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return QevalError(f"The disk is full: {model} could not be downloaded; what came is kept.")
    return QevalError(f"The download of {model} failed ({_first_line(error)}); run again to go on.")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__

"""Where things lie: the cache (`QEVAL_HOME`) and the data files that are shipped with the program."""

import os
from pathlib import Path

from qeval.errors import UsageError

HOME = "QEVAL_HOME"
"""The variable that names the cache folder."""

_PACKAGE = Path(__file__).resolve().parent


def home() -> Path:
    """The cache folder: `QEVAL_HOME`, else `~/.cache/qeval`."""
    return Path(os.environ.get(HOME) or Path.home() / ".cache" / "qeval").expanduser()


def check_place(out: Path, holds: str) -> None:
    """Refuse a folder for the results (`holds` names them) that can't be made or written into.

    Raises:
        UsageError: it is a file or lies under one, or it is read-only.
    """
    above = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not above.is_dir():
        raise UsageError(f"--out {out} {'is' if above == out else 'lies under'} a file; name a folder for {holds}.")
    if not os.access(above, os.W_OK):
        raise UsageError(f"--out {out}: {above} is read-only; name another folder for {holds}.")


def shipped(relative: str) -> Path:
    """A shipped data file or folder such as `configs/models.yaml`: in a checkout or inside the wheel."""
    checkout = _PACKAGE.parent / relative
    return checkout if checkout.exists() else _PACKAGE / "data" / relative

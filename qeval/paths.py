"""Places on disk: the cache (`QEVAL_HOME`), the data files that are shipped, and whether a place can be written."""

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from qeval.errors import UsageError

HOME = "QEVAL_HOME"
"""The variable that names the cache folder."""

_PACKAGE = Path(__file__).resolve().parent
_TILDE = re.compile(r"(?:^|(?<=[=,]))~(?=/|$)")


def home() -> Path:
    """Return the cache folder: `QEVAL_HOME`, else `~/.cache/qeval`."""
    return Path(os.environ.get(HOME) or Path.home() / ".cache" / "qeval").expanduser()


def with_homes(arguments: Sequence[str]) -> list[str]:
    """Replace `~` at the start of each path by the home folder: of a word, behind `=`, and in a list with commas.

    A shell does so at the start of a word alone, so `--out=~/run` and `--variant q=~/q` reach the program as typed.

    Args:
        arguments: The words of a command.

    Returns:
        As many words.
    """
    folder = str(Path.home())
    return [_TILDE.sub(lambda _: folder, word) for word in arguments]


def check_text(arguments: Sequence[str]) -> None:
    """Refuse words that are no text, since records, which are UTF-8, could not hold them.

    Raises:
        UsageError: A word holds bytes that are not UTF-8.
    """
    for word in arguments:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"'{word}' holds bytes that are not UTF-8; rename what is called so.") from error


def check_place(out: Path, holds: str, flag: str = "--out") -> None:
    """Refuse a folder for results that can't be made or written into.

    Args:
        out: The folder.
        holds: What it is for, as the error calls it.
        flag: The flag that named it.

    Raises:
        UsageError: It is a file or lies under one, or it is read-only.
    """
    above = _nearest(out, flag)
    if not above.is_dir():
        raise UsageError(f"{flag} {out} {'is' if above == out else 'lies under'} a file; name a folder for {holds}.")
    if not _is_writable(above):
        raise UsageError(f"{flag} {out}: {above} is read-only; name another folder for {holds}.")


def check_new_folder(out: Path, holds: str, flag: str = "--out") -> None:
    """Refuse a folder that is to be made where it can't be: its own folder is written, whatever is in it.

    Raises:
        UsageError: As `check_place`.
    """
    check_place(out.absolute().parent, holds, flag)


def check_file(path: Path, flag: str) -> None:
    """Refuse a file for results that can't be written: found before the work, not after it.

    Pipes and devices are written to as they are. A link is followed.

    Args:
        path: The file, which need not be there.
        flag: The flag that named it.

    Raises:
        UsageError: It is a folder, lies under a file, or it or its folder is read-only.
    """
    try:
        real = Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise _unusable(path, flag, error) from error
    above = _nearest(real, flag)
    if above == real and above.is_dir():
        raise UsageError(f"{flag} {path} is a folder; name a file.")
    if above == real:
        folder = real.parent if stat.S_ISREG(real.stat().st_mode) else None
        if not os.access(real, os.W_OK) or (folder is not None and not _is_writable(folder)):
            raise UsageError(f"{flag} {path} can't be written; name another file.")
    elif not above.is_dir():
        raise UsageError(f"{flag} {path} lies under a file; name another place.")
    elif not _is_writable(above):
        raise UsageError(f"{flag} {path}: {above} is read-only; name another file.")


def shipped(relative: str) -> Path:
    """Return a shipped data file or folder such as `configs/models.yaml`: in a checkout or inside the wheel."""
    checkout = _PACKAGE.parent / relative
    return checkout if checkout.exists() else _PACKAGE / "data" / relative


def nearest_existing(path: Path) -> Path:
    """Return the path itself, or the nearest above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _nearest(path: Path, flag: str) -> Path:
    """Return the path itself, or the nearest above it that exists."""
    try:
        return nearest_existing(path)
    except (OSError, ValueError) as error:  # a name that is too long, a folder that can't be looked into, a null byte
        raise _unusable(path, flag, error) from error


def _unusable(path: Path, flag: str, error: Exception) -> UsageError:
    return UsageError(f"{flag} {path} can't be used: {getattr(error, 'strerror', None) or error}.")


def _is_writable(folder: Path) -> bool:
    """Return whether a file can be made in a folder: asked of the system, and tried with one that has no name."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    try:
        with TemporaryFile(dir=folder):
            return True
    except OSError:
        return False

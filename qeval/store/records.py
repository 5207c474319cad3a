"""Records that know whether they are whole: files named `KEY-DIGEST.SUFFIX`.

The key hashes everything that changes the content; the digest is the start of the content's own sha256. So finished
work is found by its name, and a record that is torn or was changed by hand is found out by its bytes.
"""

from collections.abc import Callable
from pathlib import Path

from qeval.errors import BrokenRecordError
from qeval.identity import digest_file
from qeval.store.atomic import atomic_path

_DIGITS = 16

Warn = Callable[[str], None]


def write_record(folder: Path, key: str, suffix: str, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary file, then name it by key and content; it appears whole or not at all."""
    part = folder / f"{key}.part"
    with atomic_path(part) as temporary:
        write(temporary)
        final = folder / f"{key}-{digest_file(temporary)[:_DIGITS]}{suffix}"
    part.replace(final)
    return final


def find_record(folder: Path, key: str, suffix: str, warn: Warn) -> Path | None:
    """The record of `key`, its bytes verified, or None when the work isn't done.

    A record that is broken is named through `warn`, removed, and counts as not done.
    """
    for path in sorted(folder.glob(f"{key}-*{suffix}")):
        try:
            verify(path)
        except BrokenRecordError as error:
            warn(f"{error} It is made again.")
            path.unlink()
        else:
            return path
    return None


def verify(path: Path) -> None:
    """Check that the record's bytes are those that were written.

    Raises:
        BrokenRecordError: it names the file.
    """
    if digest_file(path)[:_DIGITS] != path.stem.rpartition("-")[2]:
        raise BrokenRecordError(f"{path} is torn or was changed: its checksum does not fit its name.")

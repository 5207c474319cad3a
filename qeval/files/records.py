"""Records that know whether they are whole: files named `KEY-DIGEST.SUFFIX`.

The key hashes everything that changes the content; the digest is the start of the content's own sha256. So finished
work is found by its name, and a record that is torn or was changed by hand is found out by its bytes.
"""

from collections.abc import Callable
from pathlib import Path

from qeval.errors import BrokenRecordError
from qeval.files.atomic import publish, temporary_file
from qeval.identity import digest_file
from qeval.progress import Notify

_DIGITS = 16


def write_record(folder: Path, key: str, suffix: str, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary file, then name it by key and content; it appears whole or not at all.

    Args:
        folder: Where the record lies.
        key: The hash of everything that changes the content.
        suffix: What its name ends in.
        write: Writes the content to a path.
    """
    with temporary_file(folder / f"{key}{suffix}") as temporary:
        write(temporary)
        final = folder / f"{key}-{digest_file(temporary)[:_DIGITS]}{suffix}"
        publish(temporary, final)
    return final


def find_record(folder: Path, key: str, suffix: str, warn: Notify) -> Path | None:
    """Return the record of `key`, its bytes verified, or None when the work isn't done.

    A record that is broken is named through `warn`, removed, and counts as not done.

    Args:
        folder: Where the record lies.
        key: The hash of everything that changes the content.
        suffix: What its name ends in.
        warn: Hears of records that are broken.
    """
    for path in sorted(folder.glob(f"{key}-*{suffix}")):
        try:
            verify_record(path)
        except BrokenRecordError as error:
            warn(f"{error} It is made again.")
            path.unlink(missing_ok=True)  # another process may have seen the same
        else:
            return path
    return None


def verify_record(path: Path) -> None:
    """Check that the record's bytes are those that were written.

    Raises:
        BrokenRecordError: It names the file.
    """
    try:
        sha256 = digest_file(path)
    except FileNotFoundError as error:
        raise BrokenRecordError(f"{path} was removed.") from error
    if sha256[:_DIGITS] != path.stem.rpartition("-")[2]:
        raise BrokenRecordError(f"{path} is torn or was changed: its checksum does not fit its name.")

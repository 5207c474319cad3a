"""Bytes of a text file to text: UTF-8 alone, and nothing in front of it or between its letters that would be scored."""

from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from pathlib import Path

from qeval.errors import UsageError


def decode(data: bytes, path: Path) -> str:
    """Return the text of a file's bytes.

    Args:
        data: All bytes of the file.
        path: What messages call it.

    Raises:
        UsageError: They start with a byte order mark, hold NUL bytes (UTF-16 or UTF-32 does), or are not UTF-8.
    """
    if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise UsageError(
            f"'{path}' starts with a byte order mark of UTF-16, which would be scored; save it as plain UTF-8."
        )
    if data.startswith(BOM_UTF8):
        raise UsageError(f"'{path}' starts with a byte order mark, which would be scored; save it as plain UTF-8.")

    # NUL bytes decode as UTF-8, and no text has any
    if (first := data.find(0)) >= 0:
        raise UsageError(
            f"'{path}' holds {data.count(0):,} NUL bytes, the first at offset {first}: it is UTF-16 or UTF-32 without "
            "a byte order mark, or no text; save it as plain UTF-8."
        )

    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"'{path}' is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} (line {line}) "
            "can't be decode; convert the file first."
        ) from error

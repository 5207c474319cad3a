"""A GGUF file's header, for whoever reads one: without torch, which processes that are timed do not hold."""

from pathlib import Path

from gguf import GGUFReader

from qeval.errors import UsageError


def open_gguf(path: Path) -> GGUFReader:
    """The file's tensors and fields, mapped and not read.

    Raises:
        UsageError: it is torn or no GGUF.
    """
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' is torn or not a GGUF file ({error}).") from error

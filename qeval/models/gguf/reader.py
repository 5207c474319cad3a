"""A GGUF file's header, for whoever reads one: without torch, which processes that are timed do not hold."""

from contextlib import AbstractContextManager
from pathlib import Path

from gguf import GGUFReader

from qeval.models.gguf.header import check_header
from qeval.parsing import one_sentence


def open_gguf(path: Path) -> GGUFReader:
    """Open a file's tensors and fields, mapped and not read.

    Raises:
        UsageError: It is torn or no GGUF.
    """
    check_header(path)
    with one_sentence(f"'{path}' is torn or not a GGUF file"):
        return GGUFReader(path)


def gguf_errors(path: Path) -> AbstractContextManager[None]:
    """Return what makes one sentence of whatever a GGUF file's content raises in its block."""
    return one_sentence(f"'{path}' can't be read as GGUF", after="Download it again.")

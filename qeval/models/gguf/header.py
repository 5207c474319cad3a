"""A GGUF file's header, checked before any library reads it: every count, length and offset against the file's size.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, counts of tensors and keys; each
key with a value of a type; each tensor's name, shape, type and offset; then, aligned, the tensors' bytes. gguf's reader
makes an object of every element that a header declares, and llama.cpp ends the process on some faults, so a header that
declares what the file can't hold is refused here, from a few kilobytes of memory.
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qeval import escape
from qeval.errors import UsageError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the types of plain values."""
_WHOLE = {2: "H", 3: "h", 4: "I", 5: "i", 10: "Q", 11: "q"}
"""The types of whole numbers that are looked at."""
_MOST_ELEMENTS = 8_000_000
"""Of all arrays together: four lists of a vocabulary of two million entries; gguf's reader makes objects of each."""
_MOST_KEYS, _MOST_TENSORS = 65_536, 1_000_000
_LONGEST_NAME = 65_535
_MOST_DIMENSIONS = 4
_ALIGNMENT, _BLOCKS, _SPLIT = "general.alignment", ".block_count", "split.count"


class _Tensor(NamedTuple):
    """A tensor's place behind the header, and its bytes."""

    name: str
    offset: int
    size: int


class _Header:
    """A reader of a header from its start on; what would lie beyond the end of the file is an error."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size, self._elements = file, size, 0
        self._order = "<"
        self.numbers: dict[str, int] = {}

    def check(self) -> None:
        """Raise ValueError or OverflowError, saying what is wrong."""
        if self._take(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._take(4)
        if int.from_bytes(version, "little") & 0xFFFF == 0:
            self._order = ">"
        if (number := struct.unpack(f"{self._order}I", version)[0]) not in _VERSIONS:
            raise ValueError(f"it is of version {number}, and qeval reads 2 and 3")
        tensors, keys = self._number("Q"), self._number("Q")
        if tensors > _MOST_TENSORS or keys > _MOST_KEYS:
            raise ValueError(f"it declares {tensors:,} tensors and {keys:,} keys")
        self._distinct(keys, self._pair)
        placed = self._distinct(tensors, self._tensor)
        self._check_blocks(tensors)
        self._check_places([tensor for tensor in placed if tensor is not None])

    def _take(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise ValueError("it declares more than the file holds, or is cut short")
        return self._file.read(count)

    def _skip(self, count: int) -> None:
        if count > self._size - self._file.tell():
            raise ValueError("it declares more than the file holds, or is cut short")
        self._file.seek(count, 1)

    def _number(self, form: str) -> int:
        return int(struct.unpack(f"{self._order}{form}", self._take(struct.calcsize(form)))[0])

    def _name(self) -> str:
        length = self._number("Q")
        if length > _LONGEST_NAME:
            raise ValueError(f"it has a name of {length:,} bytes")
        return self._take(length).decode()

    def _distinct(self, count: int, read: Callable[[str], "_Tensor | None"]) -> list["_Tensor | None"]:
        """Read something after each of `count` names, of which none stands twice."""
        seen: set[str] = set()
        values = []
        for _ in range(count):
            name = self._name()
            if name in seen:
                raise ValueError(f"{escape.cut(name)} stands in it twice")
            seen.add(name)
            values.append(read(name))
        return values

    def _pair(self, key: str) -> None:
        kind = self._number("I")
        if kind == _ARRAY:
            self._array()
        elif kind == _STRING:
            self._skip(self._number("Q"))
        elif kind in _WHOLE:
            self.numbers[key] = self._number(_WHOLE[kind])
        else:
            self._skip(self._width(kind))

    def _array(self) -> None:
        kind, count = self._number("I"), self._number("Q")
        self._elements += count
        if self._elements > _MOST_ELEMENTS:
            raise ValueError(f"it declares lists of {self._elements:,} entries, more than any vocabulary")
        if kind == _ARRAY:
            raise ValueError("it declares lists of lists, which no model has")
        if kind != _STRING:
            self._skip(count * self._width(kind))
            return
        for _ in range(count):
            self._skip(self._number("Q"))

    @staticmethod
    def _width(kind: int) -> int:
        if kind not in _SIZES:
            raise ValueError(f"it holds a value of type {kind}, which GGUF does not have")
        return _SIZES[kind]

    def _tensor(self, name: str) -> _Tensor:
        dimensions = self._number("I")
        if not 0 < dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{escape.cut(name)} has {dimensions} dimensions")
        shape = [self._number("Q") for _ in range(dimensions)]
        kind, offset = self._number("I"), self._number("Q")
        known = {each.value: each for each in GGMLQuantizationType}
        if kind not in known:
            raise ValueError(f"{escape.cut(name)} is of type {kind}, which the gguf package does not know")
        block, block_bytes = GGML_QUANT_SIZES[known[kind]]
        elements = 1
        for length in shape:
            elements *= length
        if not elements or shape[0] % block:
            raise ValueError(f"{escape.cut(name)} has the shape {escape.cut(shape)}, which its type can't have")
        return _Tensor(name, offset, elements // block * block_bytes)

    def _check_blocks(self, tensors: int) -> None:
        if self.numbers.get(_SPLIT, 1) > 1:
            return  # one of several files, which is refused by that name
        for key, value in self.numbers.items():
            if key.endswith(_BLOCKS) and not 0 < value <= max(tensors, 1):
                raise ValueError(f"{escape.cut(key)} is {value:,}, and it holds {tensors:,} tensors")

    def _check_places(self, tensors: list[_Tensor]) -> None:
        alignment = self.numbers.get(_ALIGNMENT, 32)
        if alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise ValueError(f"{_ALIGNMENT} is {alignment}, which is no power of two that a file could have")
        start = -(-self._file.tell() // alignment) * alignment
        for tensor in tensors:
            if tensor.offset % alignment:
                raise ValueError(f"{escape.cut(tensor.name)} does not begin at a multiple of {alignment}")
            if start + tensor.offset + tensor.size > self._size:
                raise ValueError(f"the bytes of {escape.cut(tensor.name)} end outside the file")


def check_header(path: Path) -> None:
    """Refuse a file whose header is no GGUF's, or declares more than the file holds.

    Args:
        path: The file.

    Raises:
        UsageError: It says what is wrong.
    """
    try:
        with path.open("rb") as file:
            _Header(file, path.stat().st_size).check()
    except (ValueError, OverflowError, struct.error) as error:
        raise UsageError(f"'{path}' is torn or not a GGUF file ({_words(error)}).") from error
    except OSError as error:
        raise UsageError(f"Cannot read '{path}': {error.strerror or error}.") from error


def _words(error: Exception) -> str:
    return "a name in it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)

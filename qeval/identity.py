"""Identity is content: a versioned hash of everything that changes a number, and of nothing that doesn't."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

IDENTITY_VERSION = 1
"""Raise it when the same inputs give other numbers, so that no older record is taken for a new one."""

_CHUNK_BYTES = 1 << 20


def digest(value: Mapping[str, Any]) -> str:
    """Return the 32 hex digits that name `value` (plain JSON values; the order of keys does not matter).

    >>> digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    True
    """
    text = json.dumps([IDENTITY_VERSION, value], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def digest_bytes(chunks: Iterable[bytes | memoryview]) -> str:
    """Return the sha256 of a stream of bytes, in hex."""
    sha = hashlib.sha256()
    for chunk in chunks:
        sha.update(chunk)
    return sha.hexdigest()


def digest_file(path: Path) -> str:
    """Return the sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return digest_bytes(iter(lambda: file.read(_CHUNK_BYTES), b""))

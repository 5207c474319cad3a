"""JSON files that carry the sha256 of their own content, so that an edit by hand or a torn file is noticed.

A seal tells accidents and careless edits from sound files. It is no signature: who can write the file can seal it anew.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from qeval.parsing import distinct

SEAL = "sha256"
"""The key that holds the digest of all other keys."""


def content_sha256(content: Mapping[str, Any]) -> str:
    """Return the sha256 of plain JSON values, without the seal among them; the order of keys does not matter.

    >>> content_sha256({"a": 1, "b": 2}) == content_sha256({"b": 2, "a": 1, "sha256": "x"})
    True
    """
    plain = {key: value for key, value in content.items() if key != SEAL}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return `content` with its seal as the last key."""
    return {**{key: value for key, value in content.items() if key != SEAL}, SEAL: content_sha256(content)}


def has_valid_seal(content: Mapping[str, Any]) -> bool:
    """Return whether the seal fits the content; False where there is none."""
    return content.get(SEAL) == content_sha256(content)


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Return the object that a JSON text holds.

    Raises:
        ValueError: It is no JSON, no object, or says a key twice, which readers would take differently.
    """
    try:
        data = json.loads(text, object_pairs_hook=distinct)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(data, dict):
        raise ValueError("no JSON object")
    return data

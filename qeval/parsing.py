"""YAML and JSON that others wrote, read strictly and within limits: a file can't take memory or time without end.

A file that breaks a rule is refused in one sentence that names it. YAML may not give a key twice (the second would win
in silence), nor grow by aliases, nor name Python objects.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from qeval import escape
from qeval.errors import QevalError, UsageError

LARGEST_YAML_BYTES = 1_000_000
LARGEST_JSON_BYTES = 1 << 28
"""tokenizer.json of the largest vocabularies has 35 MB; an index of shards some MB."""

_MOST_NODES = 200_000
"""Values of a YAML file, each alias counted as often as it stands for something."""
_DEEPEST = 100
_MERGE = "tag:yaml.org,2002:merge"
_LONGEST_REASON = 300


@contextmanager
def one_sentence(what: str, *, after: str = "") -> Iterator[None]:
    """Turn whatever a library raises over a file into one sentence that names the file.

    Libraries raise what they like over broken files: bare `Exception`s, `IndexError`, panics of Rust's, which are no
    `Exception` at all. Errors of qeval's own pass as they are.

    Args:
        what: What can't be used, as the sentence begins: `'m/config.json' can't be used`.
        after: What to do, as a sentence of its own.

    Raises:
        UsageError: Instead of whatever was raised in the block.
    """
    try:
        yield
    except (QevalError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # pyo3's PanicException is no Exception
        raise UsageError(f"{what}: {error_reason(error)}.{f' {after}' if after else ''}") from error


def error_reason(error: BaseException) -> str:
    """Return why something failed as a part of a sentence: the error's first line, cut; else in words for its kind."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError) and error.args:
        return f"{escape.cut(error.args[0])} is missing"
    lines = (line.strip() for line in str(error).splitlines())
    first = next((line.rstrip(".") for line in lines if line), "")
    return escape.cut_text(first, _LONGEST_REASON) or f"the library that reads it gave up ({type(error).__name__})"


def first_fault(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return where the first of pydantic's errors lies in a file, and what it is.

    >>> first_fault([{"loc": ("weights", 3), "msg": "Field required"}])
    ('weights.3', 'Field required')
    """
    first = errors[0]
    return ".".join(str(part) for part in first["loc"]) or "the whole file", first["msg"]


def load_yaml(path: Path, kind: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Read a YAML file; `kind` is a loader that knows more tags and runs nothing either.

    Raises:
        UsageError: It can't be read, is no YAML, gives a key twice, or is larger or deeper than any such file.
    """
    data = _read(path, LARGEST_YAML_BYTES)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"'{path}' is not valid YAML: it is not UTF-8 (byte {error.start}).") from error
    return parse_yaml(text, f"'{path}'", kind)


def parse_yaml(text: str, where: str, kind: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Parse YAML.

    Args:
        text: The document.
        where: What an error calls it.
        kind: A loader of plain values.

    Raises:
        UsageError: It is no YAML, gives a key twice, or grows by aliases beyond measure.
    """
    loader = None
    try:
        loader = kind(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _nodes(node, {}, 0) > _MOST_NODES:
            raise UsageError(f"{where} holds more than {_MOST_NODES:,} values, once its aliases are spelled out.")
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError, KeyError, AttributeError) as error:
        message = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UsageError(
            f"{where} is not valid YAML: {escape.cut_text(message, _LONGEST_REASON).rstrip('.')}."
        ) from error
    finally:
        if loader is not None:
            loader.dispose()


def _nodes(node: yaml.Node, counts: dict[int, int | None], depth: int) -> int:
    """Return how many values a node stands for, aliases spelled out.

    Raises:
        ValueError: It holds itself, is nested too deeply, or gives a key twice.
    """
    if depth > _DEEPEST:
        raise ValueError("it is nested too deeply")
    if id(node) not in counts:
        counts[id(node)] = None  # it is being counted
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            parts = [part for pair in node.value for part in pair]
        else:
            parts = node.value if isinstance(node, yaml.SequenceNode) else []
        counts[id(node)] = 1 + sum(_nodes(part, counts, depth + 1) for part in parts)
    count = counts[id(node)]
    if count is None:
        raise ValueError("it holds itself, by an alias")
    return count


def _check_keys(node: yaml.MappingNode) -> None:
    """Refuse a key that is given twice: the second value would win in silence.

    Raises:
        ValueError: It names the key and its line.
    """
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
            if (key.tag, key.value) in seen:
                raise ValueError(f"'{escape.cut_text(key.value, 80)}' is given twice (line {key.start_mark.line + 1})")
            seen.add((key.tag, key.value))


def load_json(path: Path, *, largest: int = LARGEST_JSON_BYTES) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        largest: The most bytes that such a file may have.

    Raises:
        UsageError: It can't be read, is no JSON in UTF-8, or is too large or nested too deeply.
    """
    data = _read(path, largest)
    return parse_json(data, f"'{path}'")


def _read(path: Path, largest: int) -> bytes:
    """Read the bytes of a file, or of a pipe; never more than `largest` are taken into memory."""
    try:
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except OSError as error:
        raise UsageError(f"Cannot read '{path}': {error.strerror or error}.") from error
    if len(data) > largest:
        raise UsageError(f"'{path}' has more than {largest:,} bytes, which no such file needs.")
    return data


def parse_json(data: bytes | str, where: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse JSON.

    Args:
        data: The document, UTF-8.
        where: What an error calls it.
        pairs: What makes a mapping of its keys and values; a dict without it.

    Raises:
        UsageError: It is no JSON, is nested too deeply, or holds a number that nothing could hold.
    """
    try:
        text = data.decode() if isinstance(data, bytes) else data
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError as error:
        raise UsageError(f"{where} is nested too deeply to be JSON that anybody wrote.") from error
    except ValueError as error:
        raise UsageError(f"{where} is not valid JSON: {escape.cut_text(str(error), _LONGEST_REASON)}.") from error


def load_object(path: Path, *, largest: int = LARGEST_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UsageError: As `load_json`; or it holds something else.
    """
    content = load_json(path, largest=largest)
    if not isinstance(content, dict):
        raise UsageError(f"'{path}' holds no JSON object but {escape.cut(content)}.")
    return content


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a mapping of keys and values, for `parse_json`.

    Raises:
        ValueError: A key is given twice: two readers of the file could take different ones.
    """
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"{escape.cut(twice)} is given twice")
    return mapping
